"""Several sources in one epoch: shares, passes, ranks, and a fit that goes on in the middle."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotopo.data.filters import RowFilter
from rotopo.data.mixture import Share, SourceMixture
from rotopo.data.module import PairwiseDataModule
from rotopo.data.one_source import Source
from rotopo.errors import InputError


def mixture(sizes, weights=None, repetitions=None) -> SourceMixture:
    shares = [
        Share(str(n), None if weights is None else weights[n], (repetitions or [1.0] * 9)[n])
        for n in range(len(sizes))
    ]
    return SourceMixture(shares, np.repeat(np.arange(len(sizes)), sizes))


@given(
    st.lists(st.integers(5, 90), min_size=1, max_size=5),
    st.lists(st.floats(0.1, 1.0), min_size=5, max_size=5),
    st.integers(0, 3),
    st.integers(0, 9),
)
def test_every_prefix_has_its_shares_and_passes_are_whole(sizes, weights, seed, epoch):
    """The bound of the docstring; and a source's rows over epochs differ by one at most in how
    often they come."""
    try:
        found = mixture(sizes, weights)
        counts = np.array(found.counts)
    except InputError:
        return
    assert (counts <= sizes).all()
    assert (counts == sizes).any()  # an epoch is as long as it can be
    order = np.array(found.epoch(seed, epoch))
    own = found.source_of[order]
    taken = np.cumsum(np.eye(len(sizes))[own], 0)
    shares = counts / counts.sum()
    t = np.arange(1, len(order) + 1)[:, None]
    assert (abs(taken - t * shares) <= (1 + len(sizes) * shares) / 2 + 1e-9).all()

    all_epochs = np.concatenate([found.epoch(seed, number) for number in range(epoch + 1)])
    times = np.bincount(all_epochs, minlength=sum(sizes))
    for source in range(len(sizes)):
        assert np.ptp(times[found.source_of == source]) <= 1


def test_without_weights_sources_are_whole_or_repeat():
    found = mixture([40, 8, 10], repetitions=[1.0, 2.5, 0.5])
    assert found.counts == [40, 20, 5]
    times = Counter(found.epoch(0, 0))
    assert [times[row] for row in range(40)] == [1] * 40
    assert sorted(times[row] for row in range(40, 48)) == [2] * 4 + [3] * 4
    both = Counter(found.epoch(0, 0) + found.epoch(0, 1))
    assert [both[row] for row in range(40, 58)] == [5] * 8 + [1] * 10


def test_a_source_that_gives_nothing_is_refused():
    with pytest.raises(InputError, match="2 with 3 training pairs gives none to an epoch"):
        _ = mixture([100, 100, 3], repetitions=[1.0, 1.0, 0.1]).counts


@pytest.fixture
def three(tmp_path: Path) -> list[Source]:
    """Three files with columns of their own."""
    made = []
    for name, n, columns in (
        ("films", 120, ("prompt", "chosen", "rejected")),
        ("qa", 90, ("question", "better", "worse")),
        ("code", 60, ("instruction", "good", "bad")),
    ):
        file = tmp_path / f"{name}.jsonl"
        rows = [
            dict(zip(columns, (f"{name} {i}", "yes " * (1 + i % 5), "no"), strict=True))
            | {"topic": i // 3, "score": i % 10, "certain": 0.5 + i}
            for i in range(n)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = dict(zip(("prompt", "chosen", "rejected"), columns, strict=True))
        made.append(Source(str(file), columns=named if name != "films" else None))
    return made


@pytest.fixture
def make(tiny_tokenizer_dir, tmp_path):
    def call(source, **settings):
        data = PairwiseDataModule(
            **{
                "tokenizer": str(tiny_tokenizer_dir),
                "source": source,
                "validation": 0.0,
                "pairs_per_step": 10,
                "cache_dir": str(tmp_path / "cache"),
            }
            | settings
        )
        data.prepare_data()
        data.setup()
        return data

    return call


def with_weights(sources, *weights):
    return [Source(**vars(s) | {"weight": w}) for s, w in zip(sources, weights, strict=True)]


def prompt_of(data, name, row):
    return data.pairs.preference(name, row).prompt[0]["content"]


def test_a_row_keeps_its_number_and_its_source(make, three):
    data = make(three, validation=0.2, group_by="topic", accuracy_by="topic")
    names = ("films", "qa", "code")
    firsts = dict(zip(names, (0, 120, 210), strict=True))
    for split in ("train", "validation"):
        groups = data.pairs.parts[split].groups(data.pairs.of[split]["row"][:])
        for row in data.pairs.of[split]["row"][:]:
            name, number = prompt_of(data, split, row).split()
            assert row == firsts[name] + int(number)
            assert groups[row] == json.dumps([names.index(name), str(int(number) // 3)])
    counts = {k: v for k, v in data.pairs.describe().items() if k.startswith("pairs/")}
    assert counts == {
        "pairs/train": 216,
        "pairs/validation": 54,
        "pairs/train/films": 96,
        "pairs/train/qa": 72,
        "pairs/train/code": 48,
        "pairs/validation/films": 24,
        "pairs/validation/qa": 18,
        "pairs/validation/code": 12,
    }


def test_each_source_is_read_by_its_own_settings(make, three):
    films, qa, code = three
    sources = [
        Source(**vars(films) | {"rows": 30, "margin": "certain"}),
        Source(**vars(qa) | {"chat_template_kwargs": {"enable_thinking": False}}),
        code,
    ]
    data = make(sources, split_seed=3, on_unwritten="warn")
    rows = data.pairs.of["train"]["row"][:]
    assert data.pairs.parts["train"].counts(rows) == {"films": 30, "qa": 90, "code": 60}
    margins = data.pairs.parts["train"].margins(rows)
    assert margins == {row: 0.5 + row for row in rows if row < 120}
    kwargs = [data.pairs.preference("train", row).inputs.kwargs for row in (0, 120, 210)]
    assert kwargs == [{}, {"enable_thinking": False}, {}]
    # A fixed subset, which the order's seed does not choose.
    sources[1] = qa
    assert make(sources, split_seed=3, seed=5).pairs.of["train"]["row"][:] == rows
    assert make(sources, split_seed=4).pairs.of["train"]["row"][:] != rows


class Even(RowFilter):
    """Keeps rows with an even score."""

    def keep(self, row):
        return row["score"] % 2 == 0


def test_a_filter_drops_rows_before_they_are_read_and_moves_none(make, three, tmp_path):
    """A row that cannot be used is none of the filter's."""
    file = Path(str(three[0].source))
    with file.open("a") as out:
        out.write(json.dumps({"prompt": "p", "chosen": "", "rejected": "no", "score": 1}) + "\n")
    data = make(str(file), filter=Even(), validation=0.25)
    kept = data.pairs.of["train"]["row"][:] + data.pairs.of["validation"]["row"][:]
    assert sorted(kept) == [row for row in range(120) if row % 2 == 0]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="keeps none of"):
        make(str(file), filter=type("None_", (RowFilter,), {"keep": lambda self, row: False})())


