"""Displacement at an equal margin."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotopo.metrics.displacement import at_equal_margin, log_ratios
from rotopo.metrics.runs import Training


@given(
    st.lists(st.tuples(st.floats(-40, 40), st.floats(-40, 40)), min_size=1, max_size=12),
    st.lists(st.tuples(st.floats(-40, 40), st.floats(-40, 40)), min_size=1, max_size=12),
)
def test_all_policies_are_compared_at_the_same_margin_on_their_own_paths(one, two):
    """Each point lies on its policy's path, no earlier point is beyond the margin, and the margin
    is the largest that both reach."""
    start = [(0.0, 0.0)]  # an untrained policy is its reference
    tables = {
        name: pd.DataFrame(start + path, columns=["chosen", "rejected"])
        for name, path in (("a", one), ("b", two))
    }
    margins = {name: table.chosen - table.rejected for name, table in tables.items()}
    common = min(margin.max() for margin in margins.values())
    found = at_equal_margin(tables)
    if common <= 0:
        assert found == {}
        return
    for name, table in tables.items():
        values = found[name]
        assert values["margin"] == pytest.approx(common, abs=1e-9)
        assert values["chosen"] - values["rejected"] == pytest.approx(common, abs=1e-9)
        step = values["step"]
        for column in ("chosen", "rejected"):
            assert values[column] == pytest.approx(
                np.interp(step, table.index, table[column]), abs=1e-6
            )
        assert (margins[name][: int(np.ceil(step))] < common).all()


def test_equal_margin_by_hand():
    """Along straight lines: chosen −2 and rejected −6 at margin 4, −1 and −5 for the other."""
    dpo = pd.DataFrame({"chosen": [0, -1, -4], "rejected": [0, -3, -12]}, index=[0, 5, 15])
    ropo = pd.DataFrame({"chosen": [0.0, -1.0], "rejected": [0.0, -5.0]}, index=[0, 8])
    found = at_equal_margin({"DPO": dpo, "RoPO": ropo})
    assert found["DPO"] == pytest.approx(
        {"margin": 4, "chosen": -2, "rejected": -6, "step": 25 / 3}
    )
    assert found["RoPO"] == pytest.approx({"margin": 4, "chosen": -1, "rejected": -5, "step": 8})
    falling = pd.DataFrame({"chosen": [0.0, -2.0], "rejected": [0.0, -1.0]})
    assert at_equal_margin({"DPO": dpo, "falling": falling}) == {}
    assert at_equal_margin({}) == {}


def test_log_ratios_are_read_by_step_and_smoothed(tmp_path):
    metrics = pd.DataFrame(
        {
            "step": [0, 1, 1, 2],
            "train/loss": [0.7, 0.6, np.nan, 0.5],
            "train/displacement/chosen_up": [0.0, -1.0, np.nan, -3.0],
            "train/displacement/rejected_down": [0.0, 2.0, np.nan, 6.0],
        }
    )
    run = Training("DPO", tmp_path, "", {}, metrics)
    table = log_ratios(run, "train", smoothing=2)
    assert table.index.tolist() == [0, 1, 2]
    assert table.chosen.tolist() == [0.0, -0.5, -2.0]
    assert table.rejected.tolist() == [0.0, -1.0, -4.0]
    assert log_ratios(run, "val").empty
