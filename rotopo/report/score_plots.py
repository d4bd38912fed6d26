"""Pictures of scores: of reward models on pairs, of judges on policies' responses."""

from itertools import combinations
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from rotopo.intervals import wilson_interval
from rotopo.judge.judgement import Judgement
from rotopo.metrics.calibration import binned
from rotopo.metrics.runs import Test
from rotopo.report.figures import (
    CHOSEN,
    GREY,
    HEIGHT,
    INK,
    REJECTED,
    SERIES,
    STYLE,
    TICK,
    TITLE,
    legend_below,
    new,
    panel,
    short,
)
from rotopo.report.plots import histogram

MOST_GROUPS = 30


@matplotlib.rc_context(STYLE)
def scores(test: Test) -> Figure:
    """A reward model's scores of chosen and rejected responses: histograms, and boxes below."""
    figure = new(height=HEIGHT + 0.7)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    samples = {
        "chosen": test.pairs.chosen_score.to_numpy(),
        "rejected": test.pairs.rejected_score.to_numpy(),
    }
    colours = {"chosen": CHOSEN, "rejected": REJECTED}
    histogram(top, samples, colours)
    top.set(ylabel="responses", title=short(test.name, TITLE, 9.5, bold=True))
    top.legend()
    boxes(bottom, samples, colours)
    bottom.set_xlabel("score")
    return figure


@matplotlib.rc_context(STYLE)
def reliability(test: Test) -> Figure:
    """How often a reward model is right, against how sure it is: a point for each bin."""
    margin = (test.pairs.chosen_score - test.pairs.rejected_score).to_numpy()
    sure, right, bins = binned(margin)
    figure, axes = panel(test.name)
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.9, linestyle="--", label="calibrated")
    for i in np.unique(bins):
        inside = bins == i
        n, share = int(inside.sum()), float(right[inside].mean())
        low, high = wilson_interval(share, n)
        x = sure[inside].mean()
        axes.plot([x, x], [low, high], color=CHOSEN, linewidth=0.9, alpha=0.6)
        axes.scatter(x, share, s=12 + 160 * n / len(margin), color=CHOSEN, alpha=0.85, zorder=3)
    axes.set(xlim=(0.48, 1.02), ylim=(-0.03, 1.03))
    axes.set(xlabel="probability of the higher-scored", ylabel="share of pairs it is right on")
    axes.legend(loc="lower right")
    return figure


@matplotlib.rc_context(STYLE)
def groups(tests: list[Test], names: list[str], kind: Literal["groups", "sets"]) -> Figure:
    """Accuracy of each group of pairs, or of each evaluation set, under each model, with 95 %
    intervals: those of the test, or Wilson's where it has none."""
    figure, axes = panel("", height=1.1 + 0.16 * len(names) * (len(tests) + 1))
    for i, test in enumerate(tests):
        for j, name in enumerate(names):
            if name not in test.metrics[kind]:
                continue
            found = test.metrics[kind][name]
            y = j + 0.6 * ((i + 0.5) / len(tests) - 0.5)
            ends = found.get("accuracy_interval") or wilson_interval(
                found["accuracy"], found["pairs"]
            )
            axes.plot(ends, [y, y], color=SERIES[i % 8], lw=1)
            axes.plot(
                found["accuracy"], y, "o", color=SERIES[i % 8], markersize=4.5, label=test.name
            )
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), [short(name, TICK) for name in names])
    axes.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.4, -0.6), xlabel="accuracy")
    legend_below(figure)
    return figure


