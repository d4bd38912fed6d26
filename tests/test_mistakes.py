"""Misspelt settings, classes, files and commands: what is said, and what is let through."""

import contextlib
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rotopo.cli import COMMANDS, main, run
from rotopo.described import read
from rotopo.described.check import look_through
from rotopo.described.rephrase import rephrased
from rotopo.described.types import taken

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OF_POLICIES = [file for file in CONFIGS if "reward_model" not in file.stem]
START = "fit --config configs/quickstart.yaml "
DESCRIPTION = read()


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def said(line: str) -> list[str]:
    return look_through(shlex.split(line), DESCRIPTION, COMMANDS).wrong


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fitt --config x.yaml", "fitt: did you mean fit?"),
        ("configs/quickstart.yaml", "did you mean rotopo fit --config configs/quickstart.yaml?"),
        ("fit configs/quickstart.yaml", "give a file of settings as --config configs/quick"),
        (START + "stray", "stray: belongs to no option"),
        ("fit --trainer.max_epochs 2", "no settings are given"),
        ("fit --config configs/quikstart.yaml", "did you mean configs/quickstart.yaml?"),
        ("fit --config=quickstart.yaml", "no such file; did you mean configs/quickstart.yaml?"),
        ("fit --config configs", "is a folder, not a file"),
        (
            START + "--ckpt_path runs/nowhere/last.ckpt",
            "ckpt_path: runs/nowhere/last.ckpt: no",
        ),
        (START + "--model.beta", "--model.beta needs a value"),
        (
            START + "--model.bata 0.1",
            "model.bata: DPO has no setting 'bata'; did you mean 'beta'?",
        ),
        (START + "--model.init_args.bata=0.1", "model.bata: DPO has no setting 'bata'"),
        (
            START + "--trainer.max_step 3",
            "trainer.max_step: the Trainer has no setting 'max_step'; did you mean 'max_steps'?",
        ),
        (START + "--beta 1", "fit has no setting 'beta'; did you mean 'model.beta'?"),
        (START + "--lr 1", "did you mean 'model.optimizer.lr'?"),
        (START + "--model SimpO", "there is no PairwiseModule 'SimpO'; did you mean 'SimPO'?"),
        (START + "--model rotopo.objectives.Dpo", "did you mean 'rotopo.objectives.DPO'?"),
        (START + "--model rotopo.objectivs.DPO", "there is no PairwiseModule"),
        (START + "--model.class_path SimpO", "did you mean 'SimPO'?"),
        (
            "fit --model.beta 1 --config configs/quickstart.yaml",
            "model.beta: put --config FILE, or --model CLASS, in front of it",
        ),
        (START + "--model.policy.dtyp auto", "PolicyConfig has no setting 'dtyp'"),
        (START + "--model.policy.adapter LoraConfg", "did you mean 'LoraConfig'?"),
        (START + "--model.policy.adapter.n_housholder 1", "did you mean 'n_householder'?"),
        (
            START + "--model.policy.adapter LoraConfig --model.policy.adapter.n_householder 1",
            "Lora",
        ),
        (START + "--model.optimizer AdmW", "did you mean 'AdamW'?"),
        (
            START + "--model.optimizer SGD --model.optimizer.betas [1,2]",
            "SGD has no setting 'betas'",
        ),
        (START + "--trainer.callbacks+=EarlyStoping", "did you mean 'EarlyStopping'?"),
        (
            START + "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr x",
            "trainer.callbacks.monitr: EarlyStopping has no setting 'monitr'",
        ),
        (START + "--trainer.callbacks+='{class_path: Speed, init_args: {a: 1}}'", "no setting 'a'"),
        (START + "--trainer.callbacks.monitr x", "ModelCheckpoint has no setting 'monitr'"),
        (START + "--data.source='[{source: a.jsonl, rws: 3}]'", "did you mean 'rows'?"),
        (START + "--data.validation='{x: {source: a, rws: 3}}'", "data.validation.x.rws: Source"),
        (START + "--data '{class_path: PairwiseDataModule, sorce: a}'", "go under init_args"),
        (START + "--data.layout paked", "found 'paked'; did you mean 'packed'?"),
        (START + "--model.beta abc", "model.beta: expected a float, found 'abc'"),
        (START + "--model.wpo maybe", "model.wpo: expected true or false, found 'maybe'"),
        ("judge --scors.a '{}' --baseline a --output b", "did you mean 'scores'?"),
        ("export --run a --outptu b", "did you mean 'output'?"),
        (
            START.replace("fit", "plan") + "--crd h100",
            "plan has no setting 'crd'; did you mean 'card'",
        ),
    ],
)
def test_a_mistake_is_named(line, expected):
    assert expected in said(line)[0]


