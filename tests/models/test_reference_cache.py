"""The cache of reference log-probs: the same numbers, for every process, or a clear refusal."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotopo.data.batch import response_key
from rotopo.errors import InputError
from rotopo.models.reference_cache import ReferenceCache

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5)


def keys(n: int, start: int = 0) -> list[bytes]:
    return [response_key([i], [i, 2]) for i in range(start, start + n)]


def filled(folder: Path, n: int, start: int = 0, **settings) -> ReferenceCache:
    cache = ReferenceCache(folder, "model", settings.get("dtype", torch.float32))
    cache.add(keys(n, start), [2] * n, torch.arange(2.0 * start, 2.0 * (start + n)))
    cache.flush()
    return cache


@given(tokens, tokens, tokens, tokens)
def test_only_equal_tokens_share_a_key(prompt, response, other_prompt, other_response):
    same = (prompt, response) == (other_prompt, other_response)
    assert (response_key(prompt, response) == response_key(other_prompt, other_response)) == same


def test_values_come_back_in_any_order_and_after_any_number_of_files(tmp_path):
    filled(tmp_path, 3)
    cache = filled(tmp_path, 4, start=3)
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 0, 3]):
        expected = torch.tensor([[2.0 * i, 2.0 * i + 1] for i in order]).flatten()
        assert torch.equal(cache.get([keys(7)[i] for i in order]), expected)
    assert cache.get([*keys(2), b"?" * 16]) is None
    assert keys(1)[0] in cache
    assert b"?" * 16 not in cache


def test_what_is_not_flushed_is_known_and_not_written(tmp_path):
    cache = ReferenceCache(tmp_path, "model", torch.float32)
    cache.add(keys(1), [2], torch.tensor([1.0, 2.0]))
    assert cache.get(keys(1)).tolist() == [1.0, 2.0]
    assert ReferenceCache(tmp_path, "model", torch.float32).get(keys(1)) is None


def test_float64_stays_float64(tmp_path):
    cache = ReferenceCache(tmp_path, "model", torch.float64)
    value = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    cache.add(keys(1), [2], value)
    cache.flush()
    assert torch.equal(ReferenceCache(tmp_path, "model", torch.float64).get(keys(1)), value)


def test_another_models_folder_is_refused(tmp_path):
    filled(tmp_path, 1)
    with pytest.raises(InputError, match="another model"):
        ReferenceCache(tmp_path, "other", torch.float32)


def test_a_torn_file_is_named(tmp_path):
    filled(tmp_path, 50)
    (file,) = tmp_path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{file.name}.*delete it"):
        ReferenceCache(tmp_path, "model", torch.float32)


def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path):
    filled(tmp_path, 50)
    (file,) = tmp_path.glob("*.arrow")
    whole = file.read_bytes()
    for place in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{file.name}.*delete it"):
            ReferenceCache(tmp_path, "model", torch.float32)


def test_a_damaged_label_is_named(tmp_path):
    filled(tmp_path, 1)
    (tmp_path / "model.json").write_text('{"refer')
    with pytest.raises(InputError, match=r"model\.json is damaged.*delete the folder"):
        ReferenceCache(tmp_path, "model", torch.float32)


def _write(folder: str, start: int) -> None:
    for part in range(5):
        filled(Path(folder), 2, start + 2 * part)


def test_processes_write_the_same_folder_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(str(tmp_path), 10 * k)) for k in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = ReferenceCache(tmp_path, "model", torch.float32).get(keys(40))
    assert torch.equal(found, torch.arange(80.0))
    assert json.loads((tmp_path / "model.json").read_text())["reference"] == "model"
