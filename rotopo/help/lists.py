"""What there is: objectives, formats of rows, callbacks, each list on one screen."""

import re

from rotopo.data.formats import COMMON_COLUMNS, FORMATS
from rotopo.described import Described, Description
from rotopo.help.layout import page, paragraph, table

_CITED = re.compile(r" \([^()]*(?:\d{4})[^()]*\)")


def objectives(description: Description) -> str:
    """Which there are, with their formulas where they fit."""
    found = _public(description, "PreferenceModule")
    rows = [(one.name, _without_its_name(one)) for one in found]
    return page(
        "Objectives, for --model (c, r: log-probs of the chosen and rejected response; c̄,\n"
        "r̄: per token; Δ: log-ratio to the reference; h = Δw − Δl; σ: logistic):",
        table(rows, 24),
        "More: rotopo fit --model.help DPO. A file for each, with the data that it needs:\n"
        "configs/objectives. Reward models: --model rotopo.reward.RewardModule.",
    )


def formats() -> str:
    """Which there are, with the columns of their rows."""
    rows = []
    for name, one in FORMATS.items():
        columns = [*one.columns, *(f"[{column}]" for column in one.optional)]
        said = re.sub(r"``", "", " ".join((one.read.__doc__ or "").split()))
        rows.append(f"  {name:<15}{', '.join(columns)}\n{paragraph(_sentence(said), 17)}")
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
    found = _public(description, "Callback")
    ours = [(one.name, one.doc) for one in found if one.path.startswith("rotopo.")]
    others = [(one.name, one.doc) for one in found if not one.path.startswith("rotopo.")]
    return page(
        "Callbacks, for trainer.callbacks: rotopo's",
        table(ours, 26),
        "Lightning's",
        table(others, 32),
        "More: rotopo fit --trainer.callbacks.help Generations. On the command line:\n"
        "--trainer.callbacks+=Perplexity --trainer.callbacks.file text.txt",
    )


def _public(description: Description, kind: str) -> list[Described]:
    """Classes of a kind that a room of ours shows, or Lightning, and that are no bases of others,
    by their names."""
    every = [description.classes[path] for path in description.kinds[kind]]
    parents = {base for one in every for base in one.bases}
    return sorted(
        (
            one
            for one in every
            if one.path not in parents
            and not one.abstract
            and (one.path.count(".") == 2 or not one.path.startswith("rotopo."))
        ),
        key=lambda one: one.name.lower(),
    )


def _without_its_name(one: Described) -> str:
    """What is said of an objective behind its name and its paper."""
    said = _CITED.sub("", one.doc)
    name, _, rest = said.partition(": ")
    return rest if rest and len(name.split()) < 3 else said


def _sentence(text: str) -> str:
    return re.split(r"(?<=[.;:])\s", text)[0].rstrip(";:.") + "."