def test_all_mistakes_are_said_with_their_files_and_lines(tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("trainer:\n  max_step: 3\nmodel:\n  init_args:\n    bata: 1\n    beta: x\n")
    found = said(f"{START} --config {file} --model.gama 1")
    assert found == [
        f"{file}, line 2: trainer.max_step: the Trainer has no setting 'max_step'; "
        "did you mean 'max_steps'?",
        f"{file}, line 5: model.bata: DPO has no setting 'bata'; did you mean 'beta'?",
        f"{file}, line 6: model.beta: expected a float, found 'x'",
        "model.gama: DPO has no setting 'gama'; it has beta, label_smoothing, divergence, "
        "divergence_alpha, normalise_length, wpo, wpo_clamp, policy, optimizer, scheduler, "
        "sampling, parameter_groups",
    ]


def test_a_torn_file_is_named_with_its_line(tmp_path):
    (tmp_path / "torn.yaml").write_text("trainer:\n  max_steps: [1\n")
    assert "torn.yaml, line 3: not YAML" in said(f"fit --config {tmp_path / 'torn.yaml'}")[0]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "doctor", "plan"])
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_no_file_of_ours_is_refused(command, file):
    assert said(f"{command} --config configs/quickstart.yaml --config {file}") == []


@pytest.mark.parametrize(
    "options",
    [
        "",
        "-c configs/adapters/lora.yaml --model.policy.adapter.r=4",
        "--model SimPO --model.gamma 1 --model.policy.adapter.n_householder 1",
        "--model.policy.adapter peft.LoraConfig --model.policy.adapter.r 4",
        "--model my.own.Objective --model.whatever 3 --trainer.callbacks+=ItsCallback",
        "--model.optimizer PagedAdamW8bit --model.optimizer.lr 1",
        "--model.optimizer bitsandbytes.optim.Adam8bit --model.optimizer.what 1",
        "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor val/loss",
        "--trainer.callbacks=null --trainer.logger false --trainer.strategy ddp",
        "--trainer.logger CSVLogger --trainer.logger.save_dir x",
        "--trainer.logger+=CSVLogger --trainer.logger.init_args.save_dir x",
        "--trainer.strategy DDPStrategy --trainer.strategy.dict_kwargs.anything 1",
        "--trainer.precision 32 --trainer.devices [0,1] --trainer.max_steps -1",
        "--data.validation '{x: test, y: 0.1}' --data.columns.prompt question",
        "--data.source+=a.jsonl --data.chat_template_kwargs '{a: 1}'",
        "--model.parameter_groups '{lora_B: {lr_ratio: 16}}'",
        "--model.scheduler OneCycleLR --model.scheduler.max_lr 1e-3",
        "--model.scheduler lightning.pytorch.cli.ReduceLROnPlateau --model.scheduler.monitor x",
        "--model rotopo.objectives.pairwise.SamPO --model.policy.path x",
        "--config '{trainer: {max_steps: 3}}' --print_config",
        "--config s3://somewhere/else.yaml --seed_everything 3",
        "--model.help DPO",
        "--ckpt_path last",
    ],
)
def test_what_is_right_or_in_doubt_is_let_through(options):
    assert said(START + options) == []


PLAIN = {
    "int": st.integers(-9, 10**6).map(str),
    "float": st.floats(allow_nan=False).map(repr),
    "bool": st.sampled_from(["true", "false"]),
    "None": st.just("null"),
    "str": st.text("abc xyz.", min_size=1).map(str.strip).filter(len),
}


