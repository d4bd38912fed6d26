"""The commands that run on a Trainer: LightningCLI with the tokenizer named once, one folder per
run, safe swaps of class paths, and messages instead of tracebacks."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO

import rotopo.objectives
import rotopo.reward  # (classes are known by their short names once imported)
import rotopo.robust  # noqa: F401
from rotopo import threads
from rotopo.callbacks.began import Began
from rotopo.callbacks.doctor import DataDoctor
from rotopo.callbacks.monitors import Monitors
from rotopo.data.doctor.diagnosis import refusal, render
from rotopo.data.module import PairwiseDataModule
from rotopo.described import read
from rotopo.described.check import look_through
from rotopo.errors import InputError, SeveralErrors, input_error
from rotopo.files import full_disk
from rotopo.introspection import live
from rotopo.parsing import (
    Parser,
    find_classes,
    keep_only_what_classes_share,
    refuse_ill_typed,
)
from rotopo.pretrained import with_tokenizer
from rotopo.refusals import (
    Building,
    in_one_line,
    messages,
    naming,
    refuse_repeated_names,
    unwrapped,
)
from rotopo.run import wandb
from rotopo.run.as_adapter import as_adapter
from rotopo.run.changed import checked, say
from rotopo.run.checkpoints import WholeCheckpointIO, check, disk_is_full
from rotopo.run.folder import RunFolder, ToldFolder, loggers_in, refuse_to_replace, root_of
from rotopo.run.keeping import OwnCheckpoints, flatten_names, with_last
from rotopo.run.lightning import leave_signals
from rotopo.run.settings import PARTS, for_command, is_file_of_ours, named_checkpoint
from rotopo.run.slurm import Job, Requeue, take_over
from rotopo.run.whereabouts import Whereabouts
from rotopo.trainer import Telling, quiet, shows_progress
from rotopo.training import PairwiseModule

Kind = TypeVar("Kind", bound="RotopoCLI")


class RotopoTrainer(Telling):
    """Lightning's Trainer with a command for the data alone."""

    def doctor(
        self,
        model: PairwiseModule,
        datamodule: PairwiseDataModule,
        ckpt_path: str | None = None,
    ) -> None:
        """Checks the data that a fit would train on, without loading the model.

        Args:
            model: what is to be trained; its weights are not loaded.
            datamodule: the data.
            ckpt_path: not read; here so that the files and options of fit are taken as they are.

        Raises:
            InputError: there is an error in the data; warnings are only printed.
        """
        datamodule.prepare_data()
        datamodule.setup("doctor")
        findings = datamodule.findings(model.needs)
        print(render(findings), flush=True)
        refused = refusal(findings)
        if refused is not None:
            raise InputError(refused)


