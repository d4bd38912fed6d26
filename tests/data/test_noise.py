"""Label noise: which labels each model of an annotator gets wrong, and what training sees."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, concatenate_datasets
from hypothesis import assume, given
from hypothesis import strategies as st

from rotopo.cli import run
from rotopo.data.batch import PairBatch
from rotopo.data.module import PairwiseDataModule
from rotopo.data.noise import (
    AssumedPreference,
    LabelNoise,
    LengthFlips,
    MarginFlips,
    SymmetricFlips,
    TrainingPairs,
    with_flips,
)
from rotopo.data.rows import pair_lengths
from rotopo.errors import InputError
from tests.small_run import save_config, save_pairs


def pairs_of(chosen, rejected=None, rows=None, **columns) -> TrainingPairs:
    """Pairs with these lengths; columns by name, as long as the rows' numbers go."""
    n = len(chosen)
    rows = np.arange(n) if rows is None else np.array(rows)
    rejected = np.ones(n, dtype=int) if rejected is None else np.array(rejected)
    return TrainingPairs(
        rows, np.array(chosen), rejected, lambda name: dict(enumerate(columns[name]))
    )


lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=60)
margins = st.lists(
    st.floats(-20, 20).filter(lambda m: m == 0 or abs(m) > 1e-3), min_size=1, max_size=60
)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_symmetric_flips_come_at_the_rate(rate, seed):
    n = 20_000
    flips = SymmetricFlips(rate, seed).flips(pairs_of(np.ones(n)))
    assert flips.shape == (n,)
    assert abs(flips.sum() - rate * n) <= 5 * math.sqrt(n * rate * (1 - rate))


def test_flips_are_independent_of_one_another_and_of_other_seeds():
    first, second = (SymmetricFlips(0.5, s).flips(pairs_of(np.ones(20_000))) for s in (0, 1))
    bound = 5 / math.sqrt(20_000)
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < bound


@given(st.data(), st.integers(0, 9))
def test_flips_of_a_lower_rate_are_among_those_of_a_higher_one(data, seed):
    sizes = data.draw(lengths)
    positive = data.draw(st.lists(st.floats(0.01, 9), min_size=len(sizes), max_size=len(sizes)))
    pairs = pairs_of(*zip(*sizes, strict=True), margin=positive)
    longer = float((pairs.rejected > pairs.chosen).mean())
    shares = sorted(data.draw(st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))))
    for make in (
        lambda share: SymmetricFlips(share, seed),
        lambda share: LengthFlips(share * longer, seed),
        lambda share: MarginFlips("margin", share / 2, seed),
    ):
        low, high = (make(share).flips(pairs) for share in shares)
        assert not (low & ~high).any()


@given(st.permutations(range(40)), st.integers(1, 40), st.integers(0, 9))
def test_a_rows_flip_depends_on_nothing_but_the_row_and_the_seed(order, n, seed):
    noise = SymmetricFlips(0.4, seed)
    whole = noise.flips(pairs_of(np.ones(40)))
    some = order[:n]
    assert np.array_equal(noise.flips(pairs_of(np.ones(n), rows=some)), whole[some])


@given(lengths, st.just(0.0) | st.floats(1e-100, 1))  # of less than 1e-308 few digits are left
def test_length_flips_follow_the_log_ratio_and_their_mean_is_the_rate(sizes, share):
    pairs = pairs_of(*zip(*sizes, strict=True))
    excess = np.log(pairs.rejected / pairs.chosen)
    rate = min(share * float((excess > 0).mean()), 0.999)
    p = LengthFlips(rate).flip_probabilities(pairs)
    assert p.mean() == pytest.approx(rate, abs=1e-9)
    assert (p[excess <= 0] == 0).all()
    # One c for all: what is below 1 is c times the log-ratio, and c times the others is above 1.
    below = (excess > 0) & (p < 1 - 1e-9)
    if below.any():
        c = p[below] / excess[below]
        np.testing.assert_allclose(c, c[0], rtol=1e-9)
        assert (c[0] * excess[(excess > 0) & ~below] >= 1 - 1e-6).all()


