"""``rotopo judge``: policies against a baseline under several judges, from files of scores."""

from itertools import product
from pathlib import Path

from rotopo.errors import InputError
from rotopo.files import to_json, write_whole
from rotopo.judge.comparison import agreements, diversity, verdict
from rotopo.judge.judgement import PolicyResult, Result, scores_csv
from rotopo.judge.length_control import NO_EQUAL_LENGTH
from rotopo.judge.scores import read_perplexity, read_scores
from rotopo.progress import Progress


def judge(
    *,
    scores: dict[str, dict[str, Path]],
    baseline: str,
    output: Path,
    tie: float = 0.0,
    perplexity: dict[str, Path] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> None:
    """Compare policies under judges, each policy with the baseline, prompt by prompt.

    Reads files of scores as ``rotopo predict`` with ``data.score`` writes them, and writes
    ``judge.json`` and ``judge_scores.csv``: mean scores, win rates with ties as one half, paired
    differences, length-controlled win rates, all with bootstrap intervals over the prompts, the
    judges' agreement, and how long and how diverse the responses are.

    On a command line: rotopo judge --scores.base '{trained: a.jsonl, untrained: b.jsonl}'
    --scores.DPO '{trained: c.jsonl, untrained: d.jsonl}' --baseline base --output judged.

    Args:
        scores: a file of scores for each policy and each judge: {POLICY: {JUDGE: FILE}}. All of
            them hold the same prompts.
        baseline: the policy that all are compared with.
        output: the folder to write to.
        tie: scores that differ by no more are a tie; so are the same texts, whatever the scores.
        perplexity: the perplexity.json of each policy, as the Perplexity callback writes it; None
            or a policy left out for none.
        level: the share of resampled values inside an interval.
        resamples: bootstrap samples; for length-controlled win rates no more than 200 of them.
        seed: seed of the bootstrap.

    Raises:
        InputError: policies without the same judges or prompts, a torn or unsuitable file.
    """
    if baseline not in scores:
        raise InputError(f"baseline: {baseline!r} is none of the policies {', '.join(scores)}.")
    if tie < 0:
        raise InputError(f"tie is {tie}: it has to be at least 0.")
    if not 0 < level < 1:
        raise InputError(f"level is {level}: it has to lie between 0 and 1.")
    if resamples < 1:
        raise InputError(f"resamples is {resamples}: it has to be at least 1.")
    unknown = set(perplexity or {}) - set(scores)
    if unknown:
        raise InputError(f"perplexity: {min(unknown)!r} is none of the policies.")
    table = read_scores(scores, baseline)
    judges = list(table[baseline])

    policies: dict[str, PolicyResult] = {
        policy: {"judges": {}, "texts": diversity(by_judge[judges[0]])}
        for policy, by_judge in table.items()
    }
    for policy, name in Progress(list(product(table, judges)), "judging"):
        policies[policy]["judges"][name] = verdict(
            table[policy][name], table[baseline][name], tie, level, resamples, seed
        )
    for policy in policies:
        if perplexity and policy in perplexity:
            policies[policy]["texts"]["perplexity"] = read_perplexity(perplexity[policy])

    result: Result = {
        "baseline": baseline,
        "prompts": len(table[baseline][judges[0]].rows),
        "judges": judges,
        "level": level,
        "tie": tie,
        "resamples": resamples,
        "seed": seed,
        "policies": policies,
        "agreement": agreements(table, baseline, tie),
    }
    write_whole(output / "judge_scores.csv", scores_csv(table))
    write_whole(output / "judge.json", to_json(result))
    print(_summary(result))
    print(f"All of it in {output / 'judge.json'}")


def _summary(result: Result) -> str:
    """The comparison as a table of text."""
    header = ["policy", "judge", "mean score", "win rate", "interval", "at equal length"]
    rows = [header]
    refused = False
    for policy, values in result["policies"].items():
        for name, found in values["judges"].items():
            low, high = found["interval"]
            scores = [f"{found['mean_score']:.3f}", f"{found['win_rate']:.3f}"]
            row = [policy, name, *scores, f"{low:.3f} to {high:.3f}"]
            controlled = found["length_controlled_interval"]
            if controlled is None:
                refused = True
                rows.append([*row, "–"])
            else:
                low, high = controlled
                rows.append([*row, f"{found['length_controlled_win_rate']:.3f}"])
                rows.append([""] * len(row) + [f"{low:.3f} to {high:.3f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    title = (
        f"{result['prompts']} prompts, win rates against {result['baseline']}, "
        f"{100 * result['level']:g}% intervals"
    )
    if refused:
        lines.append(NO_EQUAL_LENGTH)
    return "\n".join([title, *(line.rstrip() for line in lines)])
