"""Picture of the noise study."""

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rotopo.report.figures import STYLE, new, short

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
_GREY = "0.7"
_Style = tuple[Any, str]  # a colour and a kind of line
# What the reader comes for where nothing was asked for, each with a colour and a line; everything
# else is the background.
_STYLES: dict[str, _Style] = {
    "DPO": ("black", "-"),
    "DPO+filter": ("black", "--"),
    "ROPO": (_COLOURS[0], "-"),
    "ROPO+filter": (_COLOURS[0], "--"),
    "ROPO+filter+sampling": (_COLOURS[0], ":"),
    "cDPO": (_COLOURS[1], "-"),
    "RobustDPO": (_COLOURS[3], "-"),
}
_KNOWN = {"cDPO": "cDPO (knows the rate)", "RobustDPO": "RobustDPO (knows the rate)"}
_TITLES = {
    "accuracy": "Accuracy on clean held-out pairs",
    "auroc": "Flipped labels found by their margins (AUROC)",
}


@matplotlib.rc_context(STYLE)
def noise(summary: pd.DataFrame, asked: list[str] | None = None) -> Figure:
    """Accuracy and AUROC over the flip rate, every line named at its end.

    Args:
        summary: of :func:`rotopo.studies.noise.summarised`.
        asked: the objectives that are drawn in colour, in front of all others; None for those
            that deal with noise.
    """
    measures = [measure for measure in _TITLES if (summary.measure == measure).any()]
    names = summary.objective.nunique()
    figure = new(6.4 * len(measures), max(5.4, 1.2 + 0.17 * names))
    panels = figure.subplots(1, len(measures), squeeze=False).flatten().tolist()
    styles = _STYLES if asked is None else _styles(asked)
    for axes, measure in zip(panels, measures, strict=True):
        _panel(axes, summary[summary.measure == measure], styles)
        axes.set_title(_TITLES[measure], fontsize=11)
    grey = set(summary.objective) - styles.keys()
    figure.supxlabel(
        "Flipped labels. Bars: 95 % intervals over seeds.\n"
        f"{'Those of the grey lines, and differences' if grey else 'Differences'} paired by seed"
        f"{',' if grey else ''} are in summary.csv.",
        fontsize=9,
    )
    return figure


def _styles(asked: list[str]) -> dict[str, _Style]:
    """A colour and a line for each: its usual one, or one that no other has."""
    usual = {name: _STYLES[name] for name in asked if name in _STYLES}
    free = [
        (colour, line)
        for line in ("-", "--", ":", "-.")
        for colour in _COLOURS
        if (colour, line) not in usual.values()
    ]
    others = [name for name in asked if name not in usual]
    return usual | {name: free[i % len(free)] for i, name in enumerate(others)}


def _panel(axes: Axes, rows: pd.DataFrame, styles: dict[str, _Style]) -> None:
    rates = sorted(rows.noise.unique())
    names = sorted(rows.objective.unique(), key=lambda name: (name in styles, name))
    span = max(rates) - min(rates) or 0.1
    step = 0.012 * span
    shown = [name for name in names if name in styles]
    ends = {}
    for name in names:
        line = rows[rows.objective == name].sort_values("noise")
        colour, style = styles.get(name, (_GREY, "-"))
        # A little beside one another, or the bars would hide each other.
        shift = (shown.index(name) - (len(shown) - 1) / 2) * step if name in shown else 0.0
        x = line.noise + shift
        axes.plot(x, line["mean"], style, color=colour, linewidth=1.8 if name in shown else 1)
        if name in shown:
            axes.errorbar(
                x, line["mean"], line.interval, fmt="o", color=colour, ms=3, capsize=2, lw=1
            )
        else:
            axes.plot(x, line["mean"], ".", color=colour)
        ends[name] = (x.iloc[-1], line["mean"].iloc[-1])
    axes.axhline(0.5, color="0.6", linewidth=0.8, linestyle=(0, (1, 3)))
    axes.set_xticks(rates, [f"{rate:.0%}" for rate in rates])
    axes.set_xlim(min(rates) - 0.09 * span, max(rates) + 0.09 * span)
    _name(axes, ends, styles)


def _name(axes: Axes, ends: dict[str, tuple[float, float]], styles: dict[str, _Style]) -> None:
    """Names beside the ends of the lines, in their order and far enough apart to be read."""
    low, high = axes.get_ylim()
    names = sorted(ends, key=lambda name: ends[name][1])
    apart = (high - low) / max(24, 1.1 * len(ends))
    wanted = np.array([ends[name][1] for name in names])
    # The nearest places that keep the distance: what pools too near is centred on its mean.
    places = _isotonic(wanted - apart * np.arange(len(names))) + apart * np.arange(len(names))
    axes.set_ylim(min(low, places[0]), max(high, places[-1]))
    left, right = axes.get_xlim()
    beside = right + 0.03 * (right - left)
    for name, y in zip(names, places, strict=True):
        colour = styles[name][0] if name in styles else "0.45"
        axes.annotate(
            short(_KNOWN.get(name, name), 2.2, 9),
            ends[name],
            (beside, y),
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),
                "shrinkA": 0,
                "color": colour,
                "lw": 0.6,
                "alpha": 0.6,
            },
        )


def _isotonic(values: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence nearest to the values [n] in squares: neighbours that are in the
    wrong order take their mean."""
    groups: list[tuple[float, int]] = []
    for value in values.tolist():
        groups.append((value, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (a, n), (b, m) = groups[-2:]
            groups[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(n, value) for value, n in groups])
