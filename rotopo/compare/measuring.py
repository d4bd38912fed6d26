"""What is measured of a run while it trains, at fixed points: its distance and its outcomes."""

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from rotopo.compare.sequence_kl import drawn_responses, response_kls
from rotopo.data.batch import Role, collate
from rotopo.data.messages import Message
from rotopo.data.prompts import decoded
from rotopo.errors import InputError
from rotopo.files import to_json, write_whole
from rotopo.metrics.geometry import effective_rank, merged_weights, neuron_cosine
from rotopo.metrics.perplexity import perplexity
from rotopo.metrics.yardstick import COLUMNS, columns
from rotopo.models.log_probs import sum_of_role
from rotopo.models.modes import evaluating
from rotopo.models.policy import Policy
from rotopo.models.samples import sample_reference
from rotopo.run.lightning import data_of
from rotopo.run.steps import ends_step

Judge = Callable[[list[Message], str], float]


class Measuring(Callback):
    """Measures a policy before its first step, at some steps, and after its last.

    The n-th of N points comes after (n/N)² of the steps: more closely at the beginning, where a
    policy moves fastest [ours].

    Each point is a file ``points/STEP.json`` in ``folder``, whole or not at all:

    - ``step``;
    - ``pairs``: of each held-out pair its ``group``, the log-ratios log π_θ/π_ref of both
      responses, and their tokens;
    - ``responses``: drawn from the policy: ``group``, ``prompt`` (its number), ``text``,
      ``tokens``, the summed ``reverse_kl``, and ``score``, if there is a judge;
    - ``reference_responses``: drawn from the reference, once for all runs: ``group``, ``prompt``,
      and the summed ``forward_kl``;
    - ``whole``: single numbers: ``effective_rank`` of the last layer's hidden states on some
      held-out pairs, ``neuron_cosine`` (both as :class:`rotopo.callbacks.Geometry` has them) and
      ``perplexity``.

    A run that goes on after a kill measures again what comes after its checkpoint, to the same
    numbers. What is measured changes nothing of the training.

    Args:
        folder: where the points go.
        points: how many after the one before training.
        split: ``validation`` or ``test``, whose pairs and prompts are measured on.
        prompts: how many of its different prompts are responded to, the first ones.
        samples: responses to each.
        max_new_tokens: tokens of a response at most.
        seed: of the draws.
        geometry_pairs: held-out pairs whose hidden states are measured; 0 leaves out effective rank
            and neuron cosine.
        text: a file of held-out text for the perplexity; None leaves it out.
        judge: what gives a response its score: a function (prompt, response) -> float by its dotted
            path, or a class path with its settings.

    Raises:
        InputError: a setting out of its range, a split without rows, several ranks, a module that
            is no policy, or a reference of another vocabulary.
    """

    compares = True  # the module keeps its reference, also for objectives that have none

    def __init__(
        self,
        folder: str,
        points: int = 6,
        split: str = "test",
        prompts: int = 50,
        samples: int = 2,
        max_new_tokens: int = 64,
        seed: int = 0,
        geometry_pairs: int = 8,
        text: Path | None = None,
        judge: Judge | None = None,
    ) -> None:
        for name in ("points", "prompts", "samples", "max_new_tokens"):
            if vars()[name] < 1:
                raise InputError(f"Measuring.{name} is {vars()[name]}: it has to be at least 1.")
        if split not in ("validation", "test"):
            raise InputError(f"Measuring.split is {split!r}: it is 'validation' or 'test'.")
        self.folder = Path(folder) / "points"
        self.points = points
        self.split = split
        self.prompts = prompts
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.geometry_pairs = geometry_pairs
        self.text = text
        self.judge = judge
        self.steps: set[int] = set()
        self.groups: dict[int, str] = {}
        # Of each prompt its group, its turns and its tokens.
        self.asked: list[tuple[str, list[Message], list[int]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.world_size > 1:
            raise InputError("Measuring takes a run on one device: set trainer.devices to 1.")
        if getattr(pl_module, "policy", None) is None:
            raise InputError(f"Measuring is for policies, and {type(pl_module).__name__} is none.")
        if not data_of(trainer).has(self.split):
            raise InputError(f"data.{self.split} is 0: there is nothing to measure on.")
        self._ask(data_of(trainer))
        total = int(trainer.estimated_stepping_batches)
        self.steps = {math.ceil(total * (n / self.points) ** 2) for n in range(1, self.points + 1)}
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step in self.steps and ends_step(trainer, batch_idx):
            self._measure(trainer, pl_module)

    def _ask(self, data: Any) -> None:
        """Choose the prompts."""
        pairs = data.pairs
        self.groups = pairs.parts[self.split].groups(pairs.of[self.split]["row"][:]) or {}
        different = islice(pairs.different_prompts(self.split), self.prompts)
        self.asked = [
            (self._group(row), preference.prompt, pairs.prompt_tokens(preference))
            for row, preference in different
        ]

    def _group(self, row: int) -> str:
        return self.groups.get(row, str(row))

    @torch.no_grad()
    def _measure(self, trainer: Trainer, pl_module: Any) -> None:
        policy: Policy = pl_module.policy
        data = data_of(trainer)
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            with evaluating(policy.model):
                pairs = self._pairs(policy, data)
                whole = self._whole(policy, data)
            point = {"step": trainer.global_step, "pairs": pairs, **self._drawn(policy, data)}
            point["whole"] = whole
        write_whole(self.folder / f"{trainer.global_step}.json", to_json(point))

    def _pairs(self, policy: Policy, data: Any) -> list[dict[str, Any]]:
        rows = data.rows(self.split)
        found: list[dict[str, Any]] = []
        for batch in data.batches(rows, range(len(rows))):
            batch = batch.to(policy.device)
            log_probs = policy(batch, compared=True)
            lengths = [
                sum_of_role(batch.lengths, role, batch.roles, batch.pairs, batch.n_pairs)
                for role in (Role.CHOSEN, Role.REJECTED)
            ]
            names = (*COLUMNS, "chosen_tokens", "rejected_tokens")
            values = torch.stack([*(c.double() for c in columns(log_probs)), *lengths], 1).tolist()
            for row, numbers in zip(batch.rows.tolist(), values, strict=True):
                line = dict(zip(names, numbers, strict=True))
                found.append({"row": row, "group": self._group(row), **line})
        return sorted(found, key=lambda line: line["row"])

    def _drawn(self, policy: Policy, data: Any) -> dict[str, Any]:
        asked = self.asked
        places = [place for place in range(len(asked)) for _ in range(self.samples)]
        prompts = [asked[place][2] for place in places]
        encoder, most = data.encoder, self.max_new_tokens
        own = drawn_responses(policy, prompts, most, encoder, self.seed)
        cache = data.pairs.cache_dir / "reference_samples"
        theirs = sample_reference(policy, prompts, most, encoder, cache, self.seed)
        reverse = response_kls(policy, prompts, own, data.pad_id, data.batching.layout)[:, 1]
        forward = response_kls(policy, prompts, theirs, data.pad_id, data.batching.layout)[:, 0]
        ended = [ids[:-1] if ids[-1:] == [encoder.end_of_turn_id] else ids for ids in own]
        lines = []
        for place, kl, ids, answer in zip(
            places, reverse.tolist(), own, decoded(encoder, ended), strict=True
        ):
            group, prompt, _ = asked[place]
            line = {"group": group, "prompt": place, "text": answer["response"]}
            line |= {"tokens": len(ids), "reverse_kl": kl}
            if self.judge is not None:
                line["score"] = float(self.judge(prompt, answer["response"]))
            lines.append(line)
        return {
            "responses": lines,
            "reference_responses": [
                {"group": asked[place][0], "prompt": place, "forward_kl": kl}
                for place, kl in zip(places, forward.tolist(), strict=True)
            ],
        }

    def _whole(self, policy: Policy, data: Any) -> dict[str, float]:
        found = {}
        if self.geometry_pairs:
            rows = data.rows(self.split)
            some = [rows[i] for i in range(min(self.geometry_pairs, len(rows)))]
            batch = collate(some, data.pad_id, data.batching.layout, 1.0).to(policy.device)
            states = policy.hidden_states(batch)
            assert states is not None
            found["effective_rank"] = float(effective_rank(states[-1]))
            cosines = [float(neuron_cosine(w)) for w in merged_weights(policy.language_model)]
            if cosines:
                found["neuron_cosine"] = sum(cosines) / len(cosines)
        if self.text is not None:
            of_text = perplexity(policy, data.encoder.tokenizer, self.text)
            found["perplexity"] = of_text["perplexity"]
        return found