class RotopoCLI(LightningCLI):
    """LightningCLI with the tokenizer named once, one folder per run, and safe class swaps.

    Attributes:
        settings: all of the run's, as config.yaml has them.
    """

    _checkpoint: tuple[str, dict[str, Any]] | None = None  # that is named: path and content

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**{"prog": "rotopo", **kwargs}, allow_abbrev=False)
        parser.__class__ = Parser  # Lightning names its own
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model", "data.init_args.tokenizer", compute_fn=_path_of)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # Checkpoints are always read as weights only, so that no code in them is run.
        commands = {k: v | {"weights_only"} for k, v in LightningCLI.subcommands().items()}
        return {**commands, "doctor": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        args = self._on_checkpoint(sys.argv[1:] if args is None else list(args))
        try:
            with in_one_line(), naming("the settings", on_purpose=False):
                super().parse_arguments(parser, args)
        except InputError as error:
            # All that is wrong, with the classes that the file knows nothing of.
            found = look_through(args, live(read()), list(self.subcommands())).wrong
            raise (SeveralErrors(found) if found else error) from None
        for file in self._settings().get("config") or []:
            if file is not None:  # a checkpoint's settings
                refuse_repeated_names(Path(file.absolute))

    def _on_checkpoint(self, args: list[str]) -> list[str]:
        """The command line, behind the settings of the checkpoint that it names: a command that
        uses one builds what it says, and so does a fit that is given no file of settings."""
        command = args[0] if args else ""
        path, files = named_checkpoint(args[1:])
        if command not in self.subcommands() or command == "doctor" or not is_file_of_ours(path):
            return args
        ours = self._read(path, command)["rotopo"]
        there = ours.get("settings")
        if there is None and not files:
            raise InputError(
                f"ckpt_path: {path} holds no settings (an earlier release wrote it, or a script): "
                "give those that it was trained with, --config FILE."
            )
        if there is None or (command == "fit" and files):
            return args
        return [command, f"--config={json.dumps(for_command(command, ours))}", *args[1:]]

    def _read(self, path: str, command: str) -> dict[str, Any]:
        """A checkpoint without the tensors of a folder, once."""
        if self._checkpoint is None or self._checkpoint[0] != path:
            self._checkpoint = path, check(Path(path), resume=command == "fit")
        return self._checkpoint[1]

    def before_instantiate_classes(self) -> None:
        for name in ("model", "data"):
            refuse_ill_typed(name, self._get(self.config, name))
        _tokenizer_of(self._get(self.config, "model"))
        self._go_on_at_wandb()
        self._compare()
        # After Lightning's, which build the module and the datamodule.
        self._building = Building(self._settings())
        self.parser.add_instantiator(self._building, object)

    def instantiate_classes(self) -> None:
        with in_one_line(self._settings):
            failure = None
            try:
                super().instantiate_classes()
            except Exception as error:
                failure = self._building.failure or unwrapped(error)
            if failure is not None:  # out here, so that it does not come from what came from it
                raise failure
            self.model.know(self.settings, self._checkpoint is not None)
            self.datamodule.changed = self._open
            if self._checkpoint is not None and self.datamodule.encoder.template.reads_clock:
                self.datamodule.take_clock(self._checkpoint[1])

    def _compare(self) -> None:
        """Compare the settings with those of the checkpoint that was read; say, or refuse."""
        command = self.config.subcommand
        dumped = self.parser.dump(self.config, skip_none=False, format="json")
        self.settings = {k: v for k, v in json.loads(dumped)[command].items() if k in PARTS}
        self._open: list[str] = []
        if self._checkpoint is not None:
            there = self._checkpoint[1]["rotopo"].get("settings")
            said, still = checked(command, self.settings, there)
            say(said)
            self._open = [str(one) for one in still]

    def _go_on_at_wandb(self) -> None:
        """Have W&B's loggers go on with the run of the checkpoint's fit."""
        if self.config.subcommand == "fit" and self._checkpoint is not None:
            loggers = wandb.settings_of(self._settings().trainer.logger)
            if loggers:
                wandb.go_on(loggers, self._checkpoint[1])

    def _settings(self) -> Namespace:
        return self.config[self.config.subcommand]

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {error}.") from error

    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint that is named and not good before anything else is read; name that
        of a SLURM job which was queued again.

        Of a checkpoint's settings ours are taken, and not what Lightning would take.
        """
        command = self.config["subcommand"]
        config = self.config[command]
        self._job = self._job_of_fit() if command == "fit" else None
        if self._job is not None:
            self._job.resume()
            if self._job.resumed:
                config.ckpt_path = str(self._job.resumed)
        path = config.get("ckpt_path")
        if command != "doctor" and is_file_of_ours(path):  # doctor reads none
            self._read(path, command)
        else:
            self._checkpoint = None

    def _job_of_fit(self) -> Job | None:
        number = os.environ.get("SLURM_JOB_ID")
        if number is None:
            return None
        settings = self.config.clone()
        for size in ("devices", "num_nodes"):  # may be what SLURM has given this time
            settings.fit.trainer.pop(size)
        root = root_of(self.config.fit.trainer.default_root_dir)
        return Job.of_command(number, root, self.parser.dump(settings, skip_validation=True))

    def _run_subcommand(self, subcommand: str) -> None:
        self.carry_out(subcommand)

    def carry_out(self, subcommand: str) -> None:
        """Run the Trainer's method; a full disk is told in one line."""
        try:
            with in_one_line(self._settings, lambda: self._began.began):
                super()._run_subcommand(subcommand)
        except Exception as error:
            full = full_disk(error)
            if full is None or input_error(error):
                raise
            folder = getattr(self.trainer.checkpoint_callback, "dirpath", None)
            raise disk_is_full(None, full, folder and Path(folder)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A folder of the run's own, ``default_root_dir/version_N``, whatever loggers are given;
        checkpoints written whole, unless ``plugins`` has another way."""
        config = self._get(self.config_init, "trainer")
        given = config.plugins or []
        plugins = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        own = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        callbacks = [one for one in own if one is not None]
        flatten_names(callbacks)
        kept: list[Callback] = []
        if self.subcommand == "doctor":  # wherever the fit is going to run
            kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
            kwargs |= {"plugins": None, "logger": False}
        else:
            folder = RunFolder(root_of(config.default_root_dir))
            kwargs["logger"] = loggers = loggers_in(folder, config.logger)
            goes_on = bool(self._settings().get("ckpt_path"))
            kept = [ToldFolder(folder), OwnCheckpoints(callbacks, goes_on), wandb.WandbIds(loggers)]
            kept.append(Whereabouts(by_command=True))
            callbacks = with_last(callbacks, config.enable_checkpointing)
        for name, least in (
            ("accumulate_grad_batches", 1),
            ("check_val_every_n_epoch", 1),
            ("gradient_clip_val", 0),
        ):
            # Not by Lightning, which would divide by 0, or climb where it should descend.
            if config[name] is not None and not config[name] >= least:
                raise InputError(
                    f"trainer.{name} is {config[name]}: it has to be at least {least}."
                )
        if config.val_check_interval == 0:
            raise InputError("trainer.val_check_interval is 0: it has to be above zero.")
        self._began = Began()
        requeue = [Requeue(self._job)] if self._job is not None else []
        # First whether the ranks go on from one place, then the doctor: what it refuses leaves no
        # settings behind.
        shown = shows_progress(callbacks, config.enable_progress_bar)
        always = [*requeue, *kept, DataDoctor(), Monitors(), self._began, *shown]
        kwargs["callbacks"] = [*always, *callbacks]
        with naming("trainer", on_purpose=False):
            try:
                trainer = super().instantiate_trainer(**kwargs)
            except OverflowError as error:
                raise InputError(f"trainer.devices is {config.devices}: too many.") from error
        if trainer.is_global_zero:
            refuse_to_replace(trainer.loggers)
        take_over(trainer, self._job)
        leave_signals(trainer)
        there = self._checkpoint if self.subcommand == "fit" else None
        threads.settle(trainer.world_size, there[1]["rotopo"].get("threads") if there else None)
        return trainer


def run(args: list[str] | None = None) -> RotopoCLI:
    """Run the command line and return what it built: trainer, model and datamodule.

    Args:
        args: arguments without the program's name; None reads them from the process.

    Raises:
        SystemExit: with status 2 after bad input, whose message is printed without a traceback.
    """
    return built(RotopoCLI, args)


def built(command: type[Kind], args: list[str] | None) -> Kind:
    keep_only_what_classes_share()
    find_classes()
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
    quiet()
    with messages():
        return _with_one_parser(command, args)(
            PairwiseModule,
            PairwiseDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # they are the model's settings
            save_config_kwargs={"overwrite": True},
            trainer_class=RotopoTrainer,
            trainer_defaults={
                "enable_model_summary": False,  # of one row, the policy
                "use_distributed_sampler": False,  # our samplers know the ranks themselves
                # The longest batch comes first (on a processor a pair), and the others fit too.
                "num_sanity_val_steps": 1,
            },
            args=args,
        )


def _with_one_parser(command: type[Kind], args: list[str] | None) -> type[Kind]:
    """A command line that knows the command at hand alone, where its name comes first: a parser
    for each of the others would be built as well, which takes a fifth of a small run's time."""
    known = command.subcommands()
    name = (sys.argv[1:] if args is None else args)[:1]
    if not name or name[0] not in known:
        return command
    one = {name[0]: known[name[0]]}
    return type(command.__name__, (command,), {"subcommands": staticmethod(lambda: one)})


def _path_of(model: Any) -> str:
    """As :func:`_tokenizer_of`, of what will be refused the path itself: the parser would put what
    is to be said of it in words of its own."""
    try:
        return _tokenizer_of(model)
    except InputError:
        return _backbone_of(model).path


def _tokenizer_of(model: Any) -> str:
    """Where the tokenizer of the model is that a module trains.

    Raises:
        InputError: its path is a run's folder, without an adapter for others.
    """
    backbone = _backbone_of(model)
    if not Path(backbone.path).expanduser().is_dir():
        return backbone.path
    return with_tokenizer(as_adapter(backbone.path), backbone.get("base_path"))


def _backbone_of(model: Any) -> Any:
    """Settings of the policy, or of the reward model's backbone."""
    return model.init_args.get("policy") or model.init_args.get("backbone")
