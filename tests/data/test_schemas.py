import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rotopo.data.schemas import FORMATS, Preference, naming_row, read_row, resolve_format
from rotopo.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


EXPECTED = Preference([user("q")], [assistant("good")], [assistant("bad")])

# One row of each public format, with the columns its data set really has.
ROWS = {
    "explicit": {"prompt": "q", "chosen": "good", "rejected": "bad", "source": "x"},
    "implicit": {
        "chosen": [user("q"), assistant("good")],
        "rejected": [user("q"), assistant("bad")],
    },
    "ultrafeedback": {
        "prompt": "q",
        "prompt_id": "0",
        "chosen": [user("q"), assistant("good")],
        "rejected": [user("q"), assistant("bad")],
        "messages": [user("q"), assistant("good")],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
    "hh": {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
    "align_anything": {
        "question": "q",
        "response_1": "bad",
        "response_2": "good",
        "overall_response": 2,
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "kto": {"prompt": "q", "completion": "good", "label": True},
    "messages": {"messages": [user("q"), assistant("good")]},
}


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_detected_and_read(name):
    rows = Dataset.from_list([ROWS[name]])
    found = resolve_format(None, rows)
    assert found.name == name
    unpaired = Preference([user("q")], [assistant("good")], None)
    assert read_row(found, rows[0]) == (unpaired if name in ("kto", "messages") else EXPECTED)


@pytest.mark.parametrize("label", [False, 0])
def test_kto_label_says_which_response_it_is(label):
    row = {"prompt": [user("q")], "completion": [assistant("bad")], "label": label}
    assert resolve_format(None, Dataset.from_list([row])).name == "kto"
    assert read_row(FORMATS["kto"], row) == Preference([user("q")], None, [assistant("bad")])


def test_further_responses_come_from_their_columns():
    row = ROWS["explicit"] | {"best": "gold one", "drawn": [assistant("sample")]}
    found = read_row(FORMATS["explicit"], row, {"gold": "best", "reference_sample": "drawn"})
    extra = {"gold": [assistant("gold one")], "reference_sample": [assistant("sample")]}
    assert found == Preference(EXPECTED.prompt, EXPECTED.chosen, EXPECTED.rejected, extra)
    with pytest.raises(InputError, match="'nowhere' is missing"):
        read_row(FORMATS["explicit"], row, {"gold": "nowhere"})


def test_every_format_has_a_row_here():
    assert ROWS.keys() == FORMATS.keys()


def test_explicit_takes_messages_too():
    row = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    rows = Dataset.from_list([row])
    assert read_row(resolve_format(None, rows), rows[0]) == EXPECTED


def test_columns_of_structs_give_messages_keys_of_none():
    odd = {"role": "user", "content": "q", "name": None}
    row = {"chosen": [odd, assistant("good")], "rejected": [odd, assistant("bad")]}
    assert read_row(FORMATS["implicit"], row) == EXPECTED


turns = st.text(min_size=1, alphabet="abc ").filter(str.strip)


@given(st.lists(st.tuples(turns, turns), max_size=3), turns, turns, turns)
def test_implicit_prompt_is_the_shared_conversation(history, question, good, bad):
    shared = [turn for q, a in history for turn in (user(q), assistant(a))] + [user(question)]
    row = {"chosen": [*shared, assistant(good)], "rejected": [*shared, assistant(bad)]}
    if good.strip() == bad.strip():
        with pytest.raises(InputError, match="equal"):
            read_row(FORMATS["implicit"], row)
    else:
        preference = read_row(FORMATS["implicit"], row)
        assert preference == Preference(shared, [assistant(good)], [assistant(bad)])


def test_responses_that_begin_alike_stay_responses():
    # The shared first assistant turn is the response's, since a prompt ends before the assistant.
    row = {
        "chosen": [user("q"), assistant("well"), assistant("good")],
        "rejected": [user("q"), assistant("well"), assistant("bad")],
    }
    preference = read_row(FORMATS["implicit"], row)
    assert preference.prompt == [user("q")]
    assert preference.chosen == [assistant("well"), assistant("good")]


def test_hh_reads_every_turn():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nthere\n\nHuman: q\n\nAssistant:"
    preference = read_row(FORMATS["hh"], {"chosen": f"{start} good", "rejected": f"{start} bad"})
    assert preference.prompt == [user("hi"), assistant("hello\n\nthere"), user("q")]
    assert preference.chosen == [assistant("good")]


def test_align_anything_label_names_the_better_one():
    row = ROWS["align_anything"] | {"overall_response": 1}
    assert read_row(FORMATS["align_anything"], row).chosen == [assistant("bad")]
    row = ROWS["align_anything"] | {"overall_response": "2"}  # as csv has it
    assert read_row(FORMATS["align_anything"], row) == EXPECTED


def test_sharegpt_system_column_yields_to_a_system_turn():
    row = ROWS["sharegpt"] | {"system": "be brief"}
    system = {"role": "system", "content": "be brief"}
    assert read_row(FORMATS["sharegpt"], row).prompt == [system, user("q")]
    own = [{"from": "system", "value": "be long"}, {"from": "human", "value": "q"}]
    prompt = read_row(FORMATS["sharegpt"], row | {"conversations": own}).prompt
    assert prompt == [{"role": "system", "content": "be long"}, user("q")]


BAD_ROWS = {
    "empty response": ("explicit", {"chosen": " \n"}, "'chosen'.*empty"),
    "missing value": ("explicit", {"rejected": None}, "'rejected' is missing"),
    "number for a text": ("explicit", {"chosen": 4}, "'chosen'.*found 4"),
    "equal": ("explicit", {"chosen": "bad "}, "equal"),
    "prompt that ends in a response": (
        "explicit",
        {"prompt": [user("q"), assistant("a")]},
        "'prompt'.*not the assistant's",
    ),
    "response with a user's turn": (
        "implicit",
        {"chosen": [user("other"), assistant("good")]},
        "'prompt'.*not the assistant's",
    ),
    "conversations that part early": (
        "implicit",
        {"chosen": [user("q"), assistant("x"), user("r"), assistant("good")]},
        "'chosen'.*not the assistant's",
    ),
    "response missing from a conversation": ("implicit", {"rejected": [user("q")]}, "empty"),
    "message without content": ("implicit", {"chosen": [{"role": "user"}]}, "'chosen'.*no content"),
    "prompt of another conversation": ("ultrafeedback", {"prompt": "other"}, "'prompt'.*none of"),
    "hh without a speaker": ("hh", {"chosen": "good"}, "'chosen'.*Human:"),
    "hh empty": ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: "}, "'chosen'.*empty"),
    "wrong label": ("align_anything", {"overall_response": 3}, "'overall_response'.*3"),
    "label true": ("align_anything", {"overall_response": True}, "'overall_response'.*True"),
    "empty response of two": ("align_anything", {"response_1": ""}, "'response_1'.*empty"),
    "unknown speaker": ("sharegpt", {"chosen": {"from": "bot", "value": "x"}}, "'chosen'.*human"),
    "kto without a label": ("kto", {"label": None}, "'label'.*None"),
    "kto label of words": ("kto", {"label": "yes"}, "'label'.*'yes'"),
    "messages to answer": (
        "messages",
        {"messages": [user("q")]},
        "'messages'.*not the assistant's",
    ),
    "kto empty": ("kto", {"completion": " "}, "'completion'.*empty"),
    "tools that are none": ("sharegpt", {"tools": "sheds"}, "'tools'.*JSON schemas.*sheds"),
    "turns that are none": ("sharegpt", {"conversations": 5}, "'conversations'.*found 5"),
    "system message of a number": ("sharegpt", {"system": 5}, "'system'.*found a int"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_names_row_and_field(case):
    name, change, message = BAD_ROWS[case]
    with pytest.raises(InputError, match=message) as raised, naming_row(17):
        read_row(FORMATS[name], ROWS[name] | change)
    assert str(raised.value).startswith("row 17")


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_missing_column(field):
    row = {key: value for key, value in ROWS["explicit"].items() if key != field}
    with pytest.raises(InputError, match=f"'{field}' is missing"):
        read_row(FORMATS["explicit"], row)


def test_no_format_fits():
    with pytest.raises(InputError) as raised:
        resolve_format(None, Dataset.from_list([{"text": "a", "label": 1}]))
    assert "text, label" in str(raised.value)
    assert all(name in str(raised.value) for name in FORMATS)


def test_types_decide_and_not_names_alone():
    with pytest.raises(InputError, match="fit no known format"):
        resolve_format(None, Dataset.from_list([{"prompt": "q", "chosen": 1, "rejected": 0}]))


def test_several_formats_fit():
    rows = Dataset.from_list([ROWS["explicit"] | ROWS["align_anything"]])
    with pytest.raises(InputError, match="several formats") as raised:
        resolve_format(None, rows)
    assert "explicit:" in str(raised.value)
    assert "align_anything:" in str(raised.value)
    assert "hh:" not in str(raised.value)
    assert resolve_format("explicit", rows) is FORMATS["explicit"]


def test_hh_texts_beside_a_prompt_are_ambiguous():
    with pytest.raises(InputError, match="several formats"):
        resolve_format(None, Dataset.from_list([ROWS["hh"] | {"prompt": "q"}]))


def test_detection_looks_past_missing_values():
    rows = Dataset.from_list([ROWS["explicit"] | {"chosen": None}, ROWS["explicit"]])
    assert resolve_format(None, rows).name == "explicit"


def test_unknown_format_suggests_the_nearest():
    with pytest.raises(InputError, match="'align_anything'"):
        resolve_format("align_anythng", Dataset.from_list([ROWS["hh"]]))


def test_format_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "from rotopo.data.schemas import Preference\n"
        "def read(row):\n"
        "    m = lambda role, key: [{'role': role, 'content': row[key]}]\n"
        "    return Preference(m('user', 'q'), m('assistant', 'a'), m('assistant', 'b'))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = Dataset.from_list([{"q": "q", "a": "good", "b": "bad"}])
    found = resolve_format("my_rows.read", rows)
    assert read_row(found, rows[0]) == EXPECTED
    assert found.source_file == str(tmp_path / "my_rows.py")
    with pytest.raises(KeyError) as raised, naming_row(3):
        read_row(found, {})
    assert "row 3" in raised.value.__notes__[0]
    with pytest.raises(InputError, match="no function 'missing'"):
        resolve_format("my_rows.missing", rows)
    with pytest.raises(InputError, match="no module 'no_such_rows'"):
        resolve_format("no_such_rows.read", rows)


def test_real_pandalm_rows_through_align_anything():
    file = SHARED / "pandalm" / "testset-v1.json"
    if not file.exists():
        pytest.skip("needs ../shared/data")
    rows = json.loads(file.read_text("utf-8"))
    read = 0
    for row in rows:
        responses = [row["response1"], row["response2"]]
        pair = dict(zip(("response_1", "response_2"), responses, strict=True))
        pair |= {"question": row["instruction"], "overall_response": row["annotator1"]}
        # Ties, numbers for texts, empty and equal responses: all of them are in there.
        usable = row["annotator1"] in (1, 2) and all(isinstance(r, str) and r for r in responses)
        if not usable or responses[0].strip() == responses[1].strip():
            with pytest.raises(InputError, match="field"):
                read_row(FORMATS["align_anything"], pair)
            continue
        preference = read_row(FORMATS["align_anything"], pair)
        assert preference.chosen[0]["content"] == row[f"response{row['annotator1']}"]
        read += 1
    assert read > 800
