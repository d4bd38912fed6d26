"""The pairs: lengths, words, and the map of embeddings, which can hold generations too."""

import numpy as np

from rotopo.report import figures, text_plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Panel, Part, Picture, Section, with_minus
from rotopo.report.parts import word_clouds

ORDER = 10


def section(inputs: Inputs) -> Section:
    clouds = {"chosen": figures.CHOSEN, "rejected": figures.REJECTED}
    parts: list[Part] = []
    for test in [*inputs.reward_tests, *inputs.tests][:1]:
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
                        f"{with_minus((chosen - rejected).mean(), 1)} tokens.",
                    ),
                ],
                f"Lengths in tokens of the {n:,} chosen and {n:,} rejected responses of the "
                f"held-out pairs (as tokenised for {test.name}, the end-of-turn token included, "
                "which the lengths of generations leave out), and their difference within each "
                f"pair. Mean {chosen.mean():.1f} chosen, {rejected.mean():.1f} rejected.",
            )
        )
        texts = {"chosen": test.pairs.chosen.tolist(), "rejected": test.pairs.rejected.tolist()}
        parts += word_clouds("Words of the pairs", texts, clouds, inputs.seed)
    if inputs.embeddings is not None:
        known = clouds | inputs.colours
        parts.append(_map(*inputs.embeddings, known, inputs.tsne_perplexity, inputs.seed))
    return Section("Data", parts)


def _map(
    x: np.ndarray, labels: np.ndarray, known: dict[str, str], perplexity: float, seed: int
) -> Picture:
    n = len(x)
    perplexity = min(perplexity, (n - 1) / 3)
    kinds = list(dict.fromkeys(labels.tolist()))
    if len({known[k] for k in kinds if k in known}) == len(kinds):
        palette = {name: known[name] for name in kinds}
    else:  # pairs and policies together would share colours
        palette = {name: figures.SERIES[i % len(figures.SERIES)] for i, name in enumerate(kinds)}
    counts = ", ".join(f"{name} {(labels == name).sum():,}" for name in kinds)
    figure = text_plots.embedding_map(x, labels, palette, perplexity, seed)
    reduced = x.shape[1] > 50 and n > 50
    return Picture(
        "Map of the responses",
        [Panel(figure, f"Scatter plot of {n} embedded responses: {counts}.", tuple(kinds))],
        f"t-SNE (perplexity {perplexity:.3g}, seed {seed}"
        + (", after a projection on 50 principal components" if reduced else "")
        + f") of {n:,} embeddings of {x.shape[1]} dimensions: {counts}. Neighbours on the map are "
        "neighbours in the embedding; distances between clusters and the axes mean nothing.",
    )
