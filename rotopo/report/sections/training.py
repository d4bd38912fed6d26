"""The trainings: losses and learning rates."""

from rotopo.report import plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Panel, Picture, Section
from rotopo.report.parts import first_and_last, pairs_of

ORDER = 30


def section(inputs: Inputs) -> Section:
    runs, smoothing = [*inputs.reward_fits, *inputs.fits], inputs.smoothing
    if not runs:
        return Section("Training", [])
    rates = [run for run in runs if any(column.startswith("lr-") for column in run.metrics)]
    picture = Picture(
        "Loss and learning rate",
        [
            Panel(
                plots.loss_and_rate(run, smoothing),
                f"Loss over training of {run.name}: {first_and_last(run, 'train/loss')}.",
            )
            for run in runs
        ],
        f"Training loss as logged (faint) and its mean over {smoothing} logged steps, the loss on "
        f"validation pairs as points ({pairs_of(runs)}). "
        + ("Below: the learning rate." if rates else "No run logged its learning rate."),
    )
    return Section("Training", [picture])
