"""The data doctor: clean data gives no finding, each planted fault is found with its numbers."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rotopo.cli import run
from rotopo.data.doctor import limits
from rotopo.data.doctor.diagnosis import diagnose, refusal, render
from rotopo.data.doctor.examination import Patient, Severity
from rotopo.data.noise import with_flips
from rotopo.data.schemas import FORMATS, Preference
from rotopo.data.tokenized import Outcome
from rotopo.data.tokens import PairEncoder
from rotopo.errors import InputError
from rotopo.intervals import wilson_interval
from rotopo.models.policy import Policy
from rotopo.models.scorer import Scorer
from rotopo.pretrained import Positions
from tests.byte_tokenizer import CHATML
from tests.data.test_tokens import GEMMA, STYLES
from tests.ranks import on_ranks, strategy
from tests.small_run import save_config

N = 40
STRENGTHS = [1, 3, 25]
IDS = List(Value("int32"))


def clean(n: int = N, first: int = 0) -> list[dict]:
    """Rows that nothing is wrong with: every other chosen response is the longer one."""
    return [
        {
            "prompt": f"what is number {i}?",
            "chosen": f"it is {i}" + " indeed" * (i % 2),
            "rejected": f"it may be {i + 1}" + " or so" * (1 - i % 2),
        }
        for i in range(first, first + n)
    ]


@pytest.fixture
def tokenizer(make_byte_tokenizer):
    special, template, bos, eos, pad, adds_bos = STYLES["gemma, bos by the template"]
    return make_byte_tokenizer(special, template, bos, eos, pad, adds_bos)


def patient(encoder, read=FORMATS["explicit"].read, extra=(), **splits) -> Patient:
    """Rows as the token cache would keep them, those of each split from number 0."""
    outcomes, pairs, kept = Counter(), {}, {}
    for split, rows in splits.items():
        columns = {name: [] for name in ("prompt", "chosen", "rejected", *extra, "row")}
        kept[split] = []
        for number, row in enumerate(rows):
            preference = read(row)
            for role in extra:
                preference.extra[role] = [{"role": "assistant", "content": row[role]}]
            kept[split].append(preference)
            try:
                pair, outcome = encoder.truncate(encoder.encode(preference))
            except InputError:
                outcome = Outcome.BAD
            outcomes[outcome] += 1
            if outcome < Outcome.TOO_LONG:
                values = (pair.prompt, pair.chosen, pair.rejected, *pair.extra.values(), number)
                for name, value in zip(columns, values, strict=True):
                    columns[name].append(value)
        features = Features(dict.fromkeys(columns, IDS) | {"row": Value("int64")})
        pairs[split] = Dataset.from_dict(columns, features=features)
    counts = {outcome.name.lower(): outcomes[outcome] for outcome in Outcome}
    return Patient(encoder, pairs, pairs["train"], lambda s, row: kept[s][row], counts)


def planted(healthy: Patient, column: str, rows: range, change, split: str = "train") -> Patient:
    """The patient with some rows' tokens changed in one column."""
    table = healthy.pairs[split].to_dict()
    for row in rows:
        table[column][row] = change(table[column][row])
    pairs = Dataset.from_dict(table, features=healthy.pairs[split].features)
    changed = {**healthy.pairs, split: pairs}
    return replace(healthy, pairs=changed, drawn=changed["train"])


def worse(findings) -> dict:
    """What is not well: severity and numbers by check."""
    return {f.check: (f.severity, f.numbers) for f in findings if f.severity != Severity.OK}


def numbers(patient: Patient, check: str) -> dict:
    return next(f.numbers for f in diagnose(patient) if f.check == check)


def only(patient: Patient, check: str, severity: str, *also: str) -> dict:
    """The numbers of the one finding there is, but for those that follow from it."""
    found = worse(diagnose(patient))
    assert set(found) - set(also) == {check}
    assert found[check][0] == severity
    return found[check][1]


@pytest.mark.parametrize("style", STYLES)
def test_clean_data_gives_no_finding(make_byte_tokenizer, style):
    special, template, bos, eos, pad, adds_bos = STYLES[style]
    encoder = PairEncoder(make_byte_tokenizer(special, template, bos, eos, pad, adds_bos))
    parts = {"train": clean(), "validation": clean(8, N), "test": clean(8, 60)}
    found = diagnose(replace(patient(encoder, **parts), vocabulary=len(encoder.tokenizer)))
    if style == "llama 3, bos by both":
        # Of two line feeds in front of a word GPT-2's rules, unlike Llama's, leave it one: so the
        # whole text has other tokens indeed, in every prompt.
        assert worse(found).keys() == {"tokenised as a whole"}
        assert worse(found)["tokenised as a whole"][1]["of the prompt"] == 2 * N
        return
    assert worse(found) == {}
    assert refusal(found) is None
    assert len(render(found).splitlines()) == 1 + len(found)
    assert render(found, complete=False).splitlines() == [
        f"Data doctor: {len(found)} checks, 0 errors, 0 warnings."
    ]
    json.dumps([f.numbers for f in found])


