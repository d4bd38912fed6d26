"""One scale for policies of all objectives, when they are tested."""

import json
from pathlib import Path

import pytest
import torch

from rotopo.callbacks import PairScores
from rotopo.cli import run
from rotopo.objectives import DPO, ORPO, SimPO
from tests.callbacks.test_pair_scores import flat, model, module_of, read_pairs, run_test, source
from tests.small_run import save_config, save_pairs

__all__ = ["model", "source"]  # fixtures

PREFIX = "test/yardstick/"
KEYS = {
    *("margin", "accuracy", "log_ratio/chosen", "log_ratio/rejected", "displaced"),
    *("log_ratio_per_token/chosen", "log_ratio_per_token/rejected"),
    *("kl_per_token/on_data/forward", "kl_per_token/on_data/reverse"),
}
OWN = """
from torch.nn.functional import softplus
from rotopo.data.needs import Needs
from rotopo.objectives.base import PreferenceModule

class Ranked(PreferenceModule):
    needs = Needs(reference=False)

    def losses(self, log_probs):
        return softplus(log_probs.rejected - log_probs.chosen)

    def rewards(self, log_probs):
        return log_probs.chosen, log_probs.rejected
"""


def read(folder: Path) -> dict:
    return json.loads((folder / "test.json").read_text("utf-8"))


def of_kind(kind, model):
    """The same weights, whatever the objective."""
    module = module_of(model)
    other = kind(policy=module.policy_config)
    other.policy = module.policy
    return other


def dense(module, lines, tokenizer) -> dict:
    """The yardstick by its definition, from transformers' own logits."""
    model = module.policy.model
    ratios, kls = {"chosen": [], "rejected": []}, []
    for line in lines:
        prompt = tokenizer.apply_chat_template(
            line["prompt"], add_generation_prompt=True, return_dict=False
        )
        for role, values in ratios.items():
            text = f"{line[role]}<|im_end|>"
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([prompt + ids])
            with torch.no_grad():
                ours = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                with model.disable_adapter():
                    theirs = model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            values.append(((ours - theirs).gather(1, torch.tensor([ids]).T).sum(), len(ids)))
            forward = (theirs.exp() * (theirs - ours)).sum(-1)
            reverse = (ours.exp() * (ours - theirs)).sum(-1)
            kls.append(torch.stack([forward, reverse], 1))
    chosen, rejected = (torch.tensor([r for r, _ in values]) for values in ratios.values())
    per_token = [torch.tensor([r / n for r, n in values]).mean() for values in ratios.values()]
    forward, reverse = torch.cat(kls).mean(0)
    return {
        "margin": (chosen - rejected).mean(),
        "accuracy": (chosen > rejected).double().mean(),
        "log_ratio/chosen": chosen.mean(),
        "log_ratio/rejected": rejected.mean(),
        "log_ratio_per_token/chosen": per_token[0],
        "log_ratio_per_token/rejected": per_token[1],
        "displaced": (chosen < 0).double().mean(),
        "kl_per_token/on_data/forward": forward,
        "kl_per_token/on_data/reverse": reverse,
    }


@pytest.mark.parametrize("kind", [DPO, SimPO, ORPO])
def test_it_is_what_its_definition_says_whatever_the_objective(
    model, source, tmp_path, tiny_tokenizer, kind
):
    module = of_kind(kind, model)
    folder, logged = run_test(module, model, source, tmp_path / "runs", PairScores())
    expected = dense(module, read_pairs(folder), tiny_tokenizer)
    assert expected["kl_per_token/on_data/forward"] > 1e-3
    found = flat(read(folder)["yardstick"])
    found = {name: value for name, value in found.items() if "interval" not in name}
    assert found == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-10)
    assert expected.keys() == KEYS
    logs = {k.removeprefix(PREFIX): v for k, v in logged.items() if k.startswith(PREFIX)}
    assert logs == pytest.approx(found, rel=1e-5)
    for line in read_pairs(folder):
        h = line["chosen_log_ratio"] - line["rejected_log_ratio"]
        if kind is DPO:
            assert line["chosen_score"] - line["rejected_score"] == pytest.approx(0.1 * h)


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def folder_of_test(config: Path, *options: str) -> Path:
    cli = run(["test", *([f"--config={config}"] if config else []), *options])
    return Path(cli.trainer.log_dir)


SIMPO = ["--model=SimPO", "--trainer.max_steps=2"]


