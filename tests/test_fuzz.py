"""Fuzzed input: it is read as a plain reading of it says, or refused with what and where."""

import csv
import io
import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotopo.data.messages import texts_in
from rotopo.data.schemas import FORMATS, naming_row, read_row, resolve_format
from rotopo.data.sources import load_rows
from rotopo.data.token_cache import fingerprint_rows, tokenize_rows
from rotopo.data.tokenized import Outcome
from rotopo.data.tokens import PairEncoder
from rotopo.errors import InputError
from rotopo.files import read_jsonl
from rotopo.lightning_cli import RotopoCLI, run
from tests.data.test_schemas import ROWS
from tests.small_run import save_config

FEW = {"suppress_health_check": list(HealthCheck)}


def fuzzed(few: int, many: int):
    """A test with few examples by default, and one with many more that is slow."""

    def both(test):
        return pytest.mark.parametrize(
            "examples", [few, pytest.param(many, marks=pytest.mark.slow)]
        )(test)

    return both


ODD_TEXTS = [
    *("", " ", "\n", "\u200b", "\x00", "NA", "null", "4", "2020-01-01", "2020-01-01T10:00:00Z"),
    *("<|im_end|>", "<|eos|>", "<|pad|>", "a\ud800", "\udc00", "\U0001f600", "e\u0301", "\u2028"),
    *("\n\nHuman: q\n\nAssistant: a", "\n\nHuman:", "user", "assistant", "x" * 3000, "\ufeff"),
]
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=8)
NUMBERS = st.sampled_from([0, 1, -1, 2, 1.0, 0.5, 2**53 + 1, 2**63, 10**30, math.nan, math.inf])
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "<|im_end|>", ""]) | TEXTS,
        "content": TEXTS | st.none(),
        "from": st.sampled_from(["human", "gpt", "bot"]),
        "value": TEXTS | NUMBERS,
    },
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
JUNK = (
    LEAVES
    | st.lists(TURNS | LEAVES, max_size=3)
    | TURNS
    | st.dictionaries(TEXTS, LEAVES, max_size=2)
)


