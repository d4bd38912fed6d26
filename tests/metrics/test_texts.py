"""distinct-n and self-BLEU, by hand and by their definitions."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rotopo.metrics.texts import distinct, self_bleu, words


def test_words():
    assert words("Don't STOP, naïve_1 été.") == [
        "don",
        "'",
        "t",
        "stop",
        ",",
        "naïve_1",
        "été",
        ".",
    ]
    assert words(" \n") == []


def test_distinct_by_hand():
    texts = [words("a b a b"), words("a c")]
    assert distinct(texts, 1) == 3 / 6
    assert distinct(texts, 2) == 3 / 4  # ab, ba, ab | ac
    assert distinct(texts, 4) == 1
    assert distinct(texts, 5) is None
    assert distinct([], 1) is None


def test_self_bleu_of_the_same_text_is_one_and_of_nothing_in_common_zero():
    text = words("the film is long and dull")
    assert self_bleu([text] * 3) == pytest.approx(1)
    assert self_bleu([text, words("no word here shared")]) == 0
    assert self_bleu([text]) is None
    assert self_bleu([text, []]) == 0


def test_self_bleu_by_hand():
    a, b = words("a b c d e"), words("a b c d f g")
    # a against b: 4/5 words, 3/4, 2/3, 1/2; five words against six.
    first = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    # b against a: 4/6, 3/5, 2/4, 1/3; longer than its reference.
    second = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert self_bleu([a, b]) == pytest.approx((first + second) / 2)


def test_an_order_without_a_match_counts_a_tenth():
    a, b = words("a x b y"), words("a b")
    first = (2 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    second = (2 / 2 * 0.1 / 1 * 0.1 / 1 * 0.1 / 1) ** 0.25 * math.exp(1 - 4 / 2)
    assert self_bleu([a, b]) == pytest.approx((first + second) / 2)


def bleu(text: list[str], references: list[list[str]]) -> float:
    """BLEU-4 with the smoothing of method 1, by its definition."""

    def grams(t: list[str], n: int) -> Counter:
        return Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1))

    log_precision = 0.0
    for n in range(1, 5):
        own = grams(text, n)
        matches = sum(min(c, max(grams(r, n)[g] for r in references)) for g, c in own.items())
        if n == 1 and matches == 0:
            return 0.0
        log_precision += 0.25 * math.log((matches or 0.1) / max(1, sum(own.values())))
    closest = min((abs(len(r) - len(text)), len(r)) for r in references)[1]
    return math.exp(log_precision + min(0, 1 - closest / len(text)))


@settings(max_examples=100)
@given(st.lists(st.text("abc", max_size=9), min_size=2, max_size=6))
def test_self_bleu_is_the_mean_bleu_against_all_others(texts):
    split = [list(text) for text in texts]
    expected = [bleu(text, split[:i] + split[i + 1 :]) for i, text in enumerate(split)]
    assert self_bleu(split) == pytest.approx(sum(expected) / len(expected), abs=1e-12)