def test_a_clean_set_of_one_pair_or_with_several_turns_has_no_finding(tokenizer):
    assert worse(diagnose(patient(PairEncoder(tokenizer), train=clean(1)))) == {}
    turn = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "I do"}]
    rows = [
        {
            "prompt": [*turn, turn[0]],
            "chosen": [turn[1], {"role": "assistant", "content": f"and {i}" + "." * (i % 2)}],
            "rejected": [turn[1], {"role": "assistant", "content": f"or {i}." + "!" * (1 - i % 2)}],
        }
        for i in range(N)
    ]
    assert worse(diagnose(patient(PairEncoder(tokenizer), train=rows))) == {}


@pytest.mark.parametrize("k", STRENGTHS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bos(tokenizer, k, split):
    encoder, bos = PairEncoder(tokenizer), tokenizer.bos_token_id
    healthy = patient(encoder, train=clean(), test=clean(30, N))
    stored = ("tokens as stored",)  # in train they are not those of the rows either
    for change, name in (
        (lambda ids: ids[1:], "rows without"),
        (lambda ids: [bos, *ids], "rows with several"),
        (lambda ids: [*ids, bos], "rows with several"),
    ):
        ill = planted(healthy, "prompt", range(2, 2 + k), change, split)
        found = only(ill, "bos", "error", *stored)
        expected = dict.fromkeys(("rows without", "rows with several", "rows with one inside"), 0)
        assert found == {"written": 1} | expected | {name: k}
        (advice,) = (f.advice for f in diagnose(ill) if f.check == "bos")
        assert f"row 2 of {split}" in advice
    ill = planted(healthy, "rejected", range(k), lambda ids: [bos, *ids], split)
    assert only(ill, "bos", "error", *stored)["rows with one inside"] == k


def test_a_template_that_writes_two_bos(tokenizer):
    encoder = PairEncoder(tokenizer, chat_template="{{ bos_token }}" + GEMMA)
    found = only(patient(encoder, train=clean(), test=clean(5, N)), "bos", "error")
    assert found["rows with several"] == N + 5
    assert found["written"] == 2


def test_two_bos_where_every_turn_has_one(make_byte_tokenizer):
    special, template, bos, eos, pad, _ = STYLES["chatml, bos at every turn"]
    encoder = PairEncoder(make_byte_tokenizer(special, template, bos, eos, pad, False))
    healthy = patient(encoder, train=clean())
    ill = planted(healthy, "prompt", range(7), lambda ids: [ids[0], *ids])
    found = only(ill, "bos", "error", "tokens as stored")
    assert (found["written"], found["rows with several"]) == ("every turn", 7)


@pytest.mark.parametrize("k", STRENGTHS)
def test_end_of_turn(tokenizer, k):
    encoder = PairEncoder(tokenizer)
    end = encoder.end_of_turn_id
    healthy = patient(encoder, train=clean(), validation=clean(30, N))
    for column in ("chosen", "rejected"):
        for split in ("train", "validation"):
            ill = planted(healthy, column, range(k), lambda ids: ids[:-1], split)
            found = only(ill, "end of turn", "error", "tokens as stored")
            assert found == {"responses": 140, "without": k, "with more inside": 0}
            ill = planted(healthy, column, range(k), lambda ids: [ids[0], end, *ids[1:]], split)
            found = only(ill, "end of turn", "error", "tokens as stored", "round trip")
            assert found == {"responses": 140, "without": 0, "with more inside": k}


@pytest.mark.parametrize("k", STRENGTHS)
def test_pad_and_eos_inside(tokenizer, k):
    encoder = PairEncoder(tokenizer)
    healthy = patient(encoder, train=clean())
    for column in ("prompt", "chosen"):
        for token, name in (
            (encoder.pad_id, "rows with pad"),
            (tokenizer.eos_token_id, "rows with eos"),
        ):
            ill = planted(
                healthy, column, range(k), lambda ids, token=token: [*ids[:-1], token, ids[-1]]
            )
            found = only(ill, "pad and eos", "error", "tokens as stored")
            assert found[name] == k
            assert found["rows with pad"] + found["rows with eos"] == k


def test_pad_that_is_eos_is_said_and_a_pad_that_the_template_writes_is_a_warning(
    make_byte_tokenizer,
):
    special = ["<e>", "<b>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = make_byte_tokenizer(special, GEMMA, "<b>", "<e>", "<e>", False)
    found = diagnose(patient(PairEncoder(tokenizer), train=clean()))
    assert worse(found) == {}
    (pad,) = (f.numbers for f in found if f.check == "pad and eos")
    assert pad["pad is eos"] == "yes"
    tokenizer.chat_template = GEMMA.replace("'<end_of_turn>\n'", "'<end_of_turn>' + eos_token")
    history = [{"role": r, "content": "a"} for r in ("user", "assistant", "user")]
    rows = [row | {"prompt": [*history[:2], history[0] | {"content": row["prompt"]}]}
            for row in clean()[:5]]  # fmt: skip
    ill = patient(PairEncoder(tokenizer), train=clean()[5:] + rows)
    # The first turn has one behind it, too.
    assert only(ill, "pad and eos", "warning")["rows with pad"] == N


@pytest.mark.parametrize("k", STRENGTHS)
def test_empty_and_equal_responses(tokenizer, k):
    encoder = PairEncoder(tokenizer)
    healthy = patient(encoder, train=clean())
    ill = planted(healthy, "rejected", range(k), lambda ids: ids[-1:])
    found = only(ill, "empty responses", "error", "tokens as stored", "length bias")
    assert found == {"rows with no token": k, "rows with nothing visible": 0}

    rows = [row | {"chosen": "​ \n"} for row in clean()[:k]] + clean()[k:]
    found = only(patient(encoder, train=rows), "empty responses", "warning", "length bias")
    assert found == {"rows with no token": 0, "rows with nothing visible": k}

    pairs = healthy.pairs["train"].to_dict()
    pairs["rejected"][:k] = pairs["chosen"][:k]
    same = Dataset.from_dict(pairs, features=healthy.pairs["train"].features)
    ill = replace(healthy, pairs={"train": same}, drawn=same)
    # Swapped, such a pair is itself.
    found = only(ill, "equal responses", "error", "tokens as stored", "duplicates", "length bias")
    assert found == {"pairs": k}


@pytest.mark.parametrize("k", STRENGTHS)
def test_short_prompts(tokenizer, k):
    rows = [row | {"prompt": "x" if i < k else row["prompt"]} for i, row in enumerate(clean())]
    found = only(patient(PairEncoder(tokenizer), train=rows), "short prompts", "warning")
    assert found == {"prompts": N, "of a token or none": k, "share": k / N}


def test_a_cut_prompt_is_short_by_what_is_left_of_its_content(tokenizer):
    """Of the prompt <b> user-header content <eot> assistant-header the left side goes."""
    whole = PairEncoder(tokenizer).encode_prompt([{"role": "user", "content": "x" * 50}])
    response = len("y" * 30) + 1
    behind = len(whole) - whole.index(tokenizer.get_vocab()["x"]) - 50
    for left, short in ((5, 0), (2, 0), (1, 3), (0, 3)):
        encoder = PairEncoder(tokenizer, max_length=1 + left + behind + response)
        cut = [{"prompt": "x" * 50, "chosen": "y" * 30, "rejected": "z" * 29 + c} for c in "abc"]
        found = numbers(patient(encoder, train=cut), "short prompts")
        assert found["of a token or none"] == short


@pytest.mark.parametrize("k", STRENGTHS)
def test_truncation_counts_and_tokens_lost(tokenizer, k):
    encoder = PairEncoder(tokenizer)
    long = [row | {"prompt": row["prompt"] + "x" * 400} for row in clean()[:k]]
    lengths = [len(encoder.encode(FORMATS["explicit"].read(row)).prompt) for row in long]
    encoder = PairEncoder(tokenizer, max_length=300)
    ill = patient(encoder, train=long + clean()[k:])
    found = numbers(ill, "truncation")
    assert (found["rows"], found["prompts cut"], found["responses cut"]) == (N, k, 0)
    left = sum(len(ids) for ids in ill.pairs["train"]["prompt"][:k])
    assert found["share of prompt tokens lost there"] == pytest.approx(1 - left / sum(lengths))
    assert found["share of response tokens lost there"] == 0
    expected = "warning" if k / N > limits.PROMPTS_CUT else "ok"
    assert next(f.severity for f in diagnose(ill) if f.check == "truncation") == expected

    encoder = PairEncoder(tokenizer, max_length=300, truncation="drop")
    found = numbers(patient(encoder, train=long + clean()[k:]), "truncation")
    assert (found["dropped as too long"], found["prompts cut"]) == (k, 0)


def test_a_run_whose_every_response_is_cut_is_refused(tokenizer):
    rows = [row | {"chosen": "x" * 300, "rejected": "y" * 300} for row in clean()]
    encoder = PairEncoder(tokenizer, max_length=200, truncation="response_right")
    found = only(patient(encoder, train=rows), "truncation", "error")
    assert found["responses cut"] == N
    assert "data.max_length" in refusal(diagnose(patient(encoder, train=rows)))


@pytest.mark.parametrize(("k", "severity"), [(1, "warning"), (5, "warning"), (30, "error")])
def test_little_difference_is_left(tokenizer, k, severity):
    """k pairs differ in the last two of the tokens that are kept; the others in all of them."""
    prompt = len(PairEncoder(tokenizer).encode_prompt([{"role": "user", "content": "q"}]))
    encoder = PairEncoder(tokenizer, max_length=prompt + 60, truncation="response_right")
    rows = [
        {"prompt": "q", "chosen": "s" * same + "c" * 200, "rejected": "s" * same + "r" * 200}
        for same in [58] * k + [57] * (N - k)
    ]
    found = {f.check: f for f in diagnose(patient(encoder, train=rows))}["difference left"]
    assert found.severity == severity
    assert found.numbers["with a cut response"] == N
    assert found.numbers["share"] == k / N
    assert k in found.numbers.values()


@pytest.mark.parametrize("k", STRENGTHS)
def test_duplicates_and_contradictions(tokenizer, k):
    encoder, rows = PairEncoder(tokenizer), clean()
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    found = only(patient(encoder, train=rows + rows[:k]), "duplicates", "warning")
    assert found == {
        "pairs": N + k,
        "copies of another": k,
        "also there with the other label": 0,
    }
    found = only(patient(encoder, train=rows + swapped[:k]), "duplicates", "warning")
    assert found == {
        "pairs": N + k,
        "copies of another": 0,
        "also there with the other label": 2 * k,
    }


@pytest.mark.parametrize("k", STRENGTHS)
def test_leakage(tokenizer, k):
    encoder, rows = PairEncoder(tokenizer), clean()
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    prompts = [row | {"chosen": "yes", "rejected": "no"} for row in rows]
    for leaks, same, other in ((rows, k, 0), (swapped, 0, k), (prompts, 0, 0)):
        ill = patient(encoder, train=rows, test=leaks[:k] + clean(30, N))
        assert only(ill, "leakage to test", "warning") == {
            "pairs": 30 + k,
            "with a prompt of train": k,
            "that are in train": same,
            "with the other label in train": other,
        }


def test_prompts_are_compared_as_they_were_before_they_were_cut(tokenizer):
    encoder = PairEncoder(tokenizer, max_length=60)
    train = [{"prompt": f"{i} " + "x" * 99, "chosen": "yes", "rejected": "no"} for i in range(9)]
    test = [{"prompt": f"{i} " + "x" * 99, "chosen": "yes", "rejected": "no"} for i in range(7, 12)]
    ill = patient(encoder, train=train, test=test)
    assert ill.pairs["train"]["prompt"][0] == ill.pairs["train"]["prompt"][1]
    found = numbers(ill, "leakage to test")
    assert (found["with a prompt of train"], found["that are in train"]) == (2, 2)
    assert numbers(ill, "duplicates")["copies of another"] == 0


TEXTS = st.sampled_from("abc")
SMALL = st.lists(st.tuples(TEXTS, TEXTS, TEXTS).filter(lambda t: t[1] != t[2]), min_size=1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=SMALL, test=SMALL, single=st.booleans())
def test_copies_and_leaks_are_those_of_a_brute_force_count(tokenizer, train, test, single):
    def row(pair):
        return dict(zip(("prompt", "chosen", "rejected"), pair, strict=True))

    def read(row):
        preference = FORMATS["explicit"].read(row)
        if not single:
            return preference
        # Unpaired, with a label that the other letter decides: so that contradictions turn up.
        labelled = (
            (preference.chosen, None) if row["rejected"] == "a" else (None, preference.chosen)
        )
        return Preference(preference.prompt, *labelled)

    ill = patient(
        PairEncoder(tokenizer), read, train=[row(p) for p in train], test=[row(p) for p in test]
    )
    keys = {
        split: [
            (p, json.dumps(preference.chosen), json.dumps(preference.rejected))
            for p, preference in ((r[0], read(row(r))) for r in rows)
        ]
        for split, rows in (("train", train), ("test", test))
    }

    def other(key):
        return key[0], key[2], key[1]

    found = numbers(ill, "duplicates")
    assert found["copies of another"] == sum(
        key in keys["train"][:i] for i, key in enumerate(keys["train"])
    )
    assert found["also there with the other label"] == sum(
        any(other(key) == b for b in keys["train"]) for key in keys["train"]
    )
    assert list(numbers(ill, "leakage to test").values()) == [
        len(test),
        sum(any(p == q for q, _, _ in train) for p, _, _ in test),
        sum(key in keys["train"] for key in keys["test"]),
        sum(other(key) in keys["train"] for key in keys["test"]),
    ]


def test_length_bias_is_that_of_the_lengths(tokenizer):
    for longer, shorter, ties, severity in (
        (20, 20, 3, "ok"),
        (33, 10, 0, "warning"),
        (10, 33, 5, "warning"),
        (4, 1, 0, "ok"),  # five pairs tell nothing
    ):
        signs = [1] * longer + [-1] * shorter + [0] * ties
        rows = [
            {"prompt": f"number {i}", "chosen": "c" * (9 + 2 * d), "rejected": "r" * 9}
            for i, d in enumerate(signs)
        ]
        ill = patient(PairEncoder(tokenizer), train=rows)
        found = {f.check: f for f in diagnose(ill)}["length bias"]
        share = binomtest(longer, longer + shorter).proportion_ci(method="wilson")
        assert found.severity == severity
        assert list(found.numbers.values()) == pytest.approx(
            [
                len(rows),
                longer,
                shorter,
                2 * (longer - shorter) / len(rows),
                longer / (longer + shorter),
                share.low,
                share.high,
            ],
            abs=1e-7,
        )
    assert wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize("k", [0, 2, 20, 39, 40])
def test_balance_of_unpaired_labels_and_noise(tokenizer, k):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i < k}
        for i, row in enumerate(clean())
    ]
    healthy = patient(PairEncoder(tokenizer), FORMATS["kto"].read, train=rows)
    for flips in (0, 7):
        flipped = np.arange(N) >= N - flips
        drawn = with_flips(healthy.pairs["train"], flipped) if flips else healthy.drawn
        found = {f.check: f for f in diagnose(replace(healthy, drawn=drawn))}
        desirable = k + flips - 2 * max(0, k + flips - N)
        assert found["label balance"].numbers == {
            "desirable": desirable,
            "undesirable": N - desirable,
            "share desirable": desirable / N,
        }
        balanced = limits.DESIRABLE[0] <= desirable / N <= limits.DESIRABLE[1]
        assert found["label balance"].severity == ("ok" if balanced else "warning")
        assert worse(found.values()).keys() <= {"label balance"}
        if flips:
            expected = {"labels": N, "flipped": 7, "share": 7 / N}
            assert found["label noise"].numbers == expected
        assert "length bias" not in found


