"""The noise study's command, its intervals, and what has to come out."""

import json
import math

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.isotonic import isotonic_regression

from rotopo.objectives import DPO
from rotopo.studies import noise, noise_plots
from rotopo.studies.noise_methods import Method
from tests.studies.refusals import assert_refused, assert_refuses_a_file

COLUMNS = ["task", "objective", "noise", "seed", "accuracy", "auroc", "recall"]
SHORT = ("--tabular.epochs=2", "--tabular.rounds=2", "--seeds=[7,8]")


class Own(DPO):
    """An objective from outside of the package."""


@pytest.mark.parametrize("p", [0.5, 0.75, 0.975, 0.995])
@pytest.mark.parametrize("freedom", [1, 2, 3, 19, 200])
def test_students_quantile(p, freedom):
    expected = stats.t.ppf(p, freedom)
    assert noise.student_quantile(p, freedom) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_interval_is_that_of_a_t_test():
    values = pd.Series(np.random.default_rng(0).normal(size=20))
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert noise.half_width(values) == pytest.approx((interval.high - interval.low) / 2, rel=1e-6)
    assert math.isnan(noise.half_width(values[:1]))


def table(**accuracies: list[float]) -> pd.DataFrame:
    rows = [
        ("tabular", name, 0.2, seed, accuracy, 0.9, 0.5)
        for name, of_seeds in accuracies.items()
        for seed, accuracy in enumerate(of_seeds)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_differences_are_paired_by_seed():
    runs = table(DPO=[0.5, 0.7, 0.9], ROPO=[0.6, 0.8, 1.0], IPO=[0.7, 0.7, 0.7])
    # In any order of the rows.
    summary = noise.summarised(runs.sample(frac=1, random_state=0))
    summary = summary[summary.measure == "accuracy"].set_index("objective")
    assert summary.loc["ROPO", "mean"] == pytest.approx(0.8)
    assert summary.loc["ROPO", "interval"] > 0.3
    assert summary.loc["ROPO", "difference"] == pytest.approx(0.1)
    assert summary.loc["ROPO", "difference_interval"] == pytest.approx(0, abs=1e-9)
    assert summary.loc["IPO", "difference"] == pytest.approx(0)
    expected = stats.ttest_rel([0.7, 0.7, 0.7], [0.5, 0.7, 0.9]).confidence_interval(0.95).high
    assert summary.loc["IPO", "difference_interval"] == pytest.approx(expected, rel=1e-6)
    assert math.isnan(summary.loc["DPO", "difference"])
    text = noise.printed(noise.summarised(runs))
    assert "+0.100 ± 0.000*" in text
    assert "+0.000 ± 0.497 " in text


def test_who_loses_is_said_to_lose():
    text = noise.printed(noise.summarised(table(DPO=[0.8, 0.9], ROPO=[0.7, 0.8])))
    assert "-0.100 ± 0.000*" in text


def test_without_dpo_or_with_one_seed_there_is_nothing_to_compare():
    text = noise.printed(noise.summarised(table(ROPO=[0.7])))
    lines = text.splitlines()
    assert lines[-1].split() == ["ROPO", "0.700", "0.900", "0.500"]
    text = noise.printed(noise.summarised(table(ROPO=[0.7], DPO=[0.6])))
    assert text.splitlines()[-2].split()[:3] == ["ROPO", "0.700", "(+0.100"]


def test_the_command_writes_tables_and_a_picture_and_prints(tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    names = ["DPO", "cDPO", "ROPO+filter", "ROPO+filter+sampling", "TYPO"]
    noise.main(["--output", str(folder), *SHORT, f"--objective=[{','.join(names)}]"])
    assert {file.name for file in folder.iterdir()} == {
        "results.csv",
        "summary.csv",
        "rounds.csv",
        "noise.png",
    }
    runs = pd.read_csv(folder / "results.csv")
    assert list(runs.columns) == COLUMNS
    assert len(runs) == len(names) * 3 * 2
    assert not runs.duplicated(["objective", "noise", "seed"]).any()
    assert set(runs.noise) == {0.0, 0.2, 0.4}
    assert set(runs.seed) == {7, 8}
    assert runs.accuracy.between(0, 1).all()
    clean = runs.noise == 0
    for measure in ("auroc", "recall"):
        assert runs.loc[clean, measure].isna().all()
        assert runs.loc[~clean, measure].between(0, 1).all()

    rounds = pd.read_csv(folder / "rounds.csv")
    assert set(rounds.objective) == {"ROPO+filter", "ROPO+filter+sampling"}
    assert (rounds.dropped == 200).all()
    assert (rounds.right <= rounds.accepted).all()
    assert (rounds.accepted <= rounds.dropped).all()

    summary = pd.read_csv(folder / "summary.csv").set_index(["objective", "noise", "measure"])
    means = runs[(runs.objective == "TYPO") & (runs.noise == 0.4)].mean(numeric_only=True)
    assert summary.loc[("TYPO", 0.4, "auroc"), "mean"] == pytest.approx(means.auroc)
    printed = capsys.readouterr().out
    assert f"{means.auroc:.3f}" in printed
    assert "40% flipped, 2 seeds" in printed
    assert matplotlib.image.imread(folder / "noise.png").std() > 0.01


def test_a_run_is_the_same_beside_others_and_in_any_order(tmp_path):
    tables = []
    for i, options in enumerate(
        (
            ["--objective=[DPO,ROPO]", "--noise=[0,0.2]", "--seeds=[7,8]"],
            ["--objective=[ROPO,IPO,DPO]", "--noise=[0.4,0.2,0]", "--seeds=[9,8,7]"],
            ["--objective=ROPO", "--noise=0.2", "--seeds=8"],
        )
    ):
        noise.main(["--output", str(tmp_path / str(i)), *SHORT[:2], *options])
        read = pd.read_csv(tmp_path / str(i) / "results.csv")
        tables.append(read.set_index(["objective", "noise", "seed"]).sort_index())
    first, more, one = tables
    pd.testing.assert_frame_equal(more.loc[first.index], first)
    pd.testing.assert_frame_equal(first.loc[one.index], one)


def test_what_knows_the_rate_is_given_the_true_one(tmp_path):
    assert Method.named("cDPO").build(0.4).label_smoothing == 0.4
    assert Method.named("cDPO+filter").build(0.4).label_smoothing == 0.4
    assert Method.named("RobustDPO").build(0.4).flip_rate == 0.4
    assert Method.named("DPO").build(0.4).label_smoothing == 0
    # Without flips there is nothing to know.
    noise.main(["--output", str(tmp_path), *SHORT, "--objective=[DPO,cDPO,RobustDPO]", "--noise=0"])
    runs = pd.read_csv(tmp_path / "results.csv").pivot(
        index="seed", columns="objective", values="accuracy"
    )
    assert (runs.sub(runs.DPO, axis=0).abs() < 2e-3).all(axis=None)


def test_names_of_methods():
    method = Method.named(f"{__name__}.Own+filter+sampling")
    assert (method.name, method.objective.__name__) == ("Own+filter+sampling", "Own")
    assert method.filtered
    assert method.sampled
    method = Method.named("HolderDPO+filter")
    assert method.filtered
    assert not method.sampled


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--objective=[]", "objective is []"),
        ("--objective=[DPO,DPO]", "each one once"),
        ("--objective=Nope", "Nope is no objective"),
        ("--objective=nowhere.Nope", "nowhere"),
        ("--objective=..Nope", "name a class path"),
        ("--objective=math.pi", "math.pi is no objective"),
        ("--objective=ROPO+sampling", "sampling needs the filter"),
        ("--objective=ROPO+filters", "is no objective"),
        ("--objective=Mixture", "defaults"),
        ("--objective=[DPO,KTO]", "responses to other prompts"),
        ("--objective=TPO", "gold responses"),
        ("--objective=SamPO", "single tokens"),
        ("--objective=DrDPO+filter", "leave the filter out"),
        ("--noise=[0.5]", "noise is 0.5"),
        ("--noise=[]", "noise is []"),
        ("--seeds=[-1]", "seeds is"),
        ("--tabular.beta=-1", "beta is -1"),
        ("--tabular.alpha=2", "alpha is 2"),
        ("--tabular.rho=1", "rho is 1"),
        ("--tabular.rho=0.9999", "none would be left"),
        ("--tabular.rounds=0", "rounds is 0"),
        ("--tabular.rounds=3", "divide evenly"),
        ("--tabular.quantile=1.5", "quantile is 1.5"),
        ("--task=other", "other"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(option, expected, tmp_path, capsys):
    assert_refused(noise.main, tmp_path / "folder", [*SHORT, option], expected, capsys)


def test_an_output_that_is_a_file_is_refused_before_anything_is_computed(tmp_path, capsys):
    assert_refuses_a_file(noise.main, tmp_path, SHORT, capsys)


def test_a_failure_at_the_end_leaves_the_results_of_before(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.csv").write_text("before")
    monkeypatch.setattr(noise_plots, "noise", lambda *_: 1 / 0)
    command = ["--output", str(tmp_path), *SHORT, "--objective=ROPO+filter", "--noise=0.2"]
    with pytest.raises(ZeroDivisionError):
        noise.main(command)
    kept, results = sorted(tmp_path.iterdir(), reverse=True)
    assert results.name == "results.csv"
    assert results.read_text() == "before"

    # What it has computed is kept, and the same command goes on from it.
    rows = kept.read_text().splitlines()
    kept.write_text(rows[0] + "\n")  # as if it had been killed after one run of two
    monkeypatch.undo()
    noise.main(command)
    assert f"Going on: {kept} has 1 parts" in capsys.readouterr().err
    assert not kept.exists()
    gone_on = pd.read_csv(results)
    whole = [json.loads(line)["rows"][0] for line in rows]
    pd.testing.assert_frame_equal(gone_on, pd.DataFrame(whole), check_dtype=False)
    assert len(pd.read_csv(tmp_path / "rounds.csv")) > 0


def test_names_in_the_picture_are_moved_apart_as_little_as_can_be():
    values = np.random.default_rng(0).normal(size=30)
    np.testing.assert_allclose(noise_plots._isotonic(values), isotonic_regression(values))


@pytest.mark.slow
def test_ropo_bears_flips_better_than_dpo_over_twenty_seeds(tmp_path):
    """The seeds were fixed before any of them was run, and nothing was chosen on them."""
    noise.main(["--output", str(tmp_path), "--objective=[DPO,ROPO]", "--noise=[0.2,0.4]"])
    runs = pd.read_csv(tmp_path / "results.csv")
    assert sorted(runs.seed.unique()) == list(range(1000, 1020))
    runs = runs.set_index(["noise", "seed"])
    for measure in ("accuracy", "auroc"):
        of = {name: rows[measure] for name, rows in runs.groupby("objective")}
        difference = of["ROPO"] - of["DPO"]
        for rate in (0.2, 0.4):
            interval = stats.ttest_1samp(difference.loc[rate], 0).confidence_interval(0.95)
            assert interval.low > 0, (measure, rate, interval)
