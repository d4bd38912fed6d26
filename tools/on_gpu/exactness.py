"""Log-probs and their gradients on the device, against float64 on the processor.

What is expected is computed in float64 from the same (rounded) weights, in the padded layout with
the family's eager attention: the plainest way through the model. How far rounding alone may go is
what the processor's own result in the same dtype, computed in that plainest way too, is away from
it. A cell fails beyond _ALLOWED times that. TF32 is off.
"""

import functools
import random
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from rotopo.data.batch import Layout, Role, TokenizedRow, collate
from rotopo.data.needs import Needs
from rotopo.models.policy import Policy, PolicyConfig
from rotopo.rotation import RotationConfig
from tests.models.families import VOCABULARY, make
from tools.on_gpu.journal import Case, Ended, NotHereError, WrongResultError
from tools.on_gpu.part import Place

FAMILIES = ("llama", "qwen2", "mistral-window", "gemma2", "gemma3_text", "gpt2")
LAYOUTS: tuple[Layout, ...] = ("packed", "shared_prompt", "padded")
ADAPTERS = ("LoRA", "rotation")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# On a processor all cells are 0.5 to 1.6 times as far from float64 as the plain way.
_ALLOWED = 5
# Heads of at least 16 numbers, since FlexAttention's kernels take no smaller ones, and positions
# for a prompt that is cut into several blocks.
_WIDE = {"hidden_size": 64, "max_position_embeddings": 2048}
_SETTINGS: dict[str, dict[str, Any]] = dict.fromkeys(FAMILIES, _WIDE) | {
    "gemma2": _WIDE | {"head_dim": 16},
    "gemma3_text": _WIDE | {"head_dim": 16},
    "gpt2": {"n_embd": 64, "n_positions": 2048},
}
Cell = tuple[str, str, Layout, str, str, bool]  # family, adapter, layout, attention, dtype, long


def cells(tiny: bool) -> list[Cell]:
    """In the order of their value; FlexAttention behind the others, since it compiles each."""
    if tiny:
        few: list[Cell] = [
            (family, adapter, "packed", attention, dtype, False)
            for family, attention in (("llama", "segments"), ("gemma2", "eager"))
            for adapter in ADAPTERS
            for dtype in DTYPES
        ]
        return [*few, ("llama", "LoRA", "packed", "flex_attention", "float32", False)]
    found: list[Cell] = []
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for family in FAMILIES:
                # transformers has no sdpa for Gemma 2, whose scores are capped, nor have we.
                attentions = ("eager",) if family == "gemma2" else ("segments", "sdpa")
                found += [
                    (family, a, layout, k, dtype, False) for a in ADAPTERS for k in attentions
                ]
        found += [(f, "LoRA", "packed", "segments", dtype, True) for f in ("llama", "gemma3_text")]
    flex = "flex_attention"
    # transformers has no FlexAttention for GPT-2.
    found += [(family, "LoRA", "packed", flex, "float32", False) for family in FAMILIES[:-1]]
    found += [(f, "LoRA", "packed", flex, "bfloat16", False) for f in ("llama", "gemma3_text")]
    found += [("gemma3_text", "LoRA", k, flex, "float32", False) for k in LAYOUTS[1:]]
    return [*found, ("llama", "rotation", "packed", flex, "float32", False)]


def cases(place: Place) -> dict[str, Case]:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return {
        " ".join([*cell[:5], *(["long"] if cell[5] else [])]): functools.partial(
            compare, cell, place
        )
        for cell in cells(place.tiny)
    }


def line(ended: list[Ended]) -> str:
    texts = []
    for dtype in DTYPES:
        worst = [
            (max(case.values["log_probs"], case.values["gradient"]), case.name)
            for case in ended
            if dtype in case.name and "gradient" in case.values
        ]
        if worst:
            error, name = max(worst)
            texts.append(f"{len(worst)} {dtype}, worst {error:.1e} ({name.split()[0]})")
    return ", ".join(texts)


