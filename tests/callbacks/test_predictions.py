"""What predict writes, and that a killed run goes on where it stopped."""

import fcntl
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from rotopo.cli import run
from rotopo.data.batch import Role, TokenizedRow, collate
from rotopo.objectives import DPO
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS, EXACT, Killed, fit, last_checkpoint

SAMPLED = ["--model.sampling.temperature=1", "--data.eval_pairs_per_batch=3"]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def predict(config: Path, root: str, *options: str):
    """The lines of the file that ``predict`` writes."""
    folder = config.parent / root
    command = ["predict", "--config", str(config), "--trainer.default_root_dir", str(folder)]
    cli = run([*command, *options])
    (file,) = Path(cli.trainer.log_dir).glob("*.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]


class Kill(Callback):
    """Dies before the writer sees a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_) -> None:
        if batch_idx == self.batch:
            raise Killed


@pytest.fixture
def killed(monkeypatch):
    """Run a ``predict`` that dies at a batch; the file of what it had done."""

    def call(config: Path, batch: int, *options: str) -> Path:
        original = DPO.configure_callbacks
        with monkeypatch.context() as patch:
            patch.setattr(DPO, "configure_callbacks", lambda self: [*original(self), Kill(batch)])
            with pytest.raises(Killed):
                predict(config, "killed", *options)
        assert not list((config.parent / "killed").rglob("responses.jsonl"))
        (part,) = (config.parent / "killed" / ".unfinished").rglob("part-0.jsonl")
        return part

    return call


def test_a_killed_generation_goes_on_where_it_stopped(config, killed, monkeypatch):
    whole = predict(config, "whole", *SAMPLED)
    assert len(whole) == 12
    part = killed(config, 2, *SAMPLED)
    assert len(part.read_text().splitlines()) == 6
    rows = []
    original = DPO.predict
    monkeypatch.setattr(
        DPO, "predict", lambda self, batch: rows.append(batch.rows) or original(self, batch)
    )
    assert predict(config, "killed", *SAMPLED) == whole
    assert torch.cat(rows).numel() == 6
    assert not (config.parent / "killed" / ".unfinished").exists()


@pytest.mark.slow
def test_killed_answers_of_two_turns_go_on(config, killed):
    file = config.parent / "question.jsonl"
    turns = [f"Write of film {n}." for n in range(4)]
    questions = [{"question_id": n, "turns": [turn, "Again."]} for n, turn in enumerate(turns)]
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    options = [f"--data.prompts={file}", "--data.eval_pairs_per_batch=1"]
    whole = predict(config, "whole", *options)
    assert len(killed(config, 2, *options).read_text().splitlines()) == 2
    assert predict(config, "killed", *options) == whole

    def choices(root: str) -> list:
        (answers,) = (config.parent / root).rglob("model_answer/model.jsonl")
        return [json.loads(line)["choices"] for line in answers.read_text().splitlines()]

    assert choices("killed") == choices("whole")


@pytest.mark.slow
@pytest.mark.parametrize("cut", [40, 1, 10_000])
def test_a_torn_line_is_done_again(config, killed, cut):
    whole = predict(config, "whole", *SAMPLED)
    part = killed(config, 3, *SAMPLED)
    torn = part.read_bytes()[:-cut]
    part.write_bytes(torn)
    assert predict(config, "killed", *SAMPLED) == whole


@pytest.mark.slow
def test_other_settings_begin_anew(config, killed):
    killed(config, 3, *SAMPLED)
    other = [*SAMPLED, "--model.sampling.seed=1"]
    assert predict(config, "killed", *other) == predict(config, "whole", *other)
    assert list((config.parent / "killed" / ".unfinished").iterdir())


def save_responses(folder: Path, n: int = 6) -> str:
    file = folder / "given.jsonl"
    lines = [{"prompt": f"{i}", "response": "a film " * (i + 1)} for i in range(n)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"--data.score={file}"


def test_scores_of_other_settings_or_weights_begin_anew(config, killed):
    fit(config, "runs", *CHECKPOINTS)
    checkpoints = sorted((config.parent / "runs").rglob("epoch*.ckpt"))
    given = [save_responses(config.parent), "--data.eval_pairs_per_batch=2"]
    first, last = (f"--ckpt_path={checkpoints[place]}" for place in (0, -1))
    killed(config, 1, *given, first)
    for changed in (["--model.policy.dtype=bfloat16", first], [last]):
        found = predict(config, "killed", *given, *changed)
        assert found == predict(config, "whole", *given, *changed)
    assert list((config.parent / "killed" / ".unfinished").iterdir())


def test_two_runs_at_once_do_not_share_a_file(config, killed, capsys):
    part = killed(config, 2, *SAMPLED)
    with part.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            predict(config, "killed", *SAMPLED)
    assert "Another process" in capsys.readouterr().err
    assert predict(config, "killed", *SAMPLED) == predict(config, "whole", *SAMPLED)


def test_a_score_that_is_no_number_ends_the_run(config, monkeypatch, capsys):
    score = {"score": float("nan")}
    monkeypatch.setattr(DPO, "predict", lambda self, batch: [score] * len(batch.rows))
    with pytest.raises(SystemExit):
        predict(config, "scores", save_responses(config.parent))
    assert "the model has diverged" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["SamPO", "LDDPO"])
def test_a_reward_of_pairs_is_no_score_of_a_response(config, capsys, objective):
    with pytest.raises(SystemExit):
        predict(config, "scores", f"--model={objective}", save_responses(config.parent))
    assert f"{objective}'s reward of a response depends" in capsys.readouterr().err


def test_draws_follow_from_the_seed_alone(config):
    first, again = (predict(config, root, *SAMPLED, "--seed_everything=5") for root in "ab")
    assert first == again == predict(config, "c", *SAMPLED, "--seed_everything=6")
    assert first != predict(config, "d", *SAMPLED, "--model.sampling.seed=1")


def test_a_prompt_is_responded_to_once(config):
    source = config.parent / "pairs.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["prompt"] = f"prompt {number % 4}"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = predict(config, "runs")
    prompts = [line["prompt"][0]["content"] for line in lines]
    assert sorted(prompts) == [f"prompt {n}" for n in range(4)]
    assert all(line["prompt"][0]["content"] == rows[line["row"]]["prompt"] for line in lines)


def test_scores_are_implicit_rewards_of_the_responses(config):
    trained = fit(config, "runs", *EXACT, *CHECKPOINTS)
    checkpoint = f"--ckpt_path={last_checkpoint(config.parent / 'runs')}"
    responses = config.parent / "given.jsonl"
    given = [
        {"prompt": "what of it", "response": "a film of wit", "note": "kept"},
        {"prompt": [{"role": "user", "content": "and that"}], "response": "", "row": 7},
        {"prompt": "and that", "response": "two\u2028lines"},
        {"prompt": "what of it", "response": "no", "tokens": 99},
    ]
    responses.write_text("".join(json.dumps(line) + "\n" for line in given))
    found = predict(config, "scores", *EXACT, checkpoint, f"--data.score={responses}")
    data, policy = trained.datamodule, trained.model.policy
    for line, want in zip(found, given, strict=True):
        score = line.pop("score")
        tokens = line.pop("tokens")
        assert line == {"row": given.index(want)} | {k: v for k, v in want.items() if k != "tokens"}
        turns = want["prompt"]
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        prompt = data.encoder.encode_prompt(turns)
        ids = data.encoder.tokenizer(want["response"], add_special_tokens=False)["input_ids"]
        assert tokens == want.get("tokens", len(ids))
        response = [*ids, data.encoder.end_of_turn_id]
        row = TokenizedRow(prompt, [response], [Role.CHOSEN], 0)
        batch = collate([row], data.pad_id, "padded", 1.0)
        with torch.no_grad():
            log_probs = policy.eval()(batch)
        expected = 0.3 * float(log_probs.chosen_log_ratio)
        assert score == pytest.approx(expected, rel=1e-8)
        assert expected != 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "resp', "line 2: not JSON"),
        ('{"prompt": "a"}', "line 2: field 'response'"),
        ('["a", "b"]', "line 2: a JSON object"),
        ('{"response": "a"}', "line 2: field 'prompt'"),
        ('{"prompt": "a", "response": "<|im_end|>"}', "line 2: field 'chosen': the text spells"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named(config, capsys, line, reason):
    responses = config.parent / "given.jsonl"
    responses.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    with pytest.raises(SystemExit):
        predict(config, "scores", f"--data.score={responses}")
    assert reason in capsys.readouterr().err


def test_scoring_needs_no_source(config):
    responses = config.parent / "given.jsonl"
    responses.write_text('{"prompt": "a", "response": "b"}\n')
    (config.parent / "pairs.jsonl").unlink()
    (line,) = predict(config, "scores", f"--data.score={responses}")
    assert line["score"] == 0
