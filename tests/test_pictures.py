"""All pictures, found by their functions: nothing is cut off, and no text lies on another.

A function that makes a figure is found by what it returns or calls, and its arguments by their
names: with a new one of known arguments there is nothing to do here.
"""

import ast
import inspect
import json
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from rotopo.compare.frontiers import Frontier
from rotopo.compare.results import AXES
from rotopo.judge.judgement import read_judgement
from rotopo.metrics.displacement import log_ratios
from rotopo.metrics.runs import read_test, read_training
from rotopo.objectives import DPO, IPO
from rotopo.report import figures
from rotopo.studies import desiderata_plots, noise, noise_plots
from rotopo.studies import desiderata_tables as tables
from rotopo.studies.surfaces import surface
from rotopo.studies.tabular import Prompt, at_strength
from tests.compare.test_compare import made_points
from tests.drawn import faults
from tests.report import report_inputs as inputs

ROOT = Path(__file__).parents[1]
WAYS = ("matplotlib", "report.figures", "report import figures")
MAKERS = {"new", "panel"}  # of rotopo.report.figures
LONG = "runs/2026-11-28/a_rather_long_name_of_an_experiment/lr_5e-4/version_{}"


def functions(file: Path) -> list[str]:
    """The public functions of a file that make a figure.

    Raises:
        AssertionError: one makes it without rotopo.report.figures.
    """
    text = file.read_text("utf-8")
    found = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
        assert not {call for call in calls if call.split(".")[-1] in ("Figure", "figure")}, (
            f"{file}, {node.name}: make figures with rotopo.report.figures"
        )
        returns = "" if node.returns is None else ast.unparse(node.returns)
        makes = "Figure" in returns or MAKERS & {call.split(".")[-1] for call in calls}
        if makes and not node.name.startswith("_"):
            found.append(node.name)
    assert "pyplot" not in text, f"{file}: pyplot keeps figures, and what draws leaks"
    return found


