import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotopo.data.batch import Sizes
from rotopo.data.sampler import EvalSampler, StatefulLoader, StepSampler
from rotopo.errors import InputError

lengths_lists = st.lists(
    st.tuples(st.integers(1, 50), st.tuples(st.integers(1, 50), st.integers(1, 50))),
    min_size=12,
    max_size=40,
)


layouts = pytest.mark.parametrize("layout", ["shared_prompt", "packed"])


def samplers(
    lengths,
    pairs_per_step=6,
    accumulation=1,
    world_size=1,
    budget=None,
    seed=0,
    layout="shared_prompt",
    length_window=1,
):
    return [
        StepSampler(
            lengths,
            pairs_per_step=pairs_per_step,
            accumulation=accumulation,
            world_size=world_size,
            rank=rank,
            seed=seed,
            token_budget=budget,
            layout=layout,
            length_window=length_window,
        )
        for rank in range(world_size)
    ]


def steps(lengths, **settings):
    """The set of pairs in each optimiser step, over ranks and micro-batches."""
    ranks = samplers(lengths, **settings)
    batches = [list(sampler) for sampler in ranks]
    accumulation = ranks[0].accumulation
    assert all(len(b) == len(ranks[0]) for b in batches)
    return [
        sorted(
            i
            for rank in batches
            for micro in rank[step * accumulation : (step + 1) * accumulation]
            for i in micro
        )
        for step in range(ranks[0].steps)
    ]


@settings(max_examples=30)
@given(
    lengths=lengths_lists,
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 2),
    seed=st.integers(0, 5),
)
def test_accumulation_and_ranks_do_not_change_the_steps(lengths, accumulation, world_size, seed):
    alone = steps(lengths, seed=seed)
    split = steps(lengths, accumulation=accumulation, world_size=world_size, seed=seed)
    assert split == alone
    assert all(len(step) == 6 for step in alone)
    together = [i for step in alone for i in step]
    assert len(set(together)) == len(together)  # no pair twice in an epoch


@layouts
@settings(max_examples=30)
@given(lengths=lengths_lists)
def test_micro_batches_of_a_step_are_near_equal(layout, lengths):
    """No cut of the sorted step into contiguous parts has a smaller largest part."""
    (sampler,) = samplers(lengths, accumulation=3, layout=layout)
    batches = list(sampler)

    def tokens(i):
        prompt, responses = lengths[i]
        return prompt + sum(responses) - len(responses)

    def cost(part):
        sizes = [tokens(i) for i in part]
        return sum(sizes) if layout == "packed" else len(part) * max(sizes)

    for start in range(0, len(batches), 3):
        parts = batches[start : start + 3]
        ordered = sorted(
            (i for part in parts for i in part),
            key=tokens,
        )
        best = min(
            max(cost(ordered[:a]), cost(ordered[a:b]), cost(ordered[b:]))
            for a in range(1, 5)
            for b in range(a + 1, 6)
        )
        assert max(map(cost, parts)) == best


def test_a_length_window_makes_the_pairs_of_a_step_similar_and_keeps_chance():
    lengths = [(5, (n, n)) for n in range(1, 64)]

    def spread(window, epoch=0):
        (sampler,) = samplers(lengths, pairs_per_step=4, length_window=window)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        seen = sorted(i for batch in batches for i in batch)
        assert len(set(seen)) == len(seen) == 60
        return batches, sum(max(batch) - min(batch) for batch in batches)

    one, four = spread(1), spread(4)
    assert four[1] < one[1] / 2
    longest = [max(batch) for batch in four[0]]
    assert longest != sorted(longest, reverse=True)
    assert spread(4)[0] == four[0]
    assert set(map(frozenset, spread(4, epoch=1)[0])).isdisjoint(map(frozenset, four[0]))


def test_rows_with_different_numbers_of_responses_are_all_in_a_step():
    """KTO's: the first takes one line of 100 tokens, the second two of 50."""
    lengths = [(50, (51,)), (20, (31, 31))]
    (sampler,) = samplers(lengths, pairs_per_step=2, layout="padded")
    assert [sorted(batch) for batch in sampler] == [[0, 1]]


def test_epochs_differ_and_repeat_by_seed():
    lengths = [(5, (3, 4))] * 30
    (sampler,) = samplers(lengths)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(samplers(lengths, seed=1)[0]) != first


def test_what_cannot_be_a_step_is_refused():
    lengths = [(10, (10, 10))] * 8
    with pytest.raises(InputError, match=r"pairs_per_step is 9.*only 8"):
        samplers(lengths, pairs_per_step=9)
    with pytest.raises(InputError, match="accumulate_grad_batches"):
        samplers(lengths, pairs_per_step=2, accumulation=3)
    with pytest.raises(InputError, match=r"one pair alone takes 28 tokens"):
        samplers(lengths, pairs_per_step=4, budget=20)
    with pytest.raises(InputError, match=r"token_budget.*accumulate_grad_batches to 2"):
        list(samplers(lengths, pairs_per_step=4, budget=60)[0])
    assert all(
        len(b) == 2 for b in samplers(lengths, pairs_per_step=4, accumulation=2, budget=60)[0]
    )


@layouts
@settings(max_examples=30)
@given(
    lengths=lengths_lists,
    world_size=st.integers(1, 3),
    budget=st.one_of(st.none(), st.integers(150, 500)),
    pairs_per_batch=st.integers(1, 7),
)
def test_evaluation_sees_every_pair_once(layout, lengths, world_size, budget, pairs_per_batch):
    ranks = [
        list(EvalSampler(lengths, budget, pairs_per_batch, world_size, rank, layout))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for b in batches for i in b) == list(range(len(lengths)))
    for batch in (b for batches in ranks for b in batches):
        if pairs_per_batch == 1 and len(lengths) % world_size:
            continue  # single pairs that do not divide among the ranks have to share
        assert len(batch) <= pairs_per_batch
        assert budget is None or Sizes(lengths, layout).tokens(batch) <= budget


def test_a_trial_begins_with_the_longest_pair_alone_and_leaves_the_evaluation_whole():
    trial = [True]
    sampler = EvalSampler([(n, (1, 1)) for n in range(9)], None, 4, 1, 0, "padded", trial.copy)
    assert list(sampler) == [[8], [4, 3, 2, 1], [0]]
    trial.clear()
    assert list(sampler) == [[8, 7, 6, 5], [4, 3, 2, 1], [0]]


def loader(workers: int) -> StatefulLoader:
    (sampler,) = samplers([(5, (3, 4))] * 30, accumulation=2)
    data = list(range(30))
    return StatefulLoader(data, batch_sampler=sampler, collate_fn=list, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_after_the_batches_that_were_consumed(workers):
    whole = list(loader(0))
    interrupted = loader(workers)
    iterator = iter(interrupted)
    consumed = [next(iterator) for _ in range(3)]
    state = interrupted.state_dict()
    resumed = loader(workers)
    resumed.load_state_dict(state)
    assert consumed + list(resumed) == whole
    assert list(resumed) == whole  # the next epoch is whole again
    assert resumed.state_dict() == {"batches": 0}


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_the_global_random_state_alone(workers):
    before = torch.get_rng_state()
    list(loader(workers))
    assert torch.equal(torch.get_rng_state(), before)
