"""The judgement: how judges score the policies' generations."""

from rotopo.judge.length_control import NO_EQUAL_LENGTH
from rotopo.report import score_plots
from rotopo.report.inputs import Inputs
from rotopo.report.page import Cell, Panel, Part, Picture, Section, Table, label, number, text
from rotopo.report.parts import interval_text

ORDER = 70


def section(inputs: Inputs) -> Section:
    verdicts, colours = inputs.verdicts, inputs.colours
    if verdicts is None:
        return Section("Judgement", [])
    n, baseline = verdicts.result["prompts"], verdicts.baseline
    rows = []
    refused = False
    for policy in verdicts.policies:
        for judge in verdicts.judges:
            found = verdicts.result["policies"][policy]["judges"][judge]
            cells = [label(policy), label(judge)]
            cells.append(number(found["mean_score"], below=interval_text(found["score_interval"])))
            if policy == baseline:
                rows.append([*cells, *[Cell("–", None)] * 6])
                continue
            for value, ends in (
                (found["mean_difference"], found["difference_interval"]),
                (found["win_rate"], found["interval"]),
                (found["length_controlled_win_rate"], found["length_controlled_interval"]),
            ):
                cells.append(number(value, below="" if ends is None else interval_text(ends)))
            refused |= found["length_controlled_win_rate"] is None
            cells += [number(n, 0) for n in (found["wins"], found["ties"], found["losses"])]
            rows.append(cells)
    headers = ["policy", "judge", "mean score", f"difference to {baseline}", "win rate"]
    headers += ["length-controlled win rate", "wins", "ties", "losses"]
    parts: list[Part] = [
        Table(
            f"Policies under judges, {n:,} prompts, against {baseline}; {verdicts.level} bootstrap "
            "intervals over the prompts, paired where two policies are compared. Ties count one "
            "half." + (f" {NO_EQUAL_LENGTH}" if refused else ""),
            headers,
            rows,
        )
    ]
    others = verdicts.policies[1:]
    means = score_plots.mean_scores(verdicts, colours)
    panels = [
        Panel(
            figure,
            f"Mean scores of {', '.join(verdicts.policies)} under {judge}.",
            (judge, *verdicts.policies),
        )
        for figure, judge in zip(means, verdicts.judges, strict=True)
    ]
    if others:
        panels.insert(
            0,
            Panel(
                score_plots.win_rates(verdicts, colours),
                f"Bars of the win rates of {', '.join(others)} under {', '.join(verdicts.judges)}.",
                (*verdicts.judges, *verdicts.policies),
            ),
        )
    crossed = score_plots.judges_crossed(verdicts, colours)
    panels += [
        Panel(
            figure,
            "Scatter plot of scores under two judges.",
            (*verdicts.judges, *verdicts.policies),
        )
        for figure in crossed
    ]
    parts.append(
        Picture(
            "Judges and policies crossed",
            panels,
            (f"Win rates against {baseline} and mean scores" if others else "Mean scores")
            + f", with {verdicts.level} bootstrap intervals"
            + ("; each response's score under one judge against another's" if crossed else "")
            + f" ({n:,} prompts). Judges' scales are their own.",
        )
    )
    if others:
        parts.append(
            Picture(
                "Differences prompt by prompt",
                [
                    Panel(
                        score_plots.differences(verdicts, judge, policy),
                        f"Sorted bars of the score differences of {policy} to {baseline} under "
                        f"{judge}.",
                        (policy, judge, baseline),
                    )
                    for judge in verdicts.judges
                    for policy in others
                ],
                f"Each prompt's score of the policy's response less that of {baseline}'s, sorted "
                f"({n:,} prompts): blue above zero, orange below; the dashed line is the mean.",
            )
        )
    agreement = verdicts.result["agreement"]
    if agreement:
        parts.append(
            Table(
                "Do the judges agree? Share of comparisons with the same outcome, Cohen's κ (the "
                "agreement beyond chance), and the rank correlation of the differences.",
                ["judges", "same outcome", "Cohen's κ", "Spearman's ρ"],
                [
                    [
                        text(pair.replace("|", " and ")),
                        *(number(found[name]) for name in ("agree", "kappa", "spearman")),
                    ]
                    for pair, found in agreement.items()
                ],
            )
        )
    return Section("Judgement", parts)