def test_vocabulary(tokenizer):
    ill = patient(PairEncoder(tokenizer), train=clean())
    top = max(max(ids) for name in ("prompt", "chosen") for ids in ill.pairs["train"][name])
    assert worse(diagnose(replace(ill, vocabulary=top + 1))) == {}
    found = only(replace(ill, vocabulary=top), "vocabulary", "error")
    assert found == {"model": top, "tokenizer": len(tokenizer), "largest id": top}


@pytest.mark.parametrize("k", STRENGTHS)
def test_stored_tokens_that_are_not_the_rows(tokenizer, k):
    encoder = PairEncoder(tokenizer)
    healthy = patient(encoder, train=clean())
    ill = planted(healthy, "chosen", range(k), lambda ids: [ids[0], *ids])
    found = only(ill, "tokens as stored", "error", "length bias")
    assert found == {"rows sampled": N, "with other tokens": k}


@pytest.mark.parametrize("k", STRENGTHS)
def test_tokens_across_the_end_of_the_prompt(make_byte_tokenizer, k):
    """The vocabulary has a token for " the", and this template ends prompts in a blank."""
    special, template, bos, eos, pad, _ = STYLES["plain, eos appended"]
    encoder = PairEncoder(make_byte_tokenizer(special, template, bos, eos, pad, False))
    rows = [
        row
        | ({"chosen": "the " + row["chosen"], "rejected": "the" + row["rejected"]} if i < k else {})
        for i, row in enumerate(clean())
    ]
    found = only(patient(encoder, train=rows), "tokenised as a whole", "warning")
    assert found == {
        "responses sampled": 2 * N,
        "with other tokens": 2 * k,
        "of the prompt": 2 * k,
        "with other white space": 0,
        "with another text": 0,
    }


