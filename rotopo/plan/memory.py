"""What a rank holds and takes for a step, of any module, strategy and load."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from rotopo.models.sharding import decoder_layers
from rotopo.plan.fakes import Device, alike, ranks, with_layers, without_values
from rotopo.plan.ledger import Moment, Parts
from rotopo.plan.load import Load
from rotopo.plan.step import BETWEEN, GRADIENTS, TRAINED, Stepper
from rotopo.training import PairwiseModule

# Layers of the smaller of two models that a larger one follows from: the other has a layer more,
# which is at neither end; FSDP2 looks a layer ahead.
_FEW = {"single": 2, "ddp": 2, "fsdp2": 3}
BUCKETS = "DDP's buckets"


@dataclass(frozen=True)
class Strategy:
    """How ranks share a model.

    Attributes:
        kind: ``single`` and ``ddp`` have it whole on each rank, ``fsdp2`` divided.
        ranks: how many.
        views: DDP's ``gradient_as_bucket_view``: gradients lie in the buckets that it sends.
    """

    kind: Literal["single", "ddp", "fsdp2"] = "single"
    ranks: int = 1
    views: bool = False


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one rank, by part.

    Attributes:
        held: between two steps, gradients included.
        most: when it is most.
        moment: when that is.
    """

    held: dict[str, int]
    most: dict[str, int]
    moment: str

    @property
    def peak(self) -> int:
        """Bytes at most; what ``torch.cuda.max_memory_allocated`` is to be compared with."""
        return sum(self.most.values())


@contextmanager
def planner(
    module: PairwiseModule,
    config: PretrainedConfig,
    strategy: Strategy = Strategy(),
    *,
    checkpointing: bool = False,
    cached: bool = False,
    accumulated: bool = False,
    device: Device = "cuda",
) -> Iterator[Callable[[Load], StepMemory]]:
    """The memory of a module's training steps, from its model's configuration alone.

    A model whose layers are all of one kind is not traced whole: what each layer adds follows from
    models of a few.

    Args:
        module: as its settings make it, not loaded; stays as it is.
        config: of its model, see :func:`rotopo.plan.fakes.model_config`.
        strategy: how ranks share it.
        checkpointing: whether activations are computed again, whatever the settings say.
        cached: whether the reference's log-probs come from the cache.
        accumulated: whether a step has several micro-batches.
        device: what a rank runs on.

    Returns:
        Within the context, a function of the load.

    Raises:
        InputError: something of the settings cannot be planned.
    """
    divided = strategy.kind == "fsdp2"
    with ranks(strategy.ranks) if divided else nullcontext() as sharding:
        whole = without_values(module, config, device, checkpointing).language_model
        layers = len(decoder_layers(whole))
        few = _FEW[strategy.kind]
        shorter = [with_layers(config, n) for n in (few, few + 1)]
        steppers = [
            Stepper(
                without_values(module, one, device, checkpointing, sharding),
                device,
                cached,
                accumulated,
                divided,
            )
            for one in (shorter if layers > few + 1 and alike(whole) else [config])
        ]

        def memory(load: Load) -> StepMemory:
            trace, *longer = (stepper(load) for stepper in steppers)
            if longer:
                trace = trace.of(layers, *longer)
            most = trace.most
            if strategy.kind == "ddp":
                most = {moment: _with_buckets(most[moment], strategy.views) for moment in most}
            moment = max(most, key=lambda moment: most[moment].total())
            held = dict(+most[BETWEEN, "all"])
            return StepMemory(held, dict(+most[moment]), _words(moment, layers))

        yield memory


def _with_buckets(parts: Parts, views: bool) -> Parts:
    """With what DDP sends gradients in, which is as large as what trains and always there."""
    held = parts | Counter({BUCKETS: parts[TRAINED]})
    if views:
        del held[GRADIENTS]
    return held


def _words(moment: Moment, layers: int) -> str:
    phase, place = moment
    if isinstance(place, int):
        place = f"layer {place + 1 if place >= 0 else layers + place + 1} of {layers}"
    return phase if place == "all" else f"{phase}, {place}"
