"""Rows and templates that people bring: used, refused or named, never wrong in silence.

The files in tests/cases are restated from public reports on other systems.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from rotopo.data.asked import Ask, margins
from rotopo.data.module import PairwiseDataModule
from rotopo.data.one_source import left_out
from rotopo.data.responses import Responses
from rotopo.data.sources import load_rows
from rotopo.errors import InputError
from rotopo.reward import RewardModule

CASES = Path(__file__).parents[1] / "cases"
PLAIN = (CASES / "three_roles.jinja").read_text()
CALL = {"function": {"name": "add", "arguments": {"a": 1}}, "type": "function"}


@pytest.fixture
def load(tiny_tokenizer_dir, tmp_path):
    """A data module, set up on a file of tests/cases or on rows of one's own."""

    def call(source: str | list[dict], template: str | None = None, **settings):
        if not isinstance(source, str):
            file = tmp_path / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in source))
        else:
            file = Path(source) if Path(source).is_absolute() else CASES / source
        if template is not None and template.endswith(".jinja"):
            template = str(CASES / template)
        data = PairwiseDataModule(
            str(tiny_tokenizer_dir),
            str(file),
            chat_template=template,
            cache_dir=str(tmp_path / "cache"),
            **{"validation": 0.3, **settings},
        )
        data.prepare_data()
        data.setup()
        return data

    return call


def spelled(data: PairwiseDataModule, place: int = 0) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a source row, as their tokens spell them."""
    (tokenized,) = (one.tokenized for one in data.pairs.sources[0].loaded.values())
    pair = tokenized.pairs[place]
    decode = data.encoder.tokenizer.decode
    return tuple(decode(pair[name]) for name in ("prompt", "chosen", "rejected"))


def pair(prompt="Where?", chosen="Here.", rejected="There.", **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def user(content):
    return {"role": "user", "content": content}


def assistant(content=None, **fields):
    return {"role": "assistant", "content": content, **fields}


def of_trl(data: PairwiseDataModule, rows: list[dict]) -> Dataset:
    """The rows as TRL's DPO trainer tokenises them; a content that is null as an empty one, since
    before transformers 5.23 a template may write it out as None there."""
    rows = json.loads(json.dumps(rows).replace('"content": null', '"content": ""'))
    tokenizer = data.encoder.tokenizer
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = DPOConfig(max_length=None, report_to="none", use_cpu=True, bf16=False)
    return DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")


def assert_as_trl(data: PairwiseDataModule, rows: list[dict]) -> None:
    """The same tokens, up to the end of turn: TRL also trains on the line feed that the template
    writes after it, which no model generates."""
    (tokenized,) = (one.tokenized for one in data.pairs.sources[0].loaded.values())
    for ours, theirs in zip(tokenized.pairs, of_trl(data, rows), strict=True):
        assert ours["prompt"] == theirs["prompt_ids"]
        for name in ("chosen", "rejected"):
            ids = theirs[f"{name}_ids"]
            assert ours[name] == ids[: len(ours[name])]
            assert data.encoder.tokenizer.decode(ids[len(ours[name]) :]) in ("", "\n")


# Calls, tools, names


def test_calls_and_tools_reach_the_template(load):
    data = load("tool_calls.jsonl", "tools.jinja")
    prompt, chosen, rejected = spelled(data)
    assert '"get_temp"' in prompt
    assert chosen == 'Let me look.<call>get_temp {"town": "Oslo"}</call><|im_end|>'
    assert '{"town": "nowhere"}' in rejected
    assert_as_trl(data, load_rows(str(CASES / "tool_calls.jsonl")).to_list())


def test_a_history_of_calls_reaches_the_template(load):
    data = load("tool_history.jsonl", "tools.jinja")
    prompt, chosen, _ = spelled(data)
    assert '<call>get_temp {"town": "Oslo"}</call>' in prompt
    assert "5 C [from get_temp]" in prompt
    assert chosen == "It is 5 degrees in Oslo.<|im_end|>"
    assert_as_trl(data, load_rows(str(CASES / "tool_history.jsonl")).to_list())


@pytest.mark.parametrize("file", ["tool_calls.jsonl", "tool_history.jsonl"])
def test_a_template_without_calls_is_refused(load, file):
    with pytest.raises(InputError, match=r"row 0 .*'tools'.*reads no 'tools'.*data\.chat_template"):
        load(file, "three_roles.jinja")


def test_a_pair_that_differs_in_its_call_alone(load):
    rows = [
        pair([user(f"{n}?")], [assistant(tool_calls=[CALL])], [assistant(tool_calls=[other])])
        for n, other in enumerate(
            [{**CALL, "function": {"name": "add", "arguments": {"a": 2}}}] * 4
        )
    ]
    data = load(rows, "tools.jinja")
    assert spelled(data)[1:] == (
        '<call>add {"a": 1}</call><|im_end|>',
        '<call>add {"a": 2}</call><|im_end|>',
    )
    assert_as_trl(data, rows)
    with pytest.raises(InputError, match=r"'chosen'.*does not write the assistant's tool_calls"):
        load(rows, "{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}")


def test_arguments_stay_as_they_are_written(load, tmp_path):
    """Names and their order are each call's own, and numbers what they were."""
    arguments = [{"a": 1, "b": None}, {"b": 2.5, "a": {"deep": [1, 2]}}, {"c": True}, {"a": 1.0}]
    rows = [
        pair([user(f"{n}?")], [assistant(tool_calls=[call])], [assistant("no")])
        for n, a in enumerate(arguments)
        for call in [{"function": {"name": "f", "arguments": a}}]
    ]
    data = load(rows, "tools.jinja")
    for place, a in enumerate(arguments):
        assert spelled(data, place)[1] == f"<call>f {json.dumps(a)}</call><|im_end|>"
    # Of a file of columns, which fill all names in with nulls, the nulls are nobody's.
    Dataset.from_list(rows[:1] + rows[2:3]).to_parquet(str(tmp_path / "rows.parquet"))
    data = load(str(tmp_path / "rows.parquet"), "tools.jinja", validation=0.5)
    assert spelled(data, 1)[1] == '<call>f {"c": true}</call><|im_end|>'