@st.composite
def settings_of_a_class(draw) -> list[str]:
    """A class named in full, or by its short name, with settings of its own of the types that they
    take."""
    at, kind = draw(
        st.sampled_from(
            [
                ("model", "PairwiseModule"),
                ("model.optimizer", "Optimizer"),
                ("model.scheduler", "LRScheduler"),
                ("model.policy.adapter", "PeftConfig"),
                ("trainer.callbacks", "Callback"),
            ]
        )
    )
    path = draw(st.sampled_from(DESCRIPTION.kinds[kind]))
    name = path if draw(st.booleans()) else path.rpartition(".")[2]
    of = DESCRIPTION.of(path)
    if kind == "Optimizer" and "." not in name:  # torch's, of two of a name
        of = DESCRIPTION.of(f"torch.optim.{name}") or of
    options = [f"--{at}={name}"]
    for setting in draw(st.lists(st.sampled_from(of.settings), max_size=3)) if of.settings else []:
        takes = taken(setting.type, DESCRIPTION)
        values = [PLAIN[kind] for kind in takes.plain if kind in PLAIN]
        values += [st.sampled_from(takes.words)] if takes.words else []
        if values and not takes.nested:
            inner = draw(st.sampled_from(["", "init_args."]))
            options.append(f"--{at}.{inner}{setting.name}={draw(st.one_of(values))}")
    return options


@given(st.lists(settings_of_a_class(), min_size=1, max_size=3), st.sampled_from(OF_POLICIES))
@settings(max_examples=60, deadline=None)
def test_settings_that_classes_take_are_never_refused(options, file):
    start = ["fit", "--config", "configs/quickstart.yaml", "--config", str(file)]
    line = start + [one for some in options for one in some]
    assert look_through(line, DESCRIPTION, COMMANDS).wrong == []


@pytest.mark.slow
@given(settings_of_a_class(), st.sampled_from(OF_POLICIES))
@settings(max_examples=25, deadline=None)
def test_what_is_refused_the_parser_refuses_too(options, file):
    """One letter of a name changed; the parser prints what it takes."""
    start = ["fit", "--config", "configs/quickstart.yaml", "--config", str(file)]
    wrong = [one[:-1] if "=" not in one else one.replace("=", "q=", 1) for one in options]
    for line in (start + options, start + wrong):
        with contextlib.redirect_stdout(None), pytest.raises(SystemExit) as stop:
            run([*line, "--print_config"])
        if stop.value.code == 0:
            assert look_through(line, DESCRIPTION, COMMANDS).wrong == []


def test_the_command_ends_before_anything_is_imported(capsys, monkeypatch):
    monkeypatch.setattr("rotopo.cli.run", lambda args: pytest.fail("it went on"))
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(START + "--model.bata 1 --trainer.max_step 2"))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("rotopo: ") for line in lines)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            'Parser key "model":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'x.Y'>, <class 'NoneType'>]\n  Errors:\n"
            "    - Problem with given class_path 'my.Mine':\n        Parser key \"beta\":\n"
            "          Expected a <class 'float'>. Got value: abc\n"
            "    - Expected a <class 'NoneType'>\n  Given value type: <class 'x.NestedArg'>\n"
            "  Given value: NestedArg(key='beta', val='abc')",
            "model.beta: expected a float, found 'abc'",
        ),
        (
            "Parser key \"model\":\n  Errors:\n    - Problem with given class_path 'my.Mine':\n"
            "        No module named 'my'\n    - Expected a <class 'NoneType'>\n"
            "  Given value type: <class 'str'>\n  Given value: my.Mine",
            "model: my.Mine: No module named 'my'",
        ),
        (
            "Parser key \"data\":\n  Errors:\n    - Problem with given class_path 'x.Data':\n"
            "        Option 'rws' is not accepted\n    - Expected a <class 'NoneType'>",
            "data.rws: Data has no setting 'rws'",
        ),
        (
            "Parser key \"trainer.max_epochs\":\n  Errors:\n    - Expected a <class 'int'>\n"
            "    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n"
            "  Given value: ",
            "trainer.max_epochs: expected an int or null, found ''",
        ),
        ("the following arguments are required: scores", "scores: missing"),
        ("unrecognized arguments: stray", "unrecognized arguments: stray"),
    ],
)
def test_the_parsers_page_becomes_a_line(message, expected):
    assert rephrased(message) == expected


def test_files_of_runs_are_read_as_they_are_written(tmp_path):
    """A run's config.yaml, every setting in it, for the command that wrote it."""
    there = {"trainer": {one.name: one.default for one in _trainer().settings if not one.required}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(there))
    assert said(f"fit --config {tmp_path / 'config.yaml'}") == []


def _trainer():
    return DESCRIPTION.of(DESCRIPTION.groups["RotopoTrainer"])