@pytest.mark.parametrize("k", STRENGTHS)
def test_a_template_that_changes_responses(tokenizer, k):
    """As those of reasoning models, which leave out what was thought."""
    template = GEMMA.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
    encoder = PairEncoder(tokenizer, chat_template=template)
    rows = [
        row | ({"chosen": "<think>so</think>" + row["chosen"]} if i < k else {})
        for i, row in enumerate(clean())
    ]
    found = only(patient(encoder, train=rows), "round trip", "warning")
    assert found["changed by the template"] == k
    assert found["not spelled by their tokens"] == 0


@pytest.mark.parametrize("k", STRENGTHS)
def test_a_tokenizer_that_cannot_spell_the_text(k):
    special = ["<u>", "<e>", "<p>"]
    letters = [*special, *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [], unk_token="<u>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<u>", eos_token="<e>", pad_token="<p>"
    )
    template = STYLES["plain, eos appended"][1]
    encoder = PairEncoder(tokenizer, chat_template=template)
    rows = [
        row | ({"rejected": row["rejected"] + "é"} if i < k else {})
        for i, row in enumerate(clean())
    ]
    found = only(patient(encoder, train=rows), "round trip", "warning", "length bias")
    assert found["not spelled by their tokens"] == k
    assert found["changed by the template"] == 0