def test_length_flips_up_to_every_longer_rejected_response():
    pairs = pairs_of([4, 4, 4, 4, 9], [5, 400, 3, 4, 10])
    assert LengthFlips(0.6).flip_probabilities(pairs) == pytest.approx([1, 1, 0, 0, 1])
    with pytest.raises(InputError, match=r"data\.noise\.rate is 0\.7.* 0\.6 at most: of 5.* 3 "):
        LengthFlips(0.7).flips(pairs)
    never = pairs_of([5, 5], [5, 1])
    assert not LengthFlips(0.0).flips(never).any()
    with pytest.raises(InputError, match=r"can flip 0 at most"):
        LengthFlips(0.1).flips(never)


@given(margins, st.floats(0, 0.999))
def test_margin_flips_are_a_bradley_terry_annotators_and_their_mean_is_the_rate(values, share):
    m = np.array(values)
    lowest = float(((m < 0).sum() + (m == 0).sum() / 2) / len(m))
    assume(lowest < 0.5)
    rate = lowest + share * (0.5 - lowest)
    p = MarginFlips("margin", rate).flip_probabilities(pairs_of(np.ones(len(m)), margin=values))
    assert p.mean() == pytest.approx(rate, abs=1e-9)
    np.testing.assert_allclose(p[m == 0], 0.5)
    # One temperature for all: the log-odds of a flip are -m / T.
    inside = (m != 0) & (p > 1e-6) & (p < 1 - 1e-6)
    if inside.any():
        inverse = -np.log(p[inside] / (1 - p[inside])) / m[inside]
        assert (inverse >= 0).all()
        np.testing.assert_allclose(inverse, inverse[0], rtol=1e-6, atol=1e-9)


def test_margin_flips_without_any_leave_every_right_label():
    pairs = pairs_of(np.ones(4), margin=[3.0, 1, 0.5, -2.0])
    assert MarginFlips("margin", 0.25).flips(pairs).tolist() == [False, False, False, True]
    for rate in (0.2, 0.5):
        with pytest.raises(InputError, match=r"data\.noise\.rate.* from 0\.25.* below 0\.5"):
            MarginFlips("margin", rate).flips(pairs)
    with pytest.raises(InputError, match=r"from 0\.5"):
        MarginFlips("margin", 0.3).flips(pairs_of(np.ones(2), margin=[0, 0]))


@pytest.mark.parametrize("bad", [None, "two", True, float("nan"), "inf"])
def test_margins_that_are_no_finite_numbers_are_named(bad):
    pairs = pairs_of(np.ones(2), rows=[7, 4], margin=[1, 1, 1, 1, bad, 1, 1, 1])
    with pytest.raises(InputError, match=rf"row 4 \(from 0\): margin is {bad!r}.*no finite number"):
        MarginFlips("margin", 0.2).flips(pairs)


def test_the_larger_models_response_is_assumed_to_be_preferred(monkeypatch):
    said = []
    monkeypatch.setattr("rotopo.data.noise.rank_zero_info", said.append)
    better = ["7b", "7b", "1b", "1b", "7b", "30b", None, ["7b"]]
    worse = ["1b", "30b", "7b", "30b", "7b", "gpt", "7b", "1b"]
    pairs = pairs_of(np.ones(8), better=better, worse=worse)
    flips = AssumedPreference("better", "worse", ["30b", "7b", "1b"]).flips(pairs)
    assert flips.tolist() == [False, True, True, True, False, False, False, False]
    (line,) = said
    assert "3 of 8 pairs" in line
    assert "1 because both models are the same" in line
    with pytest.raises(InputError, match=r"data\.noise\.ranking.* better and worse .*'7b'"):
        AssumedPreference("better", "worse", ["7B", "1B"]).flips(pairs)