@pytest.mark.parametrize("value", ["", None, [], {}, " ", 0, 1e17])
def test_an_argument_may_be_nothing(load, value):
    """A part that has no other value of its form is changed to something else."""
    call = {"function": {"name": "f", "arguments": {"a": value}}}
    rows = [pair([user(f"{n}?")], [assistant(tool_calls=[call])], "no") for n in range(4)]
    data = load(rows, "tools.jinja")
    assert left_out(data.pairs.sources) == {}
    assert json.dumps({"a": value}) in spelled(data)[1]


def test_a_null_that_is_written_stays(load, tmp_path):
    calls = [{"function": {"name": "f", "arguments": {"a": 1, "b": None}}}]
    other = [{"function": {"name": "f", "arguments": {"a": 1, "b": 2}}}]
    rows = [
        pair([user(f"{n}?")], [assistant(tool_calls=calls)], [assistant(tool_calls=other)])
        for n in range(4)
    ]
    assert '{"a": 1, "b": null}' in spelled(load(rows, "tools.jinja"))[1]


def test_arguments_that_are_texts_are_not_written_twice_over(load):
    """As APIs give them; a template that writes objects would write the text's quotes, too."""
    text = '{"town":"Oslo"}'
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": text}}
    rows = [pair([user(f"{n}?")], [assistant(tool_calls=[call])], "no") for n in range(4)]
    assert spelled(load(rows, "tools.jinja"))[1] == '<call>f {"town": "Oslo"}</call><|im_end|>'
    as_it_is = (
        (CASES / "tools.jinja")
        .read_text()
        .replace("| tojson }}</call>", "if c.function.arguments is string else '' }}</call>")
    )
    assert spelled(load(rows, as_it_is))[1] == f"<call>f {text}</call><|im_end|>"
    items = as_it_is.replace(
        "{{ c.function.arguments if c.function.arguments is string else '' }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    )
    assert spelled(load(rows, items))[1] == "<call>f town=Oslo</call><|im_end|>"


def test_tools_that_are_none(load):
    for tools in ("null", "[]", "", None, []):
        assert left_out(load([pair(tools=tools)] * 4).pairs.sources) == {}
    texts = [json.dumps({"type": "function", "function": {"name": "f", "parameters": {}}})]
    rows = [pair([user(f"{n}?")], tools=texts) for n in range(4)]
    assert '"name": "f"' in spelled(load(rows, "tools.jinja"))[0]
    with pytest.raises(InputError, match=r"row 0 .*'tools'.*JSON schemas"):
        load([pair(tools=[{"function": "f"}])] * 4)


def test_sharegpt_calls_and_observations(load):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    turns = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1}})},
        {"from": "observation", "value": "2"},
    ]
    row = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "It is 2."},
        "rejected": {"from": "gpt", "value": "It is 3."},
        "tools": json.dumps(tools),
        "system": None,
    }
    prompt, chosen, _ = spelled(load([row, row | {"conversations": turns[:1]}], "tools.jinja"))
    assert json.dumps(tools) in prompt
    assert '<call>add {"a": 1}</call>' in prompt
    assert "<|im_start|>tool\n2<|im_end|>" in prompt
    assert chosen == "It is 2.<|im_end|>"