@pytest.mark.parametrize("k", STRENGTHS)
def test_odd_orders_of_turns(make_byte_tokenizer, k):
    special, template, bos, eos, pad, _ = STYLES["chatml"]
    encoder = PairEncoder(make_byte_tokenizer(special, template, bos, eos, pad, False))

    for roles, name in (
        (("assistant", "user"), "begin with the assistant"),
        (("user", "system"), "with a late system turn"),
        (("system", "user", "user"), "with two user turns in a row"),
        (("moderator",), "with an unknown role"),
    ):
        rows = clean()
        for row in rows[:k]:
            row["prompt"] = [{"role": role, "content": row["prompt"]} for role in roles]
        found = only(patient(encoder, train=rows), "roles", "warning")
        assert found == {"prompts sampled": N, **dict.fromkeys(list(found)[1:], 0), name: k}


@pytest.mark.parametrize("form", ["text", "named", "whole dialogue", "messages", "template"])
@pytest.mark.parametrize(("k", "severity"), [(1, None), (3, "warning"), (25, "error")])
def test_responses_that_begin_with_the_prompt(tokenizer, form, k, severity):
    rows = clean()
    for row in rows[:k]:
        question = row["prompt"]
        if form == "text":
            head = question.replace(" ", "\n ") + "\n"
        elif form == "named":
            head = f"Question: {question} Answer: "
        elif form == "template":
            head = f"<|user|>\n{question}\n<|assistant|>\n"
        else:
            turns = [("user", "is there a number?"), ("assistant", "yes"), ("user", question)]
            row["prompt"] = [{"role": r, "content": c} for r, c in turns]
            head = question + " "
            if form == "whole dialogue":
                head = "".join(f"\n\n{r.title()}: {c}" for r, c in turns) + "\n\nAssistant: "
        for name in ("chosen", "rejected"):
            row[name] = head + row[name]
            if form == "messages":
                row[name] = [{"role": "assistant", "content": row[name]}]
    ill = patient(PairEncoder(tokenizer), train=rows)
    expected = {"prompts sampled": N, "repeated by the responses": k, "share": k / N}
    if severity is None:
        assert worse(diagnose(ill)) == {}
        assert numbers(ill, "repeated prompts") == expected
    else:
        assert only(ill, "repeated prompts", severity) == expected


