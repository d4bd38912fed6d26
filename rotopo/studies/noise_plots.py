"""Picture of the noise study."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
_GREY = "0.7"
# What the reader comes for, each with a colour and a line; everything else is the background.
_STYLES = {
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


def noise(summary: pd.DataFrame) -> Figure:
    """Accuracy and AUROC over the flip rate, every line named at its end.

    Args:
        summary: of :func:`rotopo.studies.noise.summarised`.
    """
    measures = [measure for measure in _TITLES if (summary.measure == measure).any()]
    figure = Figure(figsize=(6.4 * len(measures), 5.4), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False).flatten().tolist()
    for axes, measure in zip(panels, measures, strict=True):
        _panel(axes, summary[summary.measure == measure])
        axes.set_title(_TITLES[measure], loc="left", fontsize=11)
    figure.supxlabel(
        "Flipped labels. Bars: 95 % intervals over seeds; those of the grey lines are in "
        "summary.csv.",
        fontsize=9,
    )
    return figure


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    rates = sorted(rows.noise.unique())
    names = sorted(rows.objective.unique(), key=lambda name: (name in _STYLES, name))
    step = 0.012 * (max(rates) - min(rates) or 0.1)
    shown = [name for name in names if name in _STYLES]
    ends = {}
    for name in names:
        line = rows[rows.objective == name].sort_values("noise")
        colour, style = _STYLES.get(name, (_GREY, "-"))
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(rates, [f"{rate:.0%}" for rate in rates])
    _name(axes, ends)


def _name(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Names beside the ends of the lines, in their order and far enough apart to be read."""
    low, high = axes.get_ylim()
    names = sorted(ends, key=lambda name: ends[name][1])
    apart = (high - low) / 24
    wanted = np.array([ends[name][1] for name in names])
    # The nearest places that keep the distance: what pools too near is centred on its mean.
    places = _isotonic(wanted - apart * np.arange(len(names))) + apart * np.arange(len(names))
    _, right = axes.get_xlim()
    for name, y in zip(names, places, strict=True):
        colour = _STYLES[name][0] if name in _STYLES else "0.45"
        axes.annotate(
            _KNOWN.get(name, name),
            ends[name],
            (right, y),
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6},
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
