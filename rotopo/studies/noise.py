"""What flipped labels do to preference objectives, and whether they can be found.

Run it with ``python -m rotopo.studies.noise --output DIR``. Objectives are trained on labels of
which some are flipped, over flip rates and seeds; measured are the accuracy on clean held-out
pairs, and how well the margins of the training pairs tell the flipped ones
(:func:`rotopo.robust.flips.flip_detection`). Every method sees the same data from the same seed,
so that differences between methods are taken seed by seed.
"""

from rotopo import endings

if __name__ == "__main__":
    endings.begin()

import math
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import torch

from rotopo.errors import InputError
from rotopo.objectives.base import in_range
from rotopo.progress import Progress
from rotopo.studies import command, noise_plots, results
from rotopo.studies.noise_language_model import LanguageModel, LanguageModelRuns
from rotopo.studies.noise_methods import Method, Outcome
from rotopo.studies.noise_tabular import Tabular

LEVEL = 0.95  # of the intervals
BASELINE = "DPO"  # which the others are compared with
MEASURES = ("accuracy", "auroc", "recall")

_HELP = """What flipped labels do to preference objectives, over flip rates and seeds.

Writes results.csv (one run a row), rounds.csv (what ROPO's procedure dropped and took in),
summary.csv (means and differences to DPO, paired by seed, with 95 % intervals) and noise.png, and
prints the summary.

An objective is named by its class (--objective=ROPO, --objective=[DPO,IPO]), by a class path of
your own, or as cDPO, which is DPO with label smoothing. +filter behind it trains in rounds and
drops the pairs of the highest losses after each, +filter+sampling also draws new pairs for their
prompts: ROPO's procedure. cDPO's label_smoothing and RobustDPO's flip_rate are the true rate, which
they could not know in practice.

--task=language_model trains SmolLM2-135M with LoRA by the rotopo command, some two minutes a run on
one core. Every run has a folder in DIR/language_model, and none is done twice: start the study
again, and it goes on where it stopped; processes with different --seeds may share DIR, and once
they are done the study over all seeds only collects. At a rate of 0 cDPO and RobustDPO are DPO, the
same loss, and its run counts for them.
"""


class Task(Protocol):
    """What is trained and measured.

    Attributes:
        methods, seeds: what is compared, and from which seeds, where nothing else is asked for.
    """

    @property
    def methods(self) -> tuple[str, ...]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...

    def check(self, method: Method, flip_rate: float) -> None:
        """Raise an InputError if the method cannot be run."""

    def run(self, method: Method, flip_rate: float, seed: int) -> Outcome:
        """Train on labels of which the rate is flipped, and measure."""
        ...


def study(
    output: Path,
    task: Literal["tabular", "language_model"] = "tabular",
    objective: list[str] | str | None = None,
    noise: list[float] | float = [0.0, 0.2, 0.4],  # noqa: B006 (jsonargparse copies it)
    seeds: list[int] | int | None = None,
    tabular: Tabular = Tabular(),  # noqa: B008 (frozen)
    language_model: LanguageModel = LanguageModel(),  # noqa: B008 (frozen)
) -> None:
    """Compare objectives under flipped labels: compute everything, and only then write results.

    What has been computed is kept meanwhile: the same command goes on from it.

    Args:
        output: folder for tables and the picture.
        task: tabular: a small network on drawn prompts and candidates, whose true reward is known;
            language_model: a language model on real pairs.
        objective: one or several, by name or class path, with +filter or +filter+sampling behind
            for ROPO's procedure; none for those that deal with noise, and some that do not.
        noise: rates at which labels are flipped.
        seeds: of data, first weights and order; none for the task's own (tabular: 1000 to 1019,
            language_model: 0 to 2).
        tabular: settings of the tabular task.
        language_model: settings of the language-model task.

    Raises:
        InputError: a setting that cannot be used.
    """
    results.check(output)
    chosen: Task
    if task == "tabular":
        chosen = tabular
        torch.set_num_threads(1)  # its tensors are tiny: more threads would wait for one another
    else:
        chosen = LanguageModelRuns(language_model, output / task)
    names = [objective] if isinstance(objective, str) else objective
    methods = [Method.named(name) for name in (chosen.methods if names is None else names)]
    rates = noise if isinstance(noise, list) else [noise]
    runs = list(chosen.seeds) if seeds is None else seeds if isinstance(seeds, list) else [seeds]
    for setting, values in (
        ("objective", [method.name for method in methods]),
        ("noise", rates),
        ("seeds", runs),
    ):
        if not values or len(set(values)) < len(values):
            raise InputError(f"{setting} is {values}: give one value at least, each one once.")
    if min(runs) < 0:
        raise InputError(f"seeds is {runs}: give numbers from 0.")
    for rate in rates:
        in_range("noise", rate, 0, 0.5)
    for method, rate in product(methods, sorted(rates)):
        chosen.check(method, rate)

    def rows_of(method: Method, rate: float, seed: int) -> list[dict[str, Any]]:
        run = {"task": task, "objective": method.name, "noise": rate, "seed": seed}
        outcome = chosen.run(method, rate, seed)
        measures = {name: getattr(outcome, name) for name in MEASURES}
        return [run | measures, *(run | vars(round_) for round_ in outcome.rounds)]

    settings = asdict(tabular) if task == "tabular" else asdict(language_model)
    parts = results.Parts(output, [task, settings, runs], {method.objective for method in methods})
    rows, rounds = [], []
    for method, rate, seed in Progress(list(product(methods, sorted(rates), runs)), "runs"):
        row, *more = parts.of(
            f"{method.name}, {rate}, {seed}", partial(rows_of, method, rate, seed)
        )
        rows.append(row)
        rounds += more
    table = pd.DataFrame(rows)
    table[list(MEASURES)] = table[list(MEASURES)].astype(float)
    summary = summarised(table)
    tables = {"results": table, "summary": summary}
    if rounds:
        tables["rounds"] = pd.DataFrame(rounds)
    else:
        (output / "rounds.csv").unlink(missing_ok=True)  # of an earlier study
    asked = None if names is None else [method.name for method in methods]
    figures = {"noise": noise_plots.noise(summary, asked)}
    results.write(output, tables, figures, printed(summary), parts)