def places(value, path=()):
    """Paths of everything inside a value."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def changed_rows(draw, name: str):
    """A row of a format with a few of its parts replaced, removed or added to."""
    row = json.loads(json.dumps(ROWS[name]))
    for _ in range(draw(st.integers(0, 2))):
        if not row:  # of a single column, which is gone
            break
        *path, last = draw(st.sampled_from([p for p in places(row) if p]))
        holder = row
        for key in path:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "text", "remove", "add"]))
        if change == "remove":
            del holder[last]
        elif change == "add" and isinstance(holder, list):
            holder.append(draw(TURNS))
        elif change == "add":
            holder[draw(st.sampled_from(["system", "tools", "extra", "prompt", "label"]))] = draw(
                JUNK
            )
        else:
            holder[last] = draw(TEXTS if change == "text" else JUNK)
    return row


class Refused(Exception):  # noqa: N818
    """A plain reading says that it cannot be used; and in which line, where it knows."""

    def __init__(self, line: int | None = None) -> None:
        self.line = line


def plainly(call, *args) -> tuple:
    """What a plain reading gives, and what it has to say against that: one of them."""
    try:
        return call(*args), None
    except Refused as refused:
        return None, refused


def attempt(call, *args) -> tuple:
    """What a call returns, and how it is refused: one of them."""
    try:
        return call(*args), None
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    return None, message


def need(condition) -> None:
    if not condition:
        raise Refused


def messages(value) -> list:
    need(isinstance(value, list) and value)
    read = []
    for turn in value:
        need(isinstance(turn, dict) and isinstance(turn.get("role"), str))
        need(isinstance(turn.get("content"), str | list | None))
    for turn in value:
        rest = {k: v for k, v in turn.items() if not says_nothing(v)}
        rest = {"role": turn["role"]} | {k: v for k, v in rest.items() if k != "content"}
        content = turn.get("content")
        if isinstance(content, list):
            content = "".join(map(text_part, content))
        if content is not None:
            rest["content"] = content
        elif not (turn["role"] == "assistant" and len(rest) > 1):
            if turn["role"] == "system":
                continue
            need(turn["role"] in ("assistant", "tool"))
            rest["content"] = ""
        read.append(rest)
    return read


def says_nothing(value) -> bool:
    return value in (None, "", {}) or (isinstance(value, list) and all(map(says_nothing, value)))


def text_part(part) -> str:
    if isinstance(part, str):
        return part
    need(isinstance(part, dict) and part.get("type", "text") == "text")
    need(isinstance(part.get("text"), str))
    return part["text"]


def speakers_turns(value) -> list:
    need(isinstance(value, list))
    turns = []
    for turn in value:
        need(isinstance(turn, dict))
        spoken = all(isinstance(turn.get(key), str) for key in ("from", "value"))
        if spoken and turn["from"] in SPEAKERS:
            rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
            turns.append({**rest, "role": SPEAKERS[turn["from"]], "content": turn["value"]})
        else:
            turns.append(turn)
    return messages(turns) if turns else []


def text_or_messages(value, role) -> list:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return conversation(value)


def conversation(value) -> list:
    turns = [value] if isinstance(value, dict) else value
    need(turns)
    return speakers_turns(turns)


def conversations(chosen, rejected) -> tuple:
    """The longest common beginning that ends before turns of the assistant."""
    for n in range(min(len(chosen), len(rejected)), -1, -1):
        if chosen[:n] == rejected[:n] and (n == 0 or chosen[n - 1]["role"] != "assistant"):
            return chosen[:n], chosen[n:], rejected[n:]
    raise AssertionError


def dialogue(text) -> list:
    need(isinstance(text, str))
    marks = list(re.finditer(r"\n\n(Human|Assistant):", text))
    need(marks and not text[: marks[0].start()].strip())
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    role = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": role[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "observation": "tool",
    "function_call": "assistant",
}


def plain_reading(name: str, row: dict) -> tuple:
    """Prompt, chosen and rejected by each format's description."""
    get = row.get
    if name in ("explicit", "kto"):
        prompt = text_or_messages(get("prompt"), "user")
        if name == "kto":
            label, completion = get("label"), text_or_messages(get("completion"), "assistant")
            if isinstance(label, str):
                label = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}.get(
                    label.strip().lower()
                )
            need(label in (0, 1))
            return (prompt, completion, None) if label else (prompt, None, completion)
        return prompt, *(text_or_messages(get(n), "assistant") for n in ("chosen", "rejected"))
    if name in ("implicit", "ultrafeedback"):
        found = conversations(conversation(get("chosen")), conversation(get("rejected")))
        if name == "ultrafeedback":
            need(isinstance(get("prompt"), str))
            need(get("prompt").strip() in [turn.get("content", "").strip() for turn in found[0]])
        return found
    if name == "hh":
        return conversations(dialogue(get("chosen")), dialogue(get("rejected")))
    if name == "align_anything":
        label = get("overall_response")
        need(not isinstance(label, bool) and label in (1, 2, "1", "2", "1.0", "2.0"))
        first = text_or_messages(get("response_1"), "assistant")
        second = text_or_messages(get("response_2"), "assistant")
        pair = (first, second) if label in (1, "1", "1.0") else (second, first)
        return text_or_messages(get("question"), "user"), *pair
    if name == "messages":
        turns = conversation(get("messages"))
        last = [turn["role"] == "assistant" for turn in turns]
        n = len(turns) - (last[::-1].index(False) if False in last else len(turns))
        need(n < len(turns))
        return turns[:n], turns[n:], None
    assert name == "sharegpt", f"the format {name} has no plain reading here yet"
    prompt = speakers_turns(get("conversations"))
    if get("system") and not (prompt and prompt[0]["role"] == "system"):
        need(isinstance(get("system"), str))
        prompt = [{"role": "system", "content": get("system")}, *prompt]
    chosen, rejected = (speakers_turns([get(n)]) for n in ("chosen", "rejected"))
    return prompt, chosen, rejected


