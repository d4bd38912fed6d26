"""The page of a command, and that of all of them."""

from typing import NamedTuple

from rotopo.described import Described, Description, Setting
from rotopo.help.classes import head
from rotopo.help.layout import entries, page, paragraph, table
from rotopo.help.settings import inside


class Words(NamedTuple):
    """What is said of a command.

    Attributes:
        line: in the list of all commands.
        usage: behind its name.
        text: what it does, in paragraphs.
        examples: command lines, with what each is for.
    """

    line: str
    usage: str
    text: tuple[str, ...]
    examples: tuple[tuple[str, str], ...] = ()


_GO_ON = "runs/version_0/checkpoints/last.ckpt"

# In the order in which a user meets them.
TRAINING = ("fit", "validate", "test", "predict")
BESIDE = ("doctor", "plan", "compare", "judge", "report", "export")
LOOKING = ("objectives", "formats", "callbacks", "completion")

COMMANDS: dict[str, Words] = {
    "fit": Words(
        "train a policy or a reward model on preferences",
        "--config FILE [--config FILE ...] [--SETTING VALUE ...]",
        (
            "Train a policy, or a reward model, on preferences. A run is a YAML file of class "
            "paths and their settings; a further file lies on top of the ones before it, and "
            "settings behind the files override them. Each run has a folder of its own, "
            "runs/version_N, from whose checkpoints it can go on.",
        ),
        (
            ("train", "rotopo fit --config configs/quickstart.yaml"),
            (
                "another objective",
                "rotopo fit --config configs/quickstart.yaml --model SimPO --model.beta 2",
            ),
            ("go on", f"rotopo fit --ckpt_path {_GO_ON}"),
        ),
    ),
    "validate": Words(
        "measure it on the validation pairs",
        "--ckpt_path CHECKPOINT [--SETTING VALUE ...]",
        (
            "Measure a checkpoint on the validation pairs of its run. The settings are the "
            "checkpoint's own; without one, --config FILE measures the model untrained.",
        ),
        (("", f"rotopo validate --ckpt_path {_GO_ON}"),),
    ),
    "test": Words(
        "measure it on the test pairs, and write what was found",
        "--ckpt_path CHECKPOINT [--SETTING VALUE ...]",
        (
            "Measure a checkpoint on the test pairs, and write test.json and test_pairs.jsonl: "
            "accuracy with its interval, AUROC, calibration, rewards and lengths. The settings are "
            "the checkpoint's own; without one, --config FILE measures the model untrained.",
        ),
        (
            ("", f"rotopo test --ckpt_path {_GO_ON}"),
            ("on other pairs", "rotopo test --ckpt_path POLICY.ckpt --data.source pairs.jsonl"),
        ),
    ),
    "predict": Words(
        "respond to prompts, or score responses",
        "--ckpt_path CHECKPOINT [--SETTING VALUE ...]",
        (
            "Write a response to every held-out prompt (responses.jsonl); or, with data.score, "
            "what a reward model or a policy's implicit reward gives to responses (scores.jsonl). "
            "Killed and started again, it goes on where it stopped.",
        ),
        (
            ("respond", "rotopo predict --ckpt_path POLICY.ckpt"),
            ("to other prompts", "rotopo predict --ckpt_path POLICY.ckpt --data.prompts FILE"),
            ("score", "rotopo predict --ckpt_path REWARD.ckpt --data.score responses.jsonl"),
        ),
    ),
    "doctor": Words(
        "check the data of a fit; loads no model",
        "--config FILE [OPTIONS OF rotopo fit]",
        (
            "Check the data that a fit would train on: turns, padding, truncation, copies, "
            "leakage between splits, balance of labels, length. Each finding has its numbers and "
            "the setting to change. Takes the files and options of rotopo fit; loads no model.",
        ),
        (("", "rotopo doctor --config configs/quickstart.yaml"),),
    ),
    "plan": Words(
        "what a fit takes of a GPU; needs neither weights nor data",
        "--config FILE [OPTIONS OF rotopo fit] [OPTIONS BELOW]",
        (
            "What a fit takes of a GPU, before one is booked. Takes the files and options of "
            "rotopo fit. Of the model it reads config.json and no weights, and of the data "
            "nothing: lengths are the longest that data.max_length allows, unless they are given. "
            "It runs the fit's own step on tensors without values, and counts what is alive.",
            "Not planned, but refused by name: quantised bases, compiled layers, flex_attention, "
            "CPU offload, torch's first FSDP, code of the model's own, generation.",
        ),
        (
            ("", "rotopo plan --config run.yaml --card h100"),
            ("", "rotopo plan --config run.yaml --card 80GB --ranks 4"),
        ),
    ),
    "compare": Words(
        "is A better than B, equally far from the reference?",
        "--config COMPARISON.yaml [--SETTING VALUE ...]",
        (
            "Train arms alike on several seeds, each at the learning rate that suits it, and say "
            "whether they can be told apart at equal sequence KL and at equal margin, with "
            "intervals over seeds: one HTML page, and a table of every number. A comparison that "
            "was killed goes on where it stopped.",
        ),
        (
            ("what it would take", "rotopo compare --config comparison.yaml --dry_run true"),
            ("", "rotopo compare --config comparison.yaml"),
        ),
    ),
    "judge": Words(
        "compare policies, from files of scores",
        "--scores.NAME {JUDGE: FILE} ... --baseline NAME --output DIR",
        (
            "Compare policies with a baseline, prompt by prompt, from the files of scores that "
            "rotopo predict writes with data.score: mean scores, win rates with ties as one half, "
            "paired differences and win rates at equal length, each with its interval; how far "
            "the judges agree; how long and diverse the responses are.",
        ),
        (
            (
                "",
                "rotopo judge --scores.base '{rm: a.jsonl}' --scores.DPO '{rm: b.jsonl}' \\\n"
                "    --baseline base --output judged",
            ),
        ),
    ),
    "report": Words(
        "one page of runs and judgements, with pictures",
        "--output FILE [--SETTING VALUE ...]",
        (
            "Make one HTML page of reward models, trainings, generations and judgements, which "
            "needs no network. Every part is optional, and a single training makes a page too. "
            "Give a policy one name throughout.",
        ),
        (
            ("", "rotopo report --policies '{DPO: runs/version_0}' --output report.html"),
            (
                "",
                "rotopo report --reward_models '{trained: runs/version_3}' --judge judged \\\n"
                "    --output report.html",
            ),
        ),
    ),
    "export": Words(
        "make a Hugging Face model of a run, and check it",
        "--run DIR --output DIR [--SETTING VALUE ...]",
        (
            "Write a run's policy or reward model for transformers and PEFT. What was written is "
            "loaded again by transformers alone and compared with what was trained, before the "
            "folder gets its name.",
        ),
        (
            ("a model", "rotopo export --run runs/version_0 --output my_model"),
            ("an adapter", "rotopo export --run runs/version_0 --output mine --form adapter"),
        ),
    ),
    "objectives": Words("list the objectives", "", ("List the objectives that --model takes.",)),
    "formats": Words("list the formats of rows", "", ("List the formats of rows of data.",)),
    "callbacks": Words("list the callbacks", "", ("List what trainer.callbacks takes.",)),
    "completion": Words(
        "print a shell's script that completes commands, settings, classes",
        "bash | zsh | fish",
        ("Print a script with which the shell completes commands, settings and class names.",),
        (
            ("bash", "rotopo completion bash >> ~/.bashrc"),
            ("zsh", "rotopo completion zsh >> ~/.zshrc"),
            ("fish", "rotopo completion fish > ~/.config/fish/completions/rotopo.fish"),
        ),
    ),
}

