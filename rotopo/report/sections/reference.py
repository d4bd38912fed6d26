"""How far the policies are from their reference: one scale for all objectives."""

from typing import Any

from rotopo.metrics.runs import Test
from rotopo.report import score_plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Panel, Part, Picture, Section, Table, label, number
from rotopo.report.parts import interval_text

ORDER = 45

_LEAD = (
    "The same measures for every objective, whatever its own rewards are: a response's log-ratio "
    "is its log-probability under the policy less that under the reference."
)


def section(inputs: Inputs) -> Section:
    tests = [test for test in inputs.tests if test.metrics.get("yardstick")]
    if not tests:
        return Section("Policies against their reference", [])
    rows = _rows(tests)
    several = len(rows) > len(tests)
    shown = [(f"· {name}" if name else policy) for policy, name in rows]
    found = [own["yardstick"] for own in rows.values()]
    names = tuple(dict.fromkeys(name for key in rows for name in key))
    of_sets = ", of each policy on all and below it on each evaluation set" if several else ""
    panels = [
        Panel(
            score_plots.mean_log_ratios(
                list(zip(shown, (own[which] for own in found), strict=True)), unit
            ),
            f"Mean log-ratios of chosen and rejected responses, {unit}, of {', '.join(shown)}.",
            names,
        )
        for which, unit in (("log_ratio", "nats"), ("log_ratio_per_token", "nats per token"))
    ]
    caption = (
        f"Mean log-ratios of the chosen and the rejected responses of held-out pairs{of_sets}: of "
        "whole responses, and, on a scale of their own, per token. The grey line between two is "
        "the margin; a chosen one left of zero has become less likely than under the reference."
    )
    if any(own["kl_per_token"]["on_data"]["forward"] is not None for own in found):
        panels.append(
            Panel(
                score_plots.accuracy_against_kl(tests, inputs.colours),
                "Accuracy by log-ratios against the KL to the reference per token, of "
                f"{', '.join(test.name for test in tests)}.",
                tuple(test.name for test in tests),
            )
        )
        caption += (
            " Last: the share of pairs with a margin above zero, with 95% bootstrap intervals, "
            "against the KL on the data's tokens."
        )
    parts: list[Part] = [
        Picture("Log-ratios to the reference", panels, caption),
        _responses(rows, several),
        _per_token(rows, several),
    ]
    return Section("Policies against their reference", parts, _LEAD)


def _rows(tests: list[Test]) -> dict[tuple[str, str], dict[str, Any]]:
    """What was found of each policy on all pairs, and of each set by itself, by their names."""
    found = {}
    for test in tests:
        found[test.name, ""] = test.metrics
        for name, own in test.metrics.get("sets", {}).items():
            if own.get("yardstick"):
                found[test.name, name] = own
    return found


def _responses(rows: dict[tuple[str, str], dict[str, Any]], several: bool) -> Table:
    cells = []
    for (policy, name), found in rows.items():
        own = found["yardstick"]
        cells.append(
            [
                label(policy),
                *([label(name or "all")] if several else []),
                number(found["pairs"], 0),
                number(own["accuracy"], below=interval_text(own["accuracy_interval"])),
                number(own["margin"], below=interval_text(own["margin_interval"])),
                number(own["log_ratio"]["chosen"]),
                number(own["log_ratio"]["rejected"]),
                number(own["displaced"]),
            ]
        )
    headers = ["policy", *(["set"] if several else []), "pairs", "accuracy", "margin (nats)"]
    headers += ["chosen log-ratio (nats)", "rejected log-ratio (nats)", "share of chosen fallen"]
    return Table(
        "Held-out pairs, whole responses. Margin: the chosen's log-ratio less the rejected's, mean "
        "over pairs. Accuracy: the share of pairs with a margin above zero. 95% bootstrap "
        "intervals below both. Fallen: less likely than under the reference.",
        headers,
        cells,
    )


def _per_token(rows: dict[tuple[str, str], dict[str, Any]], several: bool) -> Table:
    cells = []
    for (policy, name), found in rows.items():
        own = found["yardstick"]
        kl = own["kl_per_token"]["on_data"]
        cells.append(
            [
                label(policy),
                *([label(name or "all")] if several else []),
                *(number(own["log_ratio_per_token"][w], 4) for w in ("chosen", "rejected")),
                number(kl["forward"], 4),
                number(kl["reverse"], 4),
            ]
        )
    headers = ["policy", *(["set"] if several else []), "chosen log-ratio", "rejected log-ratio"]
    headers += ["KL(reference ‖ policy)", "KL(policy ‖ reference)"]
    return Table(
        "The same per token, in nats per token: log-ratios divided by their response's tokens "
        "before the mean over pairs, and the KL of whole next-token distributions, mean over all "
        "tokens of both responses. A dash: policy and reference have other vocabularies.",
        headers,
        cells,
    )
