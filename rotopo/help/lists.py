"""What there is: objectives, formats of rows, callbacks, each list on one screen."""

import re

from rotopo.data.formats import COMMON_COLUMNS, FORMATS
from rotopo.described import Described, Description
from rotopo.help.layout import page, paragraph, table
from rotopo.help.settings import classes_of, setting_at

# What a run has only if it is asked for; the others are in every run.
ADDED = ("Alternation", "Generations", "Geometry", "NoiseDetection", "Perplexity")

_CITED = re.compile(r" \([^()]*(?:\d{4})[^()]*\)")


def objectives(description: Description) -> str:
    """Which there are, with their formulas where they fit."""
    found = _public(description, "model")
    rows = [(o.name, _without_its_name(o)) for o in found if ".objectives." in o.path]
    return page(
        "Objectives, for --model (c, r: log-probs of the chosen and rejected response; c̄,\n"
        "r̄: per token; Δ: log-ratio to the reference; h = Δw − Δl; σ: logistic):",
        table(rows, 14, 2),
        "More: rotopo fit --model.help DPO. A file for each, with the data that it needs:\n"
        "configs/objectives. Reward models: --model rotopo.reward.RewardModule.",
    )


def formats() -> str:
    """Which there are, with the columns of their rows."""
    rows = []
    for name, one in FORMATS.items():
        columns = [*one.columns, *(f"[{column}]" for column in one.optional)]
        said = " ".join((one.read.__doc__ or "").replace("``", "").split()).split(". ")[0]
        rows.append(f"  {name:<15}{', '.join(columns)}\n{paragraph(said, 17)}")
    common = " and ".join(COMMON_COLUMNS)
    return page(
        "Formats of rows, for --data.format; found by the columns where none is named:",
        "\n".join(rows),
        paragraph(
            f"Every format reads {common} as well. Columns that are called otherwise: "
            "--data.columns '{prompt: instruction, chosen: good, rejected: bad}'. A format of your "
            "own is a function of a row: --data.format my_package.my_module.my_function."
        ),
        "Where rows may come from: rotopo fit --data.help, source. Are they sound? rotopo\n"
        "doctor --config FILE",
    )


def callbacks(description: Description) -> str:
    """Which there are, ours and Lightning's."""
    found = _public(description, "trainer.callbacks")
    ours = [(one.name, one.doc) for one in found if one.path.startswith("rotopo.")]
    others = [one.name for one in found if not one.path.startswith("rotopo.")]
    return page(
        "Callbacks, for trainer.callbacks:",
        table((row for row in ours if row[0] in ADDED), 20, 2),
        "In every run without being named (named, with other settings):",
        table((row for row in ours if row[0] not in ADDED), 20, 2),
        "Lightning's:\n" + paragraph(", ".join(others), 2),
        "More: rotopo fit --trainer.callbacks.help Generations. On the command line:\n"
        "  --trainer.callbacks+=Perplexity --trainer.callbacks.file text.txt",
    )


def _public(description: Description, setting: str) -> list[Described]:
    """Classes that a setting of fit takes, ours where a room shows them, by their names."""
    taken = setting_at(description, "fit", setting, {})
    assert taken is not None
    return sorted(
        (
            one
            for one in classes_of(description, taken)
            if one.path.count(".") == 2 or not one.path.startswith("rotopo.")
        ),
        key=lambda one: one.name.lower(),
    )


def _without_its_name(one: Described) -> str:
    """What is said of an objective behind its name and its paper."""
    said = _CITED.sub("", one.doc)
    name, _, rest = said.partition(": ")
    said = rest if rest and len(name.split()) < 3 else said
    first = said.split(" ")[0]
    return said[0].lower() + said[1:] if first[1:] == first[1:].lower() else said