class NoisierLater(LabelNoise):
    """A user's own: sure of the first row, and ever less sure."""

    def __init__(self, most: float) -> None:
        super().__init__(seed=3)
        self.most = most

    def flip_probabilities(self, pairs):
        return self.most * pairs.rows / 40


def test_probabilities_of_ones_own_noise_are_checked():
    assert not NoisierLater(0.0).flips(pairs_of(np.ones(40))).any()
    assert NoisierLater(40.0).flips(pairs_of(np.ones(2))).tolist() == [False, True]
    for most in (2.0, -0.1, math.nan):
        with pytest.raises(InputError, match=r"flip_probabilities of NoisierLater.*\[0, 1\].*40 p"):
            NoisierLater(most).flips(pairs_of(np.ones(40)))


@pytest.mark.parametrize(
    "noise",
    [LengthFlips(0.2), MarginFlips("margin", 0.2), AssumedPreference("a", "b", ["7b", "1b"])],
    ids=lambda noise: type(noise).__name__,
)
def test_noise_that_compares_responses_refuses_unpaired_rows(noise):
    with pytest.raises(InputError, match=r"\w+ compares two responses, but 2 training rows have"):
        noise.flips(pairs_of([3, 0, 2], [3, 4, 0]))


N = 60


@pytest.fixture
def make(tiny_tokenizer_dir, tmp_path):
    """A data module on some rows, set up: of 60, 42 train, 6 validate and 12 test."""

    def call(rows, name="pairs", **changes):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"validation": 0.1, "test": 0.2, "pairs_per_step": 6} | changes
        data = PairwiseDataModule(
            str(tiny_tokenizer_dir), str(file), cache_dir=str(tmp_path / "cache"), **changes
        )
        data.prepare_data()
        data.setup()
        return data

    return call


