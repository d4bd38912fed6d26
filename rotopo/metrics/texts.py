"""How diverse texts are: distinct-n and self-BLEU."""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

_ORDERS = (1, 2, 3, 4)


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, and every other sign by itself [ours]."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def distinct(texts: Sequence[Sequence[str]], n: int) -> float | None:
    """distinct-n (Li et al. 2016): distinct n-grams of all texts by n-grams in all; None of none.

    It falls with the number and the length of the texts, so only compare like with like.

    Args:
        texts: the words of each text.
        n: words of an n-gram.
    """
    ngrams = [ngram for text in texts for ngram in _ngrams(text, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def self_bleu(texts: Sequence[Sequence[str]]) -> float | None:
    """Self-BLEU (Zhu et al. 2018, Texygen): mean BLEU-4 of each text against all the others.

    From 0 to 1; the higher, the more alike. BLEU (Papineni et al. 2002) of a sentence: uniform
    weights over orders 1 to 4, counts clipped by the largest in any one reference, the closest
    reference length (the shorter of two) for the brevity penalty. An order without a match counts
    a tenth of one (Chen & Cherry 2014, method 1), a text without any matching word 0. All other
    texts are references; Texygen draws 500.

    Args:
        texts: the words of each text; None for fewer than two.
    """
    if len(texts) < 2:
        return None
    counts = {n: [Counter(_ngrams(text, n)) for text in texts] for n in _ORDERS}
    highest = {n: _two_highest(counts[n]) for n in _ORDERS}
    lengths = sorted(map(len, texts))
    total = 0.0
    for i, text in enumerate(texts):
        log_precision = 0.0
        for n in _ORDERS:
            own = counts[n][i]
            # The largest count among the others: the second where the largest is this text's.
            matches = sum(
                min(count, highest[n][ngram][highest[n][ngram][0] == count])
                for ngram, count in own.items()
            )
            if n == 1 and matches == 0:
                break
            log_precision += math.log((matches or 0.1) / max(1, own.total())) / len(_ORDERS)
        else:
            total += math.exp(log_precision + min(0.0, 1 - _closest(lengths, text) / len(text)))
    return total / len(texts)


def _ngrams(text: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(text[start:] for start in range(n)), strict=False)


def _two_highest(texts: list[Counter]) -> dict[tuple[str, ...], tuple[int, int]]:
    """The two largest counts of each n-gram in any two texts."""
    highest: dict[tuple[str, ...], tuple[int, int]] = {}
    for counts in texts:
        for ngram, count in counts.items():
            first, second = highest.get(ngram, (0, 0))
            highest[ngram] = max(first, count), max(second, min(first, count))
    return highest


def _closest(lengths: list[int], text: Sequence[str]) -> int:
    """The length nearest to a text's among the others'; ``lengths`` is sorted and has its own."""
    own = bisect_left(lengths, len(text))
    others = lengths[max(0, own - 1) : own] + lengths[own + 1 : own + 2]
    return min(others, key=lambda length: (abs(length - len(text)), length))