def usable(prompt, chosen, rejected) -> tuple:
    need(prompt and prompt[-1]["role"] != "assistant")
    for response in (chosen, rejected):
        if response is not None:
            says = [
                t.get("content", "").strip() or t.keys() - {"role", "content"} for t in response
            ]
            need(any(says))
            need(all(turn["role"] == "assistant" for turn in response))
    both = [
        r and [turn | {"content": turn.get("content", "").strip()} for turn in r]
        for r in (chosen, rejected)
    ]
    need(both[0] != both[1])
    return prompt, chosen, rejected


def usable_tools(row: dict) -> None:
    tools = row.get("tools")
    if isinstance(tools, str):
        need(tools.strip().lower() in ("", "null", "none"))
    elif tools:
        need(isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))
        need(all(isinstance(tool.get("function", tool), dict) for tool in tools))


@fuzzed(40, 1500)
@pytest.mark.parametrize("name", FORMATS)
def test_rows(tiny_tokenizer, name, examples):
    encoder = PairEncoder(tiny_tokenizer)
    control = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]

    def read_numbered(row):
        with naming_row(7):
            return read_row(FORMATS[name], row)

    @settings(max_examples=examples, **FEW)
    @given(changed_rows(name))
    def check(row):
        expected, refused = plainly(lambda: usable(*plain_reading(name, row)))
        refused = refused or plainly(usable_tools, row)[1]
        found, error = attempt(read_numbered, row)
        if refused:
            assert re.match(r"row 7 \(from 0\): .*field", error)
            return
        assert (found.prompt, found.chosen, found.rejected) == expected
        spelled = list(texts_in([*(part or [] for part in expected), found.inputs.tools]))
        if any(token in text for token in control for text in spelled) or not all(
            map(is_text, spelled)
        ):
            with pytest.raises(InputError, match="field"):
                encoder.encode(found)
            return
        pair = encoder.encode(found)
        for response, ids in ((found.chosen, pair.chosen), (found.rejected, pair.rejected)):
            if response is None:
                assert ids == []
                continue
            turns = [{"content": "", **turn} for turn in found.prompt + response]
            written = tiny_tokenizer.apply_chat_template(turns, tokenize=False)
            assert tiny_tokenizer.decode(pair.prompt + ids) + "\n" == written
            assert ids.count(encoder.end_of_turn_id) == len(response)

    check()


def is_text(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def bare(value):
    """Without what is None, which a column has where a row has nothing; NaN made comparable."""
    if isinstance(value, dict):
        return {key: bare(v) for key, v in value.items() if v is not None}
    if isinstance(value, list):
        return [bare(v) for v in value]
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    return ("bool", value) if isinstance(value, bool) else value


LINES = (
    st.builds(lambda row, escape: json.dumps(row, ensure_ascii=escape).encode("utf-8", "replace"),
              st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected"]), JUNK, max_size=3),
              st.booleans())
    | st.sampled_from(
        [json.dumps(ROWS["explicit"]).encode()] * 3
        + [
            *(b"", b"  ", b"null", b"7", b'"x"', b"[1]", b"{}", b'[{"prompt": "a"}]', b"{"),
            b"\xff",
            *(b'{"prompt": "a"', b'{"prompt": "a"} {}', b'{"prompt": "a",}', b"{'prompt': 1}"),
            *(b'{"prompt": 1, "prompt": 2}', b'{"prompt": "\x00"}', b'{"prompt": "\xc3"}'),
            *(b'{"prompt": ' + b"[" * n + b"]" * n + b"}" for n in (3, 2000, 200_000)),
            *(b'{"prompt": ' + n + b"}" for n in (b"1" * 30, b"1" * 5000, b"1e999", b"-Infinity")),
            b'\xef\xbb\xbf{"prompt": "marked"}',
        ]
    )
)  # fmt: skip


def plain_json(text: str):
    """As Python reads it, but for what readers disagree about."""

    def once(pairs):
        need(len(dict(pairs)) == len(pairs) and "\0" not in "".join(dict(pairs)))
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=once)
        need(is_text(json.dumps(value, ensure_ascii=False)))
    except (ValueError, RecursionError):
        raise Refused from None
    return value


