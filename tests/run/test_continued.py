"""Runs known by their settings: which folder they have, and when they are done."""

from pathlib import Path

from rotopo.run.continued import ContinuedRun, from_last_checkpoint


def a_run(tmp_path: Path, *facts, arguments=("fit", "--x=1")) -> ContinuedRun:
    return ContinuedRun.of(
        tmp_path / "DPO-0.4-fit", "done.json", list(arguments), [tmp_path / "a.yaml"], *facts
    )


def test_the_folder_is_named_by_arguments_contents_and_facts(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 0.1\n")
    first = a_run(tmp_path)
    assert first.folder == tmp_path / "DPO-0.4-fit-fa1e7faf"  # outputs of earlier versions go on
    assert a_run(tmp_path).folder == first.folder
    others = [a_run(tmp_path, [[3, 1.5]]), a_run(tmp_path, arguments=("fit", "--x=2"))]
    (tmp_path / "a.yaml").write_text("lr: 0.2\n")
    folders = {run.folder for run in (first, *others, a_run(tmp_path))}
    assert len(folders) == 4


def test_it_is_done_once_its_outcome_is_written(tmp_path):
    (tmp_path / "a.yaml").touch()
    run = a_run(tmp_path)
    assert not run.is_done
    run.finish({"accuracy": 0.5})
    assert run.is_done
    assert run.outcome() == {"accuracy": 0.5}


def test_a_folder_without_a_good_checkpoint_begins_anew(tmp_path):
    assert from_last_checkpoint(tmp_path / "nowhere") == []
    (tmp_path / "torn.ckpt").write_bytes(b"torn")
    assert from_last_checkpoint(tmp_path) == []
