"""The reward models: how they score held-out pairs."""

from itertools import chain

from rotopo.metrics.calibration import CALIBRATION_BINS
from rotopo.metrics.runs import Test
from rotopo.report import score_plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import (
    Cell,
    Panel,
    Part,
    Picture,
    Section,
    Table,
    label,
    number,
    text,
    with_minus,
)
from rotopo.report.parts import MEASURED, by_set, measures, prompt_text, spread

ORDER = 20

# The alignment report's reward models: Qwen2.5 on align-anything (accuracy, mean, standard
# deviation). Its batch of 2 is 4 pairs a step, for it accumulated twice.
_PUBLISHED = {
    "published: untrained": (0.568, 0.702, 1.552),
    "published: trained, batch 2": (0.703, 0.079, 3.403),
    "published: trained, batch 16": (0.791, 0.127, 2.565),
}

_INDEPENDENT = (
    "These intervals take the pairs as independent; the accuracy's in the table above draws whole "
    "groups of pairs where the data has them."
)


def section(inputs: Inputs) -> Section:
    tests = inputs.reward_tests
    parts: list[Part] = []
    if tests:
        caption = (
            "Reward models on held-out pairs; 95% bootstrap intervals, over whole groups of pairs "
            f"where the data has them. {MEASURED}"
        )
        if inputs.published:
            caption += (
                " Shaded: the alignment report's own figures, of another model, data set and "
                "size (Qwen2.5, 0.5B by all signs, align-anything text to text; its accuracies fit "
                "498 or 996 pairs, and its validation split has 1,000): not a comparison under "
                "equal terms."
            )
        parts.append(measures(tests, caption, _PUBLISHED if inputs.published else {}))
        parts += by_set(tests, "the reward models")
        parts.append(
            Picture(
                "Scores of chosen and rejected responses",
                [
                    Panel(
                        score_plots.scores(test),
                        f"Histograms and boxes of {test.name}'s scores: chosen, mean "
                        f"{test.pairs.chosen_score.mean():.3f}, rejected, mean "
                        f"{test.pairs.rejected_score.mean():.3f}.",
                        (test.name,),
                    )
                    for test in tests
                ],
                f"Each reward model's scores of held-out responses ({_counts(tests)} pairs). "
                "Boxes: median and quartiles, whiskers to the 5th and 95th percentile, a diamond "
                "at the mean. Scales differ between models.",
            )
        )
        parts.append(
            Picture(
                "Calibration",
                [
                    Panel(
                        score_plots.reliability(test),
                        f"Reliability diagram of {test.name}, calibration error "
                        f"{number(test.metrics.get('ece')).text}.",
                        (test.name,),
                    )
                    for test in tests
                ],
                "How often the higher-scored response is the chosen one, against the probability "
                "σ(|difference of scores|) that the Bradley–Terry model gives it; "
                f"{CALIBRATION_BINS} equal bins from one half to one, empty ones left "
                "out, each point's area grows with its share of the pairs, lines are 95% Wilson "
                f"intervals ({_counts(tests)} pairs). {_INDEPENDENT} Points below the dashed "
                "line: too sure.",
            )
        )
        parts += _groups(tests)
        parts += _sample_pairs(tests, inputs.samples)
    return Section("Reward models", parts)


def _groups(tests: list[Test]) -> list[Part]:
    with_groups = [test for test in tests if test.metrics["groups"]]
    if not with_groups:
        return []
    sizes: dict[str, int] = {}
    for test in with_groups:
        for name, found in test.metrics["groups"].items():
            sizes[name] = max(sizes.get(name, 0), found["pairs"])
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    shown = names[: score_plots.MOST_GROUPS]
    remark = "" if len(shown) == len(names) else f" The {len(shown)} largest of {len(names)}."
    parts: list[Part] = [
        Picture(
            "Accuracy by group",
            [
                Panel(
                    score_plots.groups(with_groups, shown, "groups"),
                    f"Accuracy of {len(shown)} groups of pairs under each reward model.",
                    (*shown, *(test.name for test in with_groups)),
                )
            ],
            f"Accuracy in each group of held-out pairs, largest group first ({sizes[shown[0]]:,} "
            f"to {sizes[shown[-1]]:,} pairs), with 95% Wilson intervals. "
            f"{_INDEPENDENT}{remark}",
        )
    ]
    sections = [test for test in with_groups if "sections" in test.metrics]
    if sections:
        columns = list(dict.fromkeys(chain(*(test.metrics["sections"] for test in sections))))
        parts.append(
            Table(
                "RewardBench's sections (arXiv 2403.13787): accuracy, weighted as there.",
                ["model", *columns],
                [
                    [label(test.name), *(number(test.metrics["sections"].get(c)) for c in columns)]
                    for test in sections
                ],
            )
        )
    return parts


def _sample_pairs(tests: list[Test], samples: int) -> list[Table]:
    first = tests[0].pairs
    others = {test.name: test.pairs.set_index("row") for test in tests}
    rows = []
    for i in spread(len(first), samples):
        pair = first.iloc[i]
        cells = [number(pair.row, 0), text(prompt_text(pair.prompt))]
        cells += [text(pair.chosen), text(pair.rejected)]
        for pairs in others.values():
            # Another test may have been on other pairs.
            own = pairs.loc[pair.row] if pair.row in pairs.index else None
            if own is None or own.chosen != pair.chosen or own.rejected != pair.rejected:
                cells.append(Cell("–", None))
            else:
                both = [with_minus(v, 2) for v in (own.chosen_score, own.rejected_score)]
                margin = own.chosen_score - own.rejected_score
                cells.append(number(margin, 2, below=" vs ".join(both)))
        rows.append(cells)
    if not rows:
        return []
    headers = ["row", "prompt", "chosen", "rejected", *(f"margin, {name}" for name in others)]
    caption = (
        f"Sample pairs with their scores: {len(rows)} of {len(first):,}, evenly spaced over the "
        "rows, not picked. Below each margin: the scores of chosen and rejected. A margin below "
        "zero is a pair that the model gets wrong."
    )
    return [Table(caption, headers, rows, long=True)]


def _counts(tests: list[Test]) -> str:
    return ", ".join(f"{test.name}: {len(test.pairs):,}" for test in tests)
