"""What ``rotopo test`` finds out about pairs, from a real run of a tiny model."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from rotopo.callbacks import PairScores, Perplexity
from rotopo.data.module import PairwiseDataModule
from rotopo.errors import InputError
from rotopo.metrics.rewards import ScoredPairs, reward_metrics
from rotopo.models.settings import BackboneConfig, PolicyConfig
from rotopo.objectives import DPO, KTO
from rotopo.reward import RewardModule
from tests.small_run import WORDS, save_model

FILMS = ("Vertigo", "Stalker", "Playtime")
ROWS = 30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    generator = random.Random(0)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(2, 9)))

    rows = [
        {
            "prompt": f"{i}: {text()}",
            "chosen": f"{text()} é\u2028.",
            "rejected": text(),
            "film": FILMS[i % 3],
            "subset": ("donotanswer", "hep-go")[i % 2],
        }
        for i in range(ROWS)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def model(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_model(tmp_path / "model", tiny_tokenizer)


def module_of(model: Path, kind=DPO):
    """A policy that has moved away from its reference."""
    torch.manual_seed(1)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    policy = PolicyConfig(path=str(model), adapter=adapter, dtype="float64")
    module = kind(beta=30.0, policy=policy)
    module.configure_model()
    module.policy.start = None  # as if the adapter had been trained to its random values
    return module


def run_test(
    module,
    model: Path,
    source: Path,
    folder: Path,
    *callbacks,
    devices=1,
    **settings,
) -> tuple[Path, dict[str, float]]:
    """The run's folder, and what it logged."""
    defaults = {"validation": 0.1, "test": 0.6, "cache_dir": str(folder / "cache")}
    data = PairwiseDataModule(str(model), str(source), **defaults | settings)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        logger=CSVLogger(folder, name="", version=0),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    (logged,) = trainer.test(module, data, verbose=False)
    return Path(trainer.log_dir), logged


