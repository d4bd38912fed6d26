"""A plan as text of 80 columns."""

import textwrap

from rotopo.plan.result import Plan, Row

_GIB = 2**30
_LEFT_OUT = 0.005  # GiB: what would be printed as 0.00 is added up
ALLOWANCE = "allowance for CUDA's context, nccl and fragmentation (not measured)"


def render(plan: Plan) -> str:
    """All of a plan."""
    own, load = plan.rows[0], plan.load
    ranks = own.strategy.ranks
    every, trained = plan.weights
    lines = [
        plan.model,
        f"{_millions(every)} weights, of which {_millions(trained)} train",
        f"a micro-batch: {_pairs(load.pairs)} of a prompt of {load.prompt:,} and responses of "
        f"{load.response:,} tokens ({plan.load_from}): {plan.tokens:,} tokens, {load.layout}",
        f"a step: {plan.pairs_per_step} pairs, {plan.accumulation} micro-batches on each of "
        f"{ranks} rank{'s' * (ranks > 1)}" + ("; the reference from its cache" * plan.cached),
    ]
    lines = [part for line in lines for part in textwrap.wrap(line, 80, subsequent_indent="  ")]
    lines += ["", f"A rank, {_way(own)}{'GiB':>{72 - len(_way(own))}}"]
    lines += ["between two steps:", *_parts(own.memory.held)]
    lines += textwrap.wrap(f"when it is most, in {own.memory.moment}:", 80)
    lines += _parts(own.memory.most, plan.allowance)
    lines += ["", *_table(plan), "", *_time(plan)]
    return "\n".join(lines)


def _parts(parts: dict[str, int], allowance: float | None = None) -> list[str]:
    lines, rest = [], 0.0
    for name, size in sorted(parts.items(), key=lambda item: -item[1]):
        if size / _GIB < _LEFT_OUT:
            rest += size / _GIB
        else:
            lines.append(_line(name, size / _GIB))
    if rest >= _LEFT_OUT:
        lines.append(_line("the rest", rest))
    total = sum(parts.values()) / _GIB
    if allowance is not None:
        lines.append(_line(ALLOWANCE, allowance))
        total += allowance
    return [*lines, _line("in all", total)]


def _line(name: str, gib: float) -> str:
    return f"  {name:<70}{gib:>8.2f}"


def _table(plan: Plan) -> list[str]:
    head = f"{'':<30}{_pairs(plan.load.pairs):>12}"
    if plan.card is not None:
        peak = f"{plan.card.gib:g} GiB, the allowance included"
        head = f"{plan.card.name}: {peak}\n{head}{'most pairs':>14}{'data.token_budget':>20}"
    lines = head.split("\n")
    for row in plan.rows:
        total = row.memory.peak / _GIB + plan.allowance
        line = f"{_way(row):<30}{total:>8.1f} GiB"
        if row.pairs is not None:
            most = f"{row.pairs}" if row.pairs else "none fits"
            budget = f"{row.token_budget:,}" if row.pairs else ""
            line += f"{most:>14}{budget:>20}"
        lines.append(line.rstrip())
    if plan.card is not None:
        lines.append("  (pairs of these lengths, and no more than a rank's part of a step)")
    return lines


def _time(plan: Plan) -> list[str]:
    if plan.flops is None:
        return ["No time: not all that this model computes is counted."]
    work = f"{plan.flops / 1e15:.3g} PFLOP a step"
    if plan.seconds is None:
        return [f"{work}; name a --card whose peak is known for a time."]
    text = (
        f"{work}: {plan.seconds:.3g} s, if {plan.mfu:g} of {plan.card.name}'s peak is reached "
        "(--mfu, an assumption), at these lengths."
        if plan.card is not None
        else work
    )
    return textwrap.wrap(text, 80)


def _way(row: Row) -> str:
    ranks = f" on {row.strategy.ranks}" if row.strategy.ranks > 1 else ""
    again = ", checkpointed" if row.checkpointing else ""
    return f"{row.strategy.kind}{ranks}{again}"


def _pairs(n: int) -> str:
    return f"{n} pair{'s' * (n > 1)}"


def _millions(n: int) -> str:
    if n >= 10**9:
        return f"{n / 1e9:.2f} billion"
    return f"{n / 1e6:.2f} million" if n >= 10**5 else f"{n:,}"
