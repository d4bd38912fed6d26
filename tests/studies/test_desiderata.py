"""The reference numbers of the desiderata, the verdicts, and the command.

MINIMISERS and DIVERGENCES are this project's own, under the convention of ordered pairs; OFFICIAL
are those of EXPO's code (arXiv 2506.07492).
"""

import math

import matplotlib.image
import pandas as pd
import pytest
import torch

import rotopo.objectives
from rotopo.objectives import DPO, SFT, TYPO, Mixture
from rotopo.studies import desiderata, desiderata_plots
from rotopo.studies import desiderata_tables as tables
from rotopo.studies.surfaces import surface
from rotopo.studies.tabular import Prompt, arms, at_strength, kl
from tests.studies.refusals import assert_refused, assert_refuses_a_file

PROMPT = Prompt.of([0.6, 0.3, 0.1], [0.4, 0.4, 0.2])
GOOD = Prompt.of([0.6, 0.3, 0.1], [0.6, 0.3, 0.1])
BAD = Prompt.of([0.6, 0.2, 0.2], [0.4, 0.2, 0.4])
MIXTURE = Mixture([DPO(), SFT()], [1.0, 0.2])

# Each holds to its last decimal.
MINIMISERS = {
    ("DPO", 0.01): ("1", "0", "0"),
    ("DPO", 0.1): (".999", ".001", "0"),
    ("DPO", 1): (".6316", ".3158", ".0526"),
    ("DPO", 100): (".4025", ".3998", ".1977"),
    ("IPO", 0.01): ("1", "0", "0"),
    ("IPO", 0.1): (".8052", ".1855", ".0093"),
    ("IPO", 1): (".4532", ".3913", ".1554"),
    ("IPO", 100): (".4005", ".3999", ".1995"),
    ("f-DPO", 0.01): ("1", "0", "0"),
    ("f-DPO", 0.1): (".9997", ".0003", "0"),
    ("f-DPO", 1): (".7780", ".1972", ".0247"),
    ("f-DPO", 100): (".4051", ".3995", ".1954"),
    ("TYPO", 0.01): (".5922", ".3054", ".1025"),
    ("TYPO", 0.1): (".5438", ".3370", ".1193"),
    ("TYPO", 1): (".4442", ".3869", ".1689"),
    ("TYPO", 100): (".4006", ".3999", ".1995"),
}
OF_LABELLED_PAIRS = {
    ("TYPO", 0.1): (".5667", ".3224", ".1109"),
    ("TYPO", 1): (".4710", ".3761", ".1529"),
    **{key: value for key, value in MINIMISERS.items() if key[0] in ("DPO", "IPO")},
}
OFFICIAL = {
    ("TYPO", 0.1): (".5873", ".3087", ".1040"),
    **{key: value for key, value in MINIMISERS.items() if key[0] in ("DPO", "IPO")},
}
DIVERGENCES = {  # KL(π*‖π) on the good and on the bad prompt, by ln λ
    ("DPO", -1): (".616", ".456"),
    ("DPO", 0): (".121", ".033"),
    ("DPO", 1): (".019", ".044"),
    ("IPO", -1): (".0445", ".0256"),
    ("IPO", 0): (".0066", ".062"),
    ("IPO", 1): (".0009", ".087"),
    ("f-DPO", -1): (".928", ".886"),
    ("f-DPO", 0): (".264", ".165"),
    ("f-DPO", 1): (".057", ".024"),
    ("TYPO", -1): ("0", ".032"),
    ("TYPO", 0): ("0", ".062"),
    ("TYPO", 1): ("0", ".085"),
}


def assert_prints_as(value: float, printed: str) -> None:
    """A printed number with decimals is the value rounded; an integer is exact to 1e-4."""
    decimals = len(printed.partition(".")[2])
    tolerance = 0.5 * 10**-decimals if decimals else 1e-4
    assert abs(value - float(printed)) <= tolerance, (value, printed)


def assert_minimisers(table: pd.DataFrame, printed: dict) -> None:
    table = table.set_index(["objective", "lambda"])
    for key, policy in printed.items():
        for column, number in zip(("pi_1", "pi_2", "pi_3"), policy, strict=True):
            assert_prints_as(table.loc[key, column], number)