def test_what_a_prompt_holds_beside_its_content_is_counted(load, caplog):
    rows = [
        pair([user(f"{n}?"), assistant("look"), {"role": "tool", "name": "f", "content": "4"}])
        for n in range(4)
    ]
    data = load(rows)
    (label,) = left_out(data.pairs.sources)
    assert label == "name of the tool in the prompt"
    assert left_out(data.pairs.sources)[label].rows == 4
    assert not left_out(data.pairs.sources)[label].refused
    assert data.pairs.describe()[f"left_out/{label}"] == 4
    assert left_out(load(rows, "tools.jinja").pairs.sources) == {}


def test_an_unwritten_field_of_a_response_is_refused(load):
    rows = [pair("q?", [assistant("a", name="Ann")], [assistant("b")]) for _ in range(4)]
    with pytest.raises(InputError, match=r"row 0 .*'chosen'.*the assistant's name \(4 rows\)"):
        load(rows)
    data = load(rows, on_unwritten="warn")
    assert left_out(data.pairs.sources)["name of the assistant in a response"].rows == 4
    dropped = load([*rows, pair("r?"), pair("s?")], on_bad_row="drop")
    assert dropped.pairs.sources[0].loaded["train"].tokenized.counts["bad"] == 4


def test_null_and_empty_fields_are_nothing(load):
    nothing = {"refusal": None, "audio": None, "annotations": [], "function_call": None}
    rows = [pair([user("q?")], [assistant("a", **nothing)], [assistant("b", **nothing)])] * 4
    assert left_out(load(rows).pairs.sources) == {}


# Reasoning and the template's arguments


def test_reasoning_content_is_trained_on(load):
    data = load("reasoning_content.jsonl", "thinking.jinja")
    assert spelled(data)[1] == "<think>\nOslo lies at 0 km.\n</think>\n\nIt is 0 km.<|im_end|>"
    assert_as_trl(data, load_rows(str(CASES / "reasoning_content.jsonl")).to_list())
    with pytest.raises(InputError, match=r"does not write the assistant's reasoning_content"):
        load("reasoning_content.jsonl", "three_roles.jinja")


def test_reasoning_of_earlier_turns_is_counted(load):
    history = [user("1?"), assistant("2", reasoning_content="because"), user("3?")]
    inline = [user("1?"), assistant("<think>\nbecause\n</think>\n\n2"), user("3?")]
    rows = [pair(history), pair(inline), pair("q"), pair("r")]
    found = left_out(load(rows, "thinking.jinja").pairs.sources)
    assert {label: part.rows for label, part in found.items()} == {
        "reasoning_content of the assistant in the prompt": 1,
        "reasoning in the content of the assistant in the prompt": 1,
    }


def test_an_answer_may_speak_of_the_marks_of_reasoning(load):
    text = "Use s.split('</think>') for that."
    history = [user("1?"), assistant(text), user("2?")]
    data = load([pair(history), pair("a"), pair("b"), pair("c")], "{{ bos_token }}" + PLAIN)
    assert left_out(data.pairs.sources) == {}
    assert text in spelled(data)[0]


def test_reasoning_that_a_template_cuts_off_a_response_is_refused(load):
    cuts = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [pair("q?", "<think>so</think>yes", "no")] * 4
    assert spelled(load(rows))[1] == "<think>so</think>yes<|im_end|>"
    with pytest.raises(InputError, match=r"'chosen'.*the assistant's reasoning in the content"):
        load(rows, cuts)


