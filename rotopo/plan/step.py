"""A training step on fake tensors, moment by moment; and of a model of more layers, from two small
ones."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from rotopo.data.batch import AttentionBlock, PairBatch
from rotopo.errors import InputError
from rotopo.models import head, segment_attention
from rotopo.models.beside import embeddings
from rotopo.models.sharding import decoder_layers
from rotopo.optimisers import groups_of, optimizer_of
from rotopo.plan.fakes import Device, materialise
from rotopo.plan.ledger import Ledger, Moment, Parts, places
from rotopo.plan.load import Load
from rotopo.pretrained import first_line
from rotopo.training import PairwiseModule

TRAINED, GRADIENTS, MOMENTS = "weights that train", "gradients", "optimiser's state"
FORWARD, REFERENCE, BACKWARD, UPDATE, BETWEEN = (
    "the forward pass",
    "the reference's pass",
    "the backward pass",
    "the optimiser's step",
    "between steps",
)


@dataclass(frozen=True)
class Trace:
    """What was alive when it was most, at each moment of a step; see :class:`.Ledger`."""

    layers: int
    most: dict[Moment, Parts]

    def of(self, layers: int, other: "Trace") -> "Trace":
        """The trace of a model with more layers of the same kind, of which each adds the same.

        Args:
            layers: how many.
            other: the trace of a model with one layer more than this one's.
        """
        assert other.layers == self.layers + 1
        assert self.most.keys() == other.most.keys()
        more = layers - other.layers
        most = {}
        for moment, longer in other.most.items():
            shorter = self.most[moment]
            parts = shorter.keys() | longer.keys()
            each = {part: longer[part] - shorter[part] for part in parts}
            most[moment] = Counter({part: longer[part] + more * each[part] for part in parts})
        return Trace(layers, most)


class _Cached:
    """In the place of the reference's cache: as many values as the batch has response tokens."""

    values: Tensor

    def get(self, keys: object) -> Tensor:
        return self.values


