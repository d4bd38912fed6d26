from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import hypothesis
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# The same examples each time, however busy the machine is. To look for others:
# tools/test --hypothesis-profile default
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")

CHATML = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

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

    def make(
        special: list[str],
        chat_template: str | None,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        adds_bos: bool = False,
    ) -> PreTrainedTokenizerFast:
        merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
        pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
        vocabulary = {token: i for i, token in enumerate([*special, *pieces])}
        backend = Tokenizer(models.BPE(vocabulary, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        if adds_bos:
            assert bos is not None
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=bos,
            eos_token=eos,
            pad_token=pad,
            chat_template=chat_template,
            clean_up_tokenization_spaces=False,
        )

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(
    make_byte_tokenizer: MakeTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with :func:`tiny_tokenizer`."""
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    tokenizer = make_byte_tokenizer(special, CHATML, bos="<|bos|>", eos="<|eos|>", pad="<|pad|>")
    tokenizer.save_pretrained(folder)
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