def summarised(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and mean differences to DPO seed by seed, each ± half its 95 % interval.

    Args:
        table: a row for each run, as in results.csv.

    Returns:
        a row for each task, objective, noise and measure: ``seeds``, ``mean``, ``interval`` and,
        where there is DPO, ``difference`` and ``difference_interval``. Intervals are Student's t
        over seeds and missing where there is one seed.
    """
    rows = []
    for (task, noise, objective), runs in table.groupby(["task", "noise", "objective"], sort=False):
        baseline = table[
            (table.task == task) & (table.noise == noise) & (table.objective == BASELINE)
        ].set_index("seed")
        for measure in MEASURES:
            values = runs.set_index("seed")[measure]
            if values.isna().all():
                continue
            row = {"task": task, "objective": objective, "noise": noise, "measure": measure}
            row |= {"seeds": len(values), "mean": values.mean(), "interval": half_width(values)}
            if len(baseline) and objective != BASELINE:
                difference = values - baseline[measure]
                row["difference"] = difference.mean()
                row["difference_interval"] = half_width(difference)
            rows.append(row)
    columns = ["task", "objective", "noise", "measure", "seeds", "mean", "interval"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "difference_interval"])


def half_width(values: pd.Series) -> float:
    """Half the interval of a mean, by Student's t; NaN for one value."""
    n = len(values)
    if n < 2:
        return math.nan
    return student_quantile((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)


def student_quantile(p: float, freedom: int) -> float:
    """The p-quantile of Student's t, ½ ≤ p < 1, to six digits at least.

    With t = √ν·tan φ the density is proportional to cos^{ν−1} φ, whose integral from 0 to φ is
    computed on a grid.
    """
    angle = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0], ((density[1:] + density[:-1]) / 2).cumsum()])
    # Far out the mass stops growing in floating point; there the grid's first angle counts.
    mass, first = np.unique(mass / mass[-1], return_index=True)
    return math.sqrt(freedom) * math.tan(np.interp(2 * p - 1, mass, angle[first]))


def printed(summary: pd.DataFrame) -> str:
    """The summary as text, a table for each rate."""
    parts = [
        f"Means over seeds ± {LEVEL:.0%} interval (Student's t); in brackets the mean difference "
        f"to {BASELINE}, paired by seed (*: its interval excludes 0)"
    ]
    for noise, rows in summary.groupby("noise"):
        lines = rows.assign(text=[_cell(row) for row in rows.to_dict("records")])
        wide = lines.pivot(index="objective", columns="measure", values="text").fillna("")
        wide = wide.loc[lines.objective.unique(), [m for m in MEASURES if m in wide]]
        wide.columns.name, wide.index.name = None, None
        parts.append(f"{noise:.0%} flipped, {rows.seeds.iloc[0]} seeds\n{wide.to_string()}")
    return "\n\n".join(parts) + "\n"


def _cell(row: dict) -> str:
    text = _with_interval(f"{row['mean']:.3f}", row["interval"])
    if math.isnan(row["difference"]):
        return text
    difference = _with_interval(f"{row['difference']:+z.3f}", row["difference_interval"])
    sure = "*" if abs(row["difference"]) > row["difference_interval"] else " "
    return f"{text} ({difference}{sure})"


def _with_interval(text: str, interval: float) -> str:
    return text if math.isnan(interval) else f"{text} ± {interval:.3f}"


def main(args: list[str] | None = None) -> None:
    """The command, see :func:`rotopo.studies.command.run`."""
    command.run(study, "noise", _HELP, args)


if __name__ == "__main__":
    main()
