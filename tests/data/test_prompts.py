"""Prompts of a file, and the answers in the shapes that evaluations read."""

import json
import re
from pathlib import Path

import pytest
import torch

from rotopo.cli import run
from rotopo.data.batch import collate_prompts
from rotopo.data.predicted import Predicted
from rotopo.data.prompts import Prompts
from rotopo.data.tokens import PairEncoder
from rotopo.errors import InputError
from tests.small_run import save_config

# Questions as the evaluations' files have them, and how their own code reads the answers.
ALPACA_EVAL = [
    {
        "instruction": f"Name {n} films.",
        "output": "none",
        "generator": "text_davinci_003",
        "dataset": "helpful_base",
        "datasplit": "eval",
    }
    for n in range(3)
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write of a film.", "Shorter."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "2 + 2?"], "reference": ["2"]},
    {"question_id": 82, "category": "roleplay", "turns": ["Be a film.", "Be another."]},
]
ARENA_HARD = [
    {"uid": f"uid{n}", "category": "hard_prompt", "subcategory": "coding", "prompt": f"Film {n}?"}
    for n in range(3)
]
IFEVAL = [
    {
        "key": 1000 + n,
        "instruction_id_list": ["punctuation:no_comma"],
        "prompt": f"Say {n}.",
        "kwargs": [{}],
    }
    for n in range(3)
]


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    return save_config(tmp_path, tiny_tokenizer)


def save(folder: Path, questions: list) -> str:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
    return f"--data.prompts={file}"


def predict(config: Path, *options: str):
    """What the command built, and the lines of responses.jsonl."""
    cli = run(["predict", "--config", str(config), *options])
    return cli, read(Path(cli.trainer.log_dir) / "responses.jsonl")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]


def test_alpaca_eval(config, tmp_path):
    """Without a source, and by the base model under its own name."""
    (tmp_path / "pairs.jsonl").unlink()
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps(ALPACA_EVAL, indent=2))
    cli, lines = predict(config, f"--data.prompts={file}", "--data.answers_as=ours")
    folder = Path(cli.trainer.log_dir)
    assert [line.keys() for line in lines] == [{"row", "prompt", "response", "tokens"}] * 3
    answers = json.loads((folder / "model_outputs.json").read_text())
    assert answers == [
        {
            "dataset": "helpful_base",
            "datasplit": "eval",
            "instruction": question["instruction"],
            "output": line["response"].strip(),
            "generator": "ours",
        }
        for question, line in zip(ALPACA_EVAL, lines, strict=True)
    ]


def answers(tokenizer, folder: Path, questions: list) -> tuple[str, list[dict]]:
    """The name and the lines of the file of answers to questions, each with its number."""
    prompts = Prompts(save(folder, questions).partition("=")[2], PairEncoder(tokenizer))
    lines = [prompts.line(row) | {"response": f" {row}\n"} for row in range(len(questions))]
    found = prompts.answers(lines, "ours")
    return found.file, [json.loads(line) for line in found.text.splitlines()]


def test_ifeval(tiny_tokenizer, tmp_path):
    """Its evaluation looks responses up by the prompt's text."""
    file, found = answers(tiny_tokenizer, tmp_path, IFEVAL)
    assert file == "input_response_data.jsonl"
    assert {line["prompt"]: line["response"] for line in found} == {
        "Say 0.": " 0\n",
        "Say 1.": " 1\n",
        "Say 2.": " 2\n",
    }


def test_arena_hard(tiny_tokenizer, tmp_path):
    file, found = answers(tiny_tokenizer, tmp_path, ARENA_HARD)
    assert file == "model_answer/ours.jsonl"
    assert [answer["uid"] for answer in found] == ["uid0", "uid1", "uid2"]
    assert len({answer["ans_id"] for answer in found}) == 3
    for row, answer in enumerate(found):
        assert answer["model"] == "ours"
        assert answer["messages"][0] == {"role": "user", "content": f"Film {row}?"}
        assert answer["messages"][-1]["content"]["answer"] == f" {row}\n"