def test_responses_that_repeat_less_than_a_prompt_or_one_of_two_are_no_finding(tokenizer):
    encoder = PairEncoder(tokenizer)
    for prompt, both in (("Hi", True), ("Photosynthesis", True), ("what is number {}?", False)):
        rows = clean()
        for i, row in enumerate(rows):
            row["prompt"] = prompt.format(i)
            for name in ("chosen", "rejected")[: 1 + both]:
                row[name] = f"{row['prompt']} {row[name]}"
        assert numbers(patient(encoder, train=rows), "repeated prompts")["share"] == 0


def test_unpaired_responses_that_begin_with_the_prompt(tokenizer):
    rows = [
        {"prompt": row["prompt"], "completion": row["prompt"] + row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(clean())
    ]
    ill = patient(PairEncoder(tokenizer), FORMATS["kto"].read, train=rows)
    assert only(ill, "repeated prompts", "error")["repeated by the responses"] == N


def test_reported_rows_whose_responses_repeat_their_prompt_or_whose_prompt_is_a_dialogue(tokenizer):
    """Restated from public reports."""
    places = ("Oslo", "Lima", "Rome", "Cairo", "Quito", "Delhi", "Tunis", "Paris")
    answers = {"chosen": "{} is far.", "rejected": "No idea about {}!"}
    repeated, dialogue = (
        [
            {"prompt": prompt.format(place)}
            | {name: f"{head} {text}".format(place, place) for name, text in answers.items()}
            for place in places
        ]
        for prompt, head in (
            ("Human: Where is {}? Assistant:", "Human: Where is {}? Assistant:"),
            ("\n\nHuman: Where is {}?\n\nAssistant: Here.\n\nHuman: Which?\n\nAssistant:", ""),
        )
    )
    for row in dialogue:
        row |= {name: row[name].lstrip() for name in answers}
    encoder = PairEncoder(tokenizer)
    ill = patient(encoder, train=repeated)
    found = only(ill, "repeated prompts", "error", "dialogues", "length bias")
    assert (found["repeated by the responses"], found["share"]) == (8, 1)
    assert "repeated prompts: prompts sampled 8" in refusal(diagnose(ill))
    found = only(patient(encoder, train=dialogue), "dialogues", "warning", "length bias")
    assert found == {"prompts sampled": 8, "with a dialogue inside a turn": 8}


@pytest.mark.parametrize("k", STRENGTHS)
@pytest.mark.parametrize("where", ["text", "system turn", "last turn"])
def test_a_dialogue_inside_a_turn(make_byte_tokenizer, where, k):
    special, template, bos, eos, pad, _ = STYLES["chatml"]
    encoder = PairEncoder(make_byte_tokenizer(special, template, bos, eos, pad, False))
    rows = clean()
    for row in rows[:k]:
        inside = f"User: is there one?\nAssistant: yes\nUser: {row['prompt']}"
        if where == "system turn":
            turns = [("system", inside), ("user", row["prompt"])]
        else:
            turns = [("user", "hello"), ("assistant", "User: a\nAssistant: b"), ("user", inside)]
        row["prompt"] = [{"role": role, "content": content} for role, content in turns]
        if where == "text":
            row["prompt"] = f"{inside}\nAssistant:"
    ill = patient(encoder, train=rows)
    found = only(ill, "dialogues", "warning")
    assert found == {"prompts sampled": N, "with a dialogue inside a turn": k}
    (advice,) = (f.advice for f in diagnose(ill) if f.check == "dialogues")
    assert "data.split_dialogues" in advice
    assert "row 0 of train" in advice


# GPT-2 and its like; Llama and its like.
TABLE, ROTARY = Positions(60, end=True), Positions(60, end=False)


@pytest.mark.parametrize(("limit", "severity"), [(TABLE, "error"), (ROTARY, "warning")])
@pytest.mark.parametrize("k", STRENGTHS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_past_the_model_s_positions(tokenizer, limit, severity, k, split):
    """A row of n tokens is read up to its last but one, by reward models to its last."""
    encoder = PairEncoder(tokenizer)
    template = len(encoder.encode_prompt([{"role": "user", "content": ""}]))
    longest = max(template + len(row["prompt"] + row["chosen"]) + 1 for row in clean())
    assert longest <= 60  # one token a letter at most
    parts = {"train": clean(), "test": clean(30, N)}
    for ends, fits in ((False, 61), (True, 60)):
        for row in parts[split][2 : 2 + k]:
            row["rejected"] = "~" * (fits - 1 - len(encoder.encode_prompt(
                [{"role": "user", "content": row["prompt"]}]
            )))  # fmt: skip
        rows = patient(encoder, **parts)
        well = replace(rows, positions=limit, ends=ends)
        assert numbers(well, "positions") == {"model": 60, "longest row": 60, "rows beyond": 0}
        for row in parts[split][2 : 2 + k]:
            row["rejected"] += "~"
        ill = replace(patient(encoder, **parts), positions=limit, ends=ends)
        found = {f.check: f for f in diagnose(ill)}["positions"]
        assert found.severity == severity
        assert found.numbers == {"model": 60, "longest row": 61, "rows beyond": k}
        assert "data.max_length" in found.advice
        assert f"row 2 of {split}" in found.advice
        ill = replace(ill, positions=None)
        assert "positions" not in worse(diagnose(ill))


def test_further_responses_are_looked_at_too(tokenizer):
    encoder = PairEncoder(tokenizer)
    rows = [row | {"gold": f"gold {i}"} for i, row in enumerate(clean())]
    healthy = patient(encoder, extra=("gold",), train=rows)
    assert worse(diagnose(healthy)) == {}
    ill = planted(healthy, "gold", range(4), lambda ids: ids[:-1])
    assert only(ill, "end of turn", "error")["without"] == 4


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer) -> Path:
    file = save_config(tmp_path, tiny_tokenizer)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clean()))
    return file