@pytest.fixture(scope="module")
def paper() -> tables.Objectives:
    return desiderata.paper_objectives()


def test_the_minimisers_over_lambda_are_the_projects(paper):
    table = tables.interpolation(paper, PROMPT, (0.01, 0.1, 1, 100))
    assert len(table) == len(MINIMISERS)
    assert_minimisers(table, MINIMISERS)
    assert (table.remark == "").all()


def test_as_an_expectation_over_labelled_pairs_only_typo_changes(paper):
    table = tables.interpolation(paper, PROMPT, (0.01, 0.1, 1, 100), "labelled_pairs")
    assert_minimisers(table, OF_LABELLED_PAIRS)


def test_the_official_convention_gives_expos_numbers_and_a_sixth_of_lambda(paper):
    table = tables.interpolation(paper, PROMPT, (0.01, 0.1, 1, 100), "official")
    assert_minimisers(table, OFFICIAL)
    ours = tables.interpolation({"TYPO": TYPO()}, PROMPT, (0.6, 6.0))
    theirs = tables.interpolation({"TYPO": TYPO()}, PROMPT, (3.6, 36.0), "official")
    for column in ("pi_1", "pi_2", "pi_3"):
        assert theirs[column].tolist() == pytest.approx(ours[column].tolist(), abs=1e-7)


def test_officially_divergences_are_a_third_and_typos_lambda_a_sixth(paper):
    """Of three responses; the reference's line on the bad prompt is then at .0349."""
    bad = kl(BAD.true, BAD.reference.log())
    assert_prints_as(bad / arms(BAD, "official"), ".0349")
    wanted = ("DPO", "IPO")
    some = {name: paper[name] for name in wanted}
    thirds = tables.preservation(some, GOOD, BAD, (-1, 0, 1), "official")
    whole = tables.preservation(some, GOOD, BAD, (-1, 0, 1))
    for column in ("kl_good", "kl_bad"):
        assert (3 * thirds[column]).tolist() == pytest.approx(whole[column].tolist(), abs=1e-8)
    typo = {"TYPO": TYPO()}
    official = tables.preservation(typo, GOOD, BAD, (math.log(6),), "official")
    assert 3 * official.kl_bad[0] == pytest.approx(
        tables.preservation(typo, GOOD, BAD, (0.0,)).kl_bad[0], abs=1e-8
    )
    assert 3 * official.kl_bad[0] == pytest.approx(0.062, abs=5e-4)


def test_the_curves_are_over_the_official_codes_range():
    assert (min(tables.LOG_LAMBDAS), max(tables.LOG_LAMBDAS)) == (-5, 5)


def test_the_divergences_on_the_good_and_on_the_bad_prompt_are_the_projects(paper):
    assert_prints_as(kl(BAD.true, BAD.reference.log()), ".1046")
    table = tables.preservation(paper, GOOD, BAD, (-1, 0, 1))
    table = table.set_index(["objective", "log_lambda"])
    assert len(table) == len(DIVERGENCES)
    for key, (good, bad) in DIVERGENCES.items():
        assert_prints_as(table.loc[key, "kl_good"], good)
        assert_prints_as(table.loc[key, "kl_bad"], bad)
    assert (table.loc["TYPO"].kl_good.abs() <= 1e-10).all()
    assert (table.remark == "").all()


@pytest.mark.parametrize(
    ("convention", "constrained"),
    [("ordered_pairs", (".449", ".358", ".193")), ("official", (".497", ".357", ".146"))],
)
def test_a_constraint_parts_dpo_from_rlhf(convention, constrained):
    table = tables.constraint(PROMPT, (0.0, 0.1), convention)
    table = table.set_index(["loss_name", "alpha"])
    for key, policy in {
        ("DPO", 0.0): (".632", ".316", ".053"),
        ("RLHF", 0.0): (".632", ".316", ".053"),
        ("DPO", 0.1): constrained,
        ("RLHF", 0.1): (".536", ".318", ".146"),
    }.items():
        for column, number in zip(("pi_1", "pi_2", "pi_3"), policy, strict=True):
            assert_prints_as(table.loc[key, column], number)


