"""Likelihood displacement at an equal margin: what a margin has cost each policy."""

import numpy as np
import pandas as pd

from rotopo.metrics.runs import Training


def log_ratios(run: Training, stage: str, smoothing: int = 1) -> pd.DataFrame:
    """Mean log-ratios log π_θ − log π_ref of the chosen and the rejected responses, in nats.

    Args:
        run: a preference run; its rows are those of the ``Displacement`` callback.
        stage: ``train`` or ``val``.
        smoothing: logged steps that a value averages over, itself and those before it.

    Returns:
        Columns ``chosen`` and ``rejected``, by optimiser step; no rows where the run logged none,
        as objectives without a reference do not.
    """
    chosen = run.logged(f"{stage}/displacement/chosen_up")
    rejected = -run.logged(f"{stage}/displacement/rejected_down")
    table = pd.DataFrame({"chosen": chosen, "rejected": rejected}).dropna()
    return table.rolling(smoothing, min_periods=1).mean()


def at_equal_margin(tables: dict[str, pd.DataFrame]) -> dict[str, dict[str, float]]:
    """Every policy's log-ratios where it first reaches the largest margin that all of them reach.

    The margin is the chosen's log-ratio less the rejected's. Two policies differ in how far they
    were trained; at an equal margin they have learnt to tell the pairs apart equally well, and
    what is left to compare is the way there: chosen up, or rejected down and chosen with it. Where
    the margin lies between two rows, all values are interpolated between them. [ours]

    Args:
        tables: of :func:`log_ratios`, by policy.

    Returns:
        For each policy ``margin``, ``chosen``, ``rejected`` (nats) and ``step``. Empty where not
        every policy has reached a margin above zero. A policy whose first row lies above the
        common margin already is given with that row, and its own margin.
    """
    margins = {name: table.chosen - table.rejected for name, table in tables.items()}
    common = min((margin.max() for margin in margins.values() if len(margin)), default=0.0)
    if common <= 0 or any(margin.empty for margin in margins.values()):
        return {}
    found = {}
    for name, table in tables.items():
        margin = margins[name].to_numpy()
        rows = np.column_stack([margin, table.chosen, table.rejected, table.index])
        after = int(np.argmax(margin >= common))
        before = max(after - 1, 0)
        rise = margin[after] - margin[before]
        share = (common - margin[before]) / rise if rise > 0 else 0.0
        values = rows[before] + share * (rows[after] - rows[before])
        found[name] = dict(
            zip(("margin", "chosen", "rejected", "step"), values.tolist(), strict=True)
        )
    return found
