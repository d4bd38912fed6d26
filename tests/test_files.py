"""Files and folders that appear whole or not at all."""

import pytest

from rotopo.files import unfinished, writing_whole_folder


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "made" / "folder"
    with writing_whole_folder(target) as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text("all of it")
        assert not target.exists()
        assert list(unfinished(target)) == [part]
    assert (target / "inner" / "file").read_text() == "all of it"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with writing_whole_folder(tmp_path / "folder") as part:
            (part / "file").write_text("half of it")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


def test_of_two_writers_the_first_wins(tmp_path):
    target = tmp_path / "folder"

    def write_beside_another() -> None:
        with writing_whole_folder(target) as slow:
            (slow / "file").write_text("second")
            with writing_whole_folder(target) as fast:
                (fast / "file").write_text("first")

    with pytest.raises(FileExistsError, match="folder"):
        write_beside_another()
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]
