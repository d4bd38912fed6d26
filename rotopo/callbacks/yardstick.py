"""How far a policy is from its reference, on one scale for all objectives, when it is tested."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from rotopo.callbacks.pair_metrics import PairMetricsCallback, Values
from rotopo.data.batch import Role
from rotopo.models.log_probs import given
from rotopo.models.outcome import StepOutput


class Yardstick(PairMetricsCallback):
    """Logs of every test of a policy what does not depend on how it was trained.

    Under ``test/yardstick/``, in nats: ``margin``, ``accuracy``, ``log_ratio/chosen`` and
    ``/rejected``, ``log_ratio_per_token/chosen`` and ``/rejected``, ``displaced``, and
    ``kl_per_token/on_data/forward`` and ``/reverse``: see
    :func:`rotopo.metrics.yardstick.yardstick`, with whose values :class:`.PairScores` fills
    ``test.json``. Of unpaired rows only the response that is there counts.

    The reference is the one that an objective with a reference would have. It takes a forward pass
    of its own, beside the policy's, also where ``policy.reference`` is ``cached``, since a cache
    keeps no distributions. Of a model whose every weight trains, a test from a checkpoint keeps the
    base as it was loaded beside the trained weights; a test in the process that has trained it, by
    an objective without a reference, has none, and says so.
    """

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not pl_module.compared:
            rank_zero_info(
                "test/yardstick: left out, since every weight has been trained and "
                f"{type(pl_module).__name__} keeps no reference: test the checkpoint in a new "
                "module (rotopo test --ckpt_path), which loads the base beside it."
            )

    def values(self, output: StepOutput) -> Values | None:
        pairs, log_probs = output["pairs"], output["pairs"].log_probs
        if log_probs is None or log_probs.reference_chosen is None:
            return None
        chosen, rejected = log_probs.chosen_log_ratio, log_probs.rejected_log_ratio
        tokens = given(log_probs.tokens, "tokens")
        lengths = log_probs.chosen_length, log_probs.rejected_length
        per_token = [
            ratio / n.clamp(min=1) for ratio, n in zip((chosen, rejected), lengths, strict=True)
        ]
        values: Values = {
            "margin": (chosen - rejected, pairs.is_pair),
            "accuracy": (chosen > rejected, pairs.is_pair),
            "log_ratio/chosen": (chosen, pairs.has_chosen),
            "log_ratio/rejected": (rejected, pairs.has_rejected),
            "log_ratio_per_token/chosen": (per_token[0], pairs.has_chosen),
            "log_ratio_per_token/rejected": (per_token[1], pairs.has_rejected),
            "displaced": (chosen < 0, pairs.has_chosen),
        }
        of_data = (tokens.role == Role.CHOSEN) | (tokens.role == Role.REJECTED)
        for direction in ("forward", "reverse"):
            kl = getattr(tokens, f"{direction}_kl")
            if kl is not None:
                values[f"kl_per_token/on_data/{direction}"] = kl, of_data
        return {f"yardstick/{name}": value for name, value in values.items()}

    def on_train_batch_end(self, *_: Any) -> None:
        """Nothing: it is for tests."""

    def on_validation_batch_end(self, *_: Any) -> None:
        """Nothing: it is for tests."""


def yardstick_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of a test's table, but that of the accuracy: titles and numbers.

    Args:
        found: of :func:`rotopo.metrics.yardstick.yardstick`.
    """
    low, high = found["margin_interval"]
    rows = [
        (
            "margin h = Δw − Δl, nats",
            f"{found['margin']:.4f}  (95 % interval {low:.4f} to {high:.4f})",
        )
    ]
    for name, sign in (("chosen", "Δw"), ("rejected", "Δl")):
        per_token = found["log_ratio_per_token"][name]
        text = f"{found['log_ratio'][name]:.4f}  ({per_token:.4f} per token)"
        rows.append((f"{name} log-ratio {sign}, nats", text))
    rows.append(("pairs whose chosen fell (Δw < 0)", f"{found['displaced']:.4f}"))
    kls = found["kl_per_token"]["on_data"]
    for name, sign in (("forward", "(reference ‖ policy)"), ("reverse", "(policy ‖ reference)")):
        text = "undefined (other vocabularies)" if kls[name] is None else f"{kls[name]:.4g}"
        rows.append((f"KL per token {sign}", text))
    return rows
