"""Pictures of trainings, drawn from what they logged. Each figure is one panel, and reads at the
width of a phone."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rotopo.errors import InputError
from rotopo.metrics.runs import Training, read_training
from rotopo.report.figures import (
    CHOSEN,
    GREY,
    HEIGHT,
    MARGIN,
    REJECTED,
    SERIES,
    STYLE,
    TITLE,
    WIDTH,
    legend_below,
    new,
    panel,
    save,
    short,
)


@matplotlib.rc_context(STYLE)
def implicit_rewards(folder: Path, picture: Path, smoothing: int = 5) -> None:
    """Chosen and rejected implicit rewards, their margin and the accuracy over training.

    Args:
        folder: of a run of ``rotopo fit``.
        picture: the image to write; its suffix names the format.
        smoothing: optimiser steps that the drawn lines average over; the faint ones are raw.

    Raises:
        InputError: there is no run, or it logged no implicit rewards.
    """
    run = read_training("run", folder.name, folder)
    if "train/rewards/chosen" not in run.metrics:
        raise InputError(f"{folder} has logged no rewards: is it a preference run's?")
    figure = new(2.2 * WIDTH, HEIGHT + 0.3)
    rewards, accuracy = figure.subplots(1, 2)
    _draw_rewards(rewards, run, smoothing, validation=False)
    rewards.set_title("Implicit rewards (training)")
    curve(accuracy, run.logged("train/rewards/accuracy"), smoothing, CHOSEN)
    accuracy.axhline(0.5, color=GREY, linewidth=0.8)
    accuracy.set(xlabel="optimiser step", ylim=(0, 1.02), title="Share of pairs with margin > 0")
    accuracy.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    save(figure, picture)


def curve(
    axes: Axes, values: pd.Series, smoothing: int, colour: str, label: str = "", style: str = "-"
) -> None:
    """A metric over the steps: faint as it was logged, and its running mean."""
    if smoothing > 1:
        axes.plot(values.index, values, color=colour, alpha=0.25, linewidth=0.7)
    smooth = values.rolling(smoothing, min_periods=1).mean()
    line: dict[str, Any] = {"linestyle": style, "markersize": 4}
    line["marker"] = "s" if len(values) == 1 else ""  # there is no line of one step
    axes.plot(smooth.index, smooth, color=colour, label=label, **line)


def points(axes: Axes, values: pd.Series, colour: str, label: str = "") -> None:
    """A metric on validation data: a few points."""
    style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white"}
    axes.plot(values.index, values, linestyle="", color=colour, label=label, **style)


@matplotlib.rc_context(STYLE)
def loss_and_rate(run: Training, smoothing: int) -> Figure:
    """The loss, in training and validation, above the learning rate where it was logged."""
    rates = [column for column in run.metrics if column.startswith("lr-")]
    figure = new(height=HEIGHT + (1.1 if rates else 0))
    if rates:
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        for i, column in enumerate(rates):
            values = run.logged(column)
            label = _rate_name(column) if len(rates) > 1 else ""
            rate.plot(values.index, values, color=SERIES[i % len(SERIES)], label=label)
        rate.set(ylabel="learning rate", xlabel="optimiser step", ylim=(0, None))
        rate.yaxis.set_major_locator(MaxNLocator(3))
    else:
        loss = figure.subplots()
        loss.set_xlabel("optimiser step")
    curve(loss, run.logged("train/loss"), smoothing, SERIES[0], "training")
    if len(validation := run.logged("val/loss")):
        points(loss, validation, SERIES[1], "validation")
        loss.legend()
    loss.set(ylabel="loss (nats)", title=short(run.name, TITLE, 9.5, bold=True))
    loss.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(rates) > 1:
        handles, labels = rate.get_legend_handles_labels()
        legend_below(figure, handles, labels)
    return figure


@matplotlib.rc_context(STYLE)
def rewards(run: Training, smoothing: int) -> Figure:
    """Chosen and rejected rewards and their margin over training, with the validation's points."""
    figure, axes = panel(run.name)
    _draw_rewards(axes, run, smoothing, validation=True)
    return figure