class Stepper:
    """Takes one module's training steps on fake tensors.

    Args:
        module: on the meta device, see :func:`.without_values`; it is used up.
        device: whose step it is to be. Fake tensors are a processor's either way, on which every
            machine's torch chooses a fused attention; what differs on a GPU is set: the size of the
            head's tiles, and the optimiser's foreach.
        cached: the reference's log-probs come from a cache.
        accumulated: a step has several micro-batches, so that gradients are there in all passes.
        sharded: whether FSDP2 divides the module.
    """

    def __init__(
        self,
        module: PairwiseModule,
        device: Device,
        cached: bool,
        accumulated: bool,
        sharded: bool,
    ) -> None:
        self.module = module
        self.device = device
        self.accumulated = accumulated
        self.sharded = sharded
        self.setting = module.model_config.setting
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger: Ledger | None = None
        self.phase = FORWARD
        materialise(module, self.mode)
        self.layers = decoder_layers(module.language_model)
        self._watch(self.layers)
        if module.backbone.reference is not None:
            self._watch(decoder_layers(module.backbone.reference))
        if cached:
            policy: Any = module.backbone
            policy.cache = _Cached()
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Optimizer:
        if self.module.optimizer is None:
            raise InputError("model.optimizer is not set: name one, e.g. torch.optim.AdamW.")
        module = self.module
        groups = groups_of(module.named_parameters(), module.parameter_groups)
        optimizer = optimizer_of(self.module.optimizer, groups)
        for group in optimizer.param_groups:
            # What torch chooses on a GPU.
            if self.device == "cuda" and "foreach" in group and not group.get("fused"):
                group["foreach"] = True if group["foreach"] is None else group["foreach"]
        try:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()  # which makes its state
        except (RuntimeError, ImportError, AttributeError, TypeError) as error:
            raise InputError(
                f"model.optimizer ({type(optimizer).__name__}) cannot be planned: it takes no step "
                f"on tensors without values: {first_line(error)}"
            ) from error
        return optimizer

    def __call__(self, load: Load) -> Trace:
        """One step on a load.

        Raises:
            InputError: something of the step depends on what tensors hold.
        """
        module = self.module
        batch = self._without_values(
            load.batch(module.needs, len(embeddings(module.language_model)))
        )
        cache = getattr(getattr(module, "policy", None), "cache", None)
        if cache is not None:
            cache.values = torch.zeros(len(batch.targets))
        module.backbone._checked.add(load.layout)  # the check compares values
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)  # of the micro-batch before
        self.ledger = ledger = Ledger(self.mode)
        self._enter_what_is_held(batch)
        try:
            with ExitStack() as stack:
                stack.enter_context(_as_on(self.device))
                stack.enter_context(ledger.following_resizes())
                stack.enter_context(ledger)
                self._step(batch)
        except RuntimeError as error:
            raise InputError(
                f"{type(module).__name__} on {module.language_model.config.model_type} with "
                f"{self.setting}.attention {module.model_config.attention!r} cannot be "
                f"planned: its step does not run on tensors without values: {first_line(error)}"
            ) from error
        finally:
            self.ledger = None
        return Trace(len(self.layers), ledger.most)

    def _without_values(self, batch: PairBatch) -> PairBatch:
        """A batch of which tokens and what they see have no values, which masks grow with. Of
        its responses shapes depend on the values."""
        fake = self.mode.from_tensor
        blocks = (AttentionBlock(fake(b.queries), fake(b.keys)) for b in batch.blocks)
        return replace(
            batch,
            input_ids=fake(batch.input_ids),
            position_ids=fake(batch.position_ids),
            segment_ids=fake(batch.segment_ids),
            blocks=tuple(blocks),
        )

    def _step(self, batch: PairBatch) -> None:
        ledger = self.ledger
        assert ledger is not None
        self.phase = FORWARD
        self._at("embeddings and masks", "before")
        loss = self.module.training_step(batch, 0)["loss"]
        if not self.accumulated:
            self.optimizer.zero_grad()  # as Lightning, only here
        self.phase = BACKWARD
        self._at("head and loss", "head")
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: ledger.name([p.grad], GRADIENTS))
            for p in ([] if self.sharded else self.trained)
        ]
        loss.backward()
        for hook in hooks:
            hook.remove()
        del loss
        self.phase = UPDATE
        self._name_gradients()
        self._at("optimiser's step", "all")
        self.optimizer.step()
        self.phase = BETWEEN
        self._at("kept from the step", "all")

    def _at(self, label: str, *where: int | str) -> None:
        """Enter a moment: the label of what is allocated from then, and its places."""
        assert self.ledger is not None
        self.ledger.label = label
        self.ledger.enter(self.phase, where)

    def _name_gradients(self) -> None:
        assert self.ledger is not None
        self.ledger.name((p.grad for p in self.trained), GRADIENTS)

    def _enter_what_is_held(self, batch: PairBatch) -> None:
        ledger, backbone = self.ledger, self.module.backbone
        assert ledger is not None
        for value in vars(batch).values():
            ledger.name([value] if isinstance(value, Tensor) else [], "batch")
        for block in batch.blocks:
            ledger.name([block.queries, block.keys], "batch")
        reference = backbone.reference
        of_reference = {id(p) for p in reference.parameters()} if reference is not None else set()
        for parameter in self.module.parameters():
            kind = TRAINED if parameter.requires_grad else "frozen weights"
            if id(parameter) in of_reference:
                kind = "the reference's weights"
            ledger.name([parameter], kind)
        ledger.name(self.module.buffers(), "buffers")
        self._name_gradients()
        for state in self.optimizer.state.values():
            ledger.name((v for v in state.values() if isinstance(v, Tensor)), MOMENTS)

    def _watch(self, layers: list[nn.Module]) -> None:
        """Have the ledger know where in the model what is allocated."""
        for index, layer in enumerate(layers):
            where = places(index, len(layers))
            layer.register_forward_pre_hook(self._entering(where, "layers: rest"))
            layer.register_forward_hook(self._leaving(where, index == len(layers) - 1))
            for name, part in layer.named_children():
                if any(p.dim() > 1 for p in part.parameters()):
                    part.register_forward_pre_hook(self._entering(None, f"layers: {name}"))
                    part.register_forward_hook(self._entering(None, "layers: rest"))

    def _entering(self, where: list[int | str] | None, label: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if self.ledger is None:
                return
            prefix = "computed again, " if self.phase == BACKWARD else ""
            if self.phase in (FORWARD, REFERENCE):
                self.phase = FORWARD if torch.is_grad_enabled() else REFERENCE
                prefix = "" if self.phase == FORWARD else "reference's "
            self.ledger.label = prefix + label
            if where is not None:
                self.ledger.enter(self.phase, where)

        return hook

    def _leaving(self, where: list[int | str], last: bool) -> Callable[..., None]:
        def backward(_: Tensor) -> None:
            if self.phase == BACKWARD and self.ledger is not None:
                self._at("gradients of activations", *where)

        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if self.ledger is None:
                return
            if self.phase == BACKWARD:
                self.ledger.label = "gradients of activations"
                return
            if last:
                self._at("head and loss", "head")
            states = output[0] if isinstance(output, tuple) else output
            if states.requires_grad:
                states.register_hook(backward)

        return hook


@contextmanager
def _as_on(device: Device) -> Iterator[None]:
    """Within it the head works in tiles of the device's size, and attention as it does there,
    though on a processor's tensors."""
    tables: list[dict[str, Any]] = [head._TILE, segment_attention._SLOW_BACKWARD]
    own = [table["cpu"] for table in tables]
    for table in tables:
        table["cpu"] = table.get(device, ())
    try:
        yield
    finally:
        for table, value in zip(tables, own, strict=True):
            table["cpu"] = value
