"""The policies: their implicit rewards, what a margin has cost them, how they rank pairs."""

import pandas as pd

from rotopo.metrics.displacement import at_equal_margin, log_ratios
from rotopo.metrics.runs import Training
from rotopo.report import plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Panel, Part, Picture, Section, Table, number, text
from rotopo.report.parts import first_and_last, measures, pairs_of

ORDER = 40


def section(inputs: Inputs) -> Section:
    fits, smoothing = inputs.fits, inputs.smoothing
    parts: list[Part] = []
    with_rewards = [run for run in fits if len(run.logged("train/rewards/margin"))]
    if with_rewards:
        parts.append(
            Picture(
                "Implicit rewards over training",
                [
                    Panel(
                        plots.rewards(run, smoothing),
                        f"Rewards over training of {run.name}. Chosen: "
                        f"{first_and_last(run, 'train/rewards/chosen')}; rejected: "
                        f"{first_and_last(run, 'train/rewards/rejected')}.",
                    )
                    for run in with_rewards
                ],
                "The objective's implicit rewards of chosen and rejected responses and their "
                f"margin: mean over {smoothing} logged training steps (faint: each step), points "
                f"on validation pairs ({pairs_of(with_rewards)}). Where there is a reference, "
                "a chosen reward below zero says that the chosen are less likely than under it.",
            )
        )
    training = {run.name: log_ratios(run, "train", smoothing) for run in fits}
    training = {name: table for name, table in training.items() if len(table)}
    if training:
        parts += _displacement(fits, training, inputs.colours, smoothing)
    if inputs.tests:
        parts.append(
            measures(
                inputs.tests,
                "The policies' implicit rewards as reward models, on held-out pairs. For "
                "objectives with a reference an untrained policy's margins are zero, up to "
                "rounding. ECE and equal length as for reward models.",
                {},
            )
        )
    return Section("Policies", parts)


def _displacement(
    fits: list[Training], training: dict[str, pd.DataFrame], colours: dict[str, str], smoothing: int
) -> list[Part]:
    validation = {run.name: log_ratios(run, "val") for run in fits if run.name in training}
    found = at_equal_margin(training)
    common = min((values["margin"] for values in found.values()), default=None)
    without = [run.name for run in fits if run.name not in training]
    caption = (
        "Mean log-ratio to the reference of chosen (full lines, circles) and rejected responses "
        f"(broken, crosses) against their difference, in nats. Lines: training, mean over "
        f"{smoothing} logged steps. Signs: validation pairs. "
    )
    if common is not None:
        caption += f"The dotted line is the margin of the table below, {common:.2f} nats. "
    else:
        caption += "Not all have reached a margin above zero, so they are not compared at one. "
    if without:
        caption += f"Without a reference, and so not drawn: {', '.join(without)}."
    parts: list[Part] = [
        Picture(
            "Displacement at an equal margin",
            [
                Panel(
                    plots.displacement(training, validation, colours, common),
                    "Log-ratios of chosen and rejected against the margin, for "
                    f"{', '.join(training)}.",
                )
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
                    text(name),
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
                "of them reach (smoothed as drawn, interpolated between steps).",
                headers,
                rows,
            )
        )
    return parts