def plain_lines(content: bytes, finite: bool = False) -> list[tuple[int, dict]]:
    """Line number and object of each line; of one that cannot be used the number, in Refused."""
    found = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                value = plain_json(text)
                need(isinstance(value, dict))
                json.dumps(value, allow_nan=not finite)
                found.append((number, value))
        except (ValueError, Refused):
            raise Refused(number) from None
    return found


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


CONTENTS = st.builds(
    lambda lines, end, last, mark: mark + end.join(lines) + last,
    st.lists(LINES, max_size=4),
    st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n"]),
    st.sampled_from([b"\n", b""]),
    st.sampled_from([b"", b"", b"\xef\xbb\xbf"]),
)


@fuzzed(60, 2000)
def test_jsonl_files(tmp_path, examples):
    file, copy = tmp_path / "rows.jsonl", tmp_path / "again.jsonl"

    @settings(max_examples=examples, **FEW)
    @given(CONTENTS)
    def check(content):
        file.write_bytes(content)
        copy.write_bytes(content)
        stripped = content.removeprefix(b"\xef\xbb\xbf").lstrip()
        if stripped.startswith(b"[") or stripped.split(b"\n")[0].strip() == b"{":
            return  # a list, or one object: read as a whole
        expected, refused = plainly(plain_lines, content)
        rows, error = attempt(load_rows, str(file))
        if refused:
            named = int(re.search(r"rows\.jsonl, line (\d+)", error)[1])
            # Where an object begins that may take several lines, bytes that are no text come first.
            assert named == refused.line or not is_utf8(content.split(b"\n")[named - 1])
            return
        expected = [row for _, row in expected]
        if not any(expected):
            assert "rows.jsonl: " in error
            return
        if error:
            # Numbers that no column holds, beside other types at least; nesting that none does.
            assert re.search(r"rows\.jsonl: column '(prompt|chosen|rejected)'", error)
            assert re.search(r"\d{16}|\[{50}|NaN|Infinity|1e999", content.decode())
            return
        assert bare(rows.to_list()) == bare(expected)
        assert fingerprint_rows(rows) == fingerprint_rows(load_rows(str(copy)))

    check()


@fuzzed(60, 2000)
def test_json_files(tmp_path, examples):
    """The same rows as a list, whatever the white space."""
    file = tmp_path / "rows.json"
    rows = st.lists(st.dictionaries(st.sampled_from("abc"), JUNK, min_size=1) | LEAVES, max_size=3)

    @settings(max_examples=examples, **FEW)
    @given(rows, st.sampled_from([None, 1]), st.integers(0, 6))
    def check(values, indent, torn):
        text = json.dumps(values, indent=indent)
        text = text[: len(text) - torn] if torn > 3 else text
        file.write_text(text)
        expected, refused = plainly(plain_json, text)
        rows, error = attempt(load_rows, str(file))
        if refused or not all(isinstance(row, dict) for row in expected) or expected == []:
            assert re.search(
                r"rows\.json, line \d+" if text not in ("", "[]") else "rows.json", error
            )
            return
        if error:
            assert re.search(r"rows\.json: column '[abc]'", error)
            assert re.search(r"\d{16}|NaN|Infinity", text)
            return
        assert bare(rows.to_list()) == bare(expected)

    check()


@fuzzed(100, 4000)
def test_files_of_responses(tmp_path, examples):
    file = tmp_path / "responses.jsonl"

    @settings(max_examples=examples, **FEW)
    @given(CONTENTS)
    def check(content):
        file.write_bytes(content)
        expected, refused = plainly(plain_lines, content, True)
        found, error = attempt(lambda: list(read_jsonl(file)))
        if refused:
            assert f"responses.jsonl, line {refused.line}:" in error
        else:
            assert found == expected

    check()


