"""What the report says first: a line for every reward model and every policy."""

from typing import Any

from rotopo.metrics.displacement import at_equal_margin, log_ratios
from rotopo.metrics.runs import Test, Training
from rotopo.report.inputs import Inputs
from rotopo.report.page import with_minus


def at_a_glance(inputs: Inputs) -> list[tuple[str, str]]:
    """Names, and what there is to say of each. A policy has a line if it is on the page at all."""
    lines = []
    for test in inputs.reward_tests:
        lines.append((f"Reward model {test.name}", f"{_accuracy(test.metrics)} held-out pairs."))
    tested = {test.name for test in inputs.reward_tests}
    lines += [
        (f"Reward model {run.name}", f"{_trained(run) or 'trained'}; not tested here.")
        for run in inputs.reward_fits
        if run.name not in tested
    ]
    fits = {run.name: run for run in inputs.fits}
    tests = {test.name: test for test in inputs.tests}
    smoothed = {name: log_ratios(run, "train", inputs.smoothing) for name, run in fits.items()}
    at = at_equal_margin({name: table for name, table in smoothed.items() if len(table)})
    for name in inputs.colours:
        parts = []
        if name in tests:
            parts.append(_tested(tests[name]))
        elif name in fits and (trained := _trained(fits[name])):
            parts.append(trained)
        parts += _judged(inputs, name)
        if name in at:
            parts.append(_displaced(at[name]))
        if not parts and name in inputs.answers:
            parts.append(f"{len(inputs.answers[name]):,} responses, not judged")
        lines.append((name, "; ".join(parts or ["trained, without an accuracy in its log"]) + "."))
    return lines


def _accuracy(metrics: dict[str, Any]) -> str:
    low, high = metrics["accuracy_interval"]
    interval = f"(95% interval {low:.3f} to {high:.3f})"
    return f"accuracy {metrics['accuracy']:.3f} {interval} on {metrics['pairs']:,}"


def _tested(test: Test) -> str:
    said = f"{_accuracy(test.metrics)} held-out pairs by its implicit reward"
    yardstick = test.metrics.get("yardstick")
    if yardstick is not None and yardstick["accuracy"] != test.metrics["accuracy"]:
        said += f", {yardstick['accuracy']:.3f} by its log-ratios to the reference"
    return said


def _trained(run: Training) -> str:
    """The last accuracy that the training has logged, of pairs held out if there are any."""
    for stage, pairs in (("val", "validation"), ("train", "training")):
        values = run.logged(f"{stage}/rewards/accuracy")
        if len(values):
            return f"accuracy {values.iloc[-1]:.3f} on {pairs} pairs, as last logged"
    return ""


def _judged(inputs: Inputs, name: str) -> list[str]:
    verdicts = inputs.verdicts
    if verdicts is None or name not in verdicts.policies:
        return []
    prompts = f"{verdicts.result['prompts']:,} prompts"
    if name == verdicts.baseline:
        return [f"the baseline of the judgement, {prompts}"]
    rates = []
    for judge in verdicts.judges:
        found = verdicts.result["policies"][name]["judges"][judge]
        low, high = found["interval"]
        rates.append(f"{found['win_rate']:.1%} under {judge} ({low:.1%} to {high:.1%})")
    return [
        f"win rate against {verdicts.baseline} {', '.join(rates)}, {prompts}, {verdicts.level} "
        "intervals"
    ]


def _displaced(at: dict[str, float]) -> str:
    ways = [f"the {w}'s log-ratio is {with_minus(at[w], 2)}" for w in ("chosen", "rejected")]
    fall = at["chosen"] < 0 and at["rejected"] < 0
    return f"at a training margin of {at['margin']:.2f} nats {' and '.join(ways)} nats" + (
        ": both have become less likely (likelihood displacement)" if fall else ""
    )
