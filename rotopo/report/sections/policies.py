"""The policies: their implicit rewards, what a margin has cost them, how they rank pairs."""

import pandas as pd

from rotopo.metrics.displacement import at_equal_margin, log_ratios
from rotopo.metrics.runs import Training
from rotopo.report import plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Panel, Part, Picture, Section, Table, label, number, text
from rotopo.report.parts import (
    MEASURED,
    by_set,
    by_unit,
    first_and_last,
    measures,
    pairs_of,
    unit_text,
)

ORDER = 40


def section(inputs: Inputs) -> Section:
    fits, smoothing = inputs.fits, inputs.smoothing
    parts: list[Part] = []
    units = by_unit([run for run in fits if len(run.logged("train/rewards/margin"))])
    for unit, runs in units.items():
        parts.append(_rewards(runs, unit, len(units) > 1, smoothing))
    training = {run.name: log_ratios(run, "train", smoothing) for run in fits}
    training = {name: table for name, table in training.items() if len(table)}
    if training:
        parts += _displacement(fits, training, inputs.colours, smoothing)
    for unit, tests in by_unit(inputs.tests).items():
        caption = (
            f"The policies' implicit rewards as reward models, {unit_text(unit)}, on held-out "
            "pairs; 95% bootstrap intervals."
        )
        if unit != "nats per token":
            caption += (
                " For objectives with a reference an untrained policy's margins are zero, up to "
                "rounding."
            )
        parts.append(measures(tests, f"{caption} {MEASURED}", {}))
    parts += by_set(inputs.tests, "the policies")
    return Section("Policies", parts)


def _rewards(runs: list[Training], unit: str | None, several: bool, smoothing: int) -> Picture:
    caption = (
        f"The objective's implicit rewards, {unit_text(unit)}, of chosen and rejected responses "
        "and their margin, the chosen's less the rejected's, on training pairs: "
    )
    caption += (
        f"mean over {smoothing} logged steps (faint: each step)" if smoothing > 1 else "as logged"
    )
    held_out = [run for run in runs if len(run.logged("val/rewards/margin"))]
    caption += (
        f"; points on validation pairs ({pairs_of(runs)})." if held_out else f" ({pairs_of(runs)})."
    )
    compared = [run for run in runs if len(run.logged("train/displacement/chosen_up"))]
    if compared and unit == "nats":
        caption += (
            " A chosen reward below zero: the chosen are less likely than under the reference."
        )
    title = "Implicit rewards over training"
    return Picture(
        f"{title}, {unit_text(unit)}" if several else title,
        [
            Panel(
                plots.rewards(run, smoothing),
                f"Rewards over training of {run.name}. Chosen: "
                f"{first_and_last(run, 'train/rewards/chosen')}; rejected: "
                f"{first_and_last(run, 'train/rewards/rejected')}.",
                (run.name,),
            )
            for run in runs
        ],
        caption,
    )


def _displacement(
    fits: list[Training], training: dict[str, pd.DataFrame], colours: dict[str, str], smoothing: int
) -> list[Part]:
    validation = {run.name: log_ratios(run, "val") for run in fits if run.name in training}
    found = at_equal_margin(training)
    common = min((values["margin"] for values in found.values()), default=None)
    without = [run.name for run in fits if run.name not in training]
    smoothed = f", mean over {smoothing} logged steps" if smoothing > 1 else ""
    caption = (
        "How likely the responses have become while the margin grew: mean log-ratio to the "
        "reference of the chosen and of the rejected ones against their difference, the margin, in "
        f"nats, each on a scale of its own. Lines: training{smoothed}, the steps at which a "
        "policy's margin was larger than at all before; faint: all steps. "
    )
    if any(len(table) for table in validation.values()):
        caption += "Points: validation pairs. "
    if common is not None:
        caption += f"The dotted line is the margin of the table below, {common:.2f} nats. "
    else:
        caption += "Not all have reached a margin above zero, so they are not compared at one. "
    if without:
        caption += f"Without a reference, and so not drawn: {', '.join(without)}."
    figures = plots.displacement(training, validation, colours, common)
    parts: list[Part] = [
        Picture(
            "Displacement at an equal margin",
            [
                Panel(
                    figure,
                    f"Log-ratio of {which} responses against the margin, for "
                    f"{', '.join(training)}.",
                    tuple(training),
                )
                for figure, which in zip(figures, ("chosen", "rejected"), strict=True)
            ],
            caption,
        )
    ]
    if found:
        rows = []
        for name, values in found.items():
            fall = [w for w in ("chosen", "rejected") if values[w] < 0]
            rows.append(
                [
                    label(name),
                    number(values["margin"]),
                    number(values["chosen"]),
                    number(values["rejected"]),
                    number(values["step"], 1),
                    text({0: "neither", 1: " ".join(fall), 2: "both"}[len(fall)]),
                ]
            )
        headers = ["policy", "margin (nats)", "chosen (nats)", "rejected (nats)", "step", "fallen"]
        parts.append(
            Table(
                "Log-ratios where each policy first reaches the largest training margin that all "
                "of them reach, interpolated between steps"
                + (", smoothed as drawn." if smoothing > 1 else "."),
                headers,
                rows,
            )
        )
    return parts
