"""Sections are found by their files."""

import re

import pytest

from rotopo.report import sections
from rotopo.report.command import report
from tests.report import report_inputs as inputs

SECTION = """
from rotopo.report.page import Section, Table, text

ORDER = 35


def section(inputs):
    cells = [[text(run.name)] for run in inputs.fits]
    return Section("Who was here", [Table("All policies.", ["policy"], cells)] if cells else [])
"""


def headings(file):
    return re.findall(r"<h2 id.*?>(.*?)</h2>", file.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_new_file_is_a_new_section(tmp_path, monkeypatch):
    (tmp_path / "who_was_here.py").write_text(SECTION)
    monkeypatch.setattr(sections, "__path__", [*sections.__path__, str(tmp_path)])
    run = inputs.save_policy_fit(tmp_path / "run", 0, 40, 2.0)
    report(tmp_path / "page.html", policies={"DPO": run})
    assert headings(tmp_path / "page.html") == [
        *("At a glance", "Training", "Who was here", "Policies", "Geometry", "Runs and settings")
    ]
    judged = inputs.save_judgement(tmp_path / "judged")
    report(tmp_path / "other.html", judge=judged)
    assert headings(tmp_path / "other.html") == ["At a glance", "Generations", "Judgement"]


def test_no_two_sections_claim_the_same_place():
    orders = [module.ORDER for module in sections.modules()]
    assert orders == sorted(set(orders))
