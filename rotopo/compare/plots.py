"""Pictures of a comparison: outcomes by distance, and what is measured over training."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rotopo.compare.curves import Points
from rotopo.compare.frontiers import Frontier
from rotopo.report.figures import GREY, STYLE, legend_below, panel


@matplotlib.rc_context(STYLE)
def frontiers(
    arms: Mapping[str, Sequence[Frontier]],
    at: Sequence[float],
    colours: Mapping[str, str],
    title: str,
    label: str,
) -> Figure:
    """Outcomes by distance: a thin line for each run, a thick one for an arm's mean where all of
    its runs have been, and the levels.

    Args:
        arms: the runs of each.
        at: levels.
        colours: of each arm.
        title: of the outcome.
        label: of the distance.
    """
    figure, axes = panel(title)
    for arm, runs in arms.items():
        for run in runs:
            axes.plot(run.distance, run.outcome, color=colours[arm], linewidth=0.6, alpha=0.6)
        low, high = max(r.distance[0] for r in runs), min(r.distance[-1] for r in runs)
        grid = np.linspace(low, max(low, high), 60)
        mean = np.mean([[run.at(x) for x in grid] for run in runs], axis=0)
        axes.plot(grid, mean, color=colours[arm], linewidth=2.2, label=arm)
    for level in at:
        axes.axvline(level, color=GREY, linewidth=0.7, linestyle=":")
    axes.set_xlabel(label)
    legend_below(figure)
    return figure


@matplotlib.rc_context(STYLE)
def over_steps(
    points: Mapping[str, Sequence[Points]],
    measure: str,
    colours: Mapping[str, str],
    title: str,
) -> Figure:
    """A measure by optimiser step, a line for each run.

    Args:
        points: of each arm's runs.
        measure: an outcome, or either KL; see :meth:`rotopo.compare.curves.Points.means`.
        colours: of each arm.
        title: of the measure.
    """
    figure, axes = panel(title)
    for arm, runs in points.items():
        for number, run in enumerate(runs):
            label = None if number else arm
            axes.plot(run.steps, run.means(measure), color=colours[arm], linewidth=1, label=label)
    axes.set_xlabel("optimiser step")
    legend_below(figure)
    return figure