def break_vocabulary(config: Path) -> None:
    """As where a tokenizer has got tokens that its model knows nothing of."""
    file = config.parent / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 100}))


def no_model(monkeypatch) -> None:
    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(Policy, "load", load)
    monkeypatch.setattr(Scorer, "load", load)


REWARD = ["--model=rotopo.reward.RewardModule", "--model.backbone.path"]


@pytest.mark.parametrize("command", ["fit", "doctor"])
def test_errors_stop_before_the_model_is_loaded(config, message, monkeypatch, command):
    break_vocabulary(config)
    no_model(monkeypatch)
    for options in ([], [*REWARD, str(config.parent / "model")]):
        error = message(*options, command=command)
        assert "vocabulary: model 100, tokenizer 265" in error
        assert "model.policy.path" in error
        assert "data.doctor" in error
    assert not list(config.parent.rglob("runs/*/config.yaml"))


def test_the_command_prints_every_check_and_loads_no_model(config, monkeypatch, capsys):
    no_model(monkeypatch)
    run(["doctor", "--config", str(config), "--data.train_pairs=7", "--ckpt_path=null"])
    printed = capsys.readouterr().out
    assert "0 errors, 0 warnings" in printed
    assert "duplicates             pairs 7" in printed
    assert not (config.parent / "runs").exists()


