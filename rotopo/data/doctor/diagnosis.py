"""What the data doctor finds, in words: all of its checks, their table, and why a run is refused.

Errors are data on which training would go wrong whatever the objective: they stop a run. Warnings
are facts that a user may want, or not.
"""

from collections.abc import Callable, Iterator

from rotopo.data.doctor import pair_checks, text_checks, token_checks
from rotopo.data.doctor.examination import Examination, Finding, Patient, Severity

_CHECKS: tuple[Callable[[Examination], Iterator[Finding]], ...] = (
    token_checks.bos,
    token_checks.end_of_turn,
    token_checks.pad_and_eos,
    token_checks.vocabulary,
    token_checks.positions,
    token_checks.tokens_as_stored,
    token_checks.tokenised_as_a_whole,
    token_checks.round_trip,
    token_checks.empty_responses,
    token_checks.equal_responses,
    text_checks.unwritten,
    text_checks.altered_turns,
    text_checks.unread_columns,
    pair_checks.roles,
    text_checks.dialogues,
    text_checks.repeated_prompts,
    pair_checks.short_prompts,
    pair_checks.truncation,
    pair_checks.difference_left,
    pair_checks.duplicates,
    pair_checks.leakage,
    pair_checks.labels,
    pair_checks.length_bias,
)


def diagnose(patient: Patient) -> list[Finding]:
    """All checks, in order; one may have several findings, or none to say of such data."""
    examined = Examination(patient)
    return [finding for check in _CHECKS for finding in check(examined)]


def render(findings: list[Finding], complete: bool = True) -> str:
    """A table of what was found, with advice below each warning and error.

    Args:
        findings: of :func:`diagnose`.
        complete: also what is well.
    """
    shown = [f for f in findings if complete or f.severity != Severity.OK]
    worse = [sum(f.severity == s for f in findings) for s in (Severity.ERROR, Severity.WARNING)]
    lines = [f"Data doctor: {len(findings)} checks, {worse[0]} errors, {worse[1]} warnings."]
    width = max((len(f.check) for f in shown), default=0)
    for f in shown:
        lines.append(f"  {f.severity:<7}  {f.check:<{width}}  {_measured(f)}")
        if f.advice:
            lines.append(f"  {'':<7}  {'':<{width}}  -> {f.advice}")
    return "\n".join(lines)


def refusal(findings: list[Finding]) -> str | None:
    """Why the data cannot be trained on, as one line; None if there is no error."""
    errors = [f"{f.check}: {_measured(f)}: {f.advice}" for f in findings if f.severity == "error"]
    if not errors:
        return None
    return (
        "the data doctor stops the run. "
        + "; ".join(errors)
        + ". (rotopo doctor shows all checks; "
        "data.doctor false trains in spite of them.)"
    )


def _measured(finding: Finding) -> str:
    def text(value: int | float | str) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in finding.numbers.items())
