"""Rows of a batch: unpaired ones, further responses, and mismatches."""

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from rotopo.data.batch import Role
from rotopo.data.rows import Rows, unpaired_rows
from rotopo.errors import InputError

ids = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@st.composite
def datasets(draw):
    """Rows of which some have one response, and some share a prompt; two prompts at least."""
    prompts = draw(st.lists(ids, min_size=2, max_size=6).filter(lambda p: p[0] != p[1]))
    rows = []
    for i in range(draw(st.integers(len(prompts), 12))):
        chosen, rejected = draw(ids), draw(ids)
        missing = draw(st.sampled_from(["chosen", "rejected", None]))
        rows.append(
            {
                "prompt": prompts[i % len(prompts)],
                "chosen": [] if missing == "chosen" else chosen,
                "rejected": [] if missing == "rejected" else rejected,
                "row": 10 * i,
            }
        )
    tokens = List(Value("int64"))
    features = Features(prompt=tokens, chosen=tokens, rejected=tokens, row=Value("int64"))
    return Dataset.from_list(rows, features)


def by_role(row, role):
    return [r for r, found in zip(row.responses, row.roles, strict=True) if found == role]


@given(datasets())
def test_a_row_has_the_responses_that_its_data_has(pairs):
    rows = Rows(pairs)
    for row, pair in zip(map(rows.__getitem__, range(len(rows))), pairs, strict=True):
        assert (row.prompt, row.row) == (pair["prompt"], pair["row"])
        for name, role in (("chosen", Role.CHOSEN), ("rejected", Role.REJECTED)):
            assert by_role(row, role) == ([pair[name]] if pair[name] else [])
    single = sum(not pair["chosen"] or not pair["rejected"] for pair in pairs)
    assert unpaired_rows(pairs) == single


@given(datasets(), st.integers(0, 3))
def test_mismatches_are_whole_responses_to_another_prompt(pairs, seed):
    rows = Rows(pairs, [Role.MISMATCHED], max_length=100, seed=seed)
    again = Rows(pairs, [Role.MISMATCHED], max_length=100, seed=seed)
    for index in range(len(rows)):
        row = rows[index]
        assert row == again[index]
        found = by_role(row, Role.MISMATCHED)
        others = [
            [pair[name] for name in ("chosen", "rejected") if pair[name]]
            for pair in pairs
            if pair["prompt"] != row.prompt
        ]
        assert found in others


@given(datasets(), st.integers(7, 12))
def test_lengths_are_those_of_the_rows(pairs, max_length):
    """The sampler budgets by them, so they have to hold with mismatches cut to max_length too."""
    gold = [[1] * (1 + i % 3) for i in range(len(pairs))]
    rows = Rows(pairs, [Role.GOLD, Role.MISMATCHED], {Role.GOLD: gold}, max_length, seed=0)
    for index, (prompt, responses) in enumerate(rows.lengths()):
        row = rows[index]
        assert (prompt, responses) == (len(row.prompt), [len(r) for r in row.responses])
        assert by_role(row, Role.GOLD) == [gold[index]]
        for response in by_role(row, Role.MISMATCHED):
            assert 1 <= len(response) <= max_length - len(row.prompt)


@given(datasets())
def test_a_reward_model_has_a_token_behind_every_response(pairs):
    margins = [0.5 * i for i in range(len(pairs))]
    plain, rows = Rows(pairs), Rows(pairs, behind=77, margins=margins)
    for index, (prompt, responses) in enumerate(rows.lengths()):
        row, before = rows[index], plain[index]
        assert row.responses == [[*response, 77] for response in before.responses]
        assert (row.prompt, row.roles, row.row) == (before.prompt, before.roles, before.row)
        assert (prompt, responses) == (len(row.prompt), [len(r) for r in row.responses])
        assert (row.margin, before.margin) == (margins[index], 0.0)


def test_mismatches_need_a_second_prompt():
    pairs = Dataset.from_list(
        [{"prompt": [1], "chosen": [2], "rejected": [3], "row": i} for i in range(3)]
    )
    with pytest.raises(InputError, match="all prompts are the same"):
        Rows(pairs, [Role.MISMATCHED], max_length=9)


@given(datasets(), st.data())
def test_selected_rows_are_these_and_behind_them_those_with_other_responses(pairs, data):
    gold = [[i + 1] for i in range(len(pairs))]
    margins = [float(i) for i in range(len(pairs))]
    rows = Rows(pairs, [Role.GOLD], {Role.GOLD: gold}, behind=99, margins=margins)
    places = st.integers(0, len(pairs) - 1)
    kept = data.draw(st.lists(places))
    others = data.draw(st.lists(st.tuples(places, ids, ids), min_size=not kept))
    found = rows.select(kept, others)
    assert len(found) == len(kept) + len(others) == len(found.lengths())
    for index, place in enumerate(kept):
        assert found[index] == rows[place]
    for index, (place, chosen, rejected) in enumerate(others, len(kept)):
        row, before = found[index], rows[place]
        assert (row.prompt, row.row, row.margin) == (before.prompt, before.row, before.margin)
        assert by_role(row, Role.CHOSEN) == [[*chosen, 99]]
        assert by_role(row, Role.REJECTED) == [[*rejected, 99]]
        assert by_role(row, Role.GOLD) == by_role(before, Role.GOLD)
