"""``rotopo export``: a trained model as files that anyone can load, checked before it says done."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rotopo import threads
from rotopo.data.module import PairwiseDataModule
from rotopo.errors import InputError
from rotopo.export.job import Dtype, Form, Job, Kind, dtype_of, probes_of
from rotopo.files import write_whole, writing_whole_folder
from rotopo.load import parts
from rotopo.models.settings import BackboneConfig
from rotopo.pretrained import first_line
from rotopo.reward import RewardModule
from rotopo.run.as_adapter import from_runs
from rotopo.run.changed import checked
from rotopo.run.checkpoints import read
from rotopo.run.kept import choose_checkpoint, read_yaml
from rotopo.run.settings import differences, for_command
from rotopo.training import PairwiseModule

if TYPE_CHECKING:  # else rotopo export --help would wait for PEFT
    from rotopo.models.saved_adapter import Source


def export(
    run: Path,
    output: Path,
    checkpoint: Path | None = None,
    form: Form = "merged",
    prompts: int = 8,
    dtype: Dtype | None = None,
    test: Path | None = None,
    settings: Path | None = None,
) -> None:
    """Write a run's policy or reward model for transformers and PEFT, and check what was written.

    The folder holds weights as safetensors, the tokenizer with the run's chat template, the tokens
    that end a generation, and a model card with the run's settings and results. Before it gets its
    name, it is loaded again by transformers (and PEFT) alone and compared with the trained module
    on pairs of the run's own data that were held out: logits or rewards, and tokens. What was
    trained on a quantised base is put on the base in full precision, there too.

    On a command line: rotopo export --run runs/version_3 --output my_model. Memory: about one copy
    of the model in float32. Everything is computed on the CPU.

    Args:
        run: the folder of a ``rotopo fit`` run.
        output: the folder to write; nothing may be there yet.
        checkpoint: which checkpoint of the run; None takes the best one where a ModelCheckpoint
            monitors a metric, else the last.
        form: ``merged``: a model of transformers, for which nothing of rotopo is needed;
            ``adapter``: the adapter for PEFT, to be put on the base model at its present path. A
            rotation is an adapter for PEFT after ``import rotopo.rotation``.
        prompts: how many prompts to compare on, each with its responses.
        dtype: of merged weights; None is float32, or the dtype in which every weight was trained. A
            half type rounds the merged weights, and a small change by an adapter may be lost.
        test: the folder of a ``rotopo test`` run of the same checkpoint, for the model card; None
            takes one that lies beside the run, if there is one.
        settings: a YAML file of settings that are not the checkpoint's any more: the path of the
            base model or of the data, say, where they have moved. What was trained is built by the
            checkpoint's own.

    Raises:
        InputError: no such run or checkpoint, one that does not fit, a form that the model does
            not have, a base model or data that are gone, something at ``output``, no space, or
            files that differ from what was trained. Then nothing is left at ``output``.
    """
    # Here, so that rotopo export --help waits for neither PEFT nor pandas.
    from rotopo.export.card import Card, model_card
    from rotopo.export.checks import check_outputs, check_tokens
    from rotopo.export.run_folder import (
        check_pairs,
        find_test,
        read_metrics,
    )
    from rotopo.export.weights import write
    from rotopo.models.saved_adapter import source_of

    if prompts < 1:
        raise InputError(f"prompts is {prompts}: it has to be at least 1.")
    if output.exists():
        raise InputError(f"output: {output} is there already: remove it, or name another folder.")
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"run: {run} holds no config.yaml: give the folder of a run of rotopo fit, "
            "runs/version_0 for example."
        )
    threads.settle()
    file, which = choose_checkpoint(run, checkpoint)
    state = read(file, optimizers=False)
    beside, facts = (read_yaml(run / name) for name in ("config.yaml", "hparams.yaml"))
    check_pairs(file, state, facts)
    step = state["global_step"]
    print(f"export: {file}, {which}, step {step}", flush=True)
    tested = find_test(run, file, test)
    module, data, used = _built(state, beside, run, settings)
    config: Any
    kind: Kind
    if isinstance(module, RewardModule):
        config, kind = module.backbone_config, "reward"
    else:
        config, kind = module.policy_config, form
    config = from_runs(config)
    source = source_of(config)
    _check_form(source, kind, form, dtype)
    given, config = config, source.config
    data.take_clock(state)
    data.prepare_data()
    data.setup()
    split, probes = probes_of(data, prompts)
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    trained_in = dtype_of(config.dtype) if config.adapter is None else None
    written = dtype_of(dtype) or trained_in or wide
    job = Job(module, data, kind, given, config, split, probes, wide, written)

    with _writing(output) as folder:
        trained = write(job, state, folder)
        del state
        gc.collect()
        checks = [check_outputs(job, trained, folder), *check_tokens(job, folder)]
        if config.quantize is not None:
            checks.append(
                f"Trained on the base in {config.quantize}, written and compared on the base in "
                "full precision: in training all outputs differed by what quantising changes."
            )
        print("".join(f"export: {check}\n" for check in checks), end="", flush=True)
        card = Card(
            name=output.name,
            kind=kind,
            settings=used,
            facts=facts,
            training=read_metrics(run),
            test=tested,
            checkpoint=which,
            step=step,
            trained=trained.trained,
            parameters=trained.parameters,
            dtype=str(written).removeprefix("torch."),
            checks=checks,
            template=data.encoder.template.name,
            base=config.path,
            adapter=_class_path(config.adapter, used, kind),
        )
        write_whole(folder / "README.md", model_card(card))
    print(f"export: {output} is whole.")


def _built(
    state: dict[str, Any], beside: dict[str, Any], run: Path, given: Path | None
) -> tuple[PairwiseModule, PairwiseDataModule, dict[str, Any]]:
    """What the checkpoint says that was trained, and its settings; of an earlier release's, what
    the run's config.yaml says."""
    there = state["rotopo"].get("settings")
    if there is None:
        print(
            "export: this checkpoint holds no settings (an earlier release wrote it, or a script): "
            f"those of {run / 'config.yaml'} are taken for them.",
            flush=True,
        )
    elif ignored := differences(beside, there):
        print(
            f"export: by the checkpoint's settings, from which {run / 'config.yaml'} differs: "
            f"{', '.join(one.name for one in ignored)}.",
            flush=True,
        )
    own = run / "config.yaml" if there is None else json.dumps(for_command("fit", state["rotopo"]))
    module, data, used = parts(own, *([given] if given else []))
    if there is not None:
        said, _ = checked("export", used, there)
        print("".join(f"export: {line}\n" for line in said), end="", flush=True)
    return module, data, used