@pytest.fixture
def rows(tmp_path):
    file = save_pairs(tmp_path / "source.jsonl", N)
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def same(one: object, other: object) -> bool:
    """Whether two batches are equal, field by field."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one)]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    return one == other


@pytest.mark.parametrize("layout", ["packed", "shared_prompt", "padded"])
def test_training_sees_what_a_file_with_the_labels_swapped_by_hand_would_show(make, rows, layout):
    noisy = make(rows, layout=layout, noise=SymmetricFlips(0.4))
    flipped = dict(zip(noisy.pairs.of["train"]["row"], noisy.pairs.flipped().tolist(), strict=True))
    assert 5 < sum(flipped.values()) < 30
    swapped = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if flipped.get(i) else row
        for i, row in enumerate(rows)
    ]
    by_hand = make(swapped, "by_hand", layout=layout)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        batches = [list(getattr(data, loader)()) for data in (noisy, by_hand)]
        assert all(isinstance(batch, PairBatch) for batch in batches[0])
        assert same(*map(tuple, batches))
    clean = make(rows, layout=layout)
    assert not same(*(tuple(data.train_dataloader()) for data in (noisy, clean)))
    for loader in ("val_dataloader", "test_dataloader"):
        assert same(*(tuple(getattr(data, loader)()) for data in (noisy, clean)))


def test_the_clean_label_stays(make, rows):
    noisy, clean = make(rows, noise=SymmetricFlips(0.4)), make(rows)
    assert clean.pairs.flipped() is None
    assert "noise/flipped" not in clean.pairs.describe()
    assert noisy.pairs.flipped().shape == (len(noisy.pairs.of["train"]),)
    assert noisy.pairs.describe()["noise/flipped"] == noisy.pairs.flipped().sum()
    for found, expected in zip(noisy.pairs.of["train"], clean.pairs.of["train"], strict=True):
        if found.pop("flipped"):
            found["chosen"], found["rejected"] = found["rejected"], found["chosen"]
        assert found == expected
        assert noisy.pairs.preference("train", found["row"]) == clean.pairs.preference(
            "train", found["row"]
        )


def test_a_row_is_flipped_or_not_whatever_else_is_trained_on(make, rows):
    def flips(**changes) -> dict[int, bool]:
        data = make(rows, noise=SymmetricFlips(0.4, seed=5), **changes)
        return dict(zip(data.pairs.of["train"]["row"], data.pairs.flipped().tolist(), strict=True))

    whole = flips()
    for change in (
        {"train_pairs": 9},
        {"validation": 0.3},
        {"seed": 4},
        {"balance_lengths": True},
        {"max_length": 70, "truncation": "drop"},
    ):
        other = flips(**change)
        shared = whole.keys() & other.keys()
        assert len(shared) >= 9
        assert {row: other[row] for row in shared} == {row: whole[row] for row in shared}


def test_lengths_are_balanced_as_the_labels_were_given(make, rows):
    data = make(rows, noise=SymmetricFlips(0.4), balance_lengths=True, validation=0.0, test=0.0)
    chosen, rejected = pair_lengths(data.pairs.of["train"])
    assert (chosen > rejected).sum() == (chosen < rejected).sum() > 0
    assert len(data.pairs.flipped()) == len(chosen)
    # By the clean labels they are not.
    clean = np.where(data.pairs.flipped(), rejected - chosen, chosen - rejected)
    assert (clean > 0).sum() != (clean < 0).sum()


def test_unpaired_responses_change_sides(make, rows):
    single = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 == 0}
        for i, row in enumerate(rows)
    ]
    noisy, clean = make(single, noise=SymmetricFlips(0.4)), make(single)
    assert 5 < noisy.pairs.flipped().sum() < 30
    for found, given_ in zip(noisy.pairs.of["train"], clean.pairs.of["train"], strict=True):
        swap = found["flipped"]
        assert found["chosen"] == given_["rejected" if swap else "chosen"]
        assert found["rejected"] == given_["chosen" if swap else "rejected"]
        assert bool(found["chosen"]) != bool(found["rejected"])
    with pytest.raises(InputError, match=r"LengthFlips compares two responses, but 42 training"):
        make(single, noise=LengthFlips(0.1))


def test_flips_in_pairs_that_lie_in_several_pieces_of_memory():
    draw = np.random.default_rng(0)
    ids = [[draw.integers(99, size=draw.integers(5)).tolist() for _ in range(3)] for _ in range(50)]
    names = ["prompt", "chosen", "rejected"]
    whole = Dataset.from_list([dict(zip(names, three, strict=True)) for three in ids])
    parts = [whole.select(range(*ends)) for ends in ((3, 20), (20, 21), (25, 50))]
    pairs, flipped = concatenate_datasets(parts), draw.random(43) < 0.5
    assert len(pairs.data["chosen"].chunks) == 3
    for found, before, flip in zip(with_flips(pairs, flipped), pairs, flipped, strict=True):
        swapped = {"chosen": before["rejected"], "rejected": before["chosen"]}
        assert found == before | {"flipped": flip} | (swapped if flip else {})


def test_columns_of_the_source(make, rows):
    scored = [row | {"margin": i + 1.0} for i, row in enumerate(rows)]
    data = make(scored, noise=MarginFlips("margin", 0.3))
    numbers = np.array(data.pairs.of["train"]["row"])
    known = pairs_of(np.ones(len(numbers)), rows=numbers, margin=range(1, N + 1))
    assert np.array_equal(data.pairs.flipped(), MarginFlips("margin", 0.3).flips(known))
    with pytest.raises(InputError, match=r"data\.noise: .* no column 'score', only .*margin"):
        make(scored, noise=MarginFlips("score", 0.3))


def test_noise_needs_no_training_pairs(make, rows):
    data = make(rows, validation=0.0, test=1.0, noise=SymmetricFlips(0.4))
    assert data.pairs.flipped() is None
    assert "noise/flipped" not in data.pairs.describe()


@pytest.fixture
def config(tmp_path, tiny_tokenizer):
    return save_config(tmp_path, tiny_tokenizer)


NOISE = ["--data.noise=SymmetricFlips", "--data.noise.rate=0.3"]


def test_noise_by_short_name(config, caplog):
    cli = run(["fit", f"--config={config}", *NOISE, "--trainer.max_epochs=1"])
    flipped = cli.datamodule.pairs.flipped()
    count = flipped.sum()
    assert 0 < count < len(flipped) == 20
    said = f"data.noise: SymmetricFlips flipped {count} of 20 labels ({5 * count}.0 %)."
    assert said in caplog.messages
    log_dir = Path(cli.trainer.log_dir)
    assert f"noise/flipped: {count}\n" in (log_dir / "hparams.yaml").read_text("utf-8")
    saved = yaml.safe_load((log_dir / "config.yaml").read_text("utf-8"))
    assert saved["data"]["init_args"]["noise"] == {
        "class_path": "rotopo.data.noise.SymmetricFlips",
        "init_args": {"rate": 0.3, "seed": 0},
    }


def test_ones_own_noise_by_class_path(config, tmp_path):
    file = tmp_path / "own.yaml"
    noise = {"class_path": "tests.data.test_noise.NoisierLater", "init_args": {"most": 1.0}}
    file.write_text(yaml.safe_dump({"data": {"init_args": {"noise": noise}}}))
    data = run(["test", f"--config={config}", f"--config={file}"]).datamodule
    u = np.random.default_rng(3).random(40)  # its own seed
    numbers = np.array(data.pairs.of["train"]["row"])
    assert np.array_equal(data.pairs.flipped(), u[numbers] < numbers / 40)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (["SymmetricFlips", "rate=1"], "data.noise.rate is 1.0: it has to be in [0, 1)"),
        (["SymmetricFlips", "rate=-0.1"], "data.noise.rate is -0.1"),
        (["SymmetricFlips", "rate=.nan"], "data.noise.rate is nan"),
        (["SymmetricFlips", "rate=0.1", "seed=-1"], "data.noise.seed is -1"),
        (["SymmetricFlips"], "the following arguments are required: rate"),
        (["LengthFlips", "rate=0.95"], "data.noise.rate is 0.95, but LengthFlips can flip 0."),
        (["MarginFlips", "rate=0.2", "column=gap"], "has no column 'gap', only prompt"),
        (["MarginFlips", "rate=0.2", "column=prompt"], "data.noise: row 0 (from 0): prompt is '0:"),
        (
            ["AssumedPreference", "chosen_model=a", "rejected_model=b", "ranking=[7b]"],
            "data.noise.ranking is ['7b']",
        ),
        (
            ["AssumedPreference", "chosen_model=a", "rejected_model=b", "ranking=[7b,7b,1b]"],
            "each once",
        ),
        (
            ["AssumedPreference", "chosen_model=a", "rejected_model=b", "ranking=[7b,1b]"],
            "no column 'a', only prompt, chosen, rejected",
        ),
    ],
)
def test_bad_settings_are_named(message, noise, expected):
    name, *given_ = noise
    assert expected in message(f"--data.noise={name}", *(f"--data.noise.{s}" for s in given_))


def test_resuming_with_other_noise_is_refused(config, message):
    flat = "--model.scheduler=null"
    options = [*NOISE, flat]
    cli = run(["fit", f"--config={config}", *options, "--trainer.max_epochs=1"])
    checkpoint = f"--ckpt_path={cli.trainer.checkpoint_callback.best_model_path}"
    again = run(["fit", f"--config={config}", *options, checkpoint])
    assert again.trainer.global_step == 2 * cli.trainer.global_step
    for other in ([flat], [*options, "--data.noise.seed=1"], [*options, "--data.noise.rate=0.5"]):
        error = message(*other, checkpoint)
        assert re.search(r"data\.noise\S* is \S+ here and \S+ in the checkpoint", error)
