"""``rotopo plan`` as a user calls it."""

import json

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rotopo.cli import main
from tests.small_run import save_config


@pytest.fixture
def config(tmp_path, tiny_tokenizer):
    file = save_config(tmp_path, tiny_tokenizer)
    (tmp_path / "model" / "model.safetensors").unlink()  # no weights
    (tmp_path / "pairs.jsonl").unlink()  # no data
    return file


def test_a_plan_needs_neither_weights_nor_data(config, tmp_path, capsys):
    file = tmp_path / "plan.json"
    options = ["--ranks", "1", "--card", "h100", "--json", str(file)]
    main(["plan", f"--config={config}", "--data.max_length", "64", *options])
    printed = capsys.readouterr().out
    assert "DPO, LoraConfig, LlamaForCausalLM in float32" in printed
    assert "in all" in printed
    assert "not measured" in printed
    assert max(map(len, printed.splitlines())) <= 80
    plan = json.loads(file.read_text())
    assert plan["load"] == {"pairs": 6, "prompt": 1, "response": 63, "layout": "packed"}
    assert plan["tokens"] == 6 * (1 + 2 * 62)
    rows = {row["checkpointing"]: row for row in plan["rows"]}
    assert rows.keys() == {False, True}
    assert rows[False]["pairs"] == 6  # all of a step fits
    for row in rows.values():
        assert sum(row["memory"]["most"].values()) >= sum(row["memory"]["held"].values()) / 2
    assert plan["seconds"] == pytest.approx(plan["flops"] / (67e12 * 0.4))


def test_a_token_budget_makes_micro_batches_as_a_fit_would_find_them(config, tmp_path):
    file = tmp_path / "plan.json"
    options = ["--data.max_length=64", "--data.token_budget=300", "--ranks=1", f"--json={file}"]
    main(["plan", f"--config={config}", *options])
    plan = json.loads(file.read_text())
    assert plan["load"]["pairs"] == 2  # of 125 tokens each
    assert plan["accumulation"] == 3


def test_an_adapters_folder_is_planned_as_its_base_with_it(config, tmp_path, capsys):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "model"))
    adapter = LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj"])
    adapter.base_model_name_or_path = str(tmp_path / "model")
    get_peft_model(model, adapter).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    options = ["--ranks=1", "--card=h100", "--data.max_length=64", "--json"]
    plans = []
    for path, over in (("model", []), ("adapter", ["--model.policy={adapter: null}"])):
        where = f"--model.policy.path={tmp_path / path}"
        file = tmp_path / f"{path}.json"
        main(["plan", f"--config={config}", *over, where, *options, str(file)])
        plans.append(json.loads(file.read_text()))
    assert "DPO, LoraConfig, LlamaForCausalLM" in capsys.readouterr().out
    assert plans[0]["rows"] == plans[1]["rows"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--card", "h1000"], "--card h1000"),
        (["--mfu", "0"], "--mfu"),
        (["--ranks", "1", "--pairs", "0"], "--pairs is 0"),
        (["--ranks", "0"], "--ranks is 0"),
        (["--ranks", "4", "--prompt-tokens", "2000"], "data.max_length"),
        (["--ranks", "1", "--model-config", "nowhere.json"], "--model-config"),
        (["--ranks", "1", "--json", "no/such/folder.json"], "--json"),
        ([], "--ranks"),
        (["--ranks", "7"], "pairs_per_step"),
        (["--ranks", "2", "--trainer.strategy", "fsdp"], "trainer.strategy fsdp"),
        (["--ranks", "1", "--trainer.precision", "bf16-mixed"], "trainer.precision"),
        (["--ranks", "1", "--model.policy.attention", "flex_attention"], "flex_attention"),
        (["--ranks", "1", "--model.policy.compile", "true"], "policy.compile"),
        (["--ranks", "1", "--model.policy.path", "./nowhere"], "--model-config FILE"),
        (["--ranks", "1", "--model.nothing", "1"], "nothing"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(config, options, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", f"--config={config}", *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--card", "h100"])
    assert "--config FILE" in capsys.readouterr().err


def test_a_quantised_model_is_refused(config, tmp_path, capsys):
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    file.write_text(json.dumps(settings))
    with pytest.raises(SystemExit):
        main(["plan", f"--config={config}", "--ranks", "1"])
    assert "quantised" in capsys.readouterr().err


def test_a_reward_model_is_planned(config, tmp_path, capsys):
    settings = yaml.safe_load(config.read_text())
    policy = settings["model"]["init_args"]["policy"]
    settings["model"] = {
        "class_path": "rotopo.reward.RewardModule",
        "init_args": {
            "backbone": {**policy, "adapter": None},
            "optimizer": settings["model"]["init_args"]["optimizer"],
        },
    }
    config.write_text(yaml.safe_dump(settings))
    main(["plan", f"--config={config}", "--ranks", "1", "--pairs", "2"])
    assert "LlamaForSequenceClassification" in capsys.readouterr().out