def pictures() -> list[str]:
    """Paths of all functions that make figures."""
    found = []
    for folder in ("rotopo", "tools"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.name != "figures.py" and any(way in file.read_text("utf-8") for way in WAYS):
                module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                found += [f"{module}.{name}" for name in functions(file)]
    return found


def renamed(folder: Path, names: dict[str, str], judges: dict[str, str]) -> Path:
    """A judgement with other names, each policy and judge as often as there are names for it."""
    result = json.loads((folder / "judge.json").read_text())
    scores = pd.read_csv(folder / "judge_scores.csv")
    policies = {}
    for name, of in names.items():
        own = result["policies"][of]
        policies[name] = own | {"judges": {j: own["judges"][was] for j, was in judges.items()}}
    rows = [
        scores[(scores.policy == of) & (scores.judge == was)].assign(policy=name, judge=judge)
        for name, of in names.items()
        for judge, was in judges.items()
    ]
    baseline = next(name for name, of in names.items() if of == "base")
    result |= {"policies": policies, "judges": list(judges), "baseline": baseline}
    (folder / "judge.json").write_text(json.dumps(result))
    pd.concat(rows).to_csv(folder / "judge_scores.csv", index=False)
    return folder


def given(folder: Path, awkward: bool) -> dict[str, Any]:
    """Arguments by their names; ``function.name`` is one function's own."""
    numbers = np.random.default_rng(0)
    n = 9 if awkward else 2
    names = [LONG.format(i) for i in range(n)] if awkward else ["DPO", "RoPO"]
    scale = 1e5 if awkward else 1.0
    fits = []
    for i, name in enumerate(names):
        run = inputs.save_policy_fit(folder / f"fit_{i}", i, 40 + 10 * i, scale * (1 + i))
        facts = yaml.safe_load((run / "hparams.yaml").read_text())
        unit = {"reward_unit": "nats per token"} if awkward else {}
        (run / "hparams.yaml").write_text(yaml.safe_dump(facts | unit))
        if awkward:
            log = pd.read_csv(run / "metrics.csv")
            for group in range(1, 11):
                log[f"lr-AdamW/pg{group}"] = 1e-7 * group
            log.to_csv(run / "metrics.csv", index=False)
        fits.append(read_training("policies", name, run))
    tests = [
        read_test("tests", name, inputs.save_test(folder / f"test_{i}", i, 1, scale, True, True))
        for i, name in enumerate(names[:3])
    ]
    judged = inputs.save_judgement(folder / "judged")
    judges = {"trained": "trained", "VADER": "VADER"}
    if awkward:
        judges = {LONG.format(f"judge {i}"): "trained" for i in range(3)}
        renamed(judged, {name: "DPO" if i else "base" for i, name in enumerate(names)}, judges)
    judgement = read_judgement(judged)
    groups = [f"a group of pairs number {i}" for i in range(30)] if awkward else ["drama", "comedy"]
    for test in tests:
        some = {"pairs": 30, "accuracy": 0.7, "accuracy_interval": [0.5, 0.8]}
        test.metrics["groups"] |= dict.fromkeys(groups, some)
    labels = np.array((names * 20)[:40])
    colours = {name: figures.SERIES[i % 8] for i, name in enumerate([*names, "base"])}
    arguments = {
        "run": fits[0],
        "runs": fits,
        "folder": fits[0].folder,
        "picture": folder / "picture.png",
        "smoothing": 5,
        "training": {run.name: log_ratios(run, "train", 5) for run in fits},
        "validation": {run.name: log_ratios(run, "val") for run in fits},
        "colours": colours,
        "common": 3.0,
        "over_training.columns": {
            run.name: {"geometry/effective_rank/00": ":", "geometry/effective_rank/06": "-"}
            for run in fits
        },
        "over_layers.columns": {
            run.name: [f"geometry/effective_rank/{i:02d}" for i in range(7)] for run in fits
        },
        "title": "Hyperspherical energy / at the start",
        "test": tests[0],
        "tests": tests,
        "names": groups,
        "judgement": judgement,
        "judge": judgement.judges[0],
        "policy": judgement.policies[1],
        "tokens": {name: numbers.integers(1, 5000, 50) for name in names},
        "x": numbers.normal(size=(40, 8)),
        "labels": labels,
        "perplexity": 5.0,
        "seed": 0,
        "name": names[0],
        "kind": "groups",
        "rows": [(name, {"chosen": -scale, "rejected": -2 * scale}) for name in names],
        "unit": "nats per token",
        "frontiers.arms": {
            name: [Frontier(np.arange(5) * scale, numbers.normal(size=5)) for _ in range(3)]
            for name in names
        },
        "at": [scale, 2 * scale],
        "label": AXES["kl"],
        "points": {name: [made_points(folder / "points", 1, 1, i)] for i, name in enumerate(names)},
        "measure": "reverse_kl",
        "texts": ["some words of a text", "other words $5 and $6"],
        "colour": figures.CHOSEN,
    }
    return arguments | of_studies(awkward)


def of_studies(awkward: bool) -> dict[str, Any]:
    arms = 12 if awkward else 3
    prompt = Prompt.of([2 / (arms + 1)] + [1 / (arms + 1)] * (arms - 1), [1 / arms] * arms)
    long = "DPO (divergence=js, normalise_length=True) + 0.2 SFT"
    objectives = {long: DPO()} if awkward else {"DPO": DPO(), "IPO": IPO()}
    at = torch.linspace(-5, 5, 9, dtype=torch.float64)
    surfaces = {name: surface(at_strength(own, 1.0), at) for name, own in objectives.items()}
    others = {f"{name} {i}": surfaces[name] for name in surfaces for i in range(9)}
    methods = [f"{long} {i}" for i in range(30)] if awkward else ["DPO", "SimPO", "ROPO+filter"]
    runs = pd.DataFrame(
        {"task": "tabular", "objective": name, "noise": rate, "seed": seed, "accuracy": 0.7}
        | {"auroc": 0.6 + 0.01 * seed, "recall": 0.5}
        for name in methods
        for rate in (0.0, 0.2)
        for seed in (0, 1)
    )
    return {
        "prompt": prompt,
        "samples": None,
        "interpolation.table": tables.interpolation(objectives, prompt, (0.1, 1.0)),
        "preservation.table": tables.preservation(objectives, prompt, prompt, (0.0, 1.0)),
        "reference_kl": 0.1,
        "convention": "official",
        "constraint.table": tables.constraint(prompt, (0.0, 0.1)),
        "asked": surfaces,
        "others": others,
        "log_ratios": at,
        "summary": noise.summarised(runs),
        "noise.asked": methods[1:],
    }


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.slow), "awkward"])
def arguments(request, tmp_path_factory):
    return given(tmp_path_factory.mktemp(request.param), request.param == "awkward")


