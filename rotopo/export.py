"""``rotopo export``: a trained model as files that anyone can load, checked before it says done."""

import copy
import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import torch
import yaml
from torch import Tensor

from rotopo.data.template import clock_stopped
from rotopo.errors import InputError
from rotopo.pretrained import first_line, pretrained_folder
from rotopo.run.checkpoints import check, read

if TYPE_CHECKING:  # else rotopo export --help would wait for them
    from transformers import PreTrainedTokenizerBase

    from rotopo.data.batch import TokenizedRow
    from rotopo.data.module import PairwiseDataModule
    from rotopo.data.schemas import Preference
    from rotopo.data.tokens import PairEncoder
    from rotopo.metrics.runs import Test, Training
    from rotopo.models.policy import Policy
    from rotopo.models.scorer import Scorer
    from rotopo.models.settings import BackboneConfig
    from rotopo.training import PairwiseModule

Form = Literal["merged", "adapter"]
Kind = Literal["merged", "adapter", "reward"]  # the first two of a policy
Dtype = Literal["float32", "bfloat16", "float16", "float64"]

# What the written model may differ by from the trained one, as a share of the largest logit (of a
# reward model: of a reward's scale): rounding of two ways to compute the same in float32. Sums of
# more than 1,024 products, the hidden size, round by the root more [ours].
_TOLERANCE = 1e-5
# The same where merged weights are rounded to a half type, in its machine epsilons [ours].
_HALF_TOLERANCE = 8
# Positions compared in each response; all logits of all of them would fill the memory.
_POSITIONS = 16


@dataclass(frozen=True)
class _Probe:
    """A row of the run's data: its tokens as in training, and the same as messages."""

    row: "TokenizedRow"
    preference: "Preference"

    def positions(self) -> list[Tensor]:
        """Which tokens of each response to compare the predictions of."""
        return [
            torch.linspace(0, len(ids) - 1, min(len(ids), _POSITIONS)).round().long()
            for ids in self.row.responses
        ]


@dataclass(frozen=True)
class _Job:
    """What is exported.

    Attributes:
        config: settings of the policy or of the reward model's backbone.
        split: which the probes are from.
        wide: the dtype to compute in.
        written: the dtype of merged weights.
    """

    module: "PairwiseModule"
    data: "PairwiseDataModule"
    kind: Kind
    config: "BackboneConfig"
    split: str
    probes: list[_Probe]
    wide: torch.dtype
    written: torch.dtype


@dataclass(frozen=True)
class _Trained:
    """What the trained module says of the probes, and its numbers of parameters.

    Attributes:
        outputs: of each response logits [positions, V], or the reward [1].
        scale: what differences of outputs are a share of.
        moved: the largest difference that training has made to a logit; None of a reward model,
            whose head was drawn at random.
        trained: parameters that were trained.
        parameters: all of them.
        hidden_size: D.
    """

    outputs: list[Tensor]
    scale: float
    moved: float | None
    trained: int
    parameters: int
    hidden_size: int