def test_no_thinking_belongs_to_the_prompt(load):
    off = {"enable_thinking": False}
    data = load("no_thinking.jsonl", "thinking.jinja", chat_template_kwargs=off)
    prompt, chosen, _ = spelled(data)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chosen == "It is 0 km to Oslo.<|im_end|>"
    # The same in generation, scoring and an export.
    (question, *_) = load_rows(str(CASES / "no_thinking.jsonl"))
    messages = [user(question["prompt"])]
    ids = data.pairs.sources[0].loaded["train"].tokenized.pairs[0]["prompt"]
    assert data.encoder.encode_prompt(messages) == ids
    exported = data.encoder.tokenizer.apply_chat_template(
        messages,
        chat_template=data.encoder.exported_template(closed=False),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert exported == ids
    # TRL tokenises prompt and response at once, by which this tokenizer parts the two line feeds
    # in between: what the model sees before its first token is then not what it sees in
    # generation. The texts are the same.
    rows = [{"prompt": messages, "chat_template_kwargs": off} for _ in range(4)]
    for row in rows:
        row |= {name: [assistant(question[name])] for name in ("chosen", "rejected")}
    theirs = of_trl(data, rows)[0]
    decode = data.encoder.tokenizer.decode
    assert decode(theirs["prompt_ids"] + theirs["chosen_ids"]) == prompt + chosen + "\n"
    assert theirs["prompt_ids"] == ids[:-1]


def test_a_row_has_the_last_word_on_arguments(load):
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    rows = [pair("a?", chat_template_kwargs=json.dumps(on)), pair("b?"), pair("c?"), pair("d?")]
    data = load(rows, "thinking.jinja", chat_template_kwargs=off)
    assert [spelled(data, n)[0].endswith("</think>\n\n") for n in range(3)] == [False, True, True]
    typo = [pair(chat_template_kwargs={"enable_thinkin": False})] * 4
    with pytest.raises(InputError, match=r"'chat_template_kwargs'.*reads no 'enable_thinkin'"):
        load(typo, "thinking.jinja")
    with pytest.raises(InputError, match=r"data\.chat_template_kwargs.*reads no 'enable_thinkin'"):
        load(rows, "thinking.jinja", chat_template_kwargs={"enable_thinkin": False})


def test_a_file_of_responses_is_tokenised_as_in_training(load, tmp_path):
    data = load("tool_history.jsonl", "tools.jinja", test=0.3)
    first = data.predicted.rows(ends=False)[0]
    line = data.predicted.line(first.row)
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps(line | {"response": "It is warm."}))
    scored = Responses(str(file), data.encoder)
    assert scored.tokens[0]["prompt"] == first.prompt
    assert "get_temp" in data.encoder.tokenizer.decode(scored.tokens[0]["prompt"])


# The clock


@pytest.mark.parametrize("written", ["%d %b %Y", "%H:%M:%S"])
def test_a_template_that_reads_the_clock_gets_one_time(load, written, tmp_path, monkeypatch):
    template = (CASES / "todays_date.jinja").read_text().replace("%d %b %Y", written)
    first = load("json_text.jsonl", template)
    time = first.state_dict()["template_time"]
    assert first.pairs.describe()["template_time"] == time

    kept = next((tmp_path / "cache" / "tokens").glob("*.time"))
    kept.write_text("2024-02-29T08:09:10")  # as if the first time were long ago
    again = load("json_text.jsonl", template)
    today = {"%d %b %Y": "29 Feb 2024", "%H:%M:%S": "08:09:10"}[written]
    assert f"Today Date: {today}" in spelled(again)[0]
    assert spelled(load("json_text.jsonl", template)) == spelled(again)
    assert (
        again.encoder.encode_prompt([user("Where is Oslo?")])
        == again.pairs.sources[0].loaded["train"].tokenized.pairs[0]["prompt"]
    )

    # Without the cache the checkpoint knows.
    shutil.rmtree(tmp_path / "cache")
    resumed = PairwiseDataModule(
        first.pairs.tokenizer_path,
        first.pairs.source,
        chat_template=template,
        cache_dir=str(tmp_path / "c"),
    )
    resumed.take_clock({"PairwiseDataModule": again.state_dict()})
    resumed.prepare_data()
    resumed.setup()
    assert resumed.pairs.fingerprint is not None
    assert spelled(resumed) == spelled(again)


