"""What a user sets of a model; quick to import, since ``rotopo --help`` does it."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rotopo.errors import InputError

if TYPE_CHECKING:
    # jsonargparse runs this block when it resolves a BackboneConfig, which is when adapters have
    # to be known by their short names: ours is, like PEFT's, once imported.
    from peft import PeftConfig

    import rotopo.rotation  # noqa: F401

DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]
ComputeDtype = Literal["bfloat16"]
Quantization = Literal["4bit", "8bit"]
ReferenceMode = Literal["online", "cached", "auto"]


@dataclass(frozen=True)
class BackboneConfig:
    """The model that is trained, and what is trained of it.

    Args:
        path: a model's name on the Hub, a folder, a GGUF file, or ``package:PACKAGE/FILE`` for
            one of these inside an installed Python package; or the folder of an adapter that PEFT
            or ``rotopo export`` wrote, or of a run of ``rotopo fit`` that trained one. Without
            ``adapter`` that adapter goes on training, and the reference is what it was at the
            start; with one it is merged into its base first, and the new one is put on top.
        adapter: any PEFT adapter by class path, e.g. ``rotopo.rotation.RotationConfig`` or
            ``peft.LoraConfig``; None trains every weight of the model. Where an adapter takes
            ``modules_to_save`` or ``trainable_token_indices`` (for tokens that were added to the
            tokenizer and an embedding that was enlarged), those train beside its layers.
        dtype: dtype of the base model's weights; ``auto`` is bfloat16 where the processor is
            fast in it and an adapter trains, else float32. Adapters are float32 at least. Keep
            ``trainer.precision`` at its default: it would cast the adapter too.
        compute_dtype: for full fine-tuning: compute in bfloat16 with copies of the weights, which
            stay in float32 themselves, as do their gradients where these are added up, the
            optimiser's state and checkpoints. A frozen reference is held in bfloat16. None
            computes in ``dtype``.
        attention: ``segments`` computes only the scores that a shared-prompt batch needs, see
            :mod:`rotopo.models.segment_attention`; ``flex_attention`` does so in one compiled
            kernel on a GPU; or another implementation as transformers names it, of which ``sdpa``
            and ``eager`` take every batch layout, others only ``padded``.
        activation_checkpointing: compute each decoder layer's activations again in the backward
            pass rather than keep them.
        compile: compile each decoder layer with ``torch.compile``, for which a C++ compiler has to
            be there. The first steps then take a minute or more (torch keeps the result on disk
            for later runs) and the others less; losses move by rounding. ``auto`` does so in a fit
            whose settings make it long enough to win that time back, see
            :mod:`rotopo.models.compilation`, and a resumed fit does what it did before; all else
            runs uncompiled.
        quantize: keep the frozen base in 4 bits a weight (NF4, doubly quantised) or 8, by
            bitsandbytes, which has to be installed, under an adapter that can work on it:
            the rotation, LoRA and others, see :mod:`rotopo.models.quantized`. What is computed in
            is ``dtype``. 8 bits are LLM.int8: on a GPU it rounds activations too, and which of
            them depends on what else is in the batch, so that results vary with micro-batches;
            and it is not for FSDP.
        router_loss: the coefficient of a mixture of experts' router loss, which keeps its experts
            evenly used and is added to the training loss; None takes the model's own
            (``router_aux_loss_coef``), 0 trains without. Unlike all else of a loss it depends on
            how a step is cut into micro-batches and ranks, over which it is averaged, see
            :mod:`rotopo.models.router`.
        trust_remote_code: run the Python code that the model's folder brings along. Only for a
            model whose code you have read, or whose author you trust.
        base_path: the base model of an adapter at ``path``, where its folder does not name it, or
            it has moved since.
    """

    setting: ClassVar[str] = "backbone"  # what messages call it

    path: str = ""
    adapter: "PeftConfig | None" = None
    dtype: DtypeName = "auto"
    compute_dtype: ComputeDtype | None = None
    attention: str = "segments"
    activation_checkpointing: bool = False
    compile: bool | Literal["auto"] = "auto"
    quantize: Quantization | None = None
    router_loss: float | None = None
    trust_remote_code: bool = False
    base_path: str | None = None


@dataclass(frozen=True)
class PolicyConfig(BackboneConfig):
    """The language model that is trained, what is trained of it, and its reference.

    Args:
        reference: ``online`` computes the reference's log-probs in every step; ``cached`` computes
            them before the first one, for every pair that is not in the cache yet, and keeps them
            on disk for all runs; ``auto`` is ``cached`` unless the Trainer's limits keep the run
            from seeing all pairs, or the objective needs more than log-probs. In half types a
            cached value differs from one computed beside the policy's by rounding, since it comes
            from a batch of other pairs; so margins before training are near 0, not at 0.
        reference_cache: folder of the cache; None is one for each model in $ROTOPO_CACHE or
            ~/.cache/rotopo.
        reference_path: another model, or adapter, as the reference, with the same tokens; as
            ``path``. With a cached reference it is in memory only while the cache is filled, and in
            tests; of an objective without a reference only in these. None
            is the policy as it is before the first step.
    """

    setting: ClassVar[str] = "policy"

    reference: ReferenceMode = "online"
    reference_cache: str | None = None
    reference_path: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How responses are generated.

    Args:
        max_new_tokens: tokens of a response at most.
        temperature: softmax temperature; 0 takes the likeliest token.
        top_p: keep the smallest set of tokens whose probability reaches this.
        seed: seed of what ``predict`` draws at a temperature above 0.

    Raises:
        InputError: a setting out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(
                f"sampling.max_new_tokens is {self.max_new_tokens}: it has to be at least 1."
            )
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"sampling.temperature is {self.temperature}: it has to be 0, for the likeliest "
                "token, or above."
            )
        if not 0 <= self.top_p <= 1:
            raise InputError(f"sampling.top_p is {self.top_p}: it lies from 0 to 1.")