def test_mt_bench_answers_the_second_turn_behind_the_first_answer(config, tmp_path, caplog):
    """Greedy questions against transformers' own generation, turn by turn."""
    file = save(tmp_path, [question | {"required_temperature": 0} for question in MT_BENCH])
    cli, lines = predict(config, file, "--model.policy.dtype=float64")
    found = read(Path(cli.trainer.log_dir) / "model_answer" / "model.jsonl")
    assert "3 questions of MT-Bench, of 2 turns each, at its temperatures (0)" in caplog.text
    encoder, policy = cli.datamodule.encoder, cli.model.policy.eval()
    for answer, question, line in zip(found, MT_BENCH, lines, strict=True):
        assert answer["question_id"] == question["question_id"]
        assert answer["model_id"] == "model"
        ((choice),) = answer["choices"]
        assert choice["index"] == 0
        dialogue = []
        for turn, written in zip(question["turns"], choice["turns"], strict=True):
            dialogue.append({"role": "user", "content": turn})
            prompt = torch.tensor([encoder.encode_prompt(dialogue)])
            with torch.no_grad():
                ids = policy.language_model.generate(
                    prompt, max_new_tokens=4, do_sample=False, eos_token_id=encoder.stop_ids
                )[0, prompt.shape[1] :]
            text = encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert written == text
            dialogue.append({"role": "assistant", "content": text})
        assert line["prompt"] == dialogue[:-1]
        assert line["response"].strip() == dialogue[-1]["content"]


def test_mt_bench_has_temperatures_of_its_own(config, tmp_path):
    """With another seed answers that are drawn change, and greedy ones do not."""
    file = save(tmp_path, MT_BENCH)
    _, first = predict(config, file)
    _, other = predict(config, file, "--model.sampling.seed=1", "--data.eval_pairs_per_batch=1")
    same = [one["response"] == two["response"] for one, two in zip(first, other, strict=True)]
    assert same == [False, True, False]


def test_any_prompts(tiny_tokenizer, tmp_path):
    """Texts or messages; what else a line says comes out again."""
    dialogue = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    file = save(tmp_path, [{"prompt": "a", "id": 7}, {"prompt": dialogue}]).partition("=")[2]
    prompts = Prompts(file, PairEncoder(tiny_tokenizer))
    assert prompts.line(0) == {"row": 0, "id": 7, "prompt": dialogue[:1]}
    assert prompts.line(1) == {"row": 1, "prompt": dialogue}
    assert prompts.tokens[1]["prompt"] == prompts.encoder.encode_prompt(dialogue)
    assert prompts.answers([], "ours") is None


@pytest.mark.parametrize(
    ("questions", "reason"),
    [
        ([{"question": "a"}], "line 1: field 'prompt'"),
        ([{"instruction": "a"}, {"output": "a"}], "line 2: there is no field 'instruction'"),
        ([{"instruction": "a", "input": "b"}], "field 'input'"),
        ([{"question_id": 1, "turns": ["a", "b"]}, {"question_id": 2, "turns": ["a"]}], "1 turns"),
        ([{"question_id": 1, "turns": [{"content": "a"}]}], "field 'turns': expected texts"),
        ([{"question_id": 1, "turns": ["a", "<|im_end|>"]}], "spells the control token"),
        ([{"question_id": 1, "turns": ["a"], "required_temperature": "hot"}], "no temperature"),
        ([{"uid": 1, "prompt": "a " * 600}], "raise it, since no question is cut"),
        ([], "holds no prompt"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(tiny_tokenizer, tmp_path, questions, reason):
    file = save(tmp_path, questions).partition("=")[2]
    with pytest.raises(InputError, match=f"data.prompts: .*{re.escape(reason)}"):
        Prompts(file, PairEncoder(tiny_tokenizer))


def test_what_a_model_spells_is_no_end_of_its_turn(tiny_tokenizer, tmp_path):
    """Piece by piece a model may write the text of a control token, even one inside another."""
    file = save(tmp_path, MT_BENCH[:1]).partition("=")[2]
    prompts = Prompts(file, PairEncoder(tiny_tokenizer))
    written = tiny_tokenizer("a<|im_<|im_end|>end|>b", split_special_tokens=True)["input_ids"]
    batch = collate_prompts([[5]], 0, [0])
    (found,) = prompts.respond(batch, lambda _: [written])
    assert found["prompt"][1] == {"role": "assistant", "content": "ab"}


def test_settings_that_do_not_go_together(config, message, tmp_path):
    prompts = save(tmp_path, ARENA_HARD)
    both = message(prompts, f"--data.score={tmp_path / 'x.jsonl'}", command="predict")
    assert "data.score and data.prompts" in both
    with pytest.raises(InputError, match="can be no /"):
        Predicted(None, prompts="x.jsonl", answers_as="org/name")
