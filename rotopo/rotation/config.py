"""The settings of a rotation, and the name under which PEFT saves them."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftConfig

from rotopo.errors import InputError


class _PeftType(StrEnum):
    """Stands beside PEFT's own enumeration, which is closed; transformers reads its value."""

    ROTATION = "ROTATION"


PEFT_TYPE: Any = _PeftType.ROTATION

LOADING = """## Loading

The adapter is a weight rotation of rotopo. PEFT and transformers load it after
`import rotopo.rotation`; before, they end in `KeyError: 'ROTATION'`."""

Givens = Literal["bidirectional", "forward", "none"]
Layout = Literal["tree", "chain"]


@dataclass
class RotationConfig(PeftConfig):
    """RoPO: rotate the inputs of frozen linear layers and rescale their outputs.

    The defaults fit the share of parameters that RoPO publishes for Llama-3-8B, 0.015 %: q and v,
    2(D − 1) Givens angles, 2 D-vectors and one magnitude per output, 1,212,288 in all. The count
    does not decide the form. q and v, or q and k, k and o, v and o have the same; so has one vector
    with a magnitude per input beside those per output; and a second Givens factor in the place of
    the vectors (``givens_factors: 2``, ``n_householder: 0``) has 1,212,160, 0.01509 %, which fits
    the paper's "multi-granularity" as well. So q and v are LoRA's custom [ours], and Householder
    against a second factor is undecided [ours]: try both.

    Angles start at zero and Adam moves them by about one learning rate a step: start from 1e-3 …
    2e-2, not from DPO's 5e-7, and without weight decay [ours].

    Args:
        target_modules: Names (or name endings) of the linear layers to rotate, or one regular
            expression for their full names, or "all-linear", or null for those that PEFT gives
            LoRA in a model of this architecture.
        n_householder: Householder vectors per layer, an even number; 0 leaves the reflections out.
        givens: The Givens rotations: "bidirectional" has a forward and a reverse sweep with their
            own angles, "forward" only the first, "none" leaves them out.
        givens_factors: Givens rotations one after the other, 1 or 2, each with its own angles. The
            second one's pairs are one coordinate further along, within blocks of some √D: on the
            pairs of the first it would have no plane of its own at the start, and its first stage
            would only add to the last one of the first [ours].
        layout: Which pairs the Givens sweeps rotate: "tree", fast, or "chain" (neighbours one
            after the other), an ablation that builds a D × D matrix.
        magnitude: Whether to train a magnitude per output neuron.
        exclude_modules: Names (or name endings) of layers not to rotate although target_modules
            matches them, or one regular expression for their full names.
        layers_to_transform: Numbers of the decoder layers to rotate in, counted from 0; all if
            null. With a list of target_modules only.
        layers_pattern: Name of the list of decoder layers that layers_to_transform counts, "h" or
            "layers"; any list if null.
        modules_to_save: Modules to train whole and save beside the rotation, e.g. a new
            classification head; PEFT's task types that have one add it themselves.
        init_weights: False starts from a random rotation in place of the identity; for tests.
        task_type: PEFT's task type; not needed for causal language models here.
        peft_type: Set by the class; leave empty.
        auto_mapping: Set by PEFT when saving; leave empty.
        peft_version: Set by PEFT when saving; leave empty.
        base_model_name_or_path: Set by PEFT when saving; leave empty.
        revision: Revision of the base model on the hub.
        inference_mode: Freeze the adapter too.

    Raises:
        InputError: a setting has an unknown value, or nothing is left to train.
    """

    target_modules: list[str] | str | None = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Linear layers to rotate: names, a regular expression, or all-linear."},
    )
    n_householder: int = field(
        default=2, metadata={"help": "Householder vectors per layer, even; 0 for none."}
    )
    givens: Givens = field(
        default="bidirectional", metadata={"help": "bidirectional, forward or none."}
    )
    givens_factors: int = field(
        default=1, metadata={"help": "Givens rotations in a row, 1 or 2 (an ablation)."}
    )
    layout: Layout = field(default="tree", metadata={"help": "tree (fast) or chain (ablation)."})
    magnitude: bool = field(default=True, metadata={"help": "Train a magnitude per output neuron."})
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers not to rotate: names, or a regular expression."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the decoder layers to rotate in."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that layers_to_transform counts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole and save beside the rotation."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the identity; false, for tests, at random."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.target_modules is not None and not self.target_modules:
            raise InputError("target_modules is empty: name the layers to rotate, e.g. [q_proj].")
        for name in ("layers_to_transform", "layers_pattern"):  # said in PEFT's words
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise InputError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
            )
        if self.n_householder < 0 or self.n_householder % 2:
            raise InputError(
                f"n_householder must be even and not negative, got {self.n_householder}: vectors "
                "start as equal pairs, whose reflections cancel."
            )
        if self.givens not in get_args(Givens):
            raise InputError(f"givens must be one of {get_args(Givens)}, got {self.givens!r}.")
        if self.givens_factors not in (1, 2):
            raise InputError(f"givens_factors must be 1 or 2, got {self.givens_factors}.")
        if self.givens_factors == 2 and self.givens == "none":
            raise InputError(
                "givens_factors is 2 and givens none: say which sweeps the factors have."
            )
        if self.layout not in get_args(Layout):
            raise InputError(f"layout must be one of {get_args(Layout)}, got {self.layout!r}.")
        if self.givens == "none" and not self.n_householder and not self.magnitude:
            raise InputError(
                "Nothing to train: givens is none, n_householder 0 and magnitude false; "
                "turn one of them on."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json; a model card beside it says what to import before loading,
        as PEFT's error for a type that it does not know is a bare ``KeyError: 'ROTATION'``."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if card.is_file() and LOADING not in (text := card.read_text("utf-8")):
            card.write_text(f"{text.rstrip()}\n\n{LOADING}\n", "utf-8")