_NEEDED = (
    ("--model DPO", "an objective"),
    ("--model.policy.path FOLDER", "a language model"),
    ("--model.optimizer AdamW", "how it learns"),
    ("--data PairwiseDataModule", "the data, of"),
    ("--data.source pairs.jsonl", "rows of prompt, chosen, rejected"),
)
_SEE = (
    ("rotopo objectives", "what --model can be"),
    ("rotopo fit --model.help DPO", "what one of them takes"),
    ("rotopo formats", "which rows of data are understood"),
    ("rotopo fit --data.help", "the data's settings in full"),
    ("rotopo callbacks", "what trainer.callbacks can hold"),
    ("rotopo fit --trainer.help", "the Trainer's settings in full"),
    ("rotopo fit --config FILE --print_config", "all settings that a run would have"),
)
_AS_FIT = "All settings of rotopo fit are taken, too: rotopo fit --help"
# Lightning says of these nothing, or what does not hold here.
_SAID = {
    "seed_everything": "the seed of all random numbers; true draws one",
    "ckpt_path": "the checkpoint to go on from, or to measure",
    "default_root_dir": "the folder of the runs' folders; null is runs",
    "weights_only": "always true: no code in a checkpoint is run",
    "return_predictions": "keep what was predicted in memory, for Python",
}


