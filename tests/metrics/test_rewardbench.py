"""RewardBench's sections against its published weights."""

import random

import pytest

from rotopo.metrics.rewardbench import SECTIONS, section_scores

# Pairs of each subset as the benchmark's paper counts them (table 1).
PAIRS = {
    "Chat": (100, 95, 95, 28, 40),
    "Chat Hard": (37, 100, 134, 92, 47, 46),
    "Safety": (100, 100, 154, 250, 136),
    "Reasoning": (447, 164, 164, 164, 164, 164, 164),
}


def whole_benchmark() -> dict[str, tuple[int, float]]:
    generator = random.Random(0)
    return {
        subset: (pairs, generator.random())
        for section, subsets in SECTIONS.items()
        for subset, pairs in zip(subsets, PAIRS[section], strict=True)
    }


def test_the_whole_benchmark_has_2985_pairs():
    assert sum(n for n, _ in whole_benchmark().values()) == 2985


def test_sections_are_weighted_as_the_benchmark_does():
    groups = whole_benchmark()
    found = section_scores(groups)
    for section, subsets in SECTIONS.items():
        # Its code counts the 447 pairs of mathematics as 984, as many as there are of code.
        weights = [984 if subset == "math-prm" else groups[subset][0] for subset in subsets]
        scores = [groups[subset][1] for subset in subsets]
        expected = sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)
        assert found[section] == pytest.approx(expected, abs=1e-12)
    assert found["overall"] == pytest.approx(sum(found[s] for s in SECTIONS) / 4)


def test_a_part_of_the_benchmark_has_no_overall_score():
    assert section_scores({"donotanswer": (3, 1.0), "xstest-should-respond": (1, 0.0)}) == {
        "Safety": 0.75
    }
    assert section_scores({"math-prm": (9, 0.5)}) == {"Reasoning": 0.5}


@pytest.mark.parametrize("groups", [{}, {"films": (3, 1.0)}, {"hep-go": (3, 1.0), "x": (1, 1.0)}])
def test_other_groups_have_no_sections(groups):
    assert section_scores(groups) is None