def test_a_fit_writes_what_was_found_and_warnings_do_not_stop_it(config, caplog):
    rows = clean()
    for i, row in enumerate(rows):
        row["prompt"] = f"is it {i % 2}?"
    (config.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--trainer.max_epochs=1", "--data.noise=SymmetricFlips", "--data.noise.rate=0.3"]
    cli = run(["fit", "--config", str(config), *options])
    assert cli.trainer.global_step > 0
    found = json.loads((Path(cli.trainer.log_dir) / "doctor.json").read_text())
    warnings = [f for f in found if f["severity"] == "warning"]
    assert [f["check"] for f in warnings] == ["leakage to validation", "leakage to test"]
    assert [f["numbers"]["with a prompt of train"] for f in warnings] == [8, 12]
    (noise,) = (f["numbers"] for f in found if f["check"] == "label noise")
    assert noise["flipped"] == cli.datamodule.pairs.flipped().sum() > 0


def test_it_can_be_switched_off_and_keeps_to_fits(config, message):
    template = config.parent / "two_bos.jinja"
    template.write_text("{{ bos_token }}" + CHATML)
    options = [f"--data.chat_template={template}", "--trainer.max_epochs=1"]
    assert "bos: written 2, rows without 0, rows with several 40" in message(*options)
    assert run(["fit", "--config", str(config), *options, "--data.doctor=false"])
    assert run(["test", "--config", str(config), *options[:1]])


def test_without_training_pairs_there_is_nothing_to_see(config, message, monkeypatch):
    no_model(monkeypatch)
    for command in ("doctor", "fit"):
        error = message("--data.validation=1", "--data.test=0", command=command)
        assert "there is no pair to train on" in error


def test_unpaired_rows(config, capsys):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0}
            for i, r in enumerate(clean())]  # fmt: skip
    (config.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(["doctor", "--config", str(config), "--model=KTO"])
    assert "label balance" in capsys.readouterr().out


LEARNT = 52


@pytest.fixture
def learnt(config) -> list[str]:
    """Options of a GPT-2 with too few positions for some rows of :func:`clean`."""
    settings = {"vocab_size": 265, "n_positions": LEARNT, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(config.parent / "model")
    return ["--model.policy.adapter.target_modules=[c_attn]", "--trainer.max_epochs=1"]


def lengths(tokenizer) -> list[int]:
    """Tokens of each row of :func:`clean`."""
    encoder = PairEncoder(tokenizer)
    pairs = [encoder.encode(FORMATS["explicit"].read(row)) for row in clean()]
    return [len(pair.prompt) + pair.longest for pair in pairs]


def test_rows_past_a_table_of_positions_are_refused_before_the_first_step(
    config, learnt, message, tiny_tokenizer, tmp_path
):
    read = [n - 1 for n in lengths(tiny_tokenizer)]
    beyond = sum(n > LEARNT for n in read)
    assert 0 < beyond < N
    for command in ("doctor", "fit"):
        error = message(*learnt, command=command)
        assert f"positions: model 52, longest row {max(read)}, rows beyond {beyond}: " in error
        assert "data.max_length: set it to 52 at most" in error
    for command in ("fit", "test"):
        error = message(*learnt, "--data.doctor=false", command=command)
        taken = read[int(error.partition("row ")[2].split()[0])]
        assert taken > LEARNT
        assert f"it takes {taken} positions, and the model has 52" in error
        assert "data.max_length to 52" in error
    error = message(*learnt, "--model.sampling.max_new_tokens=40", command="predict")
    assert "40 new ones (max_new_tokens) are more than the model's 52 positions" in error
    line = {"prompt": "what is it?", "response": "x" * 99}
    (tmp_path / "responses.jsonl").write_text(json.dumps(line) + "\n")
    error = message(*learnt, f"--data.score={tmp_path / 'responses.jsonl'}", command="predict")
    assert "responses.jsonl, row 0 (from 0): it takes" in error


def test_rows_up_to_the_last_position_are_trained_on(config, learnt):
    """A response's last token is none that the model reads; a reward model reads it."""
    cut = ["--data.doctor=false", "--data.max_length=53"]
    assert run(["fit", "--config", str(config), *learnt, *cut]).trainer.global_step == 3
    sampled = ["--model.sampling.max_new_tokens=2", "--data.max_length=51"]
    assert run(["predict", "--config", str(config), *learnt, *sampled])


def test_a_reward_model_reads_one_token_more(config, learnt, message, tiny_tokenizer):
    beyond = sum(n > LEARNT for n in lengths(tiny_tokenizer))
    options = [*REWARD, str(config.parent / "model"), "--data.max_length=53"]
    for command in ("doctor", "fit"):
        error = message(*options, command=command)
        assert f"positions: model 52, longest row 53, rows beyond {beyond}: " in error


@pytest.mark.slow
def test_both_ranks_stop(config):
    command = ["fit", "--config", str(config), "--trainer.max_epochs=1", *strategy("ddp")]
    on_ranks(2, *command)
    break_vocabulary(config)
    with pytest.raises(RuntimeError) as failed:
        on_ranks(2, *command)
    assert str(failed.value).count("\nstatus 2\n") == 2
    assert str(failed.value).count("the data doctor stops the run") == 2
    assert "Traceback" not in str(failed.value)
