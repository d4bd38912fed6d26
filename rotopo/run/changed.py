"""Which settings may change where a checkpoint is gone on from or used, which may not, and why.

What a checkpoint was trained with decides what it is. :data:`TABLE` says of every setting what
becomes of another value: in a fit that goes on, and in a command that uses the checkpoint (test,
validate, predict, export).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from rotopo.errors import InputError
from rotopo.run.settings import Difference, differences, shown

# applied: it counts from the next step on (in a command: now), and is said. refused: by name.
# checked: by what it names being the same, which is compared where that is loaded.
# harmless: what is learned or computed stays the same, up to rounding.
Fate = Literal["applied", "refused", "checked", "harmless"]


@dataclass(frozen=True)
class Row:
    """What becomes of settings.

    Attributes:
        names: patterns of their names, see :func:`rotopo.run.settings.leaves`.
        fit: in a fit that goes on.
        use: in a command that uses the checkpoint.
        reason: why.
    """

    names: tuple[str, ...]
    fit: Fate
    use: Fate
    reason: str


def _rows(*rows: tuple[str, Fate, Fate, str]) -> tuple[Row, ...]:
    return tuple(Row(tuple(names.split()), fit, use, reason) for names, fit, use, reason in rows)


# The first row that fits counts.
TABLE = _rows(
    # The model.
    (
        "model model.objectives",
        "refused",
        "refused",
        "another objective is another training, and its losses and rewards mean something else: "
        "export the model, and begin a new fit from it",
    ),
    (
        "model.policy.path model.backbone.path model.policy.base_path model.backbone.base_path",
        "checked",
        "checked",
        "the base may lie elsewhere: its fingerprint is compared",
    ),
    (
        "model.*.adapter.peft_version model.*.adapter.base_model_name_or_path "
        "model.*.adapter.revision model.*.adapter.inference_mode model.*.adapter.auto_mapping "
        "model.*.adapter.task_type model.*.adapter.peft_type model.*.adapter.runtime_config "
        "model.*.adapter.*ephemeral_gpu_offload model.*.adapter.megatron_core",
        "harmless",
        "harmless",
        "a note of PEFT's, or where something is computed",
    ),
    (
        "model.*.adapter.*dropout*",
        "refused",
        "harmless",
        "the adapter is what the checkpoint holds",
    ),
    (
        "model.*.adapter model.*.adapter.*",
        "refused",
        "refused",
        "the adapter is what the checkpoint holds",
    ),
    (
        "model.*.quantize",
        "refused",
        "refused",
        "training has made up for what quantising changes",
    ),
    (
        "model.*.dtype model.*.compute_dtype",
        "applied",
        "applied",
        "the same weights, rounded otherwise: the fingerprint does not count the dtype",
    ),
    (
        "model.*.attention model.*.activation_checkpointing model.*.compile "
        "model.*.trust_remote_code",
        "harmless",
        "harmless",
        "another way to compute the same",
    ),
    (
        "model.policy.reference model.policy.reference_cache",
        "harmless",
        "harmless",
        "where the reference's log-probs come from",
    ),
    (
        "model.policy.reference_path",
        "refused",
        "refused",
        "rewards and losses are relative to the reference",
    ),
    ("model.sampling.*", "harmless", "harmless", "what predict generates by, not what is trained"),
    (
        "model.optimizer",
        "refused",
        "harmless",
        "the state of one optimiser means nothing to another: keep it, or begin a new fit",
    ),
    (
        "model.scheduler",
        "refused",
        "harmless",
        "the state of one schedule means nothing to another: keep it, or begin a new fit",
    ),
    (
        "model.scheduler.last_epoch",
        "refused",
        "harmless",
        "the place in the schedule is the checkpoint's",
    ),
    (
        "model.parameter_groups",
        "applied",
        "harmless",
        "how weights are learned; which parameters a group has is compared with the checkpoint, "
        "see rotopo.run.rates",
    ),
    (
        "model.optimizer.* model.scheduler.*",
        "applied",
        "harmless",
        "how weights are learned, see rotopo.run.rates",
    ),
    (
        "model.*.router_loss model.weights model.alpha model.beta model.centering model.delta "
        "model.desirable_weight model.divergence model.divergence_alpha model.flip_rate "
        "model.gamma model.gold_weight model.kl_weight model.l2 model.label_smoothing "
        "model.length_alpha model.length_penalty model.length_target model.likelihood_weight "
        "model.loss_type model.margin model.normalise model.normalise_length model.odds_weight "
        "model.paired model.penalty model.reference model.reward_shift model.sample_tokens "
        "model.seed model.tau model.temperature model.undesirable_weight model.unpaired "
        "model.variant model.wpo model.wpo_clamp model.objectives.*",
        "applied",
        "refused",
        "a constant of the loss and the rewards: a fit may go on with another, but what is "
        "measured by another is not what was trained",
    ),
    # The data. Training goes on at a position in an order of pairs.
    (
        "data.pairs_per_step data.length_window data.seed data.margin data.noise data.noise.* "
        "data.balance_lengths",
        "refused",
        "applied",
        "the position in the epoch would mean something else",
    ),
    (
        "data data.source data.format data.columns data.filter data.filter.* data.train_split "
        "data.validation data.test data.group_by data.split_seed "
        "data.extra_responses data.train_pairs data.chat_template data.chat_template_kwargs "
        "data.template_time data.split_dialogues data.system_message data.pad_token "
        "data.max_length data.truncation data.on_bad_row data.on_unwritten",
        "checked",
        "applied",
        "the training pairs have to stay the same: their fingerprint is compared",
    ),
    (
        "data.accuracy_by data.score data.prompts data.answers_as data.eval_pairs_per_batch "
        "data.token_budget data.layout data.num_workers data.num_proc data.cache_dir data.doctor "
        "data.tokenizer",
        "harmless",
        "harmless",
        "how batches are made and held-out pairs are looked at, not what is learned",
    ),
    # The Trainer.
    (
        "trainer.callbacks.Alternation trainer.callbacks.Alternation.*",
        "refused",
        "harmless",
        "which pairs a round trains on follows from it",
    ),
    (
        "trainer.max_epochs trainer.min_epochs trainer.max_steps trainer.min_steps "
        "trainer.max_time trainer.limit_train_batches trainer.overfit_batches "
        "trainer.limit_val_batches trainer.val_check_interval trainer.check_val_every_n_epoch",
        "applied",
        "harmless",
        "how long to train and when to validate; a schedule's length is a matter of its own",
    ),
    (
        "trainer.gradient_clip_val trainer.gradient_clip_algorithm trainer.accumulate_grad_batches",
        "applied",
        "harmless",
        "how a step is made",
    ),
    (
        "trainer.precision",
        "applied",
        "applied",
        "the same weights, computed with in another precision",
    ),
    (
        "trainer.callbacks trainer.callbacks.*",
        "applied",
        "harmless",
        "callbacks are built anew; what they remember is the checkpoint's",
    ),
    (
        "trainer.accelerator trainer.strategy trainer.strategy.* trainer.devices "
        "trainer.num_nodes trainer.plugins trainer.plugins.* trainer.use_distributed_sampler "
        "trainer.sync_batchnorm trainer.reload_dataloaders_every_n_epochs",
        "harmless",
        "harmless",
        "where and by how many a step is computed: it is the same pairs",
    ),
    (
        "trainer.logger trainer.logger.* trainer.log_every_n_steps trainer.default_root_dir "
        "trainer.enable_checkpointing trainer.enable_progress_bar trainer.enable_model_summary "
        "trainer.enable_autolog_hparams trainer.model_registry trainer.profiler "
        "trainer.profiler.* trainer.barebones trainer.fast_dev_run trainer.num_sanity_val_steps "
        "trainer.limit_test_batches trainer.limit_predict_batches trainer.detect_anomaly "
        "trainer.deterministic trainer.benchmark trainer.inference_mode",
        "harmless",
        "harmless",
        "what is written, shown or watched",
    ),
    (
        "seed_everything",
        "harmless",
        "harmless",
        "the random state goes on from the checkpoint's",
    ),
)


def row_of(name: str) -> Row | None:
    """The row of a setting; None where the table has none."""
    return next((row for row in TABLE if any(fnmatchcase(name, n) for n in row.names)), None)


def _fate(command: str, one: Difference) -> tuple[Fate, str]:
    row = row_of(one.name)
    if row is None:  # of a class of the user's own
        fate: Fate = "applied" if command == "fit" else "refused"
        return fate, "the setting is not one of rotopo's"
    return row.fit if command == "fit" else row.use, row.reason


def checked(
    command: str, here: Mapping[str, Any], there: Mapping[str, Any] | None
) -> tuple[list[str], list[Difference]]:
    """Refuse a changed setting, or say what becomes of it.

    Args:
        command: ``fit``, or one that uses the checkpoint.
        here: the settings.
        there: the checkpoint's; None where it holds none.

    Returns:
        Lines to say, and what differs that is compared when it is loaded.

    Raises:
        InputError: a setting that differs and may not, by name and both values.
    """
    if there is None:
        return [
            "this checkpoint holds no settings (an earlier release wrote it, or a "
            "script): those given are taken for what it was trained with."
        ], []
    found = [(one, *_fate(command, one)) for one in differences(here, there)]
    refused = [f"{one}: {reason}" for one, fate, reason in found if fate == "refused"]
    if refused:
        raise InputError(
            f"{'; '.join(refused)}. Leave the setting out, or set it as in the checkpoint."
        )
    when = " from the next step on" if command == "fit" else ""
    said = [
        f"{one.name} is {shown(one.here)}{when} ({shown(one.there)} in the checkpoint)."
        for one, fate, _ in found
        if fate == "applied" and (command == "fit" or not one.name.startswith("data"))
    ]
    return said, [one for one, fate, _ in found if fate == "checked"]


class Known:
    """The settings of a run, which its checkpoints hold.

    Args:
        settings: as config.yaml has them; None of a run from Python.
        compared: whether they have been compared with the checkpoint's.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None, compared: bool = False) -> None:
        self.settings = None if settings is None else dict(settings)
        self._compared = compared

    def compare(self, trainer: Trainer, there: Mapping[str, Any] | None) -> None:
        """Compare them with a checkpoint's, unless that has been done: the command line cannot
        read one that is named by a word, ``last``.

        Raises:
            InputError: see :func:`checked`.
        """
        if self.settings is not None and not self._compared and trainer.state.fn is not None:
            said, _ = checked(trainer.state.fn.value, self.settings, there)
            say(said)


def say(lines: Sequence[str]) -> None:
    """Print lines, on the first rank."""
    for line in lines:
        rank_zero_info(f"ckpt_path: {line}")
