"""Runs that are killed, and what they leave: each ends as if nothing had been, or says why not.

Every try is in a table, which the tests print.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from rotopo.files import read_jsonl
from rotopo.run.checkpoints import check, last_good, read
from tests.forks import MOMENTS, Fault, FileLimit, start
from tests.ranks import environment, free_port, strategy
from tests.small_run import save_config
from tests.test_training import CHECKPOINTS

KINDS = {
    "DPO, LoRA with dropout": [],
    "DPO, cached reference": ["--model.policy.reference=cached"],
    "reward model": [],
    "KTO, rotation": ["--model=KTO", "--model.policy.adapter=rotopo.rotation.RotationConfig"],
}
# Moments that are worth as many tries as any time, and how often each comes at most.
TIMES = {
    "half a checkpoint is written": 8,
    "a file has no name yet": 24,
    "an old checkpoint is to go": 4,
    "before a step": 6,
    "behind a step": 6,
    "in a validation": 4,
    "tokens have no name yet": 1,
    "log-probs are written": 2,
}
assert TIMES.keys() == MOMENTS.keys()


@dataclass(frozen=True)
class Try:
    """What is run, and what happens to it each time that it is started."""

    seed: int
    kind: str
    epochs: int
    accumulation: int
    workers: int
    every_step: bool
    faults: tuple[Fault | tuple[float, signal.Signals], ...]

    @property
    def run(self) -> tuple[str, int, int]:
        """All that its numbers follow from."""
        return self.kind, self.epochs, self.accumulation


def drawn(seed: int) -> Try:
    """A try by its seed: half of them are struck at some time, the others at a moment."""
    chance = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    faults: list[Fault | tuple[float, signal.Signals]] = []
    for _ in range(chance.choice([1, 1, 2])):
        number = chance.choice([signal.SIGTERM, signal.SIGKILL])
        moments = [m for m in TIMES if m != "log-probs are written" or "cached" in kind]
        if seed // 4 % 2:
            moment = chance.choice(moments)
            faults.append(Fault(moment, chance.randint(1, TIMES[moment]), number))
        else:
            faults.append((chance.uniform(0, 1), number))
    return Try(
        seed,
        kind,
        chance.choice([2, 3]),
        chance.choice([1, 2]),
        int(chance.random() < 0.25),
        chance.random() < 0.7,
        tuple(faults),
    )


@dataclass
class Laboratory:
    """Where tries are made, with the numbers of runs that nothing happens to."""

    folder: Path
    configs: dict[str, Path]
    table: list[dict[str, Any]] = field(default_factory=list)
    whole: dict[tuple, tuple[dict, pd.DataFrame, float]] = field(default_factory=dict)

    def arguments(self, one: Try, root: Path) -> list[str]:
        # By default one after each validation, and only the last one stays.
        checkpoints = list(CHECKPOINTS) if one.every_step else []
        return [
            "fit",
            f"--config={self.configs['reward' if one.kind == 'reward model' else 'policy']}",
            *KINDS[one.kind],
            *checkpoints,
            f"--trainer.default_root_dir={root}",
            f"--trainer.max_epochs={one.epochs}",
            f"--trainer.accumulate_grad_batches={one.accumulation}",
            f"--data.num_workers={one.workers}",
            f"--data.cache_dir={root / 'cache'}",
        ]

    def start(
        self,
        one: Try,
        root: Path,
        resume: Path | None,
        fault: Fault | None = None,
        *options: str,
        environment: dict[str, str] = {},  # noqa: B006
    ) -> ForkServerProcess:
        root.mkdir(exist_ok=True)
        arguments = [*self.arguments(one, root), *options]
        arguments += [f"--ckpt_path={resume}"] if resume else []
        return start(arguments, root / "log.txt", root / "cache", fault, environment)

    def expected(self, one: Try) -> tuple[dict, pd.DataFrame, float]:
        """Last checkpoint, validations and seconds of a run that nothing happens to."""
        if one.run not in self.whole:
            root = self.folder / f"whole {len(self.whole)}"
            plain = Try(0, *one.run, workers=0, every_step=True, faults=())
            began = time.monotonic()
            process = self.start(plain, root, None)
            process.join()
            assert process.exitcode == 0, (root / "log.txt").read_text()
            seconds = time.monotonic() - began
            self.whole[one.run] = (*outcome(root), seconds)
        return self.whole[one.run]

    def strike(
        self, one: Try, root: Path, fault: Fault | tuple[float, signal.Signals], seconds: float
    ) -> ForkServerProcess:
        """Start a run, or go on with it, and have it struck; the process when it has ended."""
        planted = fault if isinstance(fault, Fault) else None
        process = self.start(one, root, last_good(root), planted)
        if not isinstance(fault, Fault):
            while not (root / "log.txt").exists():  # the fork has not begun yet
                time.sleep(0.01)
            process.join(0.1 + fault[0] * seconds)
            if process.is_alive():
                os.kill(process.pid, fault[1])
        process.join(60)
        assert process.exitcode is not None, "it hangs"
        whole_files(root)
        number = fault.signal if isinstance(fault, Fault) else fault[1]
        expected = -number if number == signal.SIGKILL else 128 + number
        assert process.exitcode in (0, expected), (root / "log.txt").read_text()
        return process

    def end_and_go_on(self, one: Try) -> dict[str, Any]:
        """Have a run end by a signal that asks for it, type what it has printed, and return the
        line of the table."""
        checkpoint, validations, seconds = self.expected(one)
        root, (fault,) = self.folder / f"end {one.seed}", one.faults
        process = self.strike(one, root, fault, seconds)
        log = (root / "log.txt").read_text()
        assert "Traceback" not in log, log
        told = ""
        if process.exitcode != 0:
            (told,) = [row for row in log.splitlines() if row.startswith("rotopo: ended by ")]
            arguments = self.arguments(one, root)
            command = told.partition("go on with: rotopo ")[2]
            if command:
                arguments = shlex.split(command)
            else:
                assert "before the first step: there is nothing to keep" in told
                assert last_good(root) is None
            assert unfinished(root) == []
            process = start(arguments, root / "log.txt", root / "cache")
            process.join(60)
            assert process.exitcode == 0, (root / "log.txt").read_text()
        found, seen = outcome(root)
        return {
            "run": f"{one.kind}, checkpoints by {'step' if one.every_step else 'default'}",
            "signal": described(fault),
            "what it said": told.partition("--ckpt_path")[0].removeprefix("rotopo: "),
            "weights equal": equal(found, checkpoint),
            "validations equal": validations.equals(seen),
        }

    def make(self, one: Try) -> dict[str, Any]:
        """Make a try, and its line of the table."""
        checkpoint, validations, seconds = self.expected(one)
        root = self.folder / f"try {one.seed}"
        events = []
        for fault in one.faults:
            process = self.strike(one, root, fault, seconds)
            events.append(f"{described(fault)}: {ended(process.exitcode)}")
            if process.exitcode == 0:
                break
        resume = last_good(root)
        if process.exitcode != 0:
            process = self.start(one, root, resume)
            process.join(60)
            assert process.exitcode == 0, (root / "log.txt").read_text()
            step = read(resume)["global_step"] if resume else 0
            events.append(f"went on from step {step}")
        whole_files(root)
        found, seen = outcome(root)
        line = {
            "try": one.seed,
            "run": f"{one.kind}, {one.epochs} epochs, {one.accumulation} micro-batches, "
            f"{one.workers} workers, checkpoints by {'step' if one.every_step else 'epoch'}",
            "what happened": "; ".join(events),
            "weights equal": equal(found, checkpoint),
            "validations equal": validations.equals(seen),
        }
        self.table.append(line)
        return line


def described(fault: Fault | tuple[float, signal.Signals]) -> str:
    if isinstance(fault, Fault):
        return f"{fault.signal.name} when {fault.moment} ({fault.count})"
    return f"{fault[1].name} at {100 * fault[0]:.0f} % of its time"


def ended(code: int) -> str:
    return {0: "it was done", -9: "dead"}.get(code, f"status {code}")


def outcome(root: Path) -> tuple[dict, pd.DataFrame]:
    """The last checkpoint of a run's parts, and each validation's metrics, in their order."""
    last = last_good(root)
    assert last is not None
    logs = []
    for version in sorted(root.glob("version_*"), key=lambda f: int(f.name[8:])):
        file = version / "metrics.csv"
        if file.exists() and file.stat().st_size:
            log = pd.read_csv(file)
            if "val/loss" in log:
                logs.append(log[["epoch", "step", *sorted(c for c in log if c[:4] == "val/")]])
    log = pd.concat(logs).dropna(subset="val/loss").drop_duplicates(["epoch", "step"], keep="last")
    return read(last, mmap=False), log.sort_values("step").reset_index(drop=True)


def whole_files(root: Path) -> None:
    """Every file that has its name is whole."""
    for file in root.rglob("*"):
        if not file.is_file() or any(part[0] == "." for part in file.relative_to(root).parts):
            continue
        if file.suffix == ".ckpt":
            check(file, resume=True)
        elif file.suffix == ".json" and "datasets" not in file.parts:
            json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            list(read_jsonl(file))
        elif file.suffix == ".arrow" and "reference" in file.parts:
            pa.ipc.open_file(str(file)).read_all()


def printed(record_property, title: str, lines: list[dict[str, Any]]) -> None:
    """Have a table printed behind the tests."""
    columns = list(lines[0])
    rows = [columns, *([str(line[column]) for column in columns] for line in lines)]
    record_property("table", "\n".join([title, *(" | ".join(row) for row in rows)]))


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory, tiny_tokenizer_dir) -> Laboratory:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    folder = tmp_path_factory.mktemp("laboratory")
    file = save_config(folder, tokenizer)
    config = yaml.safe_load(file.read_text())
    config["data"]["init_args"] |= {"eval_pairs_per_batch": 4}
    file.write_text(yaml.safe_dump(config))
    settings = config["model"]["init_args"]
    config["model"] = {
        "class_path": "RewardModule",
        "init_args": {
            "backbone": settings["policy"],
            "optimizer": settings["optimizer"],
            "scheduler": settings["scheduler"],
        },
    }
    reward = folder / "reward.yaml"
    reward.write_text(yaml.safe_dump(config))
    # Or the first run would be slow.
    start(["fit", "--print_config"], folder / "log.txt", folder).join()
    return Laboratory(folder, {"policy": file, "reward": reward})


# Of 56 draws, a few that have each setting with each moment and signal that it has among the 56.
SEEDS = (0, 3, 4, 5, 6, 7, 11, 13, 15, 18, 20, 21, 24, 30, 31, 33, 34, 37, 44, 52, 53, 55)


@pytest.mark.slow
def test_killed_at_any_time_it_ends_as_if_it_had_not_been(laboratory, record_property):
    lines = [laboratory.make(drawn(seed)) for seed in SEEDS]
    printed(record_property, f"{len(lines)} runs, killed and gone on with", lines)
    assert all(line["weights equal"] and line["validations equal"] for line in lines)


def ends(number: int, signals: tuple[signal.Signals, ...]) -> list[Try]:
    """So many ends by each of some signals: half of them at some time, the others at a moment of
    training, which may end in a step, a validation or a checkpoint that is half written."""
    moments = [m for m in TIMES if m not in ("tokens have no name yet", "log-probs are written")]
    tries, chance = [], random.Random(1)
    for seed, number_of in enumerate(s for s in signals for _ in range(number)):
        moment = chance.choice(moments)
        fault: Any = Fault(moment, chance.randint(1, min(6, TIMES[moment])), number_of)
        if seed % 2:
            fault = (chance.uniform(0, 1), number_of)
        kind = list(KINDS)[seed % len(KINDS)]
        tries.append(Try(seed, kind, 2, 1 + seed % 2, 0, chance.random() < 0.5, (fault,)))
    return tries


@pytest.mark.slow
def test_asked_to_end_it_says_how_to_go_on_and_that_works(laboratory, record_property):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    lines = [laboratory.end_and_go_on(one) for one in ends(3, signals)]
    printed(record_property, f"{len(lines)} runs that signals have ended", lines)
    assert all(line["weights equal"] and line["validations equal"] for line in lines)


# Files that are damaged between two runs.


def cut(file: Path, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))


def flip(file: Path, place: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 16
    file.write_bytes(content)


# Which file, and how: by a cut to a share of it, a flipped bit at a share of it, or its removal.
DAMAGES = [
    *(("cache/tokens/*/pairs/*.arrow", cut, share) for share in (0, 0.3, 0.99)),
    *(("cache/tokens/*/pairs/*.arrow", flip, place) for place in (0.1, 0.5, 0.8)),
    ("cache/tokens/*/pairs/*.arrow", Path.unlink, None),
    ("cache/tokens/*/pairs/state.json", cut, 0.5),
    ("cache/tokens/*/pairs/dataset_info.json", cut, 0.5),
    ("cache/tokens/*/counts.json", cut, 0.5),
    ("cache/tokens/*/counts.json", flip, 0.9),
    ("cache/tokens/*/hashes.json", cut, 0.5),
    *(("cache/reference/*/*.arrow", cut, share) for share in (0, 0.3, 0.99)),
    *(("cache/reference/*/*.arrow", flip, place) for place in (0.2, 0.5, 0.8)),
    ("cache/reference/*/*.arrow", Path.unlink, None),  # computed again
    ("cache/reference/*/model.json", cut, 0.5),
    ("pairs.jsonl", cut, 0.63),
    ("version_0/checkpoints/last.ckpt", cut, 0.9),
    ("version_0/checkpoints/last.ckpt", flip, 0.4),
]
UNHARMED = {("cache/reference/*/*.arrow", Path.unlink)}


@pytest.mark.slow
def test_a_damaged_file_is_named_and_what_can_be_made_again_is(laboratory, record_property):
    one = Try(0, "DPO, cached reference", 2, 1, 0, True, ())
    checkpoint, validations, _ = laboratory.expected(one)
    source = laboratory.configs["policy"].with_name("pairs.jsonl")
    lines = []
    whole = laboratory.folder / "undamaged"
    whole.mkdir()
    shutil.copy(source, whole)
    here = f"--data.source={whole / 'pairs.jsonl'}"
    process = laboratory.start(one, whole, None, None, here)
    process.join(60)
    assert process.exitcode == 0
    for number, (pattern, damage, share) in enumerate(DAMAGES):
        root = laboratory.folder / f"damaged {number}"
        shutil.copytree(whole, root)
        (root / "log.txt").unlink()
        file = sorted(root.glob(pattern))[0]
        damage(*([file] if share is None else [file, share]))
        resume = file if file.suffix == ".ckpt" else None
        process = laboratory.start(one, root, resume, None, here.replace(str(whole), str(root)))
        process.join(60)
        text = (root / "log.txt").read_text()
        (message,) = [row for row in text.splitlines() if row[:7] == "rotopo:"] or [""]
        if (pattern, damage) in UNHARMED:
            found, seen = outcome(root)
            right = process.exitcode == 0 and validations.equals(seen)
            right &= equal(found, checkpoint)
        else:
            named = file.parent.parent if "pairs/" in pattern else file
            named = file.parent if file.name in ("counts.json", "hashes.json") else named
            right = process.exitcode == 2 and "Traceback" not in text and str(named) in message
        how = {cut: f"cut to {share}", flip: f"a bit flipped at {share}"}.get(damage, "removed")
        message = message.replace(str(root), "") or "made again, and all numbers are equal"
        lines.append({"file": pattern, "fault": how, "what happened": message, "right": right})
    printed(record_property, f"{len(lines)} damaged files", lines)
    assert all(line["right"] for line in lines)


def equal(found: dict, expected: dict) -> bool:
    return found["global_step"] == expected["global_step"] and all(
        torch.equal(value, expected["state_dict"][name])
        for name, value in found["state_dict"].items()
    )


# A disk that fills up.


def refusal(process: ForkServerProcess, root: Path) -> str:
    """The one line with which a run ends."""
    process.join(60)
    text = (root / "log.txt").read_text()
    assert process.exitcode == 2, text
    assert "Traceback" not in text
    (message,) = [row for row in text.splitlines() if row[:7] == "rotopo:"]
    return message


def unfinished(root: Path) -> list[Path]:
    return [file for file in root.rglob(".*") if file.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_disk_that_fills_up_ends_the_run_and_the_last_checkpoint_is_whole(
    laboratory, record_property, count
):
    """By a limit on files that comes before a step: a checkpoint is larger, and nothing else."""
    one = Try(0, "DPO, LoRA with dropout", 2, 1, 0, True, ())
    checkpoint, validations, _ = laboratory.expected(one)
    root = laboratory.folder / f"limit {count}"
    fault = FileLimit("before a step", count, signal.SIGXFSZ, limit=15_000)
    message = refusal(laboratory.start(one, root, None, fault), root)
    assert f"step={count}.ckpt cannot be written (File too large): make room" in message
    last = last_good(root)
    advice = "there is no checkpoint to go on from" if count == 1 else f"--ckpt_path {last}"
    assert advice in message
    assert unfinished(root) == []
    whole_files(root)
    process = laboratory.start(one, root, last)
    process.join(60)
    found, seen = outcome(root)
    line = {
        "fault": f"a limit on files from step {count} on",
        "what happened": message.replace(str(root), ""),
        "equal": equal(found, checkpoint) and validations.equals(seen),
    }
    printed(record_property, "A disk that fills up", [line])
    assert line["equal"]


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [8, 40, 90, 150])
def test_so_does_one_that_is_really_full(laboratory, record_property, kilobytes, tmp_path):
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        one = Try(0, "DPO, LoRA with dropout", 2, 1, 0, True, ())
        checkpoint, validations, _ = laboratory.expected(one)
        root = laboratory.folder / f"full {kilobytes}"
        root.mkdir()
        place = f"--trainer.default_root_dir={tmp_path}"
        message = refusal(laboratory.start(one, root, None, None, place), root)
        assert "(No space left on device): make room" in message
        assert unfinished(tmp_path) == []
        last = last_good(tmp_path)
        assert (f"--ckpt_path {last}" if last else "no checkpoint to go on from") in message
        whole_files(tmp_path)
        shutil.copytree(tmp_path, root, dirs_exist_ok=True)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    process = laboratory.start(one, root, root / last.relative_to(tmp_path) if last else None)
    process.join(60)
    found, seen = outcome(root)
    line = {
        "fault": f"a disk of {kilobytes} kB",
        "what happened": message,
        "equal": equal(found, checkpoint) and validations.equals(seen),
    }
    printed(record_property, "A disk that is really full", [line])
    assert line["equal"]


# The command as it is typed.


@pytest.mark.slow
def test_the_real_command_killed_three_times(laboratory, record_property):
    one = Try(0, "DPO, LoRA with dropout", 40, 1, 1, True, ())
    checkpoint, validations, _ = laboratory.expected(one)
    root, events = laboratory.folder / "real", []
    chance = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        resume, before = last_good(root), len(list(root.rglob("*.ckpt")))
        command = [sys.executable, "-m", "rotopo.cli", *laboratory.arguments(one, root)]
        command += [f"--ckpt_path={resume}"] if resume else []
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(list(root.rglob("*.ckpt"))) < before + 3 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        whole_files(root)
        last = last_good(root)
        step = read(last)["global_step"]
        events.append(f"{number.name}: status {process.returncode}, step {step} kept")
        if number == signal.SIGTERM:
            assert process.returncode == 143
            told = error.decode().splitlines()[-1]
            assert told.startswith(f"rotopo: ended by SIGTERM after step {step}, checkpoint kept; ")
            assert told.endswith(f"go on with: rotopo fit --ckpt_path {shlex.quote(str(last))}")
        else:
            assert process.returncode == -9
    process = laboratory.start(one, root, last_good(root))
    process.join(60)
    found, seen = outcome(root)
    line = {
        "what happened": "; ".join(events),
        "weights equal": equal(found, checkpoint),
        "validations": f"{len(seen)} of {len(validations)}",
    }
    printed(record_property, "The real command", [line])
    assert line["weights equal"]
    pd.testing.assert_frame_equal(seen, validations, check_exact=True)


def end(ranks: list[ForkServerProcess], seconds: float = 60) -> list[int | None]:
    """The ranks' statuses, None of one that does not end in time."""
    for process in ranks:
        process.join(seconds)
    return [process.exitcode for process in ranks]


