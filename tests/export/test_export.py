"""Exports: what transformers and PEFT load says what was trained, or there is no export."""

import json
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from rotopo.cli import main
from rotopo.export import checks
from rotopo.export.command import export
from tests.export.runs import (
    OFT,
    QUICK,
    ROTATION,
    card,
    copied,
    fit,
    refused,
    tie_embeddings,
)
from tests.models.families import FAMILIES, make
from tests.reward.test_runs import save_reward_config
from tests.small_run import save_config


@pytest.mark.slow
def test_merged_models_need_no_rotopo(exports, tmp_path):
    jobs = list(exports.values())
    (tmp_path / "jobs.json").write_text(
        json.dumps([[str(folder), one.conversations] for one, folder in jobs])
    )
    script = f"""
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
found = []
for folder, conversations in json.load(open({str(tmp_path / "jobs.json")!r})):
    auto = AutoModelForSequenceClassification if "rewards" in folder else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    with torch.no_grad():
        found.append([model(torch.tensor([p + r])).logits[0].tolist() for p, r in conversations])
json.dump(found, open({str(tmp_path / "found.json")!r}, "w"))
assert not any(name.partition(".")[0] in ("rotopo", "peft") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for (one, _), outputs in zip(jobs, found, strict=True):
        for output, expected in zip(outputs, one.trained(), strict=True):
            difference = (torch.tensor(output) - expected).abs().max()
            assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("adapter", [ROTATION, pytest.param(OFT, marks=pytest.mark.slow)])
def test_both_forms_of_an_adapter_say_what_was_trained(adapter, tmp_path, tiny_tokenizer):
    config = save_config(tmp_path, tiny_tokenizer)
    one = fit(config, *QUICK, adapter, "--model.policy.adapter.target_modules=[q_proj,v_proj]")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with pytest.raises(AssertionError):
        one.close(base)
    export(one.folder, tmp_path / "merged")
    one.close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    export(one.folder, tmp_path / "adapter", form="adapter")
    one.close(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    # By the base's path, as the run named it.
    one.close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("model*"))


@pytest.mark.slow
def test_an_adapter_of_lora_is_loaded_with_its_base(lora, tmp_path):
    export(lora.folder, tmp_path / "adapter", form="adapter")
    lora.close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("reward", [False, True])
def test_every_family_is_exported(family, reward, tmp_path, tiny_tokenizer):
    """The export's own check is what compares."""
    save = save_reward_config if reward else save_config
    config = save(tmp_path, tiny_tokenizer)
    make(family, torch.float32, vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    name = "backbone" if reward else "policy"
    options = [f"--model.{name}.adapter.target_modules=all-linear"]
    options += [f"--model.{name}.adapter.lora_dropout=0"]  # with it PEFT adapts no experts
    options += [f"--model.{name}.attention=eager"] * (family == "gemma2")
    one = fit(config, *QUICK, *options)
    export(one.folder, tmp_path / "export")
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    assert auto.from_pretrained(tmp_path / "export").dtype == torch.float32


def test_generation_stops_where_responses_ended(lora, merged):
    data = lora.cli.datamodule
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert sorted(model.generation_config.eos_token_id) == data.stop_ids == [2, 4]
    assert model.generation_config.pad_token_id == data.pad_id == 0
    prompt = torch.tensor([lora.conversations[0][0]])
    hidden = model.model(prompt).last_hidden_state[0, -1]
    with torch.no_grad():
        model.lm_head.weight[data.encoder.end_of_turn_id] = 100 * hidden
    output = model.generate(prompt, max_new_tokens=8)
    assert output[0, prompt.shape[1] :].tolist() == [data.encoder.end_of_turn_id]


@pytest.mark.parametrize("name", ["lora", "whole", "rewards"])
def test_the_chat_template_alone_gives_the_tokens_of_training(name, exports):
    one, folder = exports[name]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = one.cli.datamodule
    for row in data.pairs.of["test"]:
        preference = data.pairs.preference("test", row["row"])
        for turns, prompted, expected in (
            (preference.prompt, True, row["prompt"]),
            (preference.prompt + preference.chosen, False, row["prompt"] + row["chosen"]),
        ):
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=prompted, return_dict=False
            )
            behind = [] if prompted or one.cli.model.needs.ends else tokenizer("\n")["input_ids"]
            assert ids == expected + behind


def test_an_exported_reward_model_scores_as_its_users_call_it(exports):
    """Conversations through template and model in a padded batch; without the length remedies."""
    rewards, folder = exports["rewards"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data, module = rewards.cli.datamodule, rewards.module
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        expected = module.scorer(batch)[batch.responses(0)]
        preferences = [data.pairs.preference("test", row) for row in batch.rows.tolist()]
        inputs = tokenizer.apply_chat_template(
            [p.prompt + p.chosen for p in preferences],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            return_dict=True,
        )
        found = model(**inputs).logits.squeeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.config.pad_token_id == data.pad_id != data.encoder.end_of_turn_id
    assert "without the length remedies" in card(folder)
    assert "`length_alpha` `2.0`" in card(folder)


@pytest.mark.parametrize("name", ["lora", "whole"])
def test_half_types_are_for_those_who_ask(name, exports, tmp_path, capsys):
    one, merged = exports[name]
    capsys.readouterr()
    export(one.folder, tmp_path / "half", dtype="bfloat16")
    found = re.search(r"at most (\S+), .* \((\S+) is allowed\)", capsys.readouterr().out)
    assert float(found[1]) > 1e-4
    assert float(found[2]) == pytest.approx(8 * 2**-7, rel=0.05)
    for folder, dtype in ((merged, "F32"), (tmp_path / "half", "BF16")):
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {dtype}  # noqa: SIM118


@pytest.mark.slow
def test_weights_trained_in_a_half_type_stay_in_it(tmp_path, tiny_tokenizer, capsys):
    config = save_config(tmp_path, tiny_tokenizer)
    one = fit(config, *QUICK, "--model.policy={adapter: null, dtype: bfloat16}")
    capsys.readouterr()
    export(one.folder, tmp_path / "export")
    assert "(1e-05 is allowed)" in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    for name, weight in one.module.policy.model.state_dict().items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], weight)