def export(
    run: Path,
    output: Path,
    checkpoint: Path | None = None,
    form: Form = "merged",
    prompts: int = 8,
    dtype: Dtype | None = None,
    test: Path | None = None,
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

    Raises:
        InputError: no such run or checkpoint, one that does not fit, a form that the model does
            not have, a base model or data that are gone, something at ``output``, no space, or
            files that differ from what was trained. Then nothing is left at ``output``.
    """
    from rotopo.files import write_whole
    from rotopo.load import parts
    from rotopo.model_card import Card, model_card
    from rotopo.reward import RewardModule

    if prompts < 1:
        raise InputError(f"prompts is {prompts}: it has to be at least 1.")
    if output.exists():
        raise InputError(f"output: {output} is there already: remove it, or name another folder.")
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"run: {run} holds no config.yaml: give the folder of a run of rotopo fit, "
            "runs/version_0 for example."
        )
    file, which = _choose_checkpoint(run, checkpoint)
    state = read(file, optimizers=False)
    settings, facts = (_read_yaml(run / name) for name in ("config.yaml", "hparams.yaml"))
    _check_pairs(file, state, facts)
    step = state["global_step"]
    print(f"export: {file}, {which}, step {step}", flush=True)
    tested = _find_test(run, file, test)
    module, data = parts(run / "config.yaml")
    config: Any
    kind: Kind
    if isinstance(module, RewardModule):
        config, kind = module.backbone_config, "reward"
    else:
        config, kind = module.policy_config, form
    _check_form(config, kind, form, dtype)
    data.take_clock(state)
    data.prepare_data()
    data.setup()
    split, probes = _probes(data, prompts)
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    written = _dtype(dtype) or (_dtype(config.dtype) if config.adapter is None else None) or wide
    job = _Job(module, data, kind, config, split, probes, wide, written)

    with _appearing_whole(output) as folder:
        trained = _write(job, state, folder)
        del state
        gc.collect()
        checks = [_check_outputs(job, trained, folder), *_check_tokens(job, folder)]
        if config.quantize is not None:
            checks.append(
                f"Trained on the base in {config.quantize}, written and compared on the base in "
                "full precision: in training all outputs differed by what quantising changes."
            )
        print("".join(f"export: {check}\n" for check in checks), end="", flush=True)
        card = Card(
            name=output.name,
            kind=kind,
            settings=settings,
            facts=facts,
            training=_training(run),
            test=tested,
            checkpoint=which,
            step=step,
            trained=trained.trained,
            parameters=trained.parameters,
            dtype=str(written).removeprefix("torch."),
            checks=checks,
            template=data.encoder.template.name,
        )
        write_whole(folder / "README.md", model_card(card))
    print(f"export: {output} is whole.")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name in (None, "auto") else getattr(torch, str(name))


def _choose_checkpoint(run: Path, given: Path | None) -> tuple[Path, str]:
    """The checkpoint to export, and which one that is, in words."""
    if given is not None:
        return given, "as asked for"
    # A slash in a checkpoint's name has made folders.
    files = sorted((run / "checkpoints").rglob("*.ckpt"), key=lambda f: f.stat().st_mtime)
    if not files:
        raise InputError(
            f"run: there is no checkpoint in {run / 'checkpoints'}: name one in checkpoint, or let "
            "the run go on until it has written one."
        )
    last = [file for file in files if file.name.startswith("last")] or files
    for callback in check(last[-1]).get("callbacks", {}).values():
        if callback.get("monitor") and callback.get("best_model_path"):
            path = Path(callback["best_model_path"])
            kept = Path(callback.get("dirpath") or path.parent)
            name = path.relative_to(kept) if path.is_relative_to(kept) else path.name
            best = run / "checkpoints" / name
            if not best.exists():
                raise InputError(
                    f"run: the checkpoint with the best {callback['monitor']}, {best}, is gone: "
                    "name another one in checkpoint."
                )
            score = float(callback["best_model_score"])
            return best, f"the best by {callback['monitor']} ({score:.4g})"
    return last[-1], "the last"


def _check_pairs(file: Path, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run, as far as one can tell."""
    here = facts.get("fingerprint")
    there = next(
        (v["data_fingerprint"] for v in state.values() if _has(v, "data_fingerprint")), here
    )
    if here is not None and there != here:
        raise InputError(
            f"checkpoint: {file} was trained on other pairs (fingerprint {there}) than the run "
            f"({here}): it belongs to another run."
        )


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _check_form(config: "BackboneConfig", kind: Kind, form: Form, dtype: Dtype | None) -> None:
    """Refuse a form or a dtype that there is not."""
    if form == "merged":
        return
    if kind == "reward":
        raise InputError(
            "form: a reward model's head is no part of its adapter, and PEFT would load a new one: "
            "export it as merged."
        )
    if config.adapter is None:
        raise InputError(
            "form: the run trained every weight and has no adapter: export it as merged."
        )
    if dtype is not None:
        raise InputError("dtype: an adapter keeps the dtype that it was trained in: leave it out.")


def _probes(data: "PairwiseDataModule", prompts: int) -> tuple[str, list[_Probe]]:
    """The first rows of the test split with different prompts; of the validation split where there
    is no test, and of the training pairs where there is neither."""
    split = next(name for name in ("test", "validation", "train") if data.has(name))
    rows = data.rows(split)
    found: dict[tuple[int, ...], _Probe] = {}
    for row in map(rows.__getitem__, range(len(rows))):
        if len(found) == prompts:
            break
        if tuple(row.prompt) not in found:
            found[tuple(row.prompt)] = _Probe(row, data.pairs.preference(split, row.row))
    return split, list(found.values())


def _write(job: _Job, state: dict[str, Any], folder: Path) -> _Trained:
    """Load the checkpoint, see what it says of the probes, and write it.

    The model is merged in place, and nothing of it is left in memory afterwards.
    """
    from rotopo.models.policy import Policy
    from rotopo.models.scorer import Scorer

    module: Any = job.module
    config = replace(
        job.config,
        attention="segments"  # which is the same, and not on GPUs only
        if job.config.attention == "flex_attention"
        else job.config.attention,
        activation_checkpointing=False,
        compile=False,
        quantize=None,
        compute_dtype=None,
    )
    backbone: Policy | Scorer
    before: list[Tensor] | None = None
    if job.kind == "reward":
        module.scorer = backbone = Scorer.load(config, dtype=job.wide)
        backbone.eval()
    else:
        module.policy = backbone = Policy.load(config, False, dtype=job.wide)  # type: ignore[arg-type]
        backbone.eval()
        before = _logits(backbone, job)
    if job.config.quantize is not None:
        backbone.base_fingerprint += f"-{job.config.quantize}"  # as training knew these weights
    try:
        try:
            module.on_load_checkpoint(state)
        except InputError as error:
            raise InputError(str(error).replace("ckpt_path", "checkpoint", 1)) from error
        module.load_state_dict(state["state_dict"], strict=False)
        if isinstance(backbone, Scorer):
            outputs, scale = _rewards(backbone, job)
        else:
            outputs = _logits(backbone, job)
            scale = max(float(logits.abs().max()) for logits in outputs)
        moved = None if before is None else _largest_difference(before, outputs)
        parameters = list(backbone.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        every = sum(p.numel() for p in parameters)
        del parameters
        hidden_size = backbone.language_model.config.get_text_config().hidden_size
        _save(backbone.model, job, folder)
    finally:
        module.policy = module.scorer = None
    return _Trained(outputs, scale, moved, trained, every, hidden_size)


def _logits(policy: "Policy", job: _Job) -> list[Tensor]:
    """The policy's own logits of each response of the probes [positions, V]."""
    from rotopo.data.batch import collate

    found = []
    for probe in job.probes:
        batch = collate([probe.row], job.data.pad_id, job.data.batching.layout, 1.0)
        predictors = batch.predictors.split(batch.lengths.tolist())
        for places, positions in zip(predictors, probe.positions(), strict=True):
            found.append(policy.logits(batch, places[positions]))
    return found


@torch.no_grad()
def _rewards(scorer: "Scorer", job: _Job) -> tuple[list[Tensor], float]:
    """The scorer's own rewards of each response of the probes [1], and their scale.

    A reward may be near zero: its scale is what a head of this norm makes of unrelated states of
    this norm.
    """
    from rotopo.data.batch import collate

    head: Any = scorer.language_model.score
    sizes = []

    def see(head: Any, states: tuple[Tensor]) -> None:
        sizes.append(float(states[0].norm(dim=-1).max()))

    found: list[Tensor] = []
    hook = head.register_forward_pre_hook(see)
    try:
        for probe in job.probes:
            # Behind every response a token that is never read.
            responses = [[*ids, job.data.pad_id] for ids in probe.row.responses]
            row = replace(probe.row, responses=responses)
            found += scorer(collate([row], job.data.pad_id, job.data.batching.layout, 1.0)).split(1)
    finally:
        hook.remove()
    return found, max(sizes) * float(head.weight.norm()) / head.in_features**0.5


def _save(model: Any, job: _Job, folder: Path) -> None:
    """Write a model, which is not to be used afterwards, and its tokenizer."""
    from peft import PeftModel

    from rotopo.models.beside import untie

    tokenizer = _exported_tokenizer(job)
    if job.kind != "reward":
        generation = model.generation_config
        generation._from_model_config = False
        generation.eos_token_id = job.data.stop_ids
        generation.pad_token_id = tokenizer.pad_token_id
        if not generation.do_sample:  # else some models' own settings do not go together
            generation.temperature = generation.top_p = generation.top_k = None
    if job.kind == "adapter":
        config = model.peft_config["default"]
        config.base_model_name_or_path = job.config.path
        config.task_type = "CAUSAL_LM"
        model.save_pretrained(folder, save_embedding_layers=False)
        generation.save_pretrained(folder)
    else:
        merged = model
        if isinstance(model, PeftModel):
            untie(model.get_base_model())
            merged = model.merge_and_unload()
        merged.to(job.written)
        for config in (merged.config, merged.config.get_text_config()):
            config.pad_token_id = tokenizer.pad_token_id
        merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _exported_tokenizer(job: _Job) -> "PreTrainedTokenizerBase":
    encoder = job.data.encoder
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = encoder.exported_template(closed=job.kind == "reward")
    return tokenizer


def _load(job: _Job, folder: Path) -> Any:
    """What was written, as its users load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    settings: Any = {"dtype": job.wide, "trust_remote_code": job.config.trust_remote_code}
    if job.kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, **settings)
    elif job.kind == "merged":
        model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    else:
        base = pretrained_folder(job.config.path)
        model = AutoModelForCausalLM.from_pretrained(base, **settings)
        model = PeftModel.from_pretrained(model, folder)
    return model.eval()


@torch.no_grad()
def _check_outputs(job: _Job, trained: _Trained, folder: Path) -> str:
    """Compare the written files with the trained module; the result as a sentence."""
    model, found = _load(job, folder), []
    for probe in job.probes:
        for ids, positions in zip(probe.row.responses, probe.positions(), strict=True):
            if job.kind == "reward":
                tokens = torch.tensor([probe.row.prompt + ids])
                found.append(model(input_ids=tokens, use_cache=False).logits[0])
            else:
                tokens = torch.tensor([probe.row.prompt + ids[:-1]])
                logits = model(input_ids=tokens, use_cache=False).logits[0]
                found.append(logits[len(probe.row.prompt) - 1 + positions])
    difference = _largest_difference(trained.outputs, found)
    share, allowed = difference / trained.scale, _tolerance(job, trained)
    what = "rewards" if job.kind == "reward" else "logits"
    compared = f"{what} of {len(found)} responses to {len(job.probes)} prompts ({job.split})"
    if not share <= allowed:
        raise InputError(
            f"output: the written files do not say what was trained: {compared} differ by up to "
            f"{difference:.3g}, {share:.2g} of their scale, and {allowed:.2g} is allowed. "
            "Nothing was kept."
        )
    of = "the rewards' scale" if job.kind == "reward" else "the largest"
    against = "" if trained.moved is None else f" Training moved them by up to {trained.moved:.3g}."
    return (
        f"{compared[0].upper()}{compared[1:]}: loaded again, they differ from the trained module's "
        f"by at most {difference:.2g}, {share:.1g} of {of} ({allowed:.1g} is allowed)." + against
    )


def _tolerance(job: _Job, trained: _Trained) -> float:
    """What outputs may differ by, as a share of their scale."""
    as_trained = job.config.adapter is None and job.written == _dtype(job.config.dtype)
    if job.written != job.wide and not as_trained:
        return _HALF_TOLERANCE * torch.finfo(job.written).eps
    return _TOLERANCE * max(1.0, (trained.hidden_size / 1024) ** 0.5)


def _check_tokens(job: _Job, folder: Path) -> Iterator[str]:
    """Compare what the written chat template makes of the probes with the tokens of training.

    The prompts' have to be the same. A whole conversation may be cut into other tokens where a
    response begins, since training tokenises it by itself, as a model generates it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder, n, same = job.data.encoder, 0, 0
    for probe in job.probes:
        preference = probe.preference
        pair = encoder.encode(preference)
        prompt = _template_ids(encoder, tokenizer, preference, [])
        if prompt != pair.prompt:
            raise InputError(
                f"output: the written chat template makes other tokens of row {probe.row.row}'s "
                f"prompt than training had: {_first_difference(prompt, pair.prompt)}. Nothing was "
                "kept."
            )
        for turns, ids in ((preference.chosen, pair.chosen), (preference.rejected, pair.rejected)):
            if turns is None:
                continue
            whole = _template_ids(encoder, tokenizer, preference, turns)
            expected = pair.prompt + ids
            found, meant = (str(tokenizer.decode(ids)) for ids in (whole, expected))
            # A policy's template goes on after the end of turn, or leaves that to the eos.
            alike = found.startswith(meant) or meant.startswith(found)
            if not (found == meant if job.kind == "reward" else alike):
                raise InputError(
                    f"output: the written chat template writes the conversation of row "
                    f"{probe.row.row} differently from training: "
                    f"{_first_difference(whole, expected)}. Nothing was kept."
                )
            if job.kind != "reward":
                whole, expected = whole[: len(expected)], expected[: len(whole)]
            n, same = n + 1, same + (whole == expected)
    yield (
        f"Tokens by the written chat template: those of training for {len(job.probes)} of "
        f"{len(job.probes)} prompts and for {same} of {n} conversations."
    )
    if same < n:
        yield (
            "The other conversations are cut into other tokens where a response begins: training "
            "tokenises a response by itself, as a model generates it."
        )


def _template_ids(
    encoder: "PairEncoder", tokenizer: Any, preference: "Preference", response: list[Any]
) -> list[int]:
    """Tokens of a prompt, or of it with a response, by the written template."""
    template, inputs = encoder.template, preference.inputs
    messages = template.prepared(preference.prompt + response)

    def ids(messages: list[Any]) -> list[int]:
        return tokenizer.apply_chat_template(
            messages,
            tools=inputs.tools,
            chat_template=template.name,
            add_generation_prompt=not response,
            tokenize=True,
            return_dict=False,
            **inputs.kwargs,
        )

    # Written at another time, it would say so.
    with clock_stopped(template.time if template.reads_clock else None):
        try:
            return ids(messages)
        except (jinja2.UndefinedError, TypeError):  # of a call without a content, as in training
            return ids([{"content": "", **turn} for turn in messages])


def _first_difference(found: list[int], expected: list[int]) -> str:
    at = next(
        (i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(expected)),
    )
    return f"token {at} (from 0) is {found[at : at + 1]}, and was {expected[at : at + 1]}"


def _largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    # By torch, whose maximum is not a number where one of the values is not.
    largest = [(x - y).abs().max() for x, y in zip(a, b, strict=True)]
    return float(torch.stack(largest).max())


@contextmanager
def _appearing_whole(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that gets its name in the end, or is removed."""
    from safetensors import SafetensorError

    partial = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
        yield partial
        partial.chmod(0o755)  # mkdtemp's is for its owner alone, and so are safetensors' files
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        raise InputError(f"output: {output} cannot be made: {first_line(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML: {error}") from error


def _training(run: Path) -> "Training | None":
    """What the run logged, if it logged a table."""
    from rotopo.metrics.runs import read_training

    return read_training("run", run.name, run) if (run / "metrics.csv").is_file() else None


def _find_test(run: Path, checkpoint: Path, given: Path | None) -> "Test | None":
    """The test of a checkpoint: the one that was named, or one beside the run. A run that went on
    may have written another checkpoint under the name since."""
    from rotopo.metrics.runs import read_test

    def of_the_checkpoint(folder: Path) -> bool:
        try:
            settings: Any = _read_yaml(folder / "config.yaml")
            tested, since = Path(settings["ckpt_path"]), (folder / "test.json").stat().st_mtime
        except (InputError, OSError, KeyError, TypeError):  # whatever lies there
            return False
        return tested.resolve() == checkpoint.resolve() and checkpoint.stat().st_mtime <= since

    if given is not None:
        if not of_the_checkpoint(given):
            raise InputError(f"test: {given} is no test of {checkpoint}: name its own, or none.")
        return read_test("test", given.name, given)
    beside = sorted(file.parent for file in run.parent.glob("*/test.json"))
    found = [folder for folder in beside if of_the_checkpoint(folder)]
    return read_test("test", found[-1].name, found[-1]) if found else None
