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
from rotopo.metrics.runs import Training

# Okabe and Ito's colours and their like, which the colour-blind can tell apart.
CHOSEN, REJECTED, MARGIN = "#0072b2", "#d55e00", "#009e73"
# Of policies and models: not those of chosen and rejected, until there are many.
SERIES = ("#8a6fd1", "#c98a00", "#009e73", "#cc79a7", "#56b4e9", "#9a6324", CHOSEN, REJECTED)
GREY = "#848b94"
# Of axes and letters. The page makes it, and blue, lighter in the dark.
INK = "#1f2328"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": True,
    "axes.formatter.limits": (-3, 5),
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "hatch.linewidth": 0.6,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
WIDTH, HEIGHT = 3.7, 2.8  # inches: the width of a phone's column at 96 pixels an inch


def implicit_rewards(metrics: Path, picture: Path, smoothing: int = 5) -> None:
    """Chosen and rejected implicit rewards, their margin and the accuracy over training.

    Args:
        metrics: the ``metrics.csv`` of a run.
        picture: the image to write; its suffix names the format.
        smoothing: optimiser steps that the drawn lines average over; the faint ones are raw.

    Raises:
        InputError: the file holds no implicit rewards.
    """
    table = pd.read_csv(metrics)
    if "train/rewards/chosen" not in table:
        raise InputError(f"{metrics} holds no train/rewards/chosen: is it a preference run's?")
    run = Training("", metrics.parent, "", {}, table)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rewards, accuracy = figure.subplots(1, 2)
    _draw_rewards(rewards, run, smoothing, validation=False)
    rewards.set_title("Implicit rewards (training)")
    curve(accuracy, run.logged("train/rewards/accuracy"), smoothing, CHOSEN)
    accuracy.axhline(0.5, color=GREY, linewidth=0.8)
    accuracy.set(xlabel="optimiser step", ylim=(0, 1.02), title="Share of pairs with margin > 0")
    for axes in (rewards, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)


def curve(
    axes: Axes, values: pd.Series, smoothing: int, colour: str, label: str = "", style: str = "-"
) -> None:
    """A metric over the steps: faint as it was logged, and its running mean."""
    if smoothing > 1:
        axes.plot(values.index, values, color=colour, alpha=0.25, linewidth=0.7)
    smooth = values.rolling(smoothing, min_periods=1).mean()
    axes.plot(smooth.index, smooth, color=colour, label=label, linestyle=style)


def points(axes: Axes, values: pd.Series, colour: str, label: str = "") -> None:
    """A metric on validation data: a few points."""
    style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white"}
    axes.plot(values.index, values, linestyle="", color=colour, label=label, **style)


@matplotlib.rc_context(STYLE)
def loss_and_rate(run: Training, smoothing: int) -> Figure:
    """The loss, in training and validation, above the learning rate where it was logged."""
    rates = [column for column in run.metrics if column.startswith("lr-")]
    figure = Figure(figsize=(WIDTH, HEIGHT + (0.9 if rates else 0)), layout="constrained")
    if rates:
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
        for column, colour in zip(rates, SERIES, strict=False):
            values = run.logged(column)
            rate.plot(values.index, values, color=colour, label=column.removeprefix("lr-"))
        rate.set(ylabel="learning rate", xlabel="optimiser step", ylim=(0, None))
        if len(rates) > 1:
            rate.legend()
    else:
        loss = figure.subplots()
        loss.set_xlabel("optimiser step")
    curve(loss, run.logged("train/loss"), smoothing, SERIES[0], "training")
    if len(validation := run.logged("val/loss")):
        points(loss, validation, SERIES[1], "validation")
        loss.legend()
    loss.set(ylabel="loss (nats)", title=run.name)
    loss.xaxis.set_major_locator(MaxNLocator(6, integer=True))
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
) -> Figure:
    """Log-ratios of chosen (full lines) and rejected (broken) against their margin, by policy.

    Args:
        training: of :func:`rotopo.metrics.displacement.log_ratios`, smoothed, by policy.
        validation: the same of the validation pairs: circles chosen, crosses rejected.
        colours: of the policies.
        common: the margin at which policies are compared, or None.
    """
    figure, axes = panel("Log-ratio against margin", height=3.4)
    axes.axhline(0, color=GREY, linewidth=0.8)
    if common is not None:
        axes.axvline(common, color=GREY, linewidth=0.8, linestyle=":")
    for name, table in training.items():
        margin, colour = table.chosen - table.rejected, colours[name]
        axes.plot(margin, table.chosen, color=colour, linewidth=1.1, label=name)
        axes.plot(margin, table.rejected, color=colour, linewidth=1.1, linestyle=(0, (3, 1.5)))
        held_out = validation[name]
        margin = held_out.chosen - held_out.rejected
        axes.plot(margin, held_out.chosen, "o", color=colour, markeredgecolor="white")
        axes.plot(margin, held_out.rejected, "X", color=colour, markeredgecolor="white")
    axes.plot([], [], color=GREY, marker="o", label="chosen")
    axes.plot([], [], color=GREY, marker="X", linestyle=(0, (3, 1.5)), label="rejected")
    axes.set(xlabel="margin: chosen − rejected (nats)", ylabel=r"log $\pi/\pi_{ref}$ (nats)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


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
            label = "" if i else run.name
            axes.plot(values.index, values, style, color=colours[run.name], label=label)
    # A range below a thousandth of the value is round-off, and is not blown up to a trend.
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(high - low, abs(low + high) / 2000) / 2
    axes.set(xlabel="optimiser step", title=title, ylim=(middle - half, middle + half))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend()
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
    axes.legend()
    return figure


def panel(title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


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


def _draw_rewards(axes: Axes, run: Training, smoothing: int, validation: bool) -> None:
    styles = {"chosen": (CHOSEN, "-"), "rejected": (REJECTED, "-"), "margin": (MARGIN, "--")}
    axes.axhline(0, color=GREY, linewidth=0.8)
    for name, (colour, style) in styles.items():
        curve(axes, run.logged(f"train/rewards/{name}"), smoothing, colour, name, style)
        if validation:
            points(axes, run.logged(f"val/rewards/{name}"), colour)
    axes.set(xlabel="optimiser step", ylabel="reward (nats × β)")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend()