@lru_cache
def function(path: str):
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("path", pictures())
def test_nothing_is_cut_off_and_no_text_lies_on_another(path, arguments, monkeypatch):
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    picture = function(path)
    own = path.rpartition(".")[2]
    values = {}
    for name in inspect.signature(picture).parameters:
        key = f"{own}.{name}" if f"{own}.{name}" in arguments else name
        assert key in arguments, f"{path}: give {name} or {own}.{name} in given()"
        values[name] = arguments[key]
    made = picture(**values)
    drawn = [one for one in flat(made) if isinstance(one, Figure)] + saved
    assert drawn, f"{path} makes no figure"
    with matplotlib.rc_context(figures.STYLE):
        found = [fault for figure in drawn for fault in faults(figure)]
    assert not found, "\n".join(found)


def flat(made: Any) -> list[Any]:
    return (
        [one for part in made for one in flat(part)] if isinstance(made, list | tuple) else [made]
    )


def test_what_was_asked_for_comes_first_and_large():
    at = torch.linspace(-5, 5, 3, dtype=torch.float64)
    own = surface(at_strength(IPO(), 1.0), at)
    others = {f"other {i}": own for i in range(9)}
    for asked in (["IPO"], ["IPO", "DPO (divergence=js)"]):
        figure = desiderata_plots.losses(dict.fromkeys(asked, own), others, at)
        figure.draw_without_rendering()
        boxes = {axes.get_title(loc="left"): axes.get_window_extent() for axes in figure.axes}
        assert list(boxes) == [*asked, *others]
        first, rest = list(boxes.values())[: len(asked)], list(boxes.values())[len(asked) :]
        assert min(box.width for box in first) > 2 * max(box.width for box in rest)
        assert min(box.y0 for box in first) > max(box.y1 for box in rest)


def test_the_noise_studys_objectives_asked_for_are_in_colour():
    runs = pd.DataFrame(
        {"task": "tabular", "objective": name, "noise": rate, "seed": 0, "accuracy": 0.7}
        | {"auroc": 0.6, "recall": 0.5}
        for name in ("SimPO", "TYPO", "DPO")
        for rate in (0.0, 0.2)
    )
    for asked, grey in ((["SimPO", "TYPO"], {"DPO"}), (None, {"SimPO", "TYPO"})):
        figure = noise_plots.noise(noise.summarised(runs), asked)
        names = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
        assert {name for name, colour in names.items() if colour == "0.45"} == grey


def test_the_pictures_are_found(tmp_path):
    found = pictures()
    assert len(found) > 15
    assert {"rotopo.studies.noise_plots.noise", "rotopo.report.plots.implicit_rewards"} < {*found}
    (tmp_path / "own.py").write_text(
        "def drawn():\n    figure, axes = panel('A')\n    return figure\n"
    )
    assert functions(tmp_path / "own.py") == ["drawn"]
    (tmp_path / "own.py").write_text("def drawn():\n    return plt.figure()\n")
    with pytest.raises(AssertionError, match=r"rotopo\.report\.figures"):
        functions(tmp_path / "own.py")


def test_what_is_wrong_is_seen():
    """A legend that is too wide, labels that collide, and a figure without faults."""
    figure = figures.new()
    axes = figure.subplots()
    axes.plot([0, 1], label="some name" * 9)
    assert not faults(figure)
    figure.legend(loc="outside lower center")
    assert any("Legend is cut off" in fault for fault in faults(figure))
    figure, axes = figures.panel("")
    axes.set_xticks([0, 0.01], ["beside one another", "and too near"])
    axes.set_xlim(0, 1)
    assert any("overlap" in fault for fault in faults(figure))