def overview() -> str:
    """The page of all commands."""

    def lines(names: tuple[str, ...]) -> str:
        return table([(name, COMMANDS[name].line) for name in names], 15)

    return page(
        "usage: rotopo COMMAND [OPTIONS]     rotopo COMMAND --help     rotopo --version",
        "Preference optimisation of language models on Lightning. A run is a YAML file of\n"
        "class paths and settings, and any setting can be overridden behind it.",
        "Train, and use what was trained:\n" + lines(TRAINING),
        "Before and after:\n" + lines(BESIDE),
        "Look up:\n" + lines(LOOKING),
        "Examples:\n"
        "  rotopo fit --config configs/quickstart.yaml\n"
        "  rotopo fit --config configs/quickstart.yaml --model SimPO --model.beta 2\n"
        f"  rotopo test --ckpt_path {_GO_ON}\n"
        "  rotopo fit --model.help DPO           what a class takes",
    )


def command_page(description: Description, command: str) -> str:
    """The page of a command."""
    words = COMMANDS[command]
    opening = [
        f"usage: rotopo {command} {words.usage}".rstrip(),
        *(paragraph(text) for text in words.text),
        _examples(words),
    ]
    of = description.commands.get(command)
    if of is None:
        return page(*opening)
    if command == "plan":
        fits = description.commands["fit"].by_name
        own = [one for one in of.settings if one.name not in fits]
        shown = entries((head(f"--{one.name}", one), one.doc) for one in own)
        return page(*opening, "Options:\n" + shown, _AS_FIT)
    if "trainer" not in of.by_name:
        shown = entries((head(f"--{one.name}", one), one.doc) for one in of.settings)
        return page(*opening, "Options:\n" + shown)
    if command != "fit":
        return page(*opening, "Options:\n" + _lines(*_of_the_run(of)), _AS_FIT)
    return page(
        *opening,
        "A run needs, in a file or on the command line:\n" + table(_NEEDED, 43),
        "To see more:\n" + table(_SEE, 43),
        *_of_a_run(description, of),
    )


def _examples(words: Words) -> str:
    if not words.examples:
        return ""
    lines = []
    for what, line in words.examples:
        lines += [f"  # {what}"] * bool(what) + [f"  {line}"]
    return "Examples:\n" + "\n".join(lines)


def _of_a_run(description: Description, of: Described) -> list[str]:
    """The settings of a command on a Trainer, each in a line: those of the run, the model and the
    data, and the Trainer's at the end."""
    parts = {name: of.by_name[name] for name in ("model", "data", "trainer")}
    objective = description.classes["rotopo.objectives.base.PreferenceModule"].by_name
    groups = {name: one for name, one in objective.items() if one.type in description.groups}
    model = {name: one for name, one in objective.items() if name not in groups}
    return [
        "The run:\n" + _lines(*_of_the_run(of)),
        "The model, and what any objective takes, as --model.NAME:\n"
        + _lines(("--model NAME", "the objective: rotopo objectives"), *_each(model)),
        *(
            f"As --model.{name}.NAME:\n" + _lines(*_each(inside(description, one, None)))
            for name, one in groups.items()
        ),
        "The data, as --data.NAME; in full: rotopo fit --data.help\n"
        + _lines(*_each(inside(description, parts["data"], None))),
        "Lightning's Trainer, as --trainer.NAME; in full: rotopo fit --trainer.help\n"
        + _lines(*_each(inside(description, parts["trainer"], None))),
    ]


def _of_the_run(of: Described) -> list[tuple[str, str]]:
    plain = [one for one in of.settings if one.name not in ("model", "data", "trainer")]
    return [
        ("--config FILE", "settings in YAML; a further one lies on top of it"),
        ("--print_config", "print what all of it comes to, and do nothing"),
        *((f"--{one.name}", _SAID.get(one.name, one.doc)) for one in plain),
    ]


def _lines(*rows: tuple[str, str]) -> str:
    return table(rows, 28)


def _each(settings: dict[str, Setting]) -> list[tuple[str, str]]:
    return [(name, _SAID.get(name, one.doc)) for name, one in settings.items()]
