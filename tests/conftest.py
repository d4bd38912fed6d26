from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import hypothesis
import pytest
from transformers import PreTrainedTokenizerFast

from tests.byte_tokenizer import byte_tokenizer, save_tiny_tokenizer

# The same examples each time, however busy the machine is. To look for others:
# tools/test --hypothesis-profile default
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tables that tests have made, which workers of their own could not print."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, table in report.user_properties:
                if name == "table":
                    terminalreporter.write_line(f"\n{table}")


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the tests load out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def make_byte_tokenizer() -> MakeTokenizer:
    """Builds byte-level tokenizers: the special tokens first, then bytes, then a few merges."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of :func:`tiny_tokenizer`."""
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    save_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def tiny_tokenizer(tiny_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    """265 byte-level tokens: pad 0, bos 1, eos 2; ChatML (3, 4) behind one bos."""
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)


@pytest.fixture
def message(config, capsys):
    """The message of a command line that is refused, which is one line and no traceback."""

    from rotopo.cli import run  # not for tests without a command line

    def refused(*options: str, command: str = "fit") -> str:
        with pytest.raises(SystemExit) as stop:
            run([command, "--config", str(config), *options])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return refused


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
    """Nothing of what other tests have computed."""
    monkeypatch.setenv("ROTOPO_CACHE", str(tmp_path / "home"))