def flat(values: dict, prefix: str = "") -> dict[str, float]:
    """Numbers inside of dictionaries and lists by their places."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        found |= (
            flat(value, f"{prefix}{name}/")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return found


def read_pairs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "test_pairs.jsonl").open(encoding="utf-8")]


def test_files_log_and_table_of_a_preference_run(model, source, tmp_path, tiny_tokenizer, capsys):
    module = module_of(model)
    folder, logged = run_test(
        module, model, source, tmp_path / "runs", PairScores(), accuracy_by="film"
    )
    found = json.loads((folder / "test.json").read_text("utf-8"))
    lines = read_pairs(folder)
    rows = [json.loads(line) for line in source.open(encoding="utf-8")]
    assert len(lines) == found["pairs"] == 18
    assert [line["row"] for line in lines] == sorted({line["row"] for line in lines})
    beta = 30.0
    for line in lines:
        row = rows[line["row"]]
        assert line["group"] == row["film"]
        assert line["prompt"] == [{"role": "user", "content": row["prompt"]}]
        prompt = tiny_tokenizer.apply_chat_template(
            line["prompt"], add_generation_prompt=True, return_dict=False
        )
        for role in ("chosen", "rejected"):
            assert line[role] == row[role]
            response = tiny_tokenizer(f"{row[role]}<|im_end|>", add_special_tokens=False)
            ids = response["input_ids"]
            assert line[f"{role}_tokens"] == len(ids)
            tokens = torch.tensor([prompt + ids])
            values = []
            for off in (False, True):
                lm = module.policy.model
                with torch.no_grad(), lm.disable_adapter() if off else torch.no_grad():
                    log_p = lm(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                values.append(log_p.gather(1, tokens[0, len(prompt) :, None]).sum())
            expected = beta * float(values[0] - values[1])
            assert line[f"{role}_score"] == pytest.approx(expected, abs=1e-8)
    columns = ("row", "chosen_score", "rejected_score", "chosen_tokens", "rejected_tokens")
    pairs = ScoredPairs(*(np.array([line[name] for line in lines]) for name in columns))
    groups = {line["row"]: line["group"] for line in lines}
    yardstick = found.pop("yardstick")
    assert yardstick["margin"] == pytest.approx(
        (found["chosen_mean"] - found["rejected_mean"]) / beta
    )
    assert found == reward_metrics(pairs, groups)
    assert set(found["groups"]) == set(FILMS)
    assert logged["test/accuracy"] == pytest.approx(found["accuracy"])
    assert logged["test/accuracy"] == pytest.approx(logged["test/rewards/accuracy"])
    assert logged["test/auroc"] == pytest.approx(found["auroc"])
    assert logged["test/chosen_mean"] == pytest.approx(logged["test/rewards/chosen"], rel=1e-5)
    printed = capsys.readouterr().out
    assert f"{found['auroc']:.4f}" in printed
    assert "accuracy, Vertigo" in printed
    assert f"row {lines[0]['row']}: {rows[lines[0]['row']]['prompt'][:20]}" in printed
    assert str(folder / "test_pairs.jsonl") in printed
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


def test_a_reward_model_and_the_lengths_of_its_responses(model, source, tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    module = RewardModule(BackboneConfig(path=str(model), dtype="float64"))
    folder, logged = run_test(module, model, source, tmp_path / "runs", PairScores())
    found = json.loads((folder / "test.json").read_text("utf-8"))
    lm = module.scorer.model
    for line in read_pairs(folder):
        for role in ("chosen", "rejected"):
            turns = [*line["prompt"], {"role": "assistant", "content": line[role]}]
            ids = tiny_tokenizer.apply_chat_template(turns, return_dict=False)[:-1]  # a line feed
            prompt = tiny_tokenizer.apply_chat_template(
                line["prompt"], add_generation_prompt=True, return_dict=False
            )
            assert line[f"{role}_tokens"] == len(ids) - len(prompt)
            with torch.no_grad():
                expected = float(lm(torch.tensor([ids])).logits)
            assert line[f"{role}_score"] == pytest.approx(expected, abs=1e-6)
    assert logged["test/accuracy"] == pytest.approx(logged["test/rewards/accuracy"])
    assert found["reward_mean"] == pytest.approx(
        (found["chosen_mean"] + found["rejected_mean"]) / 2
    )


@pytest.mark.parametrize(
    "settings",
    [{"eval_pairs_per_batch": 1}, {"eval_pairs_per_batch": 7, "layout": "padded"}],
)
def test_batches_and_layout_change_nothing(model, source, tmp_path, settings):
    expected, _ = run_test(module_of(model), model, source, tmp_path / "a", PairScores())
    folder, _ = run_test(module_of(model), model, source, tmp_path / "b", PairScores(), **settings)
    for one, other in zip(read_pairs(expected), read_pairs(folder), strict=True):
        for name, value in one.items():
            assert other[name] == (
                pytest.approx(value, abs=1e-9) if name.endswith(("score", "ratio")) else value
            )
    one, other = (json.loads((f / "test.json").read_text("utf-8")) for f in (expected, folder))
    assert flat(one.pop("yardstick")) == pytest.approx(flat(other.pop("yardstick")), abs=1e-9)
    assert one.pop("groups") == other.pop("groups") == {}
    assert one.pop("accuracy_interval") == other.pop("accuracy_interval")
    assert one == pytest.approx(other, abs=1e-9)


def test_two_ranks_find_what_one_does(model, source, tmp_path):
    both = (tmp_path / "one", 1), (tmp_path / "two", 2)
    one, other = (
        run_test(
            module_of(model),
            model,
            source,
            folder,
            PairScores(),
            accuracy_by="film",
            devices=devices,
            eval_pairs_per_batch=4,
        )
        for folder, devices in both
    )
    assert [line["row"] for line in read_pairs(one[0])] == [
        line["row"] for line in read_pairs(other[0])
    ]
    for name in ("test.json", "test_pairs.jsonl"):
        texts = [(folder / name).read_text("utf-8") for folder, _ in (one, other)]
        numbers = [[float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)] for text in texts]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-9)
    assert one[1]["test/accuracy"] == pytest.approx(other[1]["test/accuracy"])


def test_rewardbench_subsets_get_sections_and_groups_cluster(model, source, tmp_path, capsys):
    folder, _ = run_test(
        module_of(model),
        model,
        source,
        tmp_path / "runs",
        PairScores(samples=0),
        accuracy_by="subset",
        group_by="film",
        validation=0.0,
        test=0.6,
    )
    found = json.loads((folder / "test.json").read_text("utf-8"))
    lines = read_pairs(folder)
    sections = found["sections"]
    assert sections == {
        "Safety": found["groups"]["donotanswer"]["accuracy"],
        "Reasoning": found["groups"]["hep-go"]["accuracy"],
    }
    assert "RewardBench, Safety" in capsys.readouterr().out
    # Two films are held out: resampled means are those of one, of the other, or of both.
    films = [FILMS[line["row"] % 3] for line in lines]
    assert len(set(films)) == 2
    right = [line["chosen_score"] > line["rejected_score"] for line in lines]
    means = [np.mean([r for r, f in zip(right, films, strict=True) if f == g]) for g in set(films)]
    assert found["accuracy_interval"] == pytest.approx(sorted(means))


def test_unpaired_data_is_passed_over(model, tmp_path):
    rows = [{"prompt": f"{i}", "completion": "well", "label": i % 2 == 0} for i in range(20)]
    file = tmp_path / "unpaired.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder, logged = run_test(module_of(model, KTO), model, file, tmp_path / "runs", PairScores())
    assert "test/accuracy" not in logged
    assert not (folder / "test.json").exists()
    assert not (folder / "test_pairs.jsonl").exists()


def test_a_policy_that_is_its_reference_ties_everywhere(model, source, tmp_path, capsys):
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    module = DPO(policy=PolicyConfig(path=str(model), adapter=adapter, dtype="float64"))
    folder, _ = run_test(module, model, source, tmp_path / "runs", PairScores())
    found = json.loads((folder / "test.json").read_text("utf-8"))
    assert (found["accuracy"], found["auroc"], found["ece"]) == (0, 0.5, 0)
    assert found["length_correlation"] is None
    assert found["ties"] == 18
    assert re.search(r"^ties, which count as wrong +18$", capsys.readouterr().out, re.M)


def test_rewards_that_are_not_finite_leave_no_file(model, source, tmp_path):
    module = module_of(model)
    module.beta = float("inf")
    with pytest.raises(InputError, match="not finite"):
        run_test(module, model, source, tmp_path / "runs", PairScores())
    assert not list((tmp_path / "runs").rglob("test.json"))


def test_perplexity_is_logged_and_written(model, source, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A film of some wit and no heart.", encoding="utf-8")
    folder, logged = run_test(
        module_of(model), model, source, tmp_path / "runs", Perplexity(text, window=8)
    )
    found = json.loads((folder / "perplexity.json").read_text("utf-8"))
    assert found["file"] == str(text)
    for name in ("perplexity", "reference_perplexity"):
        assert logged[f"test/{name}"] == pytest.approx(found[name])
    assert found["perplexity"] != pytest.approx(found["reference_perplexity"], rel=1e-3)


def test_perplexity_without_a_text_or_a_policy_is_refused_before_the_test(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(InputError, match="for policies"):
        Perplexity(tmp_path).on_test_start(trainer, Namespace(policy=None))
    with pytest.raises(InputError, match="there is no file"):
        Perplexity(tmp_path / "none").on_test_start(trainer, Namespace(policy=1))
