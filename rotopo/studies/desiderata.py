"""What preference objectives converge to: the desiderata of arXiv 2407.09072, for any objective.

Run it with ``python -m rotopo.studies.desiderata --output DIR``. On one prompt with K responses the
minimiser of each objective is computed while λ, the setting that holds the policy to its reference,
goes from nothing to everything, and three criteria are judged (:func:`criteria`).

The criteria and TYPO's two terms are the paper's: of the two losses of its follow-up, EXPO (arXiv
2506.07492), TYPO is the composite one; the formula of its regression loss could not be read. π* =
(.6, .3, .1), π_ref = (.4, .4, .2) and the prompts of the preservation criterion are the setting of
this project's reference numbers, which ``convention: ordered_pairs`` gives [ours]; ``official``
gives those of EXPO's code. The constraint and the exact RLHF loss beside DPO's are in that code
too, though its notebooks do not use them, and so is ln λ = −5 … 5 of the preservation. The other
grids, the thresholds of the verdicts and the sizes of the samples are ours.
"""

from rotopo import endings

if __name__ == "__main__":
    endings.begin()

import inspect
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import rotopo.objectives
from rotopo.errors import InputError
from rotopo.objectives import DPO, IPO, TYPO, Mixture
from rotopo.objectives.base import PreferenceModule
from rotopo.progress import Progress
from rotopo.studies import command, results
from rotopo.studies import desiderata_plots as plots
from rotopo.studies.desiderata_tables import (
    ALPHAS,
    LAMBDAS,
    LIMITS,
    LOG_LAMBDAS,
    PRESERVED,
    REACHED,
    SAMPLED_LAMBDAS,
    Objectives,
    constraint,
    criteria,
    interpolation,
    preservation,
    samples_of,
    spread,
)
from rotopo.studies.results import Job
from rotopo.studies.surfaces import surface
from rotopo.studies.tabular import Convention, Prompt, arms, at_strength, kl

# Δ in nats; both ends are inside of what surface() takes.
SURFACE = torch.linspace(-5, 5, 25, dtype=torch.float64)

_HELP = """What preference objectives converge to on one prompt with K responses, over λ.

For each objective: its minimiser over λ, whether it interpolates between the reference and the
truth, whether it preserves a prompt on which the reference is right, and how finite samples
scatter around all that. Writes tables (csv) and pictures (png) and prints a summary.

Any objective can be studied: --objective=SimPO, --objective=[IPO,TYPO],
--objective=DPO --objective.divergence=js, --objective='[{class_path: DPO, init_args: {divergence:
js}}]', a class path of your own, or --objective='[{class_path: Mixture, init_args: {objectives:
[DPO, SFT]}}]'. λ replaces the setting that a class names as its strength (beta; kl_weight of TYPO,
odds_weight of ORPO); a mixture passes it on to every part, and SFT has none. Responses have one
token here, so that everything about lengths is out of reach: SamPO, LDDPO and normalise_length are
DPO, R-DPO too, and normalise makes no difference. What belongs to the model (policy, optimizer,
scheduler, sampling) is not used.
"""