@matplotlib.rc_context(STYLE)
def mean_log_ratios(rows: list[tuple[str, dict[str, float]]], unit: str) -> Figure:
    """Mean log-ratios to the reference of the chosen and the rejected: the line between the two
    is the margin.

    Args:
        rows: names of policies, or of sets, and their ``chosen`` and ``rejected``.
        unit: of them.
    """
    figure, axes = panel("", 1.1 + 0.3 * len(rows))
    axes.axvline(0, color=GREY, linewidth=0.8)
    for i, (_, found) in enumerate(rows):
        axes.plot([found["rejected"], found["chosen"]], [i, i], color=GREY, linewidth=1.2)
        for name, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            axes.plot(found[name], i, "o", color=colour, markersize=6, label=name)
    axes.set_yticks(range(len(rows)), [short(name, TICK) for name, _ in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"log-ratio ({unit})")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    legend_below(figure)
    return figure


@matplotlib.rc_context(STYLE)
def accuracy_against_kl(tests: list[Test], colours: dict[str, str]) -> Figure:
    """Each policy's accuracy by its log-ratios against how far it is from the reference."""
    figure, axes = panel("Accuracy against distance")
    for test in tests:
        found, colour = test.metrics["yardstick"], colours[test.name]
        kl = found["kl_per_token"]["on_data"]["forward"]
        if kl is not None:
            axes.plot([kl, kl], found["accuracy_interval"], color=colour, linewidth=1)
            axes.plot(kl, found["accuracy"], "o", color=colour, markersize=6, label=test.name)
    axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xlabel="KL(reference ‖ policy) (nats per token)", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    legend_below(figure)
    return figure


@matplotlib.rc_context(STYLE)
def differences(judgement: Judgement, judge: str, policy: str) -> Figure:
    """Each prompt's score of a policy's response less that of the baseline's, in their order."""
    table = judgement.table(judge)
    ordered = np.sort((table[policy] - table[judgement.baseline]).to_numpy())
    figure, axes = panel(f"{short(policy, 1.2, 9.5)}, judged by {short(judge, 0.8, 9.5)}")
    colours = np.where(ordered > 0, CHOSEN, REJECTED)
    axes.bar(np.arange(1, len(ordered) + 1), ordered, width=1.0, color=colours, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    mean = float(ordered.mean())
    axes.axhline(
        mean, color=GREY, linewidth=1, linestyle="--", label=f"mean {mean:+.3g}".replace("-", "−")
    )
    axes.set(
        xlabel="prompts, by difference", ylabel=f"score − {short(judgement.baseline, TICK, 9)}"
    )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend()
    return figure


@matplotlib.rc_context(STYLE)
def win_rates(judgement: Judgement, colours: dict[str, str]) -> Figure:
    """Win rates against the baseline, a group of bars for each judge, with their intervals."""
    policies = judgement.policies[1:]
    bars = len(policies) * len(judgement.judges)
    figure, axes = panel(f"Win rate against {judgement.baseline}", 1.2 + 0.26 * bars, names=True)
    width = 0.8 / len(policies)
    for i, policy in enumerate(policies):
        found = [judgement.result["policies"][policy]["judges"][j] for j in judgement.judges]
        rates = np.array([verdict["win_rate"] for verdict in found])
        ends = np.array([verdict["interval"] for verdict in found]).T
        y = np.arange(len(found)) + (i + 0.5) * width - 0.4
        axes.barh(y, rates, width * 0.92, color=colours[policy], label=policy)
        spread = np.abs(ends - rates)
        axes.errorbar(rates, y, xerr=spread, fmt="none", color=INK, capsize=2.5, lw=1)
    axes.axvline(0.5, color=GREY, linewidth=0.9, linestyle="--")
    axes.set_yticks(range(len(judgement.judges)), [short(j, TICK) for j in judgement.judges])
    axes.set(xlim=(0, 1.04), xlabel="win rate, ties as one half", ylabel="judge")
    axes.set_ylim(len(judgement.judges) - 0.4, -0.6)
    legend_below(figure)
    return figure


@matplotlib.rc_context(STYLE)
def mean_scores(judgement: Judgement, colours: dict[str, str]) -> list[Figure]:
    """For each judge the policies' mean scores with their intervals: no two share a scale."""
    figures = []
    for judge in judgement.judges:
        names = judgement.policies
        figure, axes = panel(f"Judge: {judge}", 1.0 + 0.38 * len(names), names=True)
        for i, policy in enumerate(names):
            found = judgement.result["policies"][policy]["judges"][judge]
            axes.plot(found["score_interval"], [i, i], color=colours[policy], linewidth=2)
            axes.plot(found["mean_score"], i, "o", color=colours[policy], markersize=6)
        axes.set_yticks(range(len(names)), [short(name, TICK) for name in names])
        axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="mean score")
        axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        figures.append(figure)
    return figures


@matplotlib.rc_context(STYLE)
def judges_crossed(judgement: Judgement, colours: dict[str, str]) -> list[Figure]:
    """Every response's score under one judge against its score under another."""
    figures = []
    for a, b in combinations(judgement.judges, 2):
        figure, axes = panel("Scores of the same responses", height=HEIGHT + 0.4)
        first, second = judgement.table(a), judgement.table(b)
        for policy, marker in zip(judgement.policies, "os^Dv<>p" * 9, strict=False):
            axes.scatter(
                first[policy],
                second[policy],
                s=13,
                marker=marker,
                color=colours[policy],
                alpha=0.6,
                linewidth=0,
                label=policy,
                rasterized=len(first) > 500,
            )
        axes.set(xlabel=f"score by {short(a, 2, 9)}", ylabel=f"score by {short(b, 2, 9)}")
        legend_below(figure)
        figures.append(figure)
    return figures


def boxes(axes, samples: dict[str, np.ndarray], colours: dict[str, str]) -> None:
    """Horizontal boxes: median, quartiles, whiskers to the 5th and 95th percentile, the mean."""
    drawn = axes.boxplot(
        list(samples.values()),
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        showmeans=True,
        widths=0.55,
        patch_artist=True,
        boxprops={"edgecolor": INK, "linewidth": 0.9},
        medianprops={"color": INK, "linewidth": 1.4},
        whiskerprops={"color": INK, "linewidth": 0.9},
        capprops={"color": INK, "linewidth": 0.9},
        meanprops={"marker": "D", "markersize": 4, "markerfacecolor": "white"}
        | {"markeredgecolor": INK, "markeredgewidth": 0.9},
    )
    for box, name in zip(drawn["boxes"], samples, strict=True):
        box.set_facecolor(colours[name])
        box.set_alpha(0.75)
    axes.set_yticks(range(1, len(samples) + 1), [short(name, TICK) for name in samples])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.invert_yaxis()
