"""The generations: how long they are, their words, and how diverse they are."""

import numpy as np

from rotopo.report import text_plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Panel, Part, Picture, Section, Table, label, number
from rotopo.report.parts import word_clouds

ORDER = 60

_MEANINGS = {
    "distinct_2": "Distinct n: share of different n-grams (higher is more diverse).",
    "self_bleu": "Self-BLEU: likeness of a response to the others (lower is more diverse).",
    "perplexity": "Perplexity: of a held-out text under the policy (lower: more knowledge kept).",
}


def section(inputs: Inputs) -> Section:
    answers, verdicts, colours = inputs.answers, inputs.verdicts, inputs.colours
    parts: list[Part] = []
    if answers:
        tokens = {n: np.array([r.tokens for r in own.values()]) for n, own in answers.items()}
        medians = ", ".join(f"{name} {np.median(t):.0f}" for name, t in tokens.items())
        counts = ", ".join(f"{name} {len(t):,}" for name, t in tokens.items())
        first, second = text_plots.response_lengths(tokens, colours)
        parts.append(
            Picture(
                "How long the generations are",
                [
                    Panel(
                        first,
                        f"Boxes of the lengths of generations; medians: {medians} tokens.",
                        tuple(tokens),
                    ),
                    Panel(
                        second,
                        "Cumulative shares of the same lengths, a line for each policy.",
                        tuple(tokens),
                    ),
                ],
                f"Tokens of each policy's responses ({counts}), without the end-of-turn token, "
                "which the lengths of the pairs count. Boxes: median and quartiles, "
                "whiskers to the 5th and 95th percentile, a diamond at the mean. Lines: the share "
                "of responses of at most that length; where one steps up at its right end, "
                "responses were cut at the longest length allowed.",
            )
        )
        texts = {name: [r.text for r in own.values()] for name, own in answers.items()}
        parts += word_clouds("Words of the generations", texts, colours, inputs.seed)
    if verdicts is not None:
        measures = {
            "mean_tokens": ("mean length (tokens)", 1),
            "distinct_1": ("distinct 1", 3),
            "distinct_2": ("distinct 2", 3),
            "self_bleu": ("self-BLEU", 3),
            "perplexity": ("perplexity", 2),
        }
        found = {name: verdicts.result["policies"][name]["texts"] for name in verdicts.policies}
        shown = {k: v for k, v in measures.items() if any(k in texts for texts in found.values())}
        said = [meaning for key, meaning in _MEANINGS.items() if key in shown]
        parts.append(
            Table(
                f"The generations as texts. {' '.join(said)}",
                ["policy", *(header for header, _ in shown.values())],
                [
                    [label(n), *(number(texts.get(k), digits) for k, (_, digits) in shown.items())]
                    for n, texts in found.items()
                ],
            )
        )
    return Section("Generations", parts)