# What is refused.


def test_what_cannot_be_exported_is_named(lora, whole, rewards, tmp_path):
    output = tmp_path / "export"
    assert "holds no config.yaml" in refused(lora.folder.parent, output)
    assert "form: " in refused(whole.folder, output, form="adapter")
    assert "form: " in refused(rewards.folder, output, form="adapter")
    assert "dtype: " in refused(lora.folder, output, form="adapter", dtype="bfloat16")
    assert "prompts is 0" in refused(lora.folder, output, prompts=0)
    assert "no checkpoint" in refused(lora.folder, output, checkpoint=tmp_path / "none.ckpt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text((lora.folder / "config.yaml").read_text())
    assert "no checkpoint in" in refused(tmp_path / "empty", output)
    assert "is no test of" in refused(lora.folder, output, test=tmp_path / "empty")
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]
    assert "there already" in refused(lora.folder, tmp_path / "empty")


def test_the_command_line_ends_with_one_line(lora, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", f"--run={lora.folder}", f"--output={lora.folder}"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("rotopo: output: ")
    assert error.count("\n") == 1


def test_checkpoints_of_others_are_refused(lora, whole, tmp_path, tiny_tokenizer):
    base = tmp_path / "other" / "model"
    base.parent.mkdir()
    save_config(base.parent, tiny_tokenizer)
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(base)
        model.lm_head.weight.mul_(2)
        model.save_pretrained(base)

    adapter = {"class_path": "peft.LoraConfig", "init_args": {"target_modules": ["k_proj"]}}
    for changed, expected in (
        ({"path": str(base)}, "another base model"),
        ({"adapter": adapter}, "target_modules is ['k_proj'] here and ['q_proj'] in the"),
        ({"path": str(tmp_path / "gone" / "model")}, "there is no file or folder"),
    ):
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump({"model": {"init_args": {"policy": changed}}}))
        assert expected in refused(lora.folder, tmp_path / "export", settings=file)
    folder = copied(lora, tmp_path / "pairs")
    facts = yaml.safe_load((folder / "hparams.yaml").read_text())
    (folder / "hparams.yaml").write_text(yaml.safe_dump(facts | {"fingerprint": "0123"}))
    assert "belongs to another run" in refused(folder, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_checkpoints_settings_count_and_no_file_beside_it(lora, merged, tmp_path, capsys):
    """The run's folder as a later run would have left it; and a base that has moved."""

    def alpha(config):
        config["model"]["init_args"]["policy"]["adapter"]["init_args"]["lora_alpha"] = 64

    moved = tmp_path / "moved"
    shutil.copytree(lora.folder.parents[1] / "model", moved)
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model: {{init_args: {{policy: {{path: {moved}}}}}}}")
    folder = copied(lora, tmp_path / "run", alpha)
    export(folder, tmp_path / "export", settings=settings)
    assert "differs: model.policy.adapter.lora_alpha." in capsys.readouterr().out
    name = "model.safetensors"
    assert (tmp_path / "export" / name).read_bytes() == (merged / name).read_bytes()


@pytest.mark.parametrize(("by", "expected"), [(0.01, r"0\.0\d+"), (torch.nan, "nan")])
def test_files_that_do_not_say_what_was_trained_are_not_kept(
    by, expected, lora, tmp_path, monkeypatch
):
    load = checks.load_written

    def damaged(job, folder):
        model = load(job, folder)
        with torch.no_grad():
            model.lm_head.weight[17, 3] += by
        return model

    monkeypatch.setattr(checks, "load_written", damaged)
    error = refused(lora.folder, tmp_path / "export", form="adapter")
    assert re.search(rf"differ by up to {expected}, .* 1e-05 is allowed", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_merging_would_change_is_refused(tmp_path, tiny_tokenizer, monkeypatch):
    """An adapter on embeddings that the head is tied to: merged into both, it would be on the head
    too. So each gets a weight of its own."""
    config = save_config(tmp_path, tiny_tokenizer)
    tie_embeddings(tmp_path / "model")
    one = fit(config, *QUICK, "--model.policy.adapter.target_modules=[embed_tokens]")
    with monkeypatch.context() as patch:
        patch.setattr("rotopo.export.weights.untie", lambda model: None)
        assert "do not say what was trained" in refused(one.folder, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    export(one.folder, tmp_path / "merged")
    one.close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    export(one.folder, tmp_path / "export", form="adapter")
    one.close(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export"))


def test_other_tokens_are_refused(lora, tmp_path, monkeypatch):
    from rotopo.data.tokens import PairEncoder

    original = PairEncoder.exported_template
    monkeypatch.setattr(
        PairEncoder, "exported_template", lambda *args, **kw: "x" + original(*args, **kw)
    )
    error = refused(lora.folder, tmp_path / "export")
    assert "prompt than training had: token 0" in error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(lora, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # bytes of a file
    try:
        error = refused(lora.folder, tmp_path / "export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.startswith(f"output: {tmp_path / 'export'} cannot be made")
    assert list(tmp_path.iterdir()) == []