@matplotlib.rc_context(STYLE)
def displacement(
    training: dict[str, pd.DataFrame],
    validation: dict[str, pd.DataFrame],
    colours: dict[str, str],
    common: float | None,
) -> list[Figure]:
    """Log-ratios of the chosen and of the rejected against their margin, by policy.

    A margin goes to and fro from step to step. The line joins the steps at which a policy's margin
    is larger than at all before, and so leads from left to right; all steps are a faint one.

    Args:
        training: of :func:`rotopo.metrics.displacement.log_ratios`, smoothed, by policy.
        validation: the same of the validation pairs, drawn as points.
        colours: of the policies.
        common: the margin at which policies are compared, or None.
    """
    figures = []
    for which in ("chosen", "rejected"):
        figure, axes = panel(f"{which.capitalize()} responses", height=HEIGHT + 0.2)
        axes.axhline(0, color=GREY, linewidth=0.8)
        if common is not None:
            axes.axvline(common, color=GREY, linewidth=0.8, linestyle=":")
        for name, table in training.items():
            margin, colour = table.chosen - table.rejected, colours[name]
            axes.plot(margin, table[which], color=colour, linewidth=0.7, alpha=0.3)
            first = margin > margin.cummax().shift(fill_value=-np.inf)
            axes.plot(margin[first], table[which][first], color=colour, linewidth=1.8, label=name)
            held_out = validation[name]
            margin = held_out.chosen - held_out.rejected
            axes.plot(margin, held_out[which], "o", color=colour, markeredgecolor="white")
        axes.set(xlabel="margin: chosen − rejected (nats)", ylabel="log-ratio (nats)")
        legend_below(figure)
        figures.append(figure)
    return figures


@matplotlib.rc_context(STYLE)
def over_training(
    runs: list[Training], columns: dict[str, dict[str, str]], colours: dict[str, str], title: str
) -> Figure:
    """One measure of several runs over training.

    Args:
        runs: those that logged it.
        columns: for each run the columns to draw, and each column's line style.
        colours: of the runs.
        title: what it is, with its unit.
    """
    figure, axes = panel("")
    for run in runs:
        for i, (column, style) in enumerate(columns[run.name].items()):
            values = run.logged(column)
            label = run.name if i == len(columns[run.name]) - 1 else ""
            axes.plot(values.index, values, style, color=colours[run.name], label=label)
    # A range below a thousandth of the value is round-off, and is not blown up to a trend.
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(high - low, abs(low + high) / 2000) / 2
    axes.set(xlabel="optimiser step", title=title, ylim=(middle - half, middle + half))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    legend_below(figure)
    return figure


@matplotlib.rc_context(STYLE)
def over_layers(
    runs: list[Training], columns: dict[str, list[str]], colours: dict[str, str], title: str
) -> Figure:
    """The last logged value of one measure of each hidden layer, of several runs."""
    figure, axes = panel(title)
    for run in runs:
        layers = [int(column.rpartition("/")[2]) for column in columns[run.name]]
        last = [run.logged(column).iloc[-1] for column in columns[run.name]]
        axes.plot(layers, last, ".-", color=colours[run.name], label=run.name)
    axes.set_xlabel("hidden layer (0: embeddings)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    legend_below(figure)
    return figure


def histogram(axes: Axes, samples: dict[str, np.ndarray], colours: dict[str, str]) -> None:
    """Overlaid histograms over the same bins, as many as numpy's rule gives, at most 40."""
    together = np.concatenate(list(samples.values()))
    bins = np.histogram_bin_edges(together, "auto")
    if len(bins) > 41:
        bins = np.linspace(together.min(), together.max(), 41)
    edges = bins.tolist()
    for name, values in samples.items():
        axes.hist(values, edges, color=colours[name], alpha=0.28, label=name)
        axes.hist(values, edges, color=colours[name], histtype="step", linewidth=1.1)


def reward_label(unit: str | None) -> str:
    """Of an axis of rewards.

    Args:
        unit: of :attr:`rotopo.metrics.runs.Run.reward_unit`.
    """
    return {"": "reward (no unit)", None: "reward"}.get(unit, f"reward ({unit})")


def _draw_rewards(axes: Axes, run: Training, smoothing: int, validation: bool) -> None:
    styles = {"chosen": (CHOSEN, "-"), "rejected": (REJECTED, "-"), "margin": (MARGIN, "--")}
    axes.axhline(0, color=GREY, linewidth=0.8)
    for name, (colour, style) in styles.items():
        curve(axes, run.logged(f"train/rewards/{name}"), smoothing, colour, name, style)
        if validation:
            points(axes, run.logged(f"val/rewards/{name}"), colour)
    axes.set(xlabel="optimiser step", ylabel=reward_label(run.reward_unit))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend()


def _rate_name(column: str) -> str:
    """What a learning rate's column is of, in words: lr-AdamW/pg2 is of the second group."""
    optimiser, _, group = column.removeprefix("lr-").partition("/pg")
    return f"{optimiser}, group {group}" if group else optimiser