@pytest.mark.slow
def test_of_two_ranks_one_is_killed(laboratory, tmp_path, record_property):
    """The other ends at once: gloo sees that the connection is closed."""
    one = Try(0, "DPO, LoRA with dropout", 40, 1, 0, True, ())

    def start(root: Path, resume: Path | None = None) -> list[ForkServerProcess]:
        options, port = [*strategy("ddp"), "--trainer.devices=2"], free_port()
        ranks = [environment("torchrun", rank, 2, 1, port) for rank in range(2)]
        return [
            laboratory.start(one, root, resume, None, *options, environment=rank) for rank in ranks
        ]

    assert end(start(tmp_path / "whole")) == [0, 0]
    lines = []
    for struck in (0, 1):
        root = tmp_path / f"rank {struck} killed"
        ranks = start(root)
        deadline = time.monotonic() + 60
        while len(list(root.rglob("*.ckpt"))) < 20:
            assert time.monotonic() < deadline
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.01)
        ranks[struck].kill()
        began = time.monotonic()
        statuses = end(ranks, 30)
        seconds = time.monotonic() - began
        assert statuses[struck] == -9
        assert statuses[1 - struck] == 1
        whole_files(root)
        last = last_good(root)
        step = read(last)["global_step"]
        assert end(start(root, last)) == [0, 0]
        line = {
            "fault": f"rank {struck} killed, {step} steps kept",
            "the other ended after": f"{seconds:.1f} s",
            "weights equal": equal(outcome(root)[0], outcome(tmp_path / "whole")[0]),
        }
        lines.append(line)
    printed(record_property, "Two ranks", lines)
    assert all(line["weights equal"] for line in lines)