def test_the_papers_verdicts(paper):
    table = tables.criteria(paper, PROMPT, GOOD, (-1.0, 0.0, 1.0)).set_index("objective")
    for name in ("DPO", "IPO", "f-DPO"):
        row = table.loc[name]
        assert (row.weak, row.strong, row.preservation) == (True, False, False), name
    row = table.loc["TYPO"]
    assert (row.weak, row.strong, row.preservation) == (False, True, True)


class Flat(DPO):
    """A loss that every policy minimises, the right one too."""

    def losses(self, log_probs):
        return 0 * self.margin(log_probs)


def test_an_objective_that_does_not_choose_meets_no_criterion():
    row = tables.criteria({"flat": Flat()}, PROMPT, GOOD, (0.0,)).iloc[0]
    assert not row[["weak", "strong", "preservation"]].any()
    assert "apart" in row.remark


def test_population_values_lie_within_the_spread_of_samples(paper):
    table = tables.spread(tables.samples_of(paper, PROMPT, (1.0,), 1000, 6))
    off = (table["mean"] - table["population"]).abs()
    assert (table["std"] > 1e-4).all()
    assert (off <= 2 * table["std"]).all(), table


def test_larger_samples_scatter_less():
    typo = {"TYPO": TYPO()}
    small, large = (
        tables.spread(tables.samples_of(typo, PROMPT, (1.0,), n, 6))["std"].mean()
        for n in (100, 10_000)
    )
    assert small > 3 * large


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("DPO", "ROPO", "TYPO") else pytest.mark.slow)
        for name in rotopo.objectives.__all__
    ],
)
def test_every_registered_objective_goes_through_the_study(name):
    module = MIXTURE if name == "Mixture" else desiderata.registered()[name]
    prompt = Prompt.of([0.75, 0.25], [0.4, 0.6])
    table = tables.interpolation({name: module}, prompt, (0.5,))
    assert table[["loss", "gradient"]].map(math.isfinite).all(axis=None)
    assert math.isclose(table.pi_1[0] + table.pi_2[0], 1)
    # None turns the policy against the labels, DPOP's own fear of losing the chosen included.
    assert table.pi_1[0] > 0.4 - 1e-6
    verdicts = tables.criteria({name: module}, prompt, prompt, (0.0,))
    assert verdicts[["low_to_true", "worst_kl_good"]].map(math.isfinite).all(axis=None)


