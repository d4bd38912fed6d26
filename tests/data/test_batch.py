import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotopo.data.batch import PairBatch, Role, TokenizedRow, collate, collate_prompts, line_shape

token_lists = st.lists(st.integers(1, 90), min_size=1, max_size=9)
row_lists = st.lists(
    st.builds(
        lambda prompt, chosen, rejected, row: TokenizedRow(
            prompt, [chosen, rejected], [Role.CHOSEN, Role.REJECTED], row
        ),
        token_lists,
        token_lists,
        token_lists,
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=5,
)
layouts = pytest.mark.parametrize("layout", ["padded", "shared_prompt"])


def history(batch: PairBatch, index: int) -> list[int]:
    """The tokens that the hidden state at a flat index may see, in order of position."""
    line, column = divmod(index, batch.input_ids.shape[1])
    segments = batch.segment_ids[line]
    seen = [
        j
        for j in range(column + 1)
        if segments[j] in (0, segments[column]) and (segments[column] > 0 or segments[j] == 0)
    ]
    positions = batch.position_ids[line, seen].tolist()
    assert positions == list(range(len(seen)))
    return batch.input_ids[line, seen].tolist()


@layouts
@given(rows=row_lists)
def test_every_target_is_predicted_from_exactly_what_precedes_it(layout, rows):
    batch = collate(rows, pad_id=0, layout=layout, loss_scale=0.5)
    expected = [
        (row.prompt + response[:i], token)
        for row in rows
        for response in row.responses
        for i, token in enumerate(response)
    ]
    found = [
        (history(batch, int(index)), int(target))
        for index, target in zip(batch.predictors, batch.targets, strict=True)
    ]
    assert found == expected


@layouts
@given(rows=row_lists)
def test_owners_roles_and_lengths_tell_the_responses(layout, rows):
    batch = collate(rows, pad_id=0, layout=layout, loss_scale=1.0)
    responses = [response for row in rows for response in row.responses]
    assert batch.lengths.tolist() == [len(r) for r in responses]
    for s, response in enumerate(responses):
        assert batch.targets[batch.owners == s].tolist() == response
    chosen = batch.responses(Role.CHOSEN)
    assert batch.pairs[chosen].tolist() == list(range(len(rows)))
    assert [responses[i] for i in chosen.tolist()] == [row.responses[0] for row in rows]
    assert batch.rows.tolist() == [row.row for row in rows]


@layouts
@given(rows=row_lists)
def test_line_shape_is_what_collate_makes(layout, rows):
    for row in rows:
        batch = collate([row], pad_id=0, layout=layout, loss_scale=1.0)
        lengths = [len(r) for r in row.responses]
        assert tuple(batch.input_ids.shape) == line_shape(len(row.prompt), lengths, layout)


def test_a_row_may_hold_one_response_or_many():
    rows = [
        TokenizedRow([1, 2], [[3]], [Role.CHOSEN], 0),
        TokenizedRow([4], [[5, 6], [7], [8, 9]], [Role.REJECTED, Role.CHOSEN, Role.REJECTED], 1),
    ]
    for layout in ("padded", "shared_prompt"):
        batch = collate(rows, pad_id=0, layout=layout, loss_scale=1.0)
        assert batch.pairs.tolist() == [0, 1, 1, 1]
        assert batch.responses(Role.CHOSEN).tolist() == [0, 2]
        assert batch.targets.tolist() == [3, 5, 6, 7, 8, 9]


def test_moving_a_batch_moves_every_tensor():
    rows = [TokenizedRow([1], [[2], [3]], [Role.CHOSEN, Role.REJECTED], 0)]
    moved = collate(rows, pad_id=0, layout="padded", loss_scale=1.0).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 10
    assert all(tensor.is_meta for tensor in tensors)


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([[1, 2, 3], [4]], pad_id=0, rows=[5, 6])
    assert batch.input_ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.rows.tolist() == [5, 6]
