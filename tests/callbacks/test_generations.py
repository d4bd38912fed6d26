"""Responses to the same few prompts at every validation."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rotopo.callbacks import Generations
from rotopo.callbacks.generations import _keep
from rotopo.cli import run
from rotopo.errors import InputError
from tests.small_run import save_config
from tests.test_training import assert_equal, fit, weights

SHORT = ["--trainer.val_check_interval=1", "--trainer.max_epochs=1"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def on(**settings) -> str:
    settings.setdefault("sampling", {"max_new_tokens": 5, "temperature": 1.0})
    path = "rotopo.callbacks.Generations"
    return "--trainer.callbacks=" + json.dumps([{"class_path": path, "init_args": settings}])


def lines_of(cli) -> list[dict]:
    file = Path(cli.trainer.log_dir) / "generations.jsonl"
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def length(prompt: list[dict], response: str) -> float:
    return len(prompt[0]["content"]) + len(response) / 100


def test_lines_and_texts_of_each_validation_and_training_is_left_alone(config, tmp_path):
    plain = fit(config, "plain", *SHORT)
    judged = "tests.callbacks.test_generations.length"
    cli = fit(config, "shown", *SHORT, on(prompts=3, judge=judged))
    assert_equal(weights(cli), weights(plain), rtol=0, atol=0)
    lines = lines_of(cli)
    assert [(line["step"], line["number"]) for line in lines] == [
        (step, number) for step in (1, 2, 3) for number in range(3)
    ]
    data = cli.datamodule
    rows = data.pairs.of["validation"]["row"][:3]
    for line in lines:
        assert line["prompt"] == data.pairs.preference("validation", rows[line["number"]]).prompt
        assert line["score"] == pytest.approx(length(line["prompt"], line["response"]))
        assert line["stopped"] == (line["tokens"] < 5)
    board = EventAccumulator(cli.trainer.log_dir, size_guidance={"tensors": 0})
    board.Reload()
    texts = board.Tensors("generations/1/text_summary")
    assert [text.step for text in texts] == [1, 2, 3]
    assert lines[1]["prompt"][0]["content"] in texts[0].tensor_proto.string_val[0].decode()
    # A validation alone says the same of the same weights, in batches of other sizes too.
    checkpoint = cli.trainer.checkpoint_callback.best_model_path
    again = run(
        ["validate", f"--ckpt_path={checkpoint}", on(prompts=3), "--data.eval_pairs_per_batch=2"]
    )
    assert [line["response"] for line in lines_of(again)] == [
        line["response"] for line in lines[-3:]
    ]


def test_own_prompts_as_texts_and_from_a_file(config, tmp_path):
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "of wit"}]
    file.write_text('{"prompt": "no heart", "id": 7}\n' + json.dumps({"prompt": turns}) + "\n")
    texts = ["no heart", "of wit"]
    for prompts in (texts, str(file)):
        cli = run(["validate", f"--config={config}", on(prompts=prompts)])
        assert [line["prompt"][0]["content"] for line in lines_of(cli)] == texts
        assert all(line["step"] == 0 for line in lines_of(cli))


def test_a_step_that_comes_again_replaces_its_lines(config, tmp_path):
    """In a folder of one's own, where a script that resumes goes on writing."""
    file = tmp_path / "generations.jsonl"
    for step, text in ((1, "a"), (2, "b"), (2, "c"), (3, "d")):
        _keep(file, [{"step": step, "number": 0, "response": text}])
    found = [json.loads(line) for line in file.open()]
    assert [(line["step"], line["response"]) for line in found] == [(1, "a"), (2, "c"), (3, "d")]


@pytest.mark.slow
def test_a_reward_models_checkpoint_judges_as_predict_scores(config, tmp_path):
    reward = ["--model=rotopo.reward.RewardModule", "--model.length_penalty=0.1"]
    folder = str(tmp_path / "model")
    reward += [f"--model.backbone.path={folder}", "--trainer.max_steps=2"]
    trained = run(["fit", f"--config={config}", *reward])
    checkpoint = trained.trainer.checkpoint_callback.best_model_path
    judge = {
        "class_path": "rotopo.judge.reward_model.RewardJudge",
        "init_args": {"checkpoint": checkpoint},
    }
    cli = fit(config, "shown", *SHORT, "--trainer.max_steps=1", on(prompts=2, judge=judge))
    plain = fit(config, "plain", *SHORT, "--trainer.max_steps=1")
    assert_equal(weights(cli), weights(plain), rtol=0, atol=0)  # it has drawn no number of theirs
    lines = lines_of(cli)
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = run(["predict", f"--ckpt_path={checkpoint}", f"--data.score={file}"])
    scores = Path(scored.trainer.log_dir) / "scores.jsonl"
    expected = [json.loads(line)["score"] for line in scores.open()]
    assert [line["score"] for line in lines] == pytest.approx(expected, abs=1e-5)


def test_what_cannot_be_is_refused(config, message, tmp_path):
    assert "this run has none" in message(on(), "--data.validation=0")
    reward = ["--model=rotopo.reward.RewardModule", f"--model.backbone.path={tmp_path / 'model'}"]
    assert "RewardModule is none" in message(on(), *reward)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": 1}\n')
    assert f"{empty}, line 1" in message(on(prompts=str(empty)))
    bad = "tests.callbacks.test_generations.bad"
    assert "'good' to" in message(on(judge=bad), *SHORT)
    with pytest.raises(InputError, match="at least 1"):
        Generations(prompts=0)


def bad(prompt, response):
    return "good"
