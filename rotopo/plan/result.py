"""What a plan says."""

from dataclasses import dataclass

from rotopo.plan.cards import Card
from rotopo.plan.load import Load
from rotopo.plan.memory import StepMemory, Strategy


@dataclass(frozen=True)
class Row:
    """One way to run the fit.

    Attributes:
        strategy: among the ranks.
        checkpointing: whether activations are computed again.
        memory: of a step on the plan's micro-batch.
        pairs: the most pairs of a micro-batch that fit the card; None without a card.
        token_budget: tokens of so many pairs.
    """

    strategy: Strategy
    checkpointing: bool
    memory: StepMemory
    pairs: int | None = None
    token_budget: int | None = None


@dataclass(frozen=True)
class Plan:
    """All that is printed.

    Attributes:
        model: what is trained, in words.
        weights: parameters in all, and those that train.
        load: the micro-batch that ``rows`` are of, and in words where it comes from.
        pairs_per_step: over all ranks and micro-batches.
        accumulation: micro-batches of a step.
        rows: ways to run it; the first is the settings' own.
        flops: floating-point operations of an optimiser step; None where not all are known.
        seconds: of an optimiser step at ``mfu``; None where the card's peak is not known.
    """

    model: str
    weights: tuple[int, int]
    load: Load
    load_from: str
    tokens: int
    pairs_per_step: int
    accumulation: int
    cached: bool
    rows: list[Row]
    card: Card | None
    allowance: float
    flops: float | None
    mfu: float
    seconds: float | None