def test_evaluation_sets(make, three):
    films, qa, code = three
    sets = {"held_out": 0.1, "questions": qa, "code": Source(**vars(code) | {"rows": 7})}
    data = make(films.source, validation=sets, test={"questions": qa})
    labels = data.pairs.parts["validation"].labels(data.pairs.of["validation"]["row"][:])
    assert Counter(labels.values()) == {"held_out": 12, "questions": 90, "code": 7}
    for row, label in labels.items():
        word = prompt_of(data, "validation", row).split()[0]
        assert {"held_out": "films", "questions": "qa", "code": "code"}[label] == word
    batches = [batch.rows for batch in data.val_dataloader()]
    masks = [data.pairs.parts["validation"].labelled(rows) for rows in batches]
    assert {k: sum(int(m[k].sum()) for m in masks) for k in sets} == Counter(labels.values())
    assert {name: len(pairs) for name, pairs in data.pairs.of.items()} == {
        "train": 108,
        "validation": 109,
        "test": 90,
    }


def test_a_set_may_be_called_as_a_source_or_as_a_set_of_another_split(make, three):
    films, qa, code = three
    data = make(films.source, validation={"held_out": 0.1, "films": qa}, test={"films": code})
    found = data.pairs.describe()
    assert found["pairs/validation/held_out/films"] == 12
    assert found["pairs/validation/films"] == found["rows/validation/films/train/whole"] == 90
    assert found["rows/test/films/train/whole"] == 60
    assert found["rows/films/train/whole"] == 120