def _check_form(
    source: "Source[BackboneConfig]", kind: Kind, form: Form, dtype: Dtype | None
) -> None:
    """Refuse a form or a dtype that there is not."""
    if form == "merged":
        return
    if kind == "reward":
        raise InputError(
            "form: a reward model's head is no part of its adapter, and PEFT would load a new one: "
            "export it as merged."
        )
    if source.merged is not None:
        raise InputError(
            f"form: the adapter belongs to a base into which that of {source.merged.path} was "
            "merged, and which nobody else has: export it as merged."
        )
    if source.config.adapter is None:
        raise InputError(
            "form: the run trained every weight and has no adapter: export it as merged."
        )
    if dtype is not None:
        raise InputError("dtype: an adapter keeps the dtype that it was trained in: leave it out.")


def _class_path(adapter: Any, used: dict[str, Any], kind: Kind) -> str | None:
    """An adapter's class as the settings name it, or by itself where they name a folder."""
    backbone = used["model"]["init_args"]["backbone" if kind == "reward" else "policy"]
    if adapter is None or backbone.get("adapter"):
        return (backbone.get("adapter") or {}).get("class_path")
    return f"{type(adapter).__module__}.{type(adapter).__name__}"


@contextmanager
def _writing(output: Path) -> Iterator[Path]:
    """A folder that appears at ``output`` whole, or not at all."""
    from safetensors import SafetensorError

    try:
        with writing_whole_folder(output) as folder:
            yield folder
            folder.chmod(0o755)
            for file in folder.iterdir():
                file.chmod(0o644)  # safetensors' files are for their owner alone
    except (OSError, SafetensorError) as error:
        raise InputError(f"output: {output} cannot be made: {first_line(error)}") from error
