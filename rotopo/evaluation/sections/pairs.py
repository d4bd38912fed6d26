"""Sections on pairs: the data, and the reward models that score them."""

from itertools import chain
from typing import Any

import numpy as np

from rotopo.evaluation import plots, score_plots
from rotopo.evaluation.page import Cell, Panel, Picture, Section, Table, number, text, with_minus
from rotopo.evaluation.runs import Test
from rotopo.evaluation.sections.common import measures, prompt_text, spread, word_clouds

# The alignment report's reward models: Qwen2.5 on align-anything (accuracy, mean, standard
# deviation). Its batch of 2 is 4 pairs a step, for it accumulated twice.
_PUBLISHED = {
    "published: untrained": (0.568, 0.702, 1.552),
    "published: trained, batch 2": (0.703, 0.079, 3.403),
    "published: trained, batch 16": (0.791, 0.127, 2.565),
}

_INDEPENDENT = (
    "These intervals take the pairs as independent; the accuracy's in the table above draws whole "
    "groups where data.group_by is set."
)


def data(
    tests: list[Test],
    embedded: tuple[np.ndarray, np.ndarray] | None,
    clouds: dict[str, str],
    colours: dict[str, str],
    perplexity: float,
    seed: int,
) -> Section:
    """The pairs: lengths, words, and the map of embeddings, which can hold generations too."""
    from rotopo.evaluation import text_plots

    parts: list[Any] = []
    for test in tests:
        n = len(test.pairs)
        chosen, rejected = test.pairs.chosen_tokens, test.pairs.rejected_tokens
        first, second = text_plots.pair_lengths(test)
        parts.append(
            Picture(
                "How long the responses are",
                [
                    Panel(
                        first,
                        f"Histograms of response lengths: chosen, median {chosen.median():.0f} "
                        f"tokens, rejected, median {rejected.median():.0f}.",
                    ),
                    Panel(
                        second,
                        "Histogram of chosen less rejected length, mean "
                        f"{(chosen - rejected).mean():+.1f} tokens.",
                    ),
                ],
                f"Lengths in tokens of the {n:,} chosen and {n:,} rejected responses of the "
                f"held-out pairs (as tokenised for {test.name}, the end-of-turn token included, "
                "which the lengths of generations leave out), and their difference within each "
                f"pair. Mean {chosen.mean():.1f} chosen, {rejected.mean():.1f} rejected.",
            )
        )
        texts = {"chosen": test.pairs.chosen.tolist(), "rejected": test.pairs.rejected.tolist()}
        parts += word_clouds("Words of the pairs", texts, clouds, seed)
    if embedded is not None:
        parts.append(_map(*embedded, clouds | colours, perplexity, seed))
    return Section("Data", parts)


def _map(
    x: np.ndarray, labels: np.ndarray, known: dict[str, str], perplexity: float, seed: int
) -> Picture:
    from rotopo.evaluation import text_plots

    n = len(x)
    perplexity = min(perplexity, (n - 1) / 3)
    kinds = list(dict.fromkeys(labels.tolist()))
    if len({known[k] for k in kinds if k in known}) == len(kinds):
        palette = {name: known[name] for name in kinds}
    else:  # pairs and policies together would share colours
        palette = {name: plots.SERIES[i % len(plots.SERIES)] for i, name in enumerate(kinds)}
    counts = ", ".join(f"{name} {(labels == name).sum():,}" for name in kinds)
    figure = text_plots.embedding_map(x, labels, palette, perplexity, seed)
    reduced = x.shape[1] > 50 and n > 50
    return Picture(
        "Map of the responses",
        [Panel(figure, f"Scatter plot of {n} embedded responses: {counts}.")],
        f"t-SNE (perplexity {perplexity:.3g}, seed {seed}"
        + (", after a projection on 50 principal components" if reduced else "")
        + f") of {n:,} embeddings of {x.shape[1]} dimensions: {counts}. Neighbours on the map are "
        "neighbours in the embedding; distances between clusters and the axes mean nothing.",
    )


def reward_models(tests: list[Test], published: bool, samples: int) -> Section:
    parts: list[Any] = []
    if tests:
        caption = (
            "Reward models on held-out pairs; 95% bootstrap intervals. Mean and standard deviation "
            "over all responses. ECE: expected calibration error of σ(chosen − rejected). Equal "
            "length: pairs whose lengths differ by at most a tenth."
        )
        if published:
            caption += (
                " Shaded: the alignment report's own figures, of another model, data set and "
                "size (Qwen2.5, 0.5B by all signs, align-anything text to text; its accuracies fit "
                "498 or 996 pairs, and its validation split has 1,000): not a comparison under "
                "equal terms."
            )
        parts.append(measures(tests, caption, _PUBLISHED if published else {}))
        parts.append(
            Picture(
                "Scores of chosen and rejected responses",
                [
                    Panel(
                        score_plots.scores(test),
                        f"Histograms and boxes of {test.name}'s scores: chosen, mean "
                        f"{test.pairs.chosen_score.mean():.3f}, rejected, mean "
                        f"{test.pairs.rejected_score.mean():.3f}.",
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
                    )
                    for test in tests
                ],
                "How often the higher-scored response is the chosen one, against the probability "
                "σ(|difference of scores|) that the Bradley–Terry model gives it; "
                f"{score_plots.CALIBRATION_BINS} equal bins from one half to one, empty ones left "
                "out, each point's area grows with its share of the pairs, lines are 95% Wilson "
                f"intervals ({_counts(tests)} pairs). {_INDEPENDENT} Points below the dashed "
                "line: too sure.",
            )
        )
        parts += _groups(tests)
        parts += _sample_pairs(tests, samples)
    return Section("Reward models", parts)


def _groups(tests: list[Test]) -> list[Any]:
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
    parts: list[Any] = [
        Picture(
            "Accuracy by group",
            [
                Panel(
                    score_plots.groups(with_groups, shown),
                    f"Accuracy of {len(shown)} groups of pairs under each reward model.",
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
                    [text(test.name), *(number(test.metrics["sections"].get(c)) for c in columns)]
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