def test_surfaces_of_all_registered_objectives_are_finite_and_have_their_gradients():
    """Central differences in the chosen's log-ratio, away from kinks."""
    at = torch.tensor([-2.3 - 1e-5, -2.3 + 1e-5, 1.7], dtype=torch.float64)
    for name, module in (desiderata.registered() | {"Mixture": MIXTURE}).items():
        loss, chosen, rejected = surface(at_strength(module, 1.0), at)
        assert loss.isfinite().all(), name
        torch.testing.assert_close(
            (loss[2, 1] - loss[2, 0]) / 2e-5, chosen[2, :2].mean(), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(
            (loss[1, 2] - loss[0, 2]) / 2e-5, rejected[:2, 2].mean(), rtol=1e-6, atol=1e-6
        )


def test_dpos_surface_at_the_reference():
    values = surface(at_strength(DPO(), 1.0), torch.zeros(1, dtype=torch.float64)).flatten()
    torch.testing.assert_close(values, torch.tensor([math.log(2), -0.5, 0.5]).double())


def test_labels_name_what_differs_from_the_defaults():
    names = desiderata.labelled([DPO(), DPO(beta=3.0), DPO(divergence="js"), SFT(), MIXTURE])
    assert list(names) == ["DPO", "DPO #2", "DPO (divergence=js)", "SFT", "DPO + 0.2 SFT"]


SMALL = ("--lambdas=[0.1,1]", "--log_lambdas=[0]", "--alphas=[0,0.1]", "--samples=50", "--draws=2")
SMALL += ("--sampled_lambdas=[1]",)
TABLES = ("interpolation", "preservation", "constraint", "criteria", "sampled")
PICTURES = ("interpolation", "preservation", "constraint", "losses")


@pytest.fixture
def coarse(monkeypatch):
    """Few points in the picture of the losses."""
    monkeypatch.setattr(desiderata, "SURFACE", torch.linspace(-5, 5, 3, dtype=torch.float64))
    monkeypatch.setattr(desiderata_plots, "_ARROWS", 1)


@pytest.mark.slow
def test_the_command_writes_tables_and_pictures_and_prints(tmp_path, capsys, coarse):
    folder = tmp_path / "new" / "folder"
    desiderata.main(["--output", str(folder), *SMALL])
    printed = capsys.readouterr().out
    for text in ("(0.6316, 0.3158, 0.0526)", "0.1214 / 0.0333", "(0.5360, 0.3184, 0.1456)"):
        assert text in printed
    assert {file.name for file in folder.iterdir()} == {
        *(f"{name}.csv" for name in TABLES),
        *(f"{name}.png" for name in PICTURES),
    }
    table = pd.read_csv(folder / "interpolation.csv")
    assert table.objective.unique().tolist() == ["DPO", "IPO", "f-DPO", "TYPO"]
    for name in PICTURES:
        assert matplotlib.image.imread(folder / f"{name}.png").std() > 0.01


@pytest.mark.parametrize(
    ("option", "names"),
    [
        (["--objective=SimPO"], ["SimPO"]),
        (["--objective=rotopo.objectives.IPO"], ["IPO"]),
        (["--objective=[NCA,TYPO]"], ["NCA", "TYPO"]),
        (["--objective=DPO", "--objective.divergence=js"], ["DPO (divergence=js)"]),
        (
            ["--objective=[{class_path: Mixture, init_args: {objectives: [DPO, SFT]}}]"],
            ["DPO + SFT"],
        ),
    ],
)
def test_the_command_takes_any_objective(option, names, tmp_path, monkeypatch):
    studied = []

    def stop(self, jobs, title):
        studied.extend(job.of for job in jobs if job.table == "criteria")
        raise KeyboardInterrupt

    monkeypatch.setattr(desiderata.results.Parts, "tables", stop)
    with pytest.raises(KeyboardInterrupt):
        desiderata.main(["--output", str(tmp_path), *option])
    assert studied == names


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--objective=[]", "objective is an empty list"),
        ("--objective=Nope", "Nope"),
        ("--objective={class_path: IPO, init_args: {beta: -1}}", "beta is -1"),
        ("--true=[0.6,0.3,0.2]", "true is"),
        ("--true=[0.4,0.4,0.2]", "most likely"),
        ("--bad_true=[0.5,0.5]", "same number"),
        ("--lambdas=[0,1]", "lambdas is"),
        ("--alphas=[-1]", "alphas"),
        ("--draws=1", "draws"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(option, expected, tmp_path, capsys):
    assert_refused(desiderata.main, tmp_path / "folder", [*SMALL, option], expected, capsys)


def test_an_output_that_is_a_file_is_refused_before_anything_is_computed(tmp_path, capsys):
    assert_refuses_a_file(desiderata.main, tmp_path, SMALL, capsys)


def test_a_failure_at_the_end_leaves_the_results_of_before(tmp_path, monkeypatch, coarse, capsys):
    interpolation_plot, losses_plot = desiderata_plots.interpolation, desiderata_plots.losses
    (tmp_path / "criteria.csv").write_text("before")
    for broken in ("losses", "interpolation"):
        monkeypatch.setattr(desiderata_plots, broken, lambda *_: 1 / 0)
    command = ["--output", str(tmp_path), *SMALL, "--objective=IPO"]
    with pytest.raises(ZeroDivisionError):
        desiderata.main(command)
    kept, results = sorted(tmp_path.iterdir(), reverse=True)
    assert results.name == "criteria.csv"
    assert results.read_text() == "before"

    # What it has computed is kept, and the same command goes on from it; another starts over.
    monkeypatch.setattr(tables, "solve", lambda *_: 1 / 0)
    monkeypatch.setattr(desiderata.plots, "interpolation", interpolation_plot)
    monkeypatch.setattr(desiderata.plots, "losses", losses_plot)
    with pytest.raises(ZeroDivisionError):
        desiderata.main([*command, "--true=[0.6,0.2,0.2]"])
    assert f"Starting over: {kept.name}" in capsys.readouterr().err
    desiderata.main(command)
    assert f"Going on: {kept} has " in capsys.readouterr().err
    assert not kept.exists()
    table = pd.read_csv(tmp_path / "interpolation.csv").set_index("lambda")
    assert table.loc[1, "pi_1"] == pytest.approx(0.4532, abs=1e-4)
