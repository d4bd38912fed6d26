"""Decides for a fit whether ``compile: auto`` compiles its model."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rotopo.data.sampler import StepSampler
from rotopo.run.steps import works_in_steps_only


class CompileLayers(Callback):
    """Does what ``policy.compile`` (of a reward model, ``backbone.compile``) says where that is
    ``auto``: compiles the decoder layers in a fit that is long enough, and says which.

    A compiled layer rounds otherwise than one that is not. So the decision follows from settings
    alone, stays in the run's checkpoints, and is followed by whatever goes on from these.
    """

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        # Now, since callbacks may compute before the first step.
        compiled = checkpoint.get("compiled", False)  # which older ones, never compiled so, lack
        if pl_module.model_config.compile == "auto" and compiled:
            self._compile(pl_module, "as the run that it goes on from")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["compiled"] = pl_module.backbone.compiled

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        config = pl_module.model_config
        if config.compile != "auto" or trainer.ckpt_path is not None:
            return
        reason = _why_not(trainer, pl_module)
        if reason:
            rank_zero_info(
                f"compile: off, {reason}; set {config.setting}.compile to true to force it."
            )
        else:
            self._compile(pl_module, "which takes a minute or more in the first steps")

    def _compile(self, module: Any, comment: str) -> None:
        setting = module.model_config.setting
        rank_zero_info(f"compile: on, {comment}; set {setting}.compile to false to leave it.")
        module.backbone.compile_layers(setting)


def _why_not(trainer: Trainer, module: Any) -> str:
    from rotopo.models.compilation import why_not  # slow to import

    if works_in_steps_only(trainer):
        return "it has not been tried with FSDPStrategy"
    sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
    if not isinstance(sampler, StepSampler):
        return "the data do not say how many tokens a step has"
    tokens = sampler.tokens_per_step / trainer.world_size
    steps = trainer.estimated_stepping_batches
    return why_not(module.model_config, module.language_model, steps, tokens)