@pytest.mark.parametrize(
    "objectives",
    [
        ["ranked.Ranked"],
        pytest.param(["DPO", "SimPO", "ORPO", "SFT", "TYPO"], marks=pytest.mark.slow),
    ],
)
def test_objectives_and_ones_own_from_the_command_line(
    config, tmp_path, monkeypatch, capsys, objectives
):
    (tmp_path / "ranked.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    for objective in objectives:
        fit = ["fit", f"--config={config}", f"--model={objective}", "--trainer.max_steps=2"]
        checkpoint = run(fit).trainer.checkpoint_callback.best_model_path
        capsys.readouterr()
        folder = folder_of_test(None, f"--ckpt_path={checkpoint}")
        found[objective] = read(folder)
        assert flat(found[objective]["yardstick"]).keys() >= KEYS
        printed = capsys.readouterr().out.splitlines()
        (own,) = [n for n, line in enumerate(printed) if line.startswith("accuracy  ")]
        assert f"{found[objective]['accuracy']:.4f}" in printed[own]
        assert printed[own + 1].startswith("accuracy by the yardstick")
        assert f"{found[objective]['yardstick']['accuracy']:.4f}" in printed[own + 1]
    kls = [one["yardstick"]["kl_per_token"]["on_data"]["reverse"] for one in found.values()]
    assert min(kls) > 0
    assert len(set(kls)) == len(objectives)
    if "DPO" in found:
        own = found["DPO"]["chosen_mean"] - found["DPO"]["rejected_mean"]
        assert found["DPO"]["yardstick"]["margin"] == pytest.approx(own / 0.3, rel=1e-5)


@pytest.mark.parametrize("start", ["true", "pissa"])
def test_it_is_0_before_the_first_step(config, start):
    """Of an adapter that starts as the identity, and of one that moves its base."""
    init = f"--model.policy.adapter.init_lora_weights={start}"
    zero = flat(read(folder_of_test(config, "--model=SimPO", init))["yardstick"])
    assert not any(zero.values())


@pytest.mark.slow
def test_an_adapter_that_goes_on_is_compared_with_its_start(config):
    first = run(["fit", f"--config={config}", "--model=SFT", "--trainer.max_steps=2"])
    path = "--model.policy={adapter: null, path: " + first.trainer.log_dir + "}"
    assert not any(flat(read(folder_of_test(config, "--model=SimPO", path))["yardstick"]).values())
    second = run(["fit", f"--config={config}", *SIMPO, path])
    checkpoint = second.trainer.checkpoint_callback.best_model_path
    moved = read(folder_of_test(None, f"--ckpt_path={checkpoint}"))["yardstick"]
    assert moved["kl_per_token"]["on_data"]["forward"] > 0


def test_each_evaluation_set_has_its_own(config, tmp_path):
    other = save_pairs(tmp_path / "other.jsonl", 9)
    sets = f"--data.test={{mine: 0.3, other: {{source: {other}}}}}"
    init = "--model.policy.adapter.init_lora_weights=gaussian"
    trained = run(["fit", f"--config={config}", *SIMPO, init])
    checkpoint = f"--ckpt_path={trained.trainer.checkpoint_callback.best_model_path}"
    cli = run(["test", checkpoint, sets])
    found, logged = read(Path(cli.trainer.log_dir)), cli.trainer.callback_metrics
    assert found["sets"].keys() == {"mine", "other"}
    for prefix, values in {"": found, **{f"{k}/": v for k, v in found["sets"].items()}}.items():
        for name, value in flat(values["yardstick"]).items():
            if "interval" not in name:
                expected = float(logged[f"test/{prefix}yardstick/{name}"])
                assert value == pytest.approx(expected, rel=1e-5)
    alone = read(folder_of_test(None, checkpoint, f"--data.test={{other: {{source: {other}}}}}"))
    for name, value in flat(alone["yardstick"]).items():
        assert value == pytest.approx(flat(found["sets"]["other"]["yardstick"])[name], abs=1e-6)


FULL = "--model.policy={adapter: null}"


def test_of_full_fine_tuning_the_base_is_loaded_beside_a_checkpoint(config, caplog):
    trained = run(["fit", f"--config={config}", *SIMPO, FULL])
    checkpoint = trained.trainer.checkpoint_callback.best_model_path
    found = read(folder_of_test(None, f"--ckpt_path={checkpoint}"))["yardstick"]
    assert found["kl_per_token"]["on_data"]["reverse"] > 0
    # In the process that has trained it there is no base any more.
    trained.trainer.test(trained.model, trained.datamodule)
    assert "yardstick" not in read(Path(trained.trainer.log_dir))
    assert "test/yardstick: left out" in caplog.text


@pytest.mark.slow
def test_with_a_cached_reference_it_is_what_it_is_with_an_online_one(config):
    trained = run(["fit", f"--config={config}", "--trainer.max_steps=2"])
    checkpoint = f"--ckpt_path={trained.trainer.checkpoint_callback.best_model_path}"
    one, other = (
        read(folder_of_test(None, checkpoint, f"--model.policy.reference={kind}"))
        for kind in ("online", "cached")
    )
    assert one == other
