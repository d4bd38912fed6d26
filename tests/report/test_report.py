import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from rotopo.cli import main
from rotopo.errors import InputError
from rotopo.judge.judgement import read_judgement
from rotopo.report.command import report
from rotopo.report.figures import panel
from rotopo.report.page import Panel, Section, Table, number, render, text
from rotopo.report.sections.runs_and_settings import in_words
from tests.report import report_inputs as inputs


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the text outside of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return inputs.everything(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def html(everything, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "sub" / "report.html"
    report(file, **everything)
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]
    return file.read_text(encoding="utf-8")


def test_a_whole_page_is_one_well_formed_file_without_addresses(html):
    page = Page(html)
    assert page.open == []
    assert len(html) < 3e6
    assert page.all("link") == []
    for attributes in page.all("img"):
        assert attributes["src"].startswith("data:image/svg+xml,")
        assert len(attributes["alt"]) > 10
    for attributes in page.all("a"):
        assert attributes["href"].startswith("#")
        assert attributes["href"][1:] in {a.get("id") for _, a in page.elements}
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_texts_stay_texts(html):
    page = Page(html)
    (policy,) = (a for a in page.all("meta") if "http-equiv" in a)
    assert len(page.all("script")) == 1
    assert "script-src 'sha256-" in policy["content"]
    assert "Alignment report <of> films & critics" in page.text
    for awkward in inputs.AWKWARD[1:]:
        assert awkward[:60] in page.text
    assert page.all("b") != []
    assert "(empty)" in page.text


def test_what_is_in_the_files_is_on_the_page(html, everything):
    page = Page(html)
    for name, folder in everything["reward_models"].items():
        metrics = json.loads((folder / "test.json").read_text())
        assert f"Reward model {name}: accuracy {metrics['accuracy']:.3f}" in page.text
    result = read_judgement(everything["judge"]).result
    for policy in ("DPO", "RoPO"):
        rate = result["policies"][policy]["judges"]["VADER"]["win_rate"]
        assert f"{rate:.1%} under VADER" in page.text
    for figures in (
        (".568", ".702", "1.552"),
        (".703", ".079", "3.403"),
        (".791", ".127", "2.565"),
    ):
        assert re.search(r"\s*\S*".join(map(re.escape, figures)), page.text)
    assert "not a comparison under equal terms" in page.text
    assert "Without a reference, and so not drawn: SimPO" in page.text
    assert "8686562f16371ed0" in page.text
    assert page.text.count("seed_everything: 0") == 8
    headings = re.findall(r"<h3>(.*?)</h3>", html)
    assert len(set(headings)) == len(headings)
    for title in (
        *("How long the responses are", "Words of the pairs", "Map of the responses"),
        *("Scores of chosen and rejected responses", "Calibration", "Accuracy by group"),
        *("Loss and learning rate", "Accuracy by evaluation set", "Log-ratios to the reference"),
        "Implicit rewards over training, in nats",
        "Implicit rewards over training, in nats per token",
        *("Displacement at an equal margin", "Hidden states and neurons"),
        *("How long the generations are", "Words of the generations"),
        *("Judges and policies crossed", "Differences prompt by prompt"),
    ):
        assert title in headings


def test_every_policy_is_at_a_glance_with_its_accuracy(html, everything):
    summary = html[html.index('<section class="summary"') : html.index("Data</h2>")]
    lines = dict(re.findall(r'<li><b dir="auto">(.*?)</b>: (.*?)</li>', summary, re.DOTALL))
    tested = json.loads((everything["policy_tests"]["DPO"] / "test.json").read_text())
    assert {"DPO", "RoPO", "SimPO", "base", "Reward model trained"} < lines.keys()
    assert f"accuracy {tested['accuracy']:.3f} (95% interval" in lines["DPO"]
    assert "accuracy 0.750 on validation pairs" in lines["SimPO"]
    assert lines["base"] == "the baseline of the judgement, 48 prompts."


def test_the_yardstick_and_the_sets_are_on_the_page(html, everything):
    page = Page(html)
    for folder in everything["policy_tests"].values():
        metrics = json.loads((folder / "test.json").read_text())
        for found in (metrics, *metrics["sets"].values()):
            own = found["yardstick"]
            for value, digits in (
                (own["margin"], 3),
                (own["log_ratio"]["chosen"], 3),
                (own["log_ratio_per_token"]["rejected"], 4),
                (own["kl_per_token"]["on_data"]["forward"], 4),
            ):
                assert number(value, digits).text in page.text
    # Where a path is shortened, a tooltip has the whole of it.
    cells = [a for tag, a in page.elements if tag == "td" and a.get("title") == inputs.SET]
    assert len(cells) == 6
    assert any(inputs.SET in (a.get("title") or "") for a in page.all("img"))


def test_no_internal_name_is_in_the_text(html):
    """Outside of the settings themselves, and of tooltips."""
    text = Page(re.sub(r"<pre.*?</pre>", "", html, flags=re.DOTALL)).text
    internal = r"\b(?:val|train|test|pairs|rows|geometry)/\w+|rotopo\.\w+|\w+_fingerprint|Config\b"
    assert re.findall(internal, text) == []
    assert "training pairs" in text
    facts = ("pairs/train", "rows/films/train/too_long", "left_out/a/b", "torch", "noise/flipped")
    assert [in_words(fact) for fact in facts] == [
        "training pairs",
        "training rows of films too long, left out",
        "rows left out of a/b",
        "version of torch",
        "labels flipped",
    ]


def test_what_is_not_drawn_is_not_in_the_captions(tmp_path):
    """Neither validation, nor learning rates, nor smoothing."""
    run = inputs.save_policy_fit(tmp_path / "run", 0, 40, 2.0)
    log = pd.read_csv(run / "metrics.csv")
    kept = [c for c in log if not c.startswith(("val/", "lr-", "geometry/"))]
    log[kept].dropna(subset="train/loss").to_csv(run / "metrics.csv", index=False)
    report(tmp_path / "page.html", policies={"DPO": run}, smoothing=1)
    text = Page((tmp_path / "page.html").read_text()).text
    for word in ("oints:", "points on", "Below: the learning", "(faint)", "smoothed"):
        assert word not in text
    assert "Without a logged learning rate: DPO" in text


def test_pictures_are_in_the_family_of_the_page(html):
    """Which has no serifs, like code, whose letters have a width of their own."""
    families = re.findall(r"font-family: ([^;'\"]+)|--sans: ([^;]+);", unquote(html))
    assert len({family for pair in families for family in pair if family}) == 1
    assert not re.search(r"(?<!sans-)serif", html)


def test_captions_say_what_intervals_lengths_and_margins_are(html):
    page = Page(html)
    assert page.text.count("These intervals take the pairs as independent") == 2
    assert "whole groups of pairs where the data has them" in page.text
    assert "the end-of-turn token included, which the lengths of generations" in page.text
    assert "without the end-of-turn token, which the lengths of the pairs count" in page.text
    assert "with a reference an untrained policy's margins are zero, up to rounding" in page.text
    assert page.text.count("48 prompts, 95% intervals") == 2
    assert "against base; 95% bootstrap intervals" in page.text
    assert "No win rate at equal length" not in page.text


def test_a_judgements_level_and_refusals_are_on_the_page(tmp_path):
    folder = inputs.save_judgement(tmp_path / "judged", level=0.9)
    result = json.loads((folder / "judge.json").read_text())
    verdict = result["policies"]["RoPO"]["judges"]["trained"]
    verdict["length_controlled_win_rate"] = verdict["length_controlled_interval"] = None
    (folder / "judge.json").write_text(json.dumps(result))
    report(tmp_path / "page.html", judge=folder)
    page = Page((tmp_path / "page.html").read_text())
    assert "against base; 90% bootstrap intervals" in page.text
    assert "mean scores, with 90% bootstrap intervals" in page.text
    assert page.text.count("48 prompts, 90% intervals") == 2
    assert "95%" not in page.text
    assert "No win rate at equal length (–) where a policy's responses are all longer" in page.text
    low, high = result["policies"]["DPO"]["judges"]["VADER"]["length_controlled_interval"]
    assert f"{low:.3f} to {high:.3f}" in page.text


@pytest.mark.slow
def test_the_same_inputs_make_the_same_page(tmp_path):
    run = inputs.save_policy_fit(tmp_path / "run", 0, 40, 2.0)
    for name in ("a.html", "b.html"):
        report(tmp_path / name, policies={"DPO": run})
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_it_is_a_command(tmp_path, capsys):
    run = inputs.save_reward_fit(tmp_path / "run")
    config = tmp_path / "report.yaml"
    config.write_text(f"reward_training: {{trained: {run}}}\ntitle: Nothing but a loss\n")
    main(["report", f"--config={config}", f"--output={tmp_path / 'page.html'}"])
    assert "Nothing but a loss" in (tmp_path / "page.html").read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["report", f"--output={tmp_path / 'none.html'}", "--policies", "{DPO: nowhere}"])
    assert "rotopo: policies.DPO: there is no folder nowhere" in capsys.readouterr().err