CELLS = st.sampled_from(["", " ", "NA", "4", "02", '"', "a,b", "#", "é", "a\nb", "a\r\nb", "\x00"])
PLAIN_CELLS = CELLS | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def plain_cells(content: bytes) -> list[dict]:
    try:
        names, *records = csv.reader(io.StringIO(content.decode(), newline="\n"), strict=True)
    except (csv.Error, ValueError):
        raise Refused from None
    records = [record for record in records if record]
    need(names and all(names) and len(set(names)) == len(names))
    need(records and all(len(record) == len(names) for record in records))
    return [dict(zip(names, record, strict=True)) for record in records]


@fuzzed(25, 500)
def test_csv_files(tmp_path, examples):
    file = tmp_path / "rows.csv"

    @settings(max_examples=examples, **FEW)
    @given(
        st.lists(st.lists(PLAIN_CELLS, min_size=2, max_size=2), max_size=3),
        st.sampled_from(["prompt,chosen", "prompt,chosen,", "prompt,prompt", "prompt", "", "é,x"]),
        st.sampled_from(["", '"', "a", "a,b,c", "\xff", 'x"y,z', "\r"]),
        st.booleans(),
    )
    def check(rows, header, rest, quoted):
        stream = io.StringIO()
        style = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
        csv.writer(stream, lineterminator="\n", quoting=style).writerows(rows)
        content = f"{header}\n{stream.getvalue()}{rest}".encode(
            "latin-1" if rest == "\xff" else "utf-8", "replace"
        )
        file.write_bytes(content)
        expected, refused = plainly(plain_cells, content)
        rows, error = attempt(load_rows, str(file))
        if refused:
            assert "rows.csv" in error
        else:
            assert rows.to_list() == expected

    check()


