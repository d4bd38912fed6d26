"""What the policy answers to the same few prompts, at every validation."""

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from rotopo import ranks
from rotopo.data.batch import collate_prompts
from rotopo.data.messages import Message, text_of
from rotopo.data.preference import Preference
from rotopo.data.prompts import decoded
from rotopo.data.schemas import read_response
from rotopo.errors import InputError
from rotopo.files import read_jsonl, to_jsonl, write_whole
from rotopo.models.settings import Sampling
from rotopo.run.folder import folder_of
from rotopo.run.lightning import data_of, is_trial
from rotopo.run.steps import works_in_steps_only


class Generations(Callback):
    """Responses to the same few prompts at every validation: what does the policy write by now?

    ``generations.jsonl`` in the run's folder gets a line for each: ``step``, ``number`` (of the
    prompt, from 0), ``prompt`` (messages), ``response``, ``tokens`` (of the response), ``stopped``
    (whether it ended by itself, or was cut at ``max_new_tokens``), and ``score``, if there is a
    judge. A step that is validated again, as after a resume in the same folder, replaces its lines.
    TensorBoard shows them as text, W&B as a table; other loggers get nothing.

    Responses follow from the weights, the sampling's seed and the prompt's number alone, up to
    rounding: not from batches or ranks, nor is any of training's random numbers used up.

    Args:
        prompts: how many of the validation split's prompts, the first different ones; or the
            prompts themselves, as texts; or a jsonl file whose lines have a ``prompt`` (a text or
            messages), as for ``data.score``, and all else is left alone.
        sampling: how to choose tokens; None does as ``predict``, by ``model.sampling``.
        judge: what gives a response its score: a function (prompt, response) -> float by its dotted
            path, of the prompt's messages and the response's text, or a class path with its
            settings, such as :class:`rotopo.judge.reward_model.RewardJudge`. Only the first rank
            asks it.

    Raises:
        InputError: a module that is no policy, a run that does not validate, the strategy FSDP1, a
            file that cannot be read, or a score that is no finite number.
    """

    def __init__(
        self,
        prompts: int | list[str] | Path = 8,
        sampling: Sampling | None = None,
        judge: Callable[[list[Message], str], float] | None = None,
    ) -> None:
        if isinstance(prompts, int) and prompts < 1:
            raise InputError(f"Generations: prompts is {prompts}: it has to be at least 1.")
        self.prompts = prompts
        self.sampling = sampling
        self.judge = judge
        self.asked: list[Preference] = []
        self.tokens: list[list[int]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.asked, self.tokens = [], []  # the next run may have another tokenizer

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.limit_val_batches == 0 or not data_of(trainer).has("validation"):
            raise InputError(
                "Generations responds at every validation, and this run has none: set "
                "data.validation, and trainer.limit_val_batches above 0."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Choose the prompts."""
        if getattr(pl_module, "policy", None) is None:
            raise InputError(
                f"Generations is for policies, and {type(pl_module).__name__} is none: leave it "
                "out of trainer.callbacks."
            )
        if works_in_steps_only(trainer):
            raise InputError(
                "Generations: FSDPStrategy cannot generate: leave it out of trainer.callbacks, or "
                "take configs/strategies/fsdp2.yaml."
            )
        if self.tokens:
            return
        data = data_of(trainer)
        self.asked = self._preferences(data)
        self.tokens = [data.pairs.prompt_tokens(preference) for preference in self.asked]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or is_trial(trainer):
            return
        data = data_of(trainer)
        sampling = self.sampling or pl_module.sampling
        # In validation tensors may be made that no gradient can flow through later.
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            responses = self._responses(pl_module.policy, data, sampling)
        folder = folder_of(trainer)  # asked on every rank
        if not trainer.is_global_zero:
            return
        lines = []
        answers = zip(self.asked, decoded(data.encoder, responses), strict=True)
        for number, (preference, answer) in enumerate(answers):
            line: dict[str, Any] = {
                "step": trainer.global_step,
                "number": number,
                "prompt": preference.prompt,
                **answer,
                "stopped": answer["tokens"] < sampling.max_new_tokens,
            }
            if self.judge is not None:
                line["score"] = self._score(preference.prompt, line["response"])
            lines.append(line)
        _keep(folder / "generations.jsonl", lines)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for line in lines:
                    name = f"generations/{line['number']}"
                    logger.experiment.add_text(name, _markdown(line), line["step"])
            elif isinstance(logger, WandbLogger):
                columns = list(lines[0])
                shown = [line | {"prompt": _prompt_text(line)} for line in lines]
                rows = [list(line.values()) for line in shown]
                logger.log_text("generations", columns, rows, step=trainer.global_step)

    def _preferences(self, data: Any) -> list[Preference]:
        if isinstance(self.prompts, list):
            return [read_response({"prompt": text, "response": ""}) for text in self.prompts]
        if isinstance(self.prompts, int):
            different = data.pairs.different_prompts("validation")
            found = [preference for _, preference in islice(different, self.prompts)]
            if len(found) < self.prompts:
                rank_zero_info(
                    f"Generations: validation has {len(found)} different prompts, and not "
                    f"{self.prompts}: these are taken."
                )
            return found
        preferences = []
        for number, line in read_jsonl(self.prompts):
            try:
                preferences.append(read_response(line | {"response": ""}))
            except InputError as error:
                raise InputError(
                    f"Generations.prompts: {self.prompts}, line {number}: {error}"
                ) from error
        if not preferences:
            raise InputError(f"Generations.prompts: {self.prompts} holds no prompt.")
        return preferences

    def _responses(self, policy: Any, data: Any, sampling: Sampling) -> list[list[int]]:
        """Token ids of all responses, which the ranks share among them."""
        n, world = len(self.tokens), ranks.count()
        mine = list(range(ranks.number(), n, world))
        # As many on each rank: of a model that is divided all have to work whenever one does.
        mine += [0] * (-(-n // world) - len(mine))
        size = data.batching.eval_pairs_per_batch
        made: list[list[int]] = []
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            batch = collate_prompts([self.tokens[i] for i in part], data.pad_id, part)
            made += policy.generate(batch.to(policy.device), sampling, data.stop_ids)
        of_all = ranks.of_all(list(zip(mine, made, strict=True)))
        by_number = {number: ids for rank in reversed(of_all) for number, ids in reversed(rank)}
        return [by_number[number] for number in range(n)]

    def _score(self, prompt: list[Message], response: str) -> float:
        assert self.judge is not None
        score = self.judge(prompt, response)
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not math.isfinite(score)
        ):
            raise InputError(
                f"Generations: the judge gives {score!r} to {response[:40]!r}: it has to be a "
                "finite number."
            )
        return float(score)


def _keep(file: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines after those of other steps that are there."""
    there = [line for _, line in read_jsonl(file)] if file.exists() else []
    kept = [line for line in there if line.get("step") != lines[0]["step"]]
    write_whole(file, to_jsonl([*kept, *lines]))


def _prompt_text(line: dict[str, Any]) -> str:
    return "\n\n".join(map(text_of, line["prompt"]))


def _markdown(line: dict[str, Any]) -> str:
    end = "stopped" if line["stopped"] else "cut"
    score = f", score {line['score']:.4g}" if "score" in line else ""
    quoted = "\n".join(f"> {part}" for part in _prompt_text(line).splitlines())
    return f"{quoted}\n\n{line['response']}\n\n*{line['tokens']} tokens, {end}{score}*"
