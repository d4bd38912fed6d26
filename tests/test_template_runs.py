"""A chat template's arguments and its clock, from a fit to an export."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from rotopo.cli import main, run
from rotopo.data.template import clock_stopped
from tests.small_run import save_config

THINKING = (Path(__file__).parent / "cases" / "thinking.jinja").read_text()
# Thinking off by default in what is written, and the hour in front.
TEMPLATE = "{{- strftime_now('%H:%M') -}}" + THINKING


@pytest.fixture
def config(tmp_path, tiny_tokenizer):
    file = save_config(tmp_path, tiny_tokenizer)
    settings = yaml.safe_load(file.read_text())
    settings["data"]["init_args"] |= {
        "chat_template": TEMPLATE,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    file.write_text(yaml.safe_dump(settings))
    return file


def prompt_text(data, place: int = 0) -> str:
    return data.encoder.tokenizer.decode(
        data.pairs.sources[0].loaded["train"].tokenized.pairs[place]["prompt"]
    )


@pytest.mark.slow
def test_the_hour_of_the_first_fit_is_that_of_all_that_follows(config, tmp_path, capsys):
    fit = ["fit", "--config", str(config), "--model.scheduler=null"]
    first = run([*fit, "--trainer.max_epochs=1", "--data.template_time=2024-02-29T08:09:00"])
    assert prompt_text(first.datamodule).startswith("08:09<|im_start|>user\n")
    assert prompt_text(first.datamodule).endswith("<think>\n\n</think>\n\n")
    checkpoint = str(next(Path(first.trainer.checkpoint_callback.dirpath).glob("*.ckpt")))

    # Another day, another machine: neither the setting nor the cache.
    shutil.rmtree(tmp_path / "cache")
    resumed = run([*fit, "--ckpt_path", checkpoint])
    assert prompt_text(resumed.datamodule) == prompt_text(first.datamodule)
    shutil.rmtree(tmp_path / "cache")
    predicted = run(["predict", "--config", str(config), "--ckpt_path", checkpoint])
    assert prompt_text(predicted.datamodule) == prompt_text(first.datamodule)
    (responses,) = (tmp_path / "runs").glob("version_2/**/responses.jsonl")
    scored = run(
        [
            *("predict", "--config", str(config), "--ckpt_path", checkpoint),
            f"--data.score={responses}",
        ]
    ).datamodule
    prompt = json.loads(responses.read_text().splitlines()[0])["prompt"]
    assert scored.predicted.given.tokens[0]["prompt"] == first.datamodule.encoder.encode_prompt(
        prompt
    )

    shutil.rmtree(tmp_path / "cache")
    main(["export", "--run", str(tmp_path / "runs/version_0"), "--output", str(tmp_path / "out")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with clock_stopped(first.datamodule.encoder.template.time):
        exported = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False
        )
        thinking = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False, enable_thinking=True
        )
    assert exported == first.datamodule.encoder.encode_prompt(prompt)
    assert thinking.endswith("<|im_start|>assistant\n")


def test_a_resumed_fit_with_another_time_is_refused(config, capsys):
    fit = ["fit", "--config", str(config), "--trainer.max_epochs=1"]
    first = run([*fit, "--data.template_time=2024-02-29T08:09:00"])
    checkpoint = next(Path(first.trainer.checkpoint_callback.dirpath).glob("*.ckpt"))
    with pytest.raises(SystemExit) as stop:
        run([*fit, f"--ckpt_path={checkpoint}", "--data.template_time=2024-02-29T08:10:00"])
    assert stop.value.code == 2
    assert "data.template_time" in capsys.readouterr().err
