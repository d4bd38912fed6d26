"""What every study's command does with bad settings."""

from collections.abc import Callable
from pathlib import Path

import pytest


def assert_refused(
    main: Callable[[list[str]], None], folder: Path, options: list[str], expected: str, capsys
) -> None:
    """The command ends with a message, without a traceback, and writes nothing."""
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(folder), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not folder.exists()


def assert_refuses_a_file(
    main: Callable[[list[str]], None], folder: Path, options: list[str], capsys
) -> None:
    """The command does not write over a file that stands where its folder should."""
    (folder / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["--output", str(folder / "file"), *options])
    assert "name a folder" in capsys.readouterr().err
