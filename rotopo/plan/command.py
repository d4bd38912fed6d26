"""``rotopo plan``: from the command line to a plan."""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rotopo.callbacks.arithmetic import Decoder, is_known
from rotopo.callbacks.speed import count
from rotopo.data.needs import Needs
from rotopo.described.rephrase import InPlainWords
from rotopo.errors import InputError
from rotopo.files import to_json, write_whole
from rotopo.models.beside import embeddings
from rotopo.plan.cards import CARDS, Card
from rotopo.plan.fakes import model_config, without_values
from rotopo.plan.load import Load
from rotopo.plan.memory import StepMemory, Strategy, planner
from rotopo.plan.result import Plan, Row
from rotopo.plan.search import most_pairs
from rotopo.plan.settings import Lengths, load_of, reference_cached, refuse_rounds, strategy_of
from rotopo.plan.text import render
from rotopo.progress import Progress
from rotopo.training import PairwiseModule

GIB = 2**30


def plan(args: list[str]) -> None:
    """Print a plan, and write it as JSON where asked to.

    Args:
        args: the command line behind ``rotopo plan``.

    Raises:
        InputError: settings that do not work, or that cannot be planned; names which and why.
        SystemExit: after --help, or options that are none.
    """
    options, rest = own_options().parse_known_args(args)
    if not rest:
        raise InputError("rotopo plan: no settings: give --config FILE, as for rotopo fit.")
    if options.json is not None and not options.json.parent.is_dir():
        raise InputError(f"--json: there is no folder {str(options.json.parent)!r}.")
    found = make(rest, options)
    print(render(found))
    if options.json is not None:
        write_whole(options.json, to_json(asdict(found)))


def _take_base(module: Any) -> None:
    """Let the settings of an adapter's folder be those of its base, with the adapter on it."""
    from rotopo.models.saved_adapter import source_of
    from rotopo.run.as_adapter import from_runs

    config = source_of(from_runs(module.model_config)).config
    name = "policy_config" if hasattr(module, "policy_config") else "backbone_config"
    setattr(module, name, config)


def make(args: list[str], options: argparse.Namespace) -> Plan:
    """The plan of a fit's options, see :func:`plan`."""
    from rotopo.load import described

    card = _card(options)
    module, _, settings = described(args)
    trainer, data = settings.trainer, settings.data.init_args
    refuse_rounds(trainer)
    strategy = strategy_of(trainer, options.ranks)
    needs: Needs = module.needs
    accumulation = trainer.accumulate_grad_batches
    lengths = Lengths(options.pairs, options.prompt_tokens, options.response_tokens)
    load, load_from = load_of(data, needs, lengths, accumulation, strategy.ranks)
    if data.token_budget is not None and accumulation == 1:
        # As a fit finds it, if all pairs are of these lengths.
        accumulation = math.ceil(data.pairs_per_step / (load.pairs * strategy.ranks))
    cached = reference_cached(module, trainer)
    if options.model_config is None and Path(module.model_config.path).expanduser().is_dir():
        _take_base(module)
    config = model_config(module.model_config, options.model_config)
    own = module.model_config.activation_checkpointing
    limit = None if card is None else int((card.gib - options.allowance_gib) * GIB)
    end = max(load.pairs, math.ceil(data.pairs_per_step / strategy.ranks))

    others = [Strategy(kind, strategy.ranks) for kind in ("ddp", "fsdp2")]
    ways = [strategy, *(o for o in others if o.kind != strategy.kind and strategy.ranks > 1)]
    rows = []
    for way, again in Progress([(w, c) for w in ways for c in (own, not own)], "Planning"):
        with planner(
            module,
            config,
            way,
            checkpointing=again,
            cached=cached,
            accumulated=accumulation > 1,
            device="cuda",
        ) as memory:
            row = Row(way, again, memory(load))
            if limit is not None:
                rows.append(_with_most_pairs(row, memory, load, limit, end, needs))
            else:
                rows.append(row)

    whole = without_values(module, config, "cuda", own)
    weights = list(whole.language_model.parameters())
    flops = _flops(whole, load, data.pairs_per_step, cached)
    peak = None if card is None else card.flops(_computed_in(whole))
    seconds = None
    if flops is not None and peak is not None:
        seconds = flops / (strategy.ranks * peak * options.mfu)
    return Plan(
        model=_words(whole),
        weights=(
            sum(p.numel() for p in weights),
            sum(p.numel() for p in weights if p.requires_grad),
        ),
        load=load,
        load_from=load_from,
        tokens=load.tokens(needs),
        pairs_per_step=data.pairs_per_step,
        accumulation=accumulation,
        cached=cached,
        rows=rows,
        card=card,
        allowance=options.allowance_gib,
        flops=flops,
        mfu=options.mfu,
        seconds=seconds,
    )