def study(
    output: Path,
    objective: PreferenceModule | list[PreferenceModule] | None = None,
    true: tuple[float, ...] = (0.6, 0.3, 0.1),
    reference: tuple[float, ...] = (0.4, 0.4, 0.2),
    good: tuple[float, ...] = (0.6, 0.3, 0.1),
    bad_true: tuple[float, ...] = (0.6, 0.2, 0.2),
    bad_reference: tuple[float, ...] = (0.4, 0.2, 0.4),
    convention: Convention = "ordered_pairs",
    lambdas: tuple[float, ...] = LAMBDAS,
    log_lambdas: tuple[float, ...] = LOG_LAMBDAS,
    alphas: tuple[float, ...] = ALPHAS,
    samples: int = 1000,
    draws: int = 8,
    sampled_lambdas: tuple[float, ...] = SAMPLED_LAMBDAS,
) -> None:
    """Study objectives on single prompts: compute everything, and only then write the results.

    What has been computed is kept meanwhile: the same command goes on from it.

    Args:
        output: folder for tables and pictures.
        objective: one or several, by name or class path, with settings; none for the paper's four:
            DPO, IPO, f-DPO (JS) and TYPO.
        true: π*, probabilities of the K responses that the labels follow, in fractions such as .6.
        reference: π_ref.
        good: π* = π_ref of the prompt that is to be preserved.
        bad_true: π* of the prompt beside it, on which the reference is wrong.
        bad_reference: π_ref of that prompt.
        convention: divide the sum over ordered pairs by their number, as this project's reference
            numbers have it, or by the labelled pairs, an expectation. It matters to TYPO, whose KL
            counts twice in the first, and to the constraint. official, as EXPO's code: the
            expectation, and every KL, also those of the preservation, a mean over responses.
        lambdas: λ of the interpolation.
        log_lambdas: natural logarithms of λ of the preservation.
        alphas: α of the constraint, an added α‖θ‖² on the logits, at λ = 1.
        samples: labelled pairs in a sample, and reference samples; 0 leaves the samples out.
        draws: samples, of which the spread is taken.
        sampled_lambdas: λ of the samples.

    Raises:
        InputError: a setting that cannot be used.
    """
    results.check(output)
    prompt = Prompt.of(true, reference)
    good_prompt, bad_prompt = Prompt.of(good, good), Prompt.of(bad_true, bad_reference)
    if (prompt.true == prompt.true.max()).sum() > 1:
        raise InputError(f"true is {true}: one response has to be the most likely.")
    for name, values in (("lambdas", lambdas), ("sampled_lambdas", sampled_lambdas)):
        if not values or min(values) <= 0:
            raise InputError(f"{name} is {values}: give values above zero.")
    if not log_lambdas or not alphas or min(alphas) < 0:
        raise InputError("log_lambdas or alphas: give values, and none of alphas below zero.")
    if samples < 0 or draws < 2:
        raise InputError(f"samples is {samples} and draws {draws}: give 0 or more, and 2 or more.")
    objectives = paper_objectives() if objective is None else labelled(objective)

    both = good_prompt, bad_prompt
    jobs = [
        *(
            Job(
                "interpolation",
                f"{name}, λ = {x}",
                1,
                partial(interpolation, one, prompt, (x,), convention),
            )
            for name, one in each(objectives)
            for x in sorted(lambdas)
        ),
        *(
            Job(
                "preservation",
                f"{name}, ln λ = {x}",
                2,
                partial(preservation, one, *both, (x,), convention),
            )
            for name, one in each(objectives)
            for x in sorted(log_lambdas)
        ),
        *(
            Job("constraint", f"α = {x}", 2, partial(constraint, prompt, (x,), convention))
            for x in sorted(alphas)
        ),
        *(
            Job(
                "criteria",
                name,
                2 + len(log_lambdas),
                partial(criteria, one, prompt, good_prompt, log_lambdas, convention),
            )
            for name, one in each(objectives)
        ),
        *(
            Job(
                "sampled",
                f"{name}, λ = {x}",
                1 + draws,
                partial(samples_of, one, prompt, (x,), samples, draws, convention),
            )
            for name, one in each(objectives)
            for x in sorted(sampled_lambdas)
            if samples
        ),
    ]
    settings = [
        true,
        reference,
        good,
        bad_true,
        bad_reference,
        convention,
        samples,
        draws,
        log_lambdas,
    ]
    parts = results.Parts(output, [settings, list(objectives)], map(type, objectives.values()))
    tables = parts.tables(jobs, "desiderata")
    surfaces = {
        name: surface(at_strength(module, 1.0), SURFACE)
        for name, module in Progress((registered() | objectives).items(), "pictures of losses")
    }
    figures = {
        "interpolation": plots.interpolation(
            tables["interpolation"], prompt, tables.get("sampled")
        ),
        "preservation": plots.preservation(
            tables["preservation"],
            kl(bad_prompt.true, bad_prompt.reference.log()) / arms(bad_prompt, convention),
            convention,
        ),
        "constraint": plots.constraint(tables["constraint"]),
        "losses": plots.losses(
            {name: surfaces[name] for name in objectives},
            {name: own for name, own in surfaces.items() if name not in objectives},
            SURFACE,
        ),
    }

    results.write(output, tables, figures, summary(tables, convention), parts)


def each(objectives: Objectives) -> list[tuple[str, Objectives]]:
    """Every objective alone, behind its name."""
    return [(name, {name: module}) for name, module in objectives.items()]


def paper_objectives() -> Objectives:
    """The four that the paper compares."""
    return {"DPO": DPO(), "IPO": IPO(), "f-DPO": DPO(divergence="js"), "TYPO": TYPO()}


def registered() -> Objectives:
    """Every objective of :mod:`rotopo.objectives` in its default settings; a mixture has none."""
    names = sorted(set(rotopo.objectives.__all__) - {"Mixture"}, key=str.lower)
    return {name: getattr(rotopo.objectives, name)() for name in names}


def labelled(objectives: PreferenceModule | list[PreferenceModule]) -> Objectives:
    """Objectives under names that tell them apart."""
    found: Objectives = {}
    for module in objectives if isinstance(objectives, list) else [objectives]:
        name = label(module)
        same = sum(other == name or other.startswith(f"{name} #") for other in found)
        found[f"{name} #{same + 1}" if same else name] = module
    if not found:
        raise InputError("objective is an empty list: name at least one objective.")
    return found


