"""Help, lists and completion: true to the description, in 80 columns, without torch."""

import contextlib
import io
import subprocess
import sys
from importlib import metadata
from unicodedata import combining

import pytest

from rotopo.cli import main
from rotopo.data.formats import FORMATS
from rotopo.described import read
from rotopo.errors import InputError
from rotopo.help.command import answer
from rotopo.help.completion import words
from rotopo.help.lists import ADDED
from rotopo.help.pages import COMMANDS
from tests.test_imports import HEAVY, imported_by

LISTS = ("objectives", "formats", "callbacks")
ASKED = [
    [],
    ["--help"],
    ["--version"],
    *([name] for name in LISTS),
    *([name, "-h"] for name in COMMANDS),
    ["fit", "--config", "run.yaml", "--model.help", "DPO"],
    ["fit", "--model.help"],
    ["fit", "--model", "DPO", "--model.optimizer.help", "AdamW"],
    ["fit", "--data.help"],
    ["predict", "--trainer.callbacks.help=lightning.pytorch.callbacks.EarlyStopping"],
    ["fit", "--trainer.help"],
    ["fit", "--model.policy.help"],
    ["fit", "--model.policy.adapter.help", "rotopo.rotation.RotationConfig"],
]


def page(*args: str) -> str:
    found = answer(args)
    assert found is not None
    return found


@pytest.mark.parametrize("args", ASKED, ids=" ".join)
def test_pages_fit_80_columns(args):
    """But a setting's name with its type; and the line of versions may be wider here."""
    lines = ["".join(c for c in line if not combining(c)) for line in page(*args).splitlines()]
    wide = [line for line in lines if len(line) > 80 and not line.startswith(("  --", "rotopo 0"))]
    assert lines
    assert not wide


def test_no_page_imports_what_it_says_something_of():
    asked = f"for args in {ASKED}:\n    main(args)"
    assert not imported_by(f"from rotopo.cli import main\n{asked}") & {*HEAVY, "jsonargparse"}


def test_the_overview_names_every_command_and_each_has_its_page():
    said = page("-h")
    assert read().commands.keys() <= COMMANDS.keys()
    for name in COMMANDS:
        assert f"\n  {name} " in said
        assert page("help", name) == page(name, "--help") != said


def test_lists_are_one_screen_and_whole():
    import rotopo.callbacks
    from rotopo import objectives

    for name in LISTS:
        assert len(page(name).splitlines()) <= 45
    for name in set(objectives.__all__) - {"PreferenceModule", "ReferenceObjective"}:
        assert f"\n  {name}" in page("objectives")
    for name in FORMATS:
        assert f"\n  {name} " in page("formats")
    for name in rotopo.callbacks.__all__:
        assert f"\n  {name} " in page("callbacks")


def test_callbacks_that_come_by_themselves_are_those_of_every_run():
    import rotopo.callbacks
    from rotopo.objectives.base import PreferenceModule

    always = {type(one).__name__ for one in PreferenceModule.always_on(None)}
    always |= {"Finite", "ProgressLine"}
    assert {*rotopo.callbacks.__all__} - always <= set(ADDED)
    assert not always & set(ADDED)


def test_help_of_a_class_has_its_settings_and_those_of_the_policy():
    said = page("fit", "--model.help", "SimPO")
    assert "rotopo.objectives.SimPO" in said
    assert "--model.gamma: float = " in said
    assert "--model.policy.path: str" in said
    assert "label_smoothing" not in said
    # As the parser has it: a short name that torch has is torch's, and a path is itself.
    assert page("fit", "--model.optimizer.help", "Muon").startswith("torch.optim.Muon")
    assert page("fit", "--model.optimizer.help=rotopo.muon.Muon").startswith("rotopo.muon.Muon")


def test_a_class_that_is_not_described_is_imported_for_its_page(capsys):
    said = page("fit", "--model.help", "tests.test_cli.Other")
    assert "is not described" in capsys.readouterr().err
    assert "  --model.gamma: float = 1.0" in said
    assert "  --model.policy.path: str" in said


def test_a_class_that_is_nowhere_is_refused():
    with pytest.raises(InputError, match="there is no class 'DPOO'; did you mean DPO"):
        answer(["fit", "--model.help", "DPOO"])
    with pytest.raises(InputError, match=r"there is no class 'no\.such\.Class'"):
        answer(["fit", "--trainer.callbacks.help=no.such.Class"])


def test_a_command_line_that_asks_for_no_help_is_left_alone():
    assert answer(["fit", "--config", "run.yaml"]) is None
    assert answer(["no_command", "--help"]) is None


def test_versions_are_those_that_are_installed():
    line = page("--version")
    for package in ("torch", "lightning", "transformers", "peft"):
        assert f"{package} {metadata.version(package)}" in line
    assert line.startswith(f"rotopo {metadata.version('rotopo')} ")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["pl"], ["plan"]),
        (["fit", "--model.bet"], ["--model.beta"]),
        (["fit", "--model", "SimPO", "--model.bet"], ["--model.beta"]),
        (["fit", "--model", "IPO", "--model.gam"], []),
        (["fit", "--model", "D"], ["DPO", "DPOP", "DiscoPOP", "DrDPO"]),
        (["fit", "--model", "=", "Sim"], ["SimPO"]),
        (["fit", "--model=Sim"], ["--model=SimPO"]),
        (["fit", "--data.layout", "pa"], ["packed", "padded"]),
        (["fit", "--data.doctor", ""], ["false", "true"]),
        (["fit", "--model.policy.pat"], ["--model.policy.path"]),
        (["fit", "--trainer.callbacks.help", "EarlyS"], ["EarlyStopping"]),
        (["fit", "--config", "conf"], []),  # files, which the shell knows
        (["judge", "--base"], ["--baseline"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["no_command", "--x"], []),
    ],
    ids=str,
)
def test_completion(given, found):
    assert words(given) == found


def test_bash_completes_with_its_script(tmp_path):
    """The script in a real shell, with rotopo as a function of it."""
    script = page("completion", "bash")
    program = f"""
rotopo() {{ {sys.executable} -m rotopo.cli "$@"; }}
{script}
compopt() {{ :; }}
COMP_WORDS=(rotopo fit --model Sim) COMP_CWORD=3
_rotopo
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SimPO"], done.stderr


def test_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="bash, zsh, fish"):
        answer(["completion", "powershell"])
    with pytest.raises(InputError, match="fitt: no such command; did you mean fit"):
        answer(["help", "fitt"])
    with pytest.raises(InputError, match="takes no options"):
        answer(["objectives", "--all"])


def test_the_command_prints_its_page_and_ends_well():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(["objectives"])
    assert out.getvalue() == page("objectives")
