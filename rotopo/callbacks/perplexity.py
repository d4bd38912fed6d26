"""Held-out perplexity when a policy is tested."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rotopo.callbacks.measured import Measured
from rotopo.errors import InputError
from rotopo.files import to_json, write_whole
from rotopo.metrics.perplexity import perplexity
from rotopo.run.folder import folder_of
from rotopo.run.lightning import data_of


class Perplexity(Callback):
    """Perplexity of a text file under the policy and its reference: has it unlearned something?

    On ``rotopo test`` it logs ``test/perplexity`` and ``test/reference_perplexity`` and writes
    ``perplexity.json`` into the run's folder, see
    :func:`rotopo.metrics.perplexity.perplexity`.

    Args:
        file: the text, UTF-8.
        window: tokens of a window.
        windows_per_batch: windows computed at once.
    """

    def __init__(self, file: Path, window: int = 512, windows_per_batch: int = 8) -> None:
        self.file = file
        self.window = window
        self.windows_per_batch = windows_per_batch

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no perplexity before anything is computed.

        Raises:
            InputError: the module has no policy, or the file is not there.
        """
        if getattr(pl_module, "policy", None) is None:
            raise InputError(
                f"The Perplexity callback is for policies, and {type(pl_module).__name__} has "
                "none: leave it out of trainer.callbacks."
            )
        if not self.file.is_file():
            raise InputError(f"Perplexity: there is no file {self.file}.")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_of(trainer)
        module: Any = pl_module
        tokenizer = data.encoder.tokenizer

        def measure() -> dict[str, Any]:
            with trainer.precision_plugin.forward_context():
                return perplexity(
                    module.policy, tokenizer, self.file, self.window, self.windows_per_batch
                )

        found = Measured()(trainer, "test/perplexity", measure)
        if found is None:
            return
        for name in ("perplexity", "reference_perplexity"):
            if name in found:
                pl_module.log(f"test/{name}", found[name])
        folder = folder_of(trainer)  # asked on every rank
        if trainer.is_global_zero:
            write_whole(folder / "perplexity.json", to_json(found))