def test_all_ranks_take_the_firsts_time(tiny_tokenizer_dir, tmp_path):
    """As when another node has tokenised the same data at another time, in a cache of its own."""
    file, template = CASES / "json_text.jsonl", str(CASES / "todays_date.jinja")
    data = PairwiseDataModule(
        str(tiny_tokenizer_dir), str(file), chat_template=template, cache_dir=str(tmp_path)
    )
    data.prepare_data()
    assert "Today Date: 29 Feb 2024" not in spelled(data)[0]
    strategy = SimpleNamespace(broadcast=lambda _: "2024-02-29T08:09:10")
    data.trainer = SimpleNamespace(strategy=strategy, state=SimpleNamespace(fn="fit"))
    data.setup("fit")
    assert "Today Date: 29 Feb 2024" in spelled(data)[0]
    assert data.state_dict()["template_time"] == "2024-02-29T08:09:10"


def test_the_time_can_be_set(load):
    data = load("json_text.jsonl", "todays_date.jinja", template_time="1999-12-31")
    assert "Today Date: 31 Dec 1999" in spelled(data)[0]
    with pytest.raises(InputError, match=r"data\.template_time is 'soon'"):
        load("json_text.jsonl", "todays_date.jinja", template_time="soon")


# Several templates


@pytest.fixture
def several(tiny_tokenizer, tmp_path):
    plain, tools = (CASES / f"{n}.jinja" for n in ("three_roles", "tools"))
    tiny_tokenizer.chat_template = {"default": plain.read_text(), "tool_use": tools.read_text()}
    tiny_tokenizer.save_pretrained(tmp_path / "several")
    return tmp_path / "several"