def label(objective: PreferenceModule) -> str:
    """The class, and the settings that differ from their defaults."""
    if isinstance(objective, Mixture):
        terms = zip(objective.weights, objective.parts, strict=True)
        return " + ".join(label(part) if w == 1 else f"{w:g} {label(part)}" for w, part in terms)
    shared = inspect.signature(PreferenceModule).parameters
    settings = [
        f"{name}={getattr(objective, name)}"
        for name, parameter in inspect.signature(type(objective)).parameters.items()
        if name not in (objective.strength, *shared)
        and parameter.default is not inspect.Parameter.empty
        and getattr(objective, name, parameter.default) != parameter.default
    ]
    return type(objective).__name__ + (f" ({', '.join(settings)})" if settings else "")


def summary(tables: dict[str, pd.DataFrame], convention: Convention = "ordered_pairs") -> str:
    """The tables in short, as text."""
    table = tables["interpolation"]
    at = _near(table["lambda"], (0.01, 0.1, 1, 100))
    short = table[table["lambda"].isin(at)].assign(policy=_policies)
    wide = short.pivot(index="objective", columns="lambda", values="policy")
    parts = [
        "Minimisers π_θ over λ (*: see the remarks in the tables)",
        wide.loc[table.objective.unique()].to_string(),
    ]

    table = tables["preservation"]
    short = table[table["log_lambda"].isin(_near(table["log_lambda"], (-1, 0, 1)))]
    short = short.assign(
        kl=[
            f"{_nats(row.kl_good)} / {_nats(row.kl_bad)}{_mark(row.remark)}"
            for row in short.itertuples()
        ]
    )
    wide = short.pivot(index="objective", columns="log_lambda", values="kl")
    divided = " by the number of responses" if convention == "official" else ""
    parts += [f"KL(π*‖π_θ){divided} over ln λ, nats: π_ref = π* (good) / not (bad)"]
    parts += [wide.loc[table.objective.unique()].to_string()]

    table = tables["constraint"]
    short = table[table.alpha.isin(_near(table.alpha, (0, 0.1)))].assign(policy=_policies)
    wide = short.pivot(index="loss_name", columns="alpha", values="policy")
    parts += ["With α‖θ‖² added, λ = 1", wide.to_string()]

    table = tables["criteria"].copy()
    for name in ("weak", "strong", "preservation"):
        table[name] = table[name].map({True: "yes", False: "no"})
    parts += [
        f"Criteria: total variation to the limits at λ = {LIMITS[0]:g} and {LIMITS[1]:g} up to "
        f"{REACHED:g}, KL on the good prompt up to {PRESERVED:g} nats",
        table.to_string(index=False, float_format="{:.4f}".format),
    ]
    if "sampled" in tables:
        table = spread(tables["sampled"])
        off = (table["mean"] - table.population).abs()
        within = (off <= 2 * table["std"] + 1e-9).mean()
        numbers = zip(table.population, table["mean"], table["std"], strict=True)
        table["value"] = [f"{exact:.3f} ({mean:.3f} ± {std:.3f})" for exact, mean, std in numbers]
        wide = table.pivot(index=["objective", "response"], columns="lambda", values="value")
        parts += [
            "Samples: population (mean ± standard deviation over the draws); "
            f"{within:.0%} of the populations within two of them",
            wide.loc[table.objective.unique()].to_string(),
        ]
    return "\n\n".join(parts) + "\n"


def _policies(table: pd.DataFrame) -> list[str]:
    policy = [name for name in table if name.startswith("pi_")]
    rows = table[[*policy, "remark"]].itertuples(index=False)
    return [f"({', '.join(f'{p:.4f}' for p in row)}){_mark(remark)}" for *row, remark in rows]


def _mark(remark: str) -> str:
    return "*" if remark else ""


def _nats(kl: float) -> str:
    """A divergence in print; a point mass is infinitely far, or as far as rounding lets it be."""
    return f"{max(kl, 0):.4f}" if kl < 100 else ">100"


def _near(grid: pd.Series, wanted: tuple[float, ...]) -> list[float]:
    """Of the grid's values those nearest to the ones wanted."""
    return sorted({min(grid.unique(), key=lambda value: abs(value - w)) for w in wanted})


def main(args: list[str] | None = None) -> None:
    """The command, see :func:`rotopo.studies.command.run`."""
    torch.set_num_threads(1)  # the tensors are tiny: more threads would wait for one another
    command.run(study, "desiderata", _HELP, args)


if __name__ == "__main__":
    main()