@fuzzed(12, 200)
def test_from_rows_to_tokens(tmp_path, tiny_tokenizer, examples):
    """Rows kept and dropped add up, what is kept decodes to its row, and an error names the first
    row that cannot be used."""
    encoder = PairEncoder(tiny_tokenizer, max_length=600, truncation="drop")
    file = tmp_path / "rows.jsonl"
    texts = st.text(min_size=1, max_size=6) | st.sampled_from([t for t in ODD_TEXTS if is_text(t)])
    rows = st.lists(
        st.fixed_dictionaries(
            {
                "prompt": texts,
                "chosen": texts,
                "rejected": texts | st.none(),
                "n": st.integers(0, 3),
            }
        ),
        min_size=1,
        max_size=6,
    )

    @settings(max_examples=examples, **FEW)
    @given(rows)
    def check(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        loaded = load_rows(str(file))
        row_format = resolve_format("explicit", loaded)

        def tokenize(on_bad_row):
            return tokenize_rows(loaded, row_format, encoder, tmp_path / "cache", 1, on_bad_row)

        outcomes = []
        for row in rows:
            try:
                outcomes.append(encoder.truncate(encoder.encode(read_row(row_format, row)))[1])
            except InputError:
                outcomes.append(Outcome.BAD)
        kept = [n for n, outcome in enumerate(outcomes) if outcome < Outcome.TOO_LONG]
        if Outcome.BAD in outcomes:
            with pytest.raises(InputError, match=rf"^row {outcomes.index(Outcome.BAD)} \(from 0\)"):
                tokenize("error")
        if not kept:
            assert "no pair is left" in attempt(tokenize, "drop")[1]
            return
        found = tokenize("drop")
        assert sum(found.counts.values()) == len(rows)
        assert found.counts == {o.name.lower(): outcomes.count(o) for o in Outcome}
        assert found.pairs["row"][:] == kept
        for pair in found.pairs.to_list():
            row = rows[pair["row"]]
            for name in ("chosen", "rejected"):
                turns = [{"role": "user", "content": row["prompt"]},
                         {"role": "assistant", "content": row[name]}]  # fmt: skip
                written = tiny_tokenizer.apply_chat_template(turns, tokenize=False)
                assert tiny_tokenizer.decode(pair["prompt"] + pair[name]) + "\n" == written

    check()


DATA = (
    "train_split validation test group_by extra_responses margin train_pairs balance_lengths noise "
    "accuracy_by pairs_per_step score eval_pairs_per_batch token_budget layout length_window "
    "format chat_template system_message pad_token max_length truncation on_bad_row num_workers "
    "num_proc seed cache_dir doctor no_such_setting"
)
MODEL = (
    "beta label_smoothing policy policy.adapter policy.dtype policy.attention policy.reference "
    "policy.compile policy.reference_cache optimizer optimizer.lr scheduler scheduler.decay "
    "sampling sampling.temperature sampling.seed no_such_setting"
)
TRAINER = (
    "max_epochs max_steps accumulate_grad_batches devices accelerator strategy precision "
    "gradient_clip_val gradient_clip_algorithm val_check_interval check_val_every_n_epoch "
    "limit_train_batches limit_val_batches log_every_n_steps callbacks logger num_nodes "
    "overfit_batches fast_dev_run max_time deterministic profiler plugins no_such_setting"
)
SETTINGS = [
    *(f"data.{name}" for name in DATA.split()),
    *(f"model.{name}" for name in MODEL.split()),
    *(f"trainer.{name}" for name in TRAINER.split()),
    "seed_everything",
]
VALUES = [
    *("-1", "0", "1", "2.5", "1e99", ".nan", "true", "null", "x", "''", "[]", "{}", "[[1]]"),
    *("99999999999999999999", "-0.5", "{a: b}", "[x, null]", "cpu", "train[:3]", "2020-01-01"),
]
# What was a traceback, or no error, or climbed the loss.
FOUND = [
    *(("data.max_length", "null"), ("data.train_split", "null"), ("data.seed", "-1")),
    *(("data.test", "null"), ("data.num_proc", "-1"), ("data.pairs_per_step", "null")),
    *(("trainer.devices", "0"), ("trainer.accelerator", "x"), ("trainer.strategy", "x")),
    *(("trainer.max_time", "x"), ("trainer.accumulate_grad_batches", "0")),
    *(("trainer.gradient_clip_val", "-1"), ("trainer.check_val_every_n_epoch", "0")),
    *(("seed_everything", "-1"), ("model.beta", "null"), ("model.sampling", "[]")),
    ("trainer.devices", "99999999999999999999"),
]


@pytest.fixture
def try_settings(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    """The message that refuses settings; None where they work, and all rows are accounted for."""
    config = save_config(tmp_path, tiny_tokenizer)
    monkeypatch.chdir(tmp_path)  # some values are good names of folders
    # A fit up to its data: the command doctor would run on one processor whatever is set.
    monkeypatch.setattr(
        RotopoCLI, "_run_subcommand", lambda cli, _: cli.trainer.doctor(cli.model, cli.datamodule)
    )

    def call(settings):
        options = [f"--{name}={value}" for name, value in settings]
        capsys.readouterr()
        status = 0
        try:
            cli = run(["fit", "--config", str(config), *options])
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        if status:
            assert status == 2
            return error
        facts = cli.datamodule.pairs.describe()
        split, rows = (
            ("train[:3]", 3) if ("data.train_split", "train[:3]") in settings else ("train", 40)
        )
        assert sum(n for name, n in facts.items() if name.startswith(f"rows/{split}/")) == rows
        return None

    return call


@pytest.mark.parametrize(("setting", "value"), FOUND)
def test_settings_that_were_not_refused_by_name(try_settings, setting, value):
    last = try_settings([(setting, value)]).strip().splitlines()[-1]
    assert last.startswith("rotopo: ")
    # Lightning's message for a bad max_time says only what it is.
    assert (setting.rpartition(".")[2] if setting != "trainer.max_time" else "'x'") in last


@fuzzed(6, 60)
def test_settings(try_settings, examples):
    @settings(max_examples=examples, **FEW)
    @given(
        st.lists(
            st.tuples(st.sampled_from(SETTINGS), st.sampled_from(VALUES)),
            min_size=1,
            max_size=3,
            unique_by=lambda setting: setting[0],
        )
    )
    def check(changes):
        error = try_settings(changes)
        if error is None:
            return
        # By their names, or the value where the setting is a name itself.
        names = [name.rpartition(".")[2] for name, _ in changes]
        assert any(part in error for part in names + [value for _, value in changes if value])

    check()