@pytest.mark.slow
def test_ctrl_c_of_two_ranks_is_one_message_and_they_go_on(laboratory, tmp_path):
    """A terminal sends it to both, and torchrun once more."""
    one = Try(0, "DPO, LoRA with dropout", 8, 1, 0, True, ())

    def start(root: Path, resume: Path | None = None) -> list[ForkServerProcess]:
        options, port = [*strategy("ddp"), "--trainer.devices=2"], free_port()
        ranks = [environment("torchrun", rank, 2, 1, port) for rank in range(2)]
        return [
            laboratory.start(one, root, resume, None, *options, environment=rank) for rank in ranks
        ]

    def ctrl_c(ranks: list[ForkServerProcess], root: Path) -> str:
        for _ in range(2):
            for process in ranks:
                with suppress(ProcessLookupError):  # it has ended by the first
                    os.kill(process.pid, signal.SIGINT)
            time.sleep(0.1)
        assert end(ranks, 30) == [130, 130], (root / "log.txt").read_text()
        log = (root / "log.txt").read_text()
        assert "Traceback" not in log
        (told,) = [row for row in log.splitlines() if row.startswith("rotopo: ended by ")]
        return told

    early, root, whole = (tmp_path / name for name in ("early", "run", "whole"))
    ranks = start(early)
    deadline = time.monotonic() + 60
    while not (log := early / "log.txt").exists() or log.read_text().count("GLOBAL_RANK") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "before the first step" in ctrl_c(ranks, early)

    ranks = start(root)
    deadline = time.monotonic() + 60
    while len(list(root.rglob("*.ckpt"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    told = ctrl_c(ranks, root)
    last = last_good(root)
    assert told.endswith(f"go on with: the same command and --ckpt_path {shlex.quote(str(last))}")
    assert end(start(root, last), 120) == end(start(whole), 120) == [0, 0]
    assert equal(outcome(root)[0], outcome(whole)[0])


# Jobs that SLURM starts again.


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The path with an scontrol that only writes down what it is told."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "told.txt"}\n')
    program.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_a_job_that_slurm_queues_again_goes_on(laboratory, slurm, tmp_path, record_property):
    """By the signal that SLURM gives some time before it ends a job, and when a machine breaks
    down: by the same command, in the same folder; another command of the job begins anew."""
    one = Try(0, "DPO, LoRA with dropout", 3, 2, 0, True, ())
    checkpoint, validations, _ = laboratory.expected(one)
    root, log, events = tmp_path / "run", tmp_path / "run" / "log.txt", []
    faults = [Fault("before a step", 4, signal.SIGUSR1), Fault("behind a step", 2, signal.SIGKILL)]
    for restarts, fault in enumerate([*faults, None]):
        job = environment("srun", 0, 1, 1, 0) | slurm | {"SLURM_RESTART_COUNT": str(restarts)}
        process = laboratory.start(one, root, None, fault, environment=job)
        process.join(60)
        whole_files(root)
        events.append(f"status {process.exitcode}, step {read(last_good(root))['global_step']}")
    assert events[0] == f"status {128 + signal.SIGUSR1}, step 4", log.read_text()
    assert events[1:] == ["status -9, step 5", "status 0, step 9"], log.read_text()
    assert (tmp_path / "told.txt").read_text() == "requeue 1234\n"
    found, seen = outcome(root)
    printed(record_property, "A job that is queued again", [{"what happened": "; ".join(events)}])
    assert equal(found, checkpoint)
    pd.testing.assert_frame_equal(seen, validations, check_exact=True)

    process = laboratory.start(one, root, None, None, "--model.beta=0.4", environment=job)
    process.join(60)
    assert log.read_text().count("This job was queued again: it goes on from") == 2
    assert log.read_text().count("This job was queued again: it begins anew") == 1


@pytest.mark.slow
def test_a_job_that_cannot_be_queued_again_says_so(laboratory, slurm, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"{scontrol.read_text()}exit 1\n")
    one = Try(0, "DPO, LoRA with dropout", 3, 2, 0, True, ())
    job = environment("srun", 0, 1, 1, 0) | slurm
    job |= {"SLURM_ARRAY_JOB_ID": "1234", "SLURM_ARRAY_TASK_ID": "7"}
    fault = Fault("before a step", 2, signal.SIGUSR1)
    process = laboratory.start(one, tmp_path / "run", None, fault, environment=job)
    process.join(60)
    assert (tmp_path / "told.txt").read_text() == "requeue 1234_7\n"  # not the whole array
    *_, failed, last = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert failed.startswith("rotopo: the job was not queued again: ")
    assert last.startswith("rotopo: ended by SIGUSR1 after step 2, checkpoint kept; go on with: ")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_job_of_two_ranks_goes_on(laboratory, slurm, tmp_path, how):
    """The signal comes to the second rank alone."""
    one = Try(0, "DPO, LoRA with dropout", 3, 1, 0, True, ())
    options = [*strategy(how), "--trainer.num_nodes=2", "--trainer.devices=1"]

    def start(
        root: Path, restarts: int, struck: Fault | None = None, *second: str
    ) -> list[int | None]:
        ranks, port = [], free_port()
        for rank, (fault, more) in enumerate([(None, ()), (struck, second)]):
            job = environment("srun", rank, 2, 2, port) | slurm
            job["SLURM_RESTART_COUNT"] = str(restarts)
            given = [*options, *more]
            ranks.append(laboratory.start(one, root, None, fault, *given, environment=job))
        return end(ranks)

    assert start(tmp_path / "whole", 0) == [0, 0]
    root, status = tmp_path / "run", 128 + signal.SIGUSR1
    assert start(root, 0, Fault("before a step", 4, signal.SIGUSR1)) == [status] * 2
    assert (tmp_path / "told.txt").read_text() == "requeue 1234\n"
    # The second node has a disk of its own, or all is as it should be.
    assert start(root, 1, None, f"--trainer.default_root_dir={tmp_path}") == [2, 2]
    assert "the ranks of this job do not find the same checkpoint" in (root / "log.txt").read_text()
    assert start(root, 1) == [0, 0], (root / "log.txt").read_text()
    assert equal(outcome(root)[0], outcome(tmp_path / "whole")[0])
