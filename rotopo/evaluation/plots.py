"""Pictures of a run, drawn from what it logged."""

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from rotopo.errors import InputError


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
    table = table.dropna(subset=["train/rewards/chosen"]).set_index("step")
    smooth = table.rolling(smoothing, min_periods=1).mean()

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rewards, accuracy = figure.subplots(1, 2)
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for name, colour in zip(("chosen", "rejected", "margin"), colours, strict=False):
        column = f"train/rewards/{name}"
        rewards.plot(table.index, table[column], color=colour, alpha=0.25, linewidth=0.8)
        rewards.plot(smooth.index, smooth[column], color=colour, label=name)
    rewards.axhline(0, color="grey", linewidth=0.8)
    rewards.set(xlabel="optimiser step", ylabel="nats × β", title="Implicit rewards (training)")
    rewards.legend(frameon=False)
    column = "train/rewards/accuracy"
    accuracy.plot(table.index, table[column], color=colours[0], alpha=0.25, linewidth=0.8)
    accuracy.plot(smooth.index, smooth[column], color=colours[0])
    accuracy.axhline(0.5, color="grey", linewidth=0.8)
    accuracy.set(xlabel="optimiser step", ylim=(0, 1.02), title="Share of pairs with margin > 0")
    for axes in (rewards, accuracy):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=150)