def test_one_of_several_templates_is_named(several, tmp_path):
    def load(**settings):
        data = PairwiseDataModule(
            str(several), str(CASES / "tool_calls.jsonl"), cache_dir=str(tmp_path / "c"), **settings
        )
        data.prepare_data()
        data.setup()
        return data

    data = load(chat_template="tool_use", system_message="Be brief.")
    assert "<call>" in spelled(data)[1]
    exported = data.encoder.exported_template(closed=False)
    assert exported.keys() == {"default", "tool_use"}
    assert exported["default"] == (CASES / "three_roles.jinja").read_text()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(several)
    tokenizer.chat_template = exported
    row = load_rows(str(CASES / "tool_calls.jsonl"))[0]
    ids = tokenizer.apply_chat_template(
        row["prompt"],
        tools=row["tools"],
        chat_template="tool_use",
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == data.pairs.sources[0].loaded["train"].tokenized.pairs[0]["prompt"]
    with pytest.raises(InputError, match=r"reads no 'tools'"):
        load()
    with pytest.raises(InputError, match=r"none is called 'tool_us'.*default, tool_use"):
        load(chat_template="tool_us")


# Roles


@pytest.mark.parametrize(
    ("file", "role"), [("tool_turn.jsonl", "tool"), ("developer_turn.jsonl", "developer")]
)
def test_a_turn_that_the_template_passes_over_is_refused(load, file, role):
    with pytest.raises(InputError, match=rf"row 0 .*'prompt'.*the {role}'s content \(8 rows\)"):
        load(file, "three_roles.jinja")
    assert left_out(load(file).pairs.sources) == {}  # ChatML writes any role


def test_the_doctor_counts_turns_by_role(load):
    rows = [pair([{"role": "critic", "content": "Be bold."}, user(f"{n}?")]) for n in range(3)]
    data = load([*rows, pair("q"), pair("r")], "three_roles.jinja", on_unwritten="warn")
    (finding,) = (f for f in data.findings() if f.check == "unwritten")
    assert finding.severity == "warning"
    assert finding.numbers == {"rows": 5, "without content of the critic in the prompt": 3}


# What is no text


@pytest.mark.parametrize("column", ["images", "image", "audio", "video"])
def test_media_are_refused_by_name(load, column):
    if column == "images":
        with pytest.raises(InputError, match=r"row 0 .*'images'"):
            load("images.jsonl")
    rows = [pair(**{column: ["a.png"] if n == 2 else None}) for n in range(4)]
    with pytest.raises(InputError, match=rf"row 2 .*'{column}'"):
        load(rows)
    assert len(load([pair(**{column: None})] * 4, "three_roles.jinja").rows("train")) > 0


@pytest.mark.parametrize("name", ["images", "audio", "video"])
def test_media_of_a_message_are_refused_by_name(load, name):
    with pytest.raises(InputError, match=rf"row 0 .*'prompt'.*a message has '{name}'"):
        load([pair([user("<image>q") | {name: ["a"]}])] * 4)
    data = load([pair([user("q") | {name: [None]}])] * 4)
    assert left_out(data.pairs.sources) == {}


def test_parts_of_a_content(load):
    prompt, chosen, _ = spelled(load("content_parts.jsonl"))
    assert "Where is Oslo?" in prompt
    assert chosen == "Oslo is far.<|im_end|>"
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image_url": None}]
    system = {"role": "system", "content": None}
    rows = [pair([system, user(parts)], [assistant("a")], [assistant([])])] * 4
    with pytest.raises(InputError, match=r"row 0 .*'rejected'.*empty"):
        load(rows)
    rows = [{"prompt": [system, user(parts)], "completion": [assistant(parts)], "label": True}] * 4
    prompt, chosen, _ = spelled(load(rows))
    assert "system" not in prompt
    assert "one two" in prompt
    assert chosen == "one two<|im_end|>"
    image = [{"type": "image_url", "image_url": {"url": "a.png"}}]
    with pytest.raises(InputError, match=r"row 0 .*'prompt'.*part of type 'image_url'"):
        load([pair([user(image)])] * 4)


@pytest.mark.parametrize("name", ["weight", "train", "loss"])
def test_weights_of_turns_are_obeyed_or_refused(load, name):
    prompt = [user("a?"), assistant("b", **{name: 0}), user("c?")]
    obeyed = pair(prompt, [assistant("d", **{name: 1})], [assistant("e", **{name: True})])
    assert left_out(load([obeyed] * 4, "three_roles.jinja").pairs.sources) == {}
    with pytest.raises(InputError, match=rf"row 0 .*'chosen'.*'{name}'.*not obeyed"):
        load([obeyed | {"chosen": [assistant("d", **{name: 0})]}] * 4)
    with pytest.raises(InputError, match=rf"row 0 .*'prompt'.*'{name}'.*not obeyed"):
        load([obeyed | {"prompt": [user("a?"), assistant("b", **{name: 1}), user("c?")]}] * 4)


def test_columns_that_nothing_reads_are_named_once(load):
    sound = {"prompt_id": "0", "score_chosen": 9.0, "score_rejected": 1.0, "source": "web"}
    sound |= {"system": "be brief", "history": [["a", "b"]], "film": 1, "gap": 2.0}
    data = load([pair(f"{n}?", **sound) for n in range(8)], group_by=None, accuracy_by="film")
    named = "prompt_id, score_chosen, score_rejected, source, system, history, gap"
    assert data.pairs.describe()["columns/unread"] == named
    (finding,) = (f for f in data.findings() if f.check == "columns")
    assert finding.numbers == {"that nothing reads": named}
    assert finding.severity == "ok"


# Texts that stand for something else


def test_messages_kept_as_json_text(load):
    prompt, chosen, _ = spelled(load("json_text.jsonl"))
    assert prompt.endswith("<|im_start|>user\nWhere is Oslo?<|im_end|>\n<|im_start|>assistant\n")
    assert chosen == "Oslo is far.<|im_end|>"
    conversation = [user("q?"), assistant("good")]
    other = [user("q?"), assistant("bad")]
    texts = {"chosen": json.dumps(conversation), "rejected": json.dumps(other)}
    for row in (texts, {"prompt": "q?", **texts}):
        assert spelled(load([row] * 4))[1:] == ("good<|im_end|>", "bad<|im_end|>")
    mixed = load([pair(json.dumps([user("q?")]))] * 4)
    assert "[" not in spelled(mixed)[0]


def test_other_messages_kept_as_text(load):
    one = {name: json.dumps(assistant(name)) for name in ("chosen", "rejected")}
    python = {name: str([assistant(name)]) for name in ("chosen", "rejected")}
    sharegpt = {
        "prompt": json.dumps([{"from": "human", "value": "q?"}]),
        **{n: json.dumps([{"from": "gpt", "value": n}]) for n in ("chosen", "rejected")},
    }
    for row in (pair(**one), pair(**python), sharegpt):
        assert spelled(load([row] * 4))[1:] == ("chosen<|im_end|>", "rejected<|im_end|>")
    whole = json.dumps([user("q?"), assistant("a")])
    with pytest.raises(InputError, match=r"row 0 .*'chosen'.*messages as text"):
        load([pair([user("q?")], whole, "no")] * 4)


def test_a_response_may_be_json(load):
    for chosen in (
        "[]",
        '["a"]',
        '{"role": "assistant"}',
        json.dumps([user("hi"), assistant("ho")]),
    ):
        assert spelled(load([pair("As JSON!", chosen, "no")] * 4))[1] == f"{chosen}<|im_end|>"
    one = json.dumps([assistant("a")])  # and the other is none
    assert spelled(load([pair("As JSON!", one, "no")] * 4))[1] == f"{one}<|im_end|>"


def test_labels_and_numbers_of_a_csv_file(load, tmp_path):
    data = load("kto_labels.csv")
    (tokenized,) = (one.tokenized for one in data.pairs.sources[0].loaded.values())
    assert [bool(ids) for ids in tokenized.pairs["chosen"][:]] == [True, False] * 3 + [True]
    data = load("margin.csv", margin="gap")
    assert margins(data.pairs, "train", Ask(RewardModule.needs, "RewardModule"))[:2] == [
        0.5 * row for row in data.pairs.of["train"]["row"][:2]
    ]
    file = tmp_path / "labels.csv"
    file.write_text(
        "prompt,completion,label\n"
        + "".join(
            f"q,a {n},{t}\n" for n, t in enumerate(["1", "0", "TRUE", "false", " True ", "0.0"])
        )
    )
    (tokenized,) = (one.tokenized for one in load(str(file)).pairs.sources[0].loaded.values())
    assert [bool(ids) for ids in tokenized.pairs["chosen"][:]] == [True, False] * 3
    file.write_text("prompt,completion,label\nq,a,maybe\n")
    with pytest.raises(InputError, match=r"kto: row 0 .*'label': 'maybe' is not true or false"):
        load(str(file))
    file.write_text("prompt,chosen,rejected,gap\nq,a,b,1e-1\nq,c,d,wide\n")
    with pytest.raises(InputError, match=r"data\.margin.*row 1 .*gap is 'wide'"):
        margins(
            load(str(file), margin="gap", validation=0).pairs,
            "train",
            Ask(RewardModule.needs, "RewardModule"),
        )


def test_what_fits_no_format_is_told_row_and_field(load):
    rows = [pair(), pair(chosen=[user("no response")])]
    with pytest.raises(InputError) as raised:
        load(rows)
    lines = str(raised.value).splitlines()
    (explicit,) = (line for line in lines if line.startswith("  explicit:"))
    assert "row 1 (from 0), field 'chosen'" in explicit
    assert "a text or a list of the assistant's messages" in explicit
    (kto,) = (line for line in lines if line.startswith("  kto:"))
    assert "no column 'completion'" in kto


# Prompts inside of prompts


def test_a_dialogue_inside_a_turn_is_split_on_demand(load):
    whole, _, _ = spelled(load("dialogue_in_prompt.jsonl"))
    assert whole.count("<|im_start|>user") == 1
    data = load("dialogue_in_prompt.jsonl", split_dialogues=True)
    prompt, chosen, _ = spelled(data)
    turns = [user("Where is Oslo?"), assistant("In a country."), user("Which?")]
    assert (
        data.encoder.encode_prompt(turns)
        == data.pairs.sources[0].loaded["train"].tokenized.pairs[0]["prompt"]
    )
    assert prompt.count("<|im_start|>user") == 2
    assert chosen == "Oslo is far.<|im_end|>"
    for data_, found in ((data, 0), (load("dialogue_in_prompt.jsonl"), 1)):
        (finding,) = (f for f in data_.findings() if f.check == "dialogues")
        assert (finding.severity == "warning") == found


def test_a_prompt_in_its_responses_is_an_error(load):
    (finding,) = (f for f in load("prompt_in_response.jsonl").findings() if f.severity == "error")
    assert finding.check == "repeated prompts"
    assert finding.numbers["share"] == 1.0