def _with_most_pairs(
    row: Row,
    memory: Callable[[Load], StepMemory],
    load: Load,
    limit: int,
    end: int,
    needs: Needs,
) -> Row:
    """With the most pairs of a micro-batch within a limit in bytes, and no more than ``end``."""
    of, fixed = row.memory, sum(row.memory.held.values())
    pairs = most_pairs(lambda n: memory(load.of(n)).peak, limit, load.pairs, of.peak, fixed, end)
    return replace(row, pairs=pairs, token_budget=load.of(pairs).tokens(needs) if pairs else 0)


def _card(options: argparse.Namespace) -> Card | None:
    if not options.allowance_gib >= 0:
        raise InputError(f"--allowance-gib is {options.allowance_gib}: it has to be at least 0.")
    if not 0 < options.mfu <= 1:
        raise InputError(f"--mfu is {options.mfu}: it is a share, above 0 and up to 1.")
    if options.card is not None:
        return Card.of(options.card)
    if options.memory_gib is None:
        return None
    return Card.of(f"{options.memory_gib:g}GiB")


def _words(module: PairwiseModule) -> str:
    settings = module.model_config
    adapter = "every weight" if settings.adapter is None else type(settings.adapter).__name__
    model = module.language_model
    dtype = str(embeddings(model).dtype).removeprefix("torch.")
    words = f"{type(module).__name__}, {adapter}, {type(model).__name__} in {dtype}"
    if settings.compute_dtype is not None:
        words += f", computed in {settings.compute_dtype}"
    return words


def _computed_in(module: PairwiseModule) -> torch.dtype:
    """The dtype of the products."""
    name = module.model_config.compute_dtype
    return module.language_model.dtype if name is None else getattr(torch, name)


def _flops(module: PairwiseModule, load: Load, pairs_per_step: int, cached: bool) -> float | None:
    """Floating-point operations of an optimiser step, as ``speed/mfu`` counts them; None where not
    all that the model computes is counted."""
    model = module.language_model
    if not is_known(model):
        return None
    decoder = Decoder.of(model)
    batch = load.batch(module.needs, len(embeddings(model)))
    tokens, _, _, targets, *scores = count(batch, decoder.windows).tolist()
    online = module.needs.reference and not cached
    return decoder.flops(tokens, targets, scores, online) * pairs_per_step / load.pairs


class _Parser(InPlainWords, argparse.ArgumentParser):
    pass


def own_options() -> argparse.ArgumentParser:
    """The parser of what is no option of a fit."""
    parser = _Parser(
        "rotopo plan",
        description="What a fit takes of a GPU, before one is booked.",
    )
    card = parser.add_mutually_exclusive_group()
    names = ", ".join(CARDS)
    card.add_argument("--card", metavar="NAME", help=f"{names}; or a size, as 80GB")
    card.add_argument("--memory-gib", type=float, metavar="GIB", help="a card by its memory")
    parser.add_argument(
        "--allowance-gib",
        type=float,
        default=2.0,
        metavar="GIB",
        help="what is left for CUDA's context, nccl and fragmentation, which is not planned "
        "(default: 2, not measured)",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="GPUs (default: trainer.devices × num_nodes)"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        metavar="N",
        help="pairs of a micro-batch (default: a step's, divided by accumulation and ranks)",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="of each pair (default: 1, the worst)"
    )
    parser.add_argument(
        "--response-tokens",
        type=int,
        metavar="N",
        help="of each response (default: what data.max_length leaves)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the card's peak that a step reaches, which is assumed (default: 0.4)",
    )
    parser.add_argument(
        "--model-config",
        type=Path,
        metavar="FILE",
        help="a config.json to read instead of the model's, where the Hub is out of reach",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there too")
    return parser
