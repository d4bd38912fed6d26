"""What of a fit's settings a plan follows from."""

import math
from dataclasses import dataclass

from jsonargparse import Namespace

from rotopo.data.batch import Role
from rotopo.data.needs import Needs
from rotopo.errors import InputError
from rotopo.plan.load import Load
from rotopo.plan.memory import Strategy
from rotopo.training import PairwiseModule


@dataclass(frozen=True)
class Lengths:
    """What the command line says of the pairs; None is left to the settings."""

    pairs: int | None = None
    prompt: int | None = None
    response: int | None = None


def strategy_of(trainer: Namespace, ranks: int | None) -> Strategy:
    """How the ranks of a fit share the model.

    Args:
        trainer: the Trainer's settings.
        ranks: how many, instead of the settings'.

    Raises:
        InputError: the settings do not say how many ranks there are, or have a strategy or a
            precision that cannot be planned.
    """
    if trainer.precision not in (None, "32-true", 32, "32"):
        raise InputError(
            f"trainer.precision {trainer.precision!r} cannot be planned: leave it out, and set the "
            "model's dtype."
        )
    n = ranks if ranks is not None else _devices(trainer.devices) * (trainer.num_nodes or 1)
    if n < 1:
        raise InputError(f"--ranks is {n}: it has to be at least 1.")
    given = trainer.strategy
    name = given if isinstance(given, str) else given.get("class_path", "")
    arguments = {} if isinstance(given, str) else given.get("init_args") or {}
    kind = name.rpartition(".")[2]
    if kind == "auto":
        return Strategy("ddp" if n > 1 else "single", n)
    if kind == "FSDP2Strategy":
        if arguments.get("cpu_offload"):
            raise InputError(
                "trainer.strategy.cpu_offload cannot be planned: what lies in the processor's "
                "memory is not told apart here. Plan without it, which takes more."
            )
        return Strategy("fsdp2", n)
    if kind.startswith("ddp") or kind == "DDPStrategy":
        extra = {} if isinstance(given, str) else given.get("dict_kwargs") or {}
        views = {**dict(arguments), **dict(extra)}.get("gradient_as_bucket_view")
        return Strategy("ddp", n, bool(views))
    if kind == "SingleDeviceStrategy":
        return Strategy("single", 1)
    raise InputError(
        f"trainer.strategy {name} cannot be planned: DDP and rotopo.strategies.FSDP2Strategy can "
        "(configs/strategies/ddp.yaml, fsdp2.yaml)."
    )


def _devices(devices: int | str | list[int]) -> int:
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text.isdigit():
        return int(text)
    if "," in text and text.strip(",").replace(",", "").replace(" ", "").isdigit():
        return len([part for part in text.split(",") if part.strip()])
    raise InputError(
        f"trainer.devices is {devices}, which depends on the machine: say how many GPUs by --ranks."
    )


def reference_cached(module: PairwiseModule, trainer: Namespace) -> bool:
    """Whether a fit computes the reference's log-probs before its first step.

    ``auto`` is what a run without limits makes of it.
    """
    settings = getattr(module, "policy_config", None)
    if settings is None or not module.needs.reference or settings.reference == "online":
        return False
    if settings.reference == "cached":
        if Role.REFERENCE_SAMPLE in module.needs.roles:
            raise InputError(
                f"policy.reference is 'cached', but {type(module).__name__} needs the reference's "
                "whole distributions: set it to 'online'."
            )
        return True
    limited = trainer.max_steps != -1 or trainer.limit_train_batches not in (None, 1.0)
    return not limited and Role.REFERENCE_SAMPLE not in module.needs.roles


def refuse_rounds(trainer: Namespace) -> None:
    """Refuse a fit that generates responses between its epochs.

    Raises:
        InputError: it does.
    """
    callbacks = trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = callback.get("class_path", "").rpartition(".")[2]
        if name == "Alternation" and (callback.get("init_args") or {}).get("resampling"):
            raise InputError(
                "trainer.callbacks: Alternation's resampling generates responses, whose memory "
                "cannot be planned; plan its training by --trainer.callbacks=null."
            )


def load_of(
    data: Namespace, needs: Needs, lengths: Lengths, accumulation: int, ranks: int
) -> tuple[Load, str]:
    """The largest micro-batch that a fit's settings allow, and in words where it comes from.

    Args:
        data: settings of the datamodule.
        needs: the objective's.
        lengths: what is given instead.
        accumulation: micro-batches of a step and rank.
        ranks: how many.

    Raises:
        InputError: lengths beyond the settings' limits, or a step of too few pairs.
    """
    longest, budget, step = data.max_length, data.token_budget, data.pairs_per_step
    if lengths.pairs is None and step < accumulation * ranks:
        raise InputError(
            f"data.pairs_per_step is {step}: too few to give each of {accumulation} "
            f"(trainer.accumulate_grad_batches) × {ranks} (ranks) micro-batches a pair."
        )
    pairs = lengths.pairs
    if pairs is None:
        pairs = math.ceil(step / (accumulation * ranks))
    prompt, response = lengths.prompt, lengths.response
    given = prompt is not None and response is not None
    if prompt is None:
        prompt = 1 if response is None else longest - response
    if response is None:
        response = longest - prompt
    if prompt < 1 or response < 1 or prompt + response > longest:
        raise InputError(
            f"--prompt-tokens and --response-tokens: {prompt} and {response} tokens are not within "
            f"data.max_length ({longest}); raise it, or lower them."
        )
    load = Load(1, prompt, response, data.layout)
    said = "as given" if given else f"the longest that data.max_length {longest} allows"
    if budget is not None and lengths.pairs is None:
        if given and load.tokens(needs) > budget:
            raise InputError(
                f"data.token_budget is {budget}, but one pair takes {load.tokens(needs)} tokens."
            )
        while load.tokens(needs) > budget and load.response > 1:
            shorter = load.response - max(1, (load.tokens(needs) - budget) // 8)
            load = Load(1, prompt, max(1, shorter), data.layout)
        pairs = min(pairs, max(1, budget // load.tokens(needs)))
        said += f", within data.token_budget {budget}"
    return load.of(pairs), said