def compare(cell: Cell, place: Place) -> dict[str, Any]:
    family, adapter, _, attention, dtype, long = cell
    if attention == "flex_attention" and not place.on_gpu:
        raise NotHereError("FlexAttention trains on a GPU only")
    expected = _expected(family, adapter, dtype, long)
    found = _errors(compute(cell, place.device), expected)
    rounding = _rounding(family, adapter, dtype, long)
    values = found | {f"{name}_rounding": error for name, error in rounding.items()}
    for name, error in found.items():
        if not error <= _ALLOWED * rounding[name]:
            raise WrongResultError(
                f"{name} are off by {error:.1e}, rounding is {rounding[name]:.1e}", values
            )
    return values


@functools.cache
def _expected(family: str, adapter: str, dtype: str, long: bool) -> dict[str, Tensor]:
    plain: Cell = (family, adapter, "padded", "eager", dtype, long)
    return compute(plain, "cpu", torch.float64)


@functools.cache
def _rounding(family: str, adapter: str, dtype: str, long: bool) -> dict[str, float]:
    plain: Cell = (family, adapter, "padded", "eager", dtype, long)
    return _errors(compute(plain, "cpu"), _expected(family, adapter, dtype, long))


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Euclidean distances, as shares of what is expected."""
    return {
        name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()
    }


def compute(cell: Cell, device: str, inside: torch.dtype | None = None) -> dict[str, Tensor]:
    """What the policy says of the pairs.

    Args:
        cell: which model, batch and dtype of the weights.
        device: where.
        inside: what to compute in, where it is wider than the weights' dtype.

    Returns:
        ``log_probs`` of each token under policy and reference and of each response, and the
        ``gradient`` of a fixed weighted sum of them, all in float64 on the processor.
    """
    family, adapter, layout, attention, dtype, long = cell
    model = make(family, DTYPES[dtype], **_SETTINGS[family])
    if inside is not None:
        rounded = model.state_dict()
        model = make(family, inside, **_SETTINGS[family])
        model.load_state_dict(rounded)
    model.set_attn_implementation(attention)
    policy = Policy.build(model, PolicyConfig(adapter=_adapter(adapter)), needs_reference=True)
    generator = torch.Generator().manual_seed(0)
    trained = [p for _, p in sorted(policy.named_parameters()) if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.to(device)
    batch = collate(_rows(long), 0, layout, 1.0).to(device)
    log_probs = policy(batch, Needs(reference=True))
    assert log_probs.tokens is not None
    assert log_probs.tokens.reference is not None
    tokens = log_probs.tokens.log_prob
    weights = torch.randn(len(tokens), generator=generator, dtype=torch.float64).to(tokens)
    total = (weights * tokens).sum() + (log_probs.chosen - 2 * log_probs.rejected).sum()
    gradients = torch.autograd.grad(total, trained)
    parts = [tokens, log_probs.tokens.reference, log_probs.chosen, log_probs.rejected]
    return {
        "log_probs": torch.cat([part.detach().double().cpu() for part in parts]),
        "gradient": torch.cat([g.detach().double().cpu().flatten() for g in gradients]),
    }


def _adapter(name: str) -> LoraConfig | RotationConfig:
    if name == "LoRA":
        return LoraConfig(r=4, target_modules="all-linear")
    return RotationConfig(target_modules="all-linear")


def _rows(long: bool) -> list[TokenizedRow]:
    """Pairs that fill more than a window, and more than a block of FlexAttention's; or a long one,
    of which a block of ours goes through a fused kernel."""
    draw = random.Random(0)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(least, most))]

    lengths = [(1030, 9)] if long else [(1, 30), (90, 20), (40, 40), (7, 1)]
    return [
        TokenizedRow(
            tokens(prompt, prompt + 9),
            [tokens(response, response + 9) for _ in range(2)],
            [Role.CHOSEN, Role.REJECTED],
            row,
        )
        for row, (prompt, response) in enumerate(lengths)
    ]
