"""Fills the cache of reference log-probs before the first step."""

from collections.abc import Container, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rotopo.data.batch import Role
from rotopo.data.module import PairwiseDataModule
from rotopo.data.rows import Rows
from rotopo.errors import InputError
from rotopo.progress import Progress
from rotopo.run.lightning import data_if_any, data_of, is_hidden
from rotopo.run.steps import works_in_steps_only


class CacheReference(Callback):
    """Does what ``policy.reference`` asks for: ``cached``, ``auto`` or ``online``. A test compares
    policy and reference side by side, and has no use for a cache.

    Raises:
        InputError: the reference cannot be cached, or the ranks do not share the cache's folder.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        limits = [trainer.limit_train_batches, trainer.limit_val_batches]
        self._fill(trainer, pl_module, ("train", "validation"), limits)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._fill(trainer, pl_module, ("validation",), [trainer.limit_val_batches])

    def _fill(self, trainer: Trainer, module: Any, splits: tuple[str, ...], limits: list) -> None:
        mode, data = module.policy_config.reference, data_if_any(trainer)
        if mode == "online" or not module.needs.reference or data is None:
            return
        reason = _why_not(trainer, module)
        if mode == "auto" and (reason or not _sees_all_pairs(trainer, data, limits)):
            return
        if reason:
            raise InputError(f"policy.reference is 'cached', but {reason}: set it to 'online'.")
        precision = "" if trainer.precision == "32-true" else str(trainer.precision)
        cache = module.policy.open_cache(module.policy_config.reference_cache, precision)
        for split in splits:
            # One rank decides for all, since another run may be writing to the folder meanwhile.
            unknown: Any = _unknown(data, split, cache) if trainer.is_global_zero else None
            unknown = trainer.strategy.broadcast(unknown)
            if unknown:  # a split that there is not has none
                cache_rows(trainer, data.rows(split), unknown, f"Reference of {split}")
            else:
                cache.refresh()  # with what other processes have written meanwhile
            if trainer.world_size > 1 and _unknown(data, split, cache):
                raise InputError(
                    f"{cache.folder} does not hold what other ranks have computed: let "
                    "policy.reference_cache or $ROTOPO_CACHE name a folder that all nodes share."
                )
        module.policy.let_go_of_reference()


def cache_rows(trainer: Trainer, rows: Rows, places: Sequence[int], description: str) -> None:
    """Add the reference's log-probs of some rows to the cache, if the run has one.

    Args:
        trainer: while it runs.
        rows: the rows.
        places: which of them, one at least.
        description: of the loop, as it is shown.
    """
    module: Any = trainer.lightning_module
    data = data_of(trainer)
    if module.policy.cache is None:
        return
    bar = Progress(data.batches(rows, places), description, hidden=is_hidden(trainer))
    with trainer.precision_plugin.forward_context():
        module.policy.cache_reference(bar)
    trainer.strategy.barrier()
    module.policy.cache.refresh()


def _unknown(data: PairwiseDataModule, split: str, cache: Container[bytes]) -> list[int]:
    """Places of a split's rows that the cache does not hold; none of a split that there is not."""
    return data.rows(split).unknown(cache) if data.has(split) else []


def _why_not(trainer: Trainer, module: Any) -> str:
    """Why the reference cannot be cached; empty where it can."""
    if Role.REFERENCE_SAMPLE in module.needs.roles:
        return f"{type(module).__name__} needs the reference's whole distributions"
    if works_in_steps_only(trainer):
        return "FSDPStrategy cannot fill the cache (configs/strategies/fsdp2.yaml can)"
    return ""


def _sees_all_pairs(trainer: Trainer, data: PairwiseDataModule, limits: list[Any]) -> bool:
    """Whether no limit of the Trainer's keeps it from going over the data at least once."""
    # A share of 1.0 is all batches; the integer 1 is one of them, and no batch at all costs none.
    if not all(limit is None or limit == 0 or repr(limit) == "1.0" for limit in limits):
        return False
    pairs = len(data.pairs.training())
    return trainer.max_steps == -1 or trainer.max_steps * data.batching.pairs_per_step >= pairs