def test_what_is_no_mixture_is_refused(make, three):
    films, qa, _ = three
    for source, settings, words in (
        ([], {}, "data.source is an empty list"),
        ([films, Source()], {}, "number 1 .from 0., has no source"),
        ([films, films], {}, "several are called 'films': give each a name"),
        ([Source(**vars(films) | {"weight": 1.0}), qa], {}, "give all sources a weight, or none"),
        (with_weights(three, 1.0, 0.0, 1.0), {}, "the weight of .*qa.jsonl is 0.0"),
        ([Source(films.source, weight=1.0, repetitions=2.0)], {}, "a weight and repetitions"),
        (
            [Source(films.source, rows=1000)],
            {},
            "films has 120 pairs .train., and its rows is 1000",
        ),
        ([films, qa], {"train_pairs": 3}, "give each its rows"),
        (films.source, {"validation": {"a": films}}, "is what is trained on"),
        (films.source, {"validation": {}}, "data.validation names no set"),
        (films.source, {"validation": {"a": 0.1, "b": 0.2}}, "has 2 shares"),
        (films.source, {"test": {"a": Source(qa.source, weight=1.0)}}, "data.test.a.weight"),
        (films.source, {"test": {"a/b": qa}}, "the name 'a/b'"),
        (films.source, {"test": {"rewards": qa}}, "the name 'rewards'"),
        (films.source, {"test": {"a b": 0.1}}, "the name 'a b'"),
        (films.source, {"test": {"a": "none.jsonl"}}, "data.test.a: .*no file 'none.jsonl'"),
        (films.source, {"test": {"a": Source()}}, "data.test.a: name a split of data.source"),
        ([films, qa], {"test": {"a": Source(split="x")}}, "data.test.a has no source"),
        (films.source, {"columns": {"prompt": "question"}}, "has no column 'question' to be"),
        (films.source, {"columns": {"promt": "prompt"}}, "'promt' is not a column of any format"),
    ):
        with pytest.raises(InputError, match=words):
            make(source, **settings)


def test_paired_and_unpaired_sources_are_refused(make, three, tmp_path):
    file = tmp_path / "single.jsonl"
    file.write_text('{"prompt": "p", "completion": "c", "label": true}\n' * 20)
    with pytest.raises(
        InputError, match="'single' has rows with a single response, and 'films' only pairs"
    ):
        make([three[0], str(file)])


def test_columns_cover_others_of_the_format_s_names(make, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "not this", "ask": "this", "chosen": "yes", "rejected": "no", "why": "x"}
    file.write_text((json.dumps(row) + "\n") * 20)
    data = make(str(file), columns={"prompt": "ask"})
    assert prompt_of(data, "train", 0) == "this"
    assert data.pairs.unread_columns() == ["prompt", "why"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_have_the_shares_on_any_number_of_ranks(make, three, ranks):
    """200 steps of ten pairs at .5, .3 and .2, over epochs: each has five, three and two give or
    take one, and any number of ranks has the same steps."""
    from dataclasses import replace

    data = make(with_weights(three, 0.5, 0.3, 0.2))
    rows, mixed = data.rows("train"), data.pairs.mixture()
    loaders = [
        replace(data._loaders(), world_size=ranks, rank=rank).training(rows, mixed)
        for rank in range(ranks)
    ]
    steps = []
    for epoch in range(9):
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
        for batches in zip(*loaders, strict=True):
            steps.append(sorted(row for batch in batches for row in batch.rows.tolist()))
    assert len(steps) >= 200
    sources = [data.pairs.parts["train"].counts(step) for step in steps]
    totals = {name: sum(one[name] for one in sources[:200]) for name in sources[0]}
    wanted = dict(zip(totals, (1000, 600, 400), strict=True))
    assert all(abs(totals[name] - n) <= 9 for name, n in wanted.items())
    assert all(abs(one["films"] - 5) <= 1 and abs(one["code"] - 2) <= 1 for one in sources)
    single = data._loaders().training(rows, mixed)
    single.batch_sampler.set_epoch(0)
    first = [sorted(batch.rows.tolist()) for batch in single]
    assert steps[: len(first)] == first
