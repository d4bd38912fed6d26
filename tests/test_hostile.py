"""Run folders and caches from elsewhere: what is in them is read, shown or refused, never run.

Checkpoints are in test_checkpoints.py, texts of responses in report/test_report.py.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest

from rotopo import pretrained
from rotopo.errors import InputError
from rotopo.report.command import report
from tests.report import report_inputs as inputs
from tests.run.test_checkpoints import Creates
from tests.small_run import save_config, save_model
from tests.test_training import fit

SCRIPT = "<script>document.title='stolen'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def config(tmp_path: Path, tiny_tokenizer, monkeypatch) -> Path:
    monkeypatch.setenv("ROTOPO_CACHE", str(tmp_path / "home"))
    return save_config(tmp_path, tiny_tokenizer)


@pytest.fixture
def created(tmp_path) -> Path:
    """The file that appears if anything is run."""
    return tmp_path / "created"


def made(created: Path) -> str:
    """YAML that makes it."""
    return f"model: !!python/object/apply:os.mknod ['{created}']\n"


@pytest.mark.parametrize("name", ["config.yaml", "hparams.yaml"])
def test_a_reports_yaml_makes_no_objects(tmp_path, created, name):
    run = inputs.save_reward_fit(tmp_path / "run")
    (run / name).write_text(made(created))
    with pytest.raises(InputError, match=f"{name}: not YAML"):
        report(tmp_path / "page.html", reward_training={"RM": run})
    assert not created.exists()
    assert not (tmp_path / "page.html").exists()


def test_nor_does_a_runs_configuration(config, created, message):
    config.write_text(made(created))
    assert "python/object/apply" in message()
    assert not created.exists()


def test_names_settings_and_facts_stay_text_on_a_page(tmp_path):
    run = inputs.save_reward_fit(tmp_path / "run")
    for file in (run / "config.yaml", run / "hparams.yaml"):
        file.write_text(file.read_text() + f'"{SCRIPT}": "{SCRIPT}"\n')
    report(tmp_path / "page.html", SCRIPT, SCRIPT, reward_training={SCRIPT: run})
    html = (tmp_path / "page.html").read_text()
    assert "stolen" in html
    assert "<script>document" not in html
    assert "<img src=x" not in html


def test_embeddings_are_not_unpickled(tmp_path, created):
    x = np.array([Creates(created)] * 4, dtype=object)
    np.savez(tmp_path / "x.npz", x=x, labels=np.array(list("aabb")))
    with pytest.raises(InputError, match=r"x\.npz"):
        report(tmp_path / "page.html", embeddings=tmp_path / "x.npz")
    assert not created.exists()


@pytest.mark.parametrize(
    "pattern", ["tokens/*/pairs/*.arrow", "tokens/*/hashes.json", "../home/reference/*/*.arrow"]
)
def test_a_pickle_in_a_cache_is_refused(config, created, capsys, pattern):
    options = ["--model.policy.reference=cached", "--trainer.max_epochs=1"]
    fit(config, "first", *options)
    (file, *_) = (config.parent / "cache").glob(pattern)
    file.write_bytes(pickle.dumps(Creates(created)))
    with pytest.raises(SystemExit):
        fit(config, "second", *options)
    assert str(file.parent.parent if "pairs" in pattern else file.parent.resolve()) in str(
        capsys.readouterr().err
    )
    assert not created.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_conversion_is_named(config, tiny_tokenizer, message, monkeypatch, name):
    folder = save_model(config.parent / "home" / "models" / "converted-0", tiny_tokenizer)
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    monkeypatch.setattr(pretrained, "_convert_gguf", lambda _: folder)
    error = message("--model.policy.path=some.gguf")
    assert f"remove {folder}, and the GGUF file is converted again" in error
    assert error.rstrip().splitlines()[-1].startswith("rotopo: ")