def test_a_single_training_makes_a_page_of_its_parts_only(tmp_path):
    run = inputs.save_policy_fit(tmp_path / "run", 0, 40, 2.0, reference=False)
    (run / "config.yaml").unlink()
    (run / "hparams.yaml").unlink()
    report(tmp_path / "page.html", policies={"SimPO": run})
    html = (tmp_path / "page.html").read_text()
    assert re.findall(r"<h2 id.*?>(.*?)</h2>", html) == [
        *("At a glance", "Training", "Policies", "Geometry", "Runs and settings")
    ]
    assert '<b dir="auto">SimPO</b>: accuracy 0.750 on validation pairs, as last logged.' in html
    assert "Without a config.yaml" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to report on"),
        ({"policies": {"DPO": "nowhere"}}, r"policies\.DPO: there is no folder .*nowhere"),
        ({"policies": {"DPO": "tested"}}, r"policies\.DPO: .*tested holds no metrics.csv"),
        ({"policies": {"DPO": "."}}, "there is one in fitted below it"),
        (
            {"reward_models": {"RM": "fitted"}},
            r"reward_models\.RM: .*no test.json, which rotopo te",
        ),
        ({"responses": {"base": "none.jsonl"}}, r"responses\.base: there is no file"),
        ({"responses": {"base": "torn.jsonl"}}, "torn.jsonl, line 2: torn off"),
        ({"responses": {"base": "fields.jsonl"}}, "line 1: the field 'prompt' is missing"),
        ({"embeddings": "torn.jsonl"}, "neither an .npz nor a .csv"),
        ({"embeddings": "nan.npz"}, "not all of the values are finite"),
        ({"judge": "fitted"}, "judge: .*no judge.json, which rotopo judge writes"),
        (
            {"policies": {"DPO": "fitted"}, "published": True},
            "published: there are no reward_models",
        ),
        ({"policies": {"DPO": "fitted"}, "smoothing": 0}, "smoothing is 0"),
    ],
)
def test_bad_input_is_named_and_leaves_no_page(tmp_path, arguments, message):
    inputs.save_reward_fit(tmp_path / "fitted")
    inputs.save_test(tmp_path / "tested", 0, 0.0, 1.0)
    line = {"row": 0, "prompt": [{"role": "user", "content": "?"}], "response": "!", "tokens": 1}
    (tmp_path / "torn.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:20])
    (tmp_path / "fields.jsonl").write_text(json.dumps({"row": 0, "response": "!"}) + "\n")
    np.savez(tmp_path / "nan.npz", x=np.full((5, 2), np.nan), labels=np.array(list("aabbb")))

    def placed(value):
        if isinstance(value, dict):
            return {name: tmp_path / path for name, path in value.items()}
        return tmp_path / value if isinstance(value, str) else value

    given_paths = {name: placed(value) for name, value in arguments.items()}
    with pytest.raises(InputError, match=message):
        report(tmp_path / "page.html", **given_paths)
    assert not (tmp_path / "page.html").exists()


def test_without_the_libraries_the_message_says_what_to_install(tmp_path):
    run = inputs.save_reward_fit(tmp_path / "run")
    script = f"""
import sys
sys.modules["wordcloud"] = None
from pathlib import Path
from rotopo.report.command import report
report(Path("page.html"), reward_training={{"RM": Path({str(run)!r})}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "InputError: a report takes wordcloud" in done.stderr
    assert "pip install 'rotopo[report]'" in done.stderr


def test_cells_sort_by_value_and_show_minus_signs():
    assert number(-1234.5678).text == "−1,234.568"
    assert number(-1234.5678).key == -1234.5678
    assert number(-2.14e-5).text == "−2.1e−05"
    assert number(0.0).text == "0.000"
    assert number(None).key is None
    assert number(float("nan")).text == "–"
    table = Table("t", ["a", "b"], [[text("x"), number(1.0)], [text("y"), number(None)]])
    assert table.numeric == {1}
    html = render("t", "", [], [Section("S", [table])])
    assert 'data-key="1.0"' in html
    assert html.count("data-key") == 3


def test_pictures_do_not_depend_on_the_clock_or_on_chance():
    addresses = []
    for _ in range(2):
        figure, axes = panel("title")
        axes.plot([0, 1], [0, 1])
        addresses.append(Panel(figure, "a line").address)
    assert addresses[0] == addresses[1]
    assert "prefers-color-scheme" in addresses[0]
