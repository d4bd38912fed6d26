"""The trainings: losses and learning rates."""

from rotopo.metrics.runs import Training
from rotopo.report import plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Panel, Picture, Section
from rotopo.report.parts import first_and_last, pairs_of

ORDER = 30


def section(inputs: Inputs) -> Section:
    runs, smoothing = [*inputs.reward_fits, *inputs.fits], inputs.smoothing
    if not runs:
        return Section("Training", [])
    caption = "Training loss, in nats, as logged"
    if smoothing > 1:
        caption += f" (faint) and its mean over {smoothing} logged steps"
    if any(len(run.logged("val/loss")) for run in runs):
        caption += "; points: the loss on validation pairs"
    caption += f" ({pairs_of(runs)}). "
    without = [run.name for run in runs if not _rates(run)]
    if len(without) < len(runs):
        caption += "Below: the learning rate. "
    if without:
        caption += f"Without a logged learning rate: {', '.join(without)}."
    picture = Picture(
        "Loss and learning rate",
        [
            Panel(
                plots.loss_and_rate(run, smoothing),
                f"Loss over training of {run.name}: {first_and_last(run, 'train/loss')}.",
                (run.name,),
            )
            for run in runs
        ],
        caption,
    )
    return Section("Training", [picture])


def _rates(run: Training) -> list[str]:
    return [column for column in run.metrics if column.startswith("lr-")]
