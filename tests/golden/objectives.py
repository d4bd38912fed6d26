"""Golden values of the objectives: losses, rewards and gradients on fixed log-probs.

``python -m tests.golden.objectives`` writes ``objectives.json`` beside this file, which other
projects can test their own objectives against; nothing of ours is needed to read it. All numbers
are float64, log-probs and losses in nats, written so that they read back to the same bits.

``inputs`` has two batches by name, ``pairs`` and ``unpaired``, of B = 6 rows each. A row is a
prompt with a chosen and a rejected response; in ``unpaired`` each row has one of the two, and the
other's length and log-probs are 0. Of every batch there are, by row [B]:

- ``chosen``, ``rejected``: log π_θ(y|x), the sum over the response's tokens.
- ``reference_chosen``, ``reference_rejected``: the same under the reference.
- ``chosen_length``, ``rejected_length``: tokens of the responses.
- ``gold``, ``gold_length``: a third response's log-prob and tokens, for TPO.
- ``reference_kl``: KL(π_ref ‖ π_θ) summed along a response of the reference, for TYPO.
- ``mismatched_log_ratio``: log π_θ/π_ref of responses to other prompts, for KTO's baseline.
- ``tokens``: of ``chosen`` and of ``rejected`` a list for each row, a number for each token:
  ``log_prob`` and ``reference``, whose sums are the log-probs above, and ``sum_squared``, Σ_v p_v²
  of the policy's distribution that the token comes from.

Each of ``objectives`` is one objective with its settings on one batch:

- ``name``, ``class`` (in ``rotopo.objectives``), ``settings``: those that are not the defaults; a
  Mixture's ``objectives`` are of this form too. ``defaults``: the others.
- ``inputs``: the batch.
- ``observed``: a batch that was a step before, for BCO's shift.
- ``given``: what the objective takes beside the batch. ``z0``: KTO's baseline, which is
  max(0, β · mean of ``mismatched_log_ratio``). ``delta``: BCO's shift, 0 before the first step,
  then the mean of two numbers, the means of the observed chosen and rejected rewards.
  ``drawn``: which tokens SamPO has drawn, 1 or 0, in the form of ``tokens``.
- ``losses`` [B]: of each row; of AOT and Dr. DPO, which couple rows, as their classes say.
- ``rewards``: the implicit ones of ``chosen`` and ``rejected`` [B]; null for no response.
- ``gradients``: of the *mean* of ``losses`` with respect to ``chosen``, ``rejected``, ``gold`` and
  ``reference_kl`` [B] and to ``tokens`` (their ``log_prob``), each taken for an input of its own.
  Only those are there that the loss is computed from: objectives that weigh tokens (SamPO, LD-DPO)
  read no sums. WPO's weights, z0 and δ are constants, without a gradient.

``reward_models`` are losses of reward models, functions of the rewards themselves, with
``inputs.rewards``: ``chosen`` and ``rejected`` rewards [B], ``margin`` in rewards [B],
``chosen_length`` and ``rejected_length``. Each has ``settings`` (``length_alpha``,
``length_penalty``, ``length_target`` turn the rewards r into r/(α + length) − λ|length − target|
first; ``margin`` is added to the row's own if ``row_margins``; ``centering``, ``l2``), ``losses``
[B] and ``gradients`` of their mean with respect to the rewards before they are turned.
"""

import inspect
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rotopo.objectives
from rotopo.data.batch import Role
from rotopo.models.log_probs import PairLogProbs, ResponseTokens
from rotopo.objectives.base import PreferenceModule
from rotopo.reward.losses import length_adjusted, pairwise_loss

FILE = Path(__file__).with_name("objectives.json")
_ROLES = {"chosen": Role.CHOSEN, "rejected": Role.REJECTED}
_LENGTHS = [(3, 2), (1, 4), (5, 5), (2, 1), (4, 6), (3, 3)]  # of chosen and rejected responses
_AWAY = 5  # the last pair: its rejected response is far likelier than under the reference

# By class, the settings that differ from the defaults.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("DPO", {}),
    "DPO, label smoothing": ("DPO", {"label_smoothing": 0.2}),
    "DPO, forward KL": ("DPO", {"divergence": "forward_kl"}),
    "DPO, Jensen-Shannon": ("DPO", {"divergence": "js"}),
    "DPO, alpha divergence": ("DPO", {"divergence": "alpha"}),
    "DPO, alpha divergence above 1": ("DPO", {"divergence": "alpha", "divergence_alpha": 1.5}),
    "DPO, per token": ("DPO", {"normalise_length": True}),
    "WPO": ("DPO", {"wpo": True}),
    "WPO, not clamped": ("DPO", {"wpo": True, "wpo_clamp": False}),
    "RobustDPO": ("RobustDPO", {}),
    "IPO, mean": ("IPO", {}),
    "IPO, sum": ("IPO", {"normalise": "sum"}),
    "SLiC": ("SLiC", {}),
    "SLiC without a reference": ("SLiC", {"reference": False, "likelihood_weight": 0.7}),
    "DPOP": ("DPOP", {}),
    "LengthRegularizedDPO": ("LengthRegularizedDPO", {}),
    "SamPO": ("SamPO", {}),
    "LDDPO": ("LDDPO", {}),
    "LDDPO, tails left out": ("LDDPO", {"alpha": 0.0}),
    "EXO": ("EXO", {}),
    "DiscoPOP": ("DiscoPOP", {}),
    "DrDPO": ("DrDPO", {}),
    "HolderDPO": ("HolderDPO", {}),
    "ROPO": ("ROPO", {}),
    "AOT, paired": ("AOT", {}),
    "AOT, unpaired": ("AOT", {"paired": False}),
    "AOT, label smoothing": ("AOT", {"label_smoothing": 0.2}),
    "KTO": ("KTO", {}),
    "KTO, weights": ("KTO", {"desirable_weight": 1.2, "undesirable_weight": 0.7}),
    "BCO": ("BCO", {}),
    "BCO after a step": ("BCO", {"beta": 0.2}),
    "NCA": ("NCA", {}),
    "SPPO": ("SPPO", {}),
    "APO-zero": ("APO", {}),
    "APO-down": ("APO", {"variant": "down"}),
    "SFT": ("SFT", {}),
    "SimPO": ("SimPO", {}),
    "AlphaPO": ("AlphaPO", {}),
    "CPO": ("CPO", {}),
    "ORPO": ("ORPO", {}),
    "TPO": ("TPO", {}),
    "TPO, mean": ("TPO", {"normalise": "mean"}),
    "TYPO": ("TYPO", {}),
    "Mixture": (
        "Mixture",
        {
            "objectives": [
                {"class": "DPO", "settings": {"beta": 0.2}},
                {"class": "SFT", "settings": {}},
            ],
            "weights": [1.0, 0.25],
        },
    ),
}
_AFTER_A_STEP = {"BCO after a step"}
_ON_UNPAIRED = ("KTO", "KTO, weights", "BCO", "BCO after a step", "NCA", "SPPO", "APO-zero", "SFT")
_REWARD_MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margins": {"row_margins": True, "margin": 0.2},
    "centering": {"centering": 0.1},
    "l2": {"l2": 0.05},
    "all of these": {"row_margins": True, "margin": 0.2, "centering": 0.1, "l2": 0.05},
    "length": {"length_alpha": 2.0, "length_penalty": 0.03, "length_target": 3.0},
}


def main() -> None:
    inputs = {"pairs": _pairs(), "rewards": _rewards()}
    inputs["unpaired"] = _unpaired(inputs["pairs"])
    objectives = [
        {"name": name, "class": kind, "settings": settings, "inputs": batch}
        for name, (kind, settings) in VARIANTS.items()
        for batch in ("pairs", "unpaired")
        if batch == "pairs" or name in _ON_UNPAIRED
    ]
    for entry in objectives:
        if entry["name"] in _AFTER_A_STEP:
            entry["observed"] = "pairs"
        entry |= {"defaults": defaults(entry)} | evaluated(entry, inputs)
    reward_models = [{"name": n, "settings": s} for n, s in _REWARD_MODELS.items()]
    for entry in reward_models:
        entry |= evaluated_reward_model(entry, inputs["rewards"])
    about = "Golden values of preference objectives; float64, in nats. The format is described in "
    values = {
        "about": f"{about}tests/golden/objectives.py of rotopo.",
        "inputs": inputs,
        "objectives": objectives,
        "reward_models": reward_models,
    }
    FILE.write_text(_as_json(values) + "\n", encoding="utf-8")


def defaults(entry: dict[str, Any]) -> dict[str, Any]:
    """The settings of an entry's class that it leaves as they are."""
    shared = inspect.signature(PreferenceModule).parameters
    parameters = inspect.signature(getattr(rotopo.objectives, entry["class"])).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in {*shared, *entry["settings"], "kwargs"}
    }


def evaluated(entry: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """``given``, ``losses``, ``rewards`` and ``gradients`` of an entry."""
    batch = inputs[entry["inputs"]]
    objective = _built(entry["class"], entry["settings"])
    log_probs, leaves = _as_log_probs(batch)
    observed = entry.get("observed")
    given, losses, rewards = _called(
        objective, log_probs, _as_log_probs(inputs[observed])[0] if observed else None
    )
    losses.mean().backward()
    found: dict[str, Any] = {"losses": losses.tolist()}
    found["rewards"] = {
        name: [
            value if length else None
            for value, length in zip(values.tolist(), batch[f"{name}_length"], strict=True)
        ]
        for name, values in zip(_ROLES, rewards, strict=True)
    }
    found["gradients"] = {
        name: _nested(leaf.grad, batch) if name == "tokens" else leaf.grad.tolist()
        for name, leaf in leaves.items()
        if leaf.grad is not None
    }
    shown = {
        name: _nested(value, batch) if name == "drawn" else value.item()
        for name, value in given.items()
    }
    return {"given": shown} | found


def _called(
    objective: PreferenceModule, log_probs: PairLogProbs, observed: PairLogProbs | None
) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, Tensor]]:
    """What the objective takes beside the log-probs, its losses, and its rewards: the one place
    that knows how objectives come to their state.

    Args:
        objective: any.
        log_probs: of the batch.
        observed: of the batch of a step before, or None.
    """
    if observed is not None:
        objective.observe(observed.detach(), step_ended=True)
    log_probs = objective.complete(log_probs)
    handed, given = log_probs.handed, {}
    if isinstance(objective, rotopo.objectives.KTO):
        total, count = handed["mismatched_total"]
        given["z0"] = (objective.beta * total / count).clamp(min=0)
    if isinstance(objective, rotopo.objectives.BCO):
        given["delta"] = handed["reward_shift"]
    if isinstance(objective, rotopo.objectives.SamPO):
        given["drawn"] = handed["drawn"]
    return given, objective.losses(log_probs), objective.rewards(log_probs)


def evaluated_reward_model(entry: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """``losses`` and ``gradients`` of a reward model's entry."""
    settings = entry["settings"]
    leaves = {name: _tensor(inputs[name]).requires_grad_() for name in _ROLES}
    rewards = [
        length_adjusted(
            leaf,
            torch.tensor(inputs[f"{name}_length"]),
            settings.get("length_alpha"),
            settings.get("length_penalty", 0.0),
            settings.get("length_target", 0.0),
        )
        for name, leaf in leaves.items()
    ]
    margin = settings.get("margin", 0.0)
    if settings.get("row_margins"):
        margin = margin + _tensor(inputs["margin"])
    others = {name: settings[name] for name in ("centering", "l2") if name in settings}
    losses = pairwise_loss(*rewards, margin, **others)
    losses.mean().backward()
    gradients = {name: leaf.grad.tolist() for name, leaf in leaves.items()}
    return {"losses": losses.tolist(), "gradients": gradients}


def _built(kind: str, settings: dict[str, Any]) -> PreferenceModule:
    if kind == "Mixture":
        parts = [_built(part["class"], part["settings"]) for part in settings["objectives"]]
        return rotopo.objectives.Mixture(parts, settings["weights"])
    return getattr(rotopo.objectives, kind)(**settings)


def _as_log_probs(batch: dict[str, Any]) -> tuple[PairLogProbs, dict[str, Tensor]]:
    """A batch, and the tensors in it that gradients are taken of."""
    leaves = {
        name: _tensor(batch[name]).requires_grad_()
        for name in ("chosen", "rejected", "gold", "reference_kl")
    }
    # A row's chosen response, then its rejected one.
    places = [
        (row, role, position)
        for row in range(len(batch["chosen"]))
        for name, role in _ROLES.items()
        for position in range(batch[f"{name}_length"][row])
    ]
    pair, role, position = (torch.tensor(column) for column in zip(*places, strict=True))
    leaves["tokens"] = _flat(batch, "log_prob").requires_grad_()
    tokens = ResponseTokens(
        pair=pair,
        role=role,
        position=position,
        log_prob=leaves["tokens"],
        reference=_flat(batch, "reference"),
        sum_squared=_flat(batch, "sum_squared"),
    )
    log_probs = PairLogProbs(
        chosen=leaves["chosen"],
        rejected=leaves["rejected"],
        chosen_length=torch.tensor(batch["chosen_length"]),
        rejected_length=torch.tensor(batch["rejected_length"]),
        reference_chosen=_tensor(batch["reference_chosen"]),
        reference_rejected=_tensor(batch["reference_rejected"]),
        mismatched_log_ratio=_tensor(batch["mismatched_log_ratio"]),
        gold=leaves["gold"],
        gold_length=torch.tensor(batch["gold_length"]),
        reference_kl=leaves["reference_kl"],
        rows=torch.arange(len(batch["chosen"])),
        tokens=tokens,
    )
    return log_probs, leaves


def _tensor(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _flat(batch: dict[str, Any], name: str) -> Tensor:
    """A value of all tokens [N], a row's chosen response before its rejected one."""
    rows = zip(*(batch["tokens"][role][name] for role in _ROLES), strict=True)
    return _tensor([value for row in rows for response in row for value in response])


def _nested(values: Tensor, batch: dict[str, Any]) -> dict[str, list[list[float]]]:
    """The other way round."""
    rest = values.tolist()
    nested: dict[str, list[list[float]]] = {role: [] for role in _ROLES}
    for row in range(len(batch["chosen"])):
        for role in _ROLES:
            length = batch[f"{role}_length"][row]
            nested[role].append(rest[:length])
            rest = rest[length:]
    return nested


def _pairs() -> dict[str, Any]:
    """Six pairs with a few nats between policy and reference, the last one further away."""
    generator = random.Random(0)

    def several(n: int, low: float, high: float) -> list[float]:
        return [round(generator.uniform(low, high), 2) for _ in range(n)]

    tokens: dict[str, dict[str, list[list[float]]]] = {}
    for place, name in enumerate(_ROLES):
        lengths = [pair[place] for pair in _LENGTHS]
        log_prob = [several(n, -3.0, -0.1) for n in lengths]
        shifts = [several(n, -1.2, 1.2) for n in lengths]
        shifts[_AWAY] = [5.0 if name == "chosen" else -5.0 for _ in shifts[_AWAY]]
        reference = [
            [round(min(-0.01, c + s), 2) for c, s in zip(*both, strict=True)]
            for both in zip(log_prob, shifts, strict=True)
        ]
        squared = [several(n, 0.05, 0.6) for n in lengths]
        tokens[name] = {"log_prob": log_prob, "reference": reference, "sum_squared": squared}
    B = len(_LENGTHS)
    sums = {
        f"{prefix}{name}": [round(sum(response), 2) for response in tokens[name][kind]]
        for prefix, kind in (("", "log_prob"), ("reference_", "reference"))
        for name in _ROLES
    }
    return {
        **sums,
        "chosen_length": [chosen for chosen, _ in _LENGTHS],
        "rejected_length": [rejected for _, rejected in _LENGTHS],
        "gold": several(B, -9.0, -1.0),
        "gold_length": [generator.randint(1, 6) for _ in range(B)],
        "reference_kl": several(B, 0.0, 3.0),
        "mismatched_log_ratio": several(B, -1.0, 4.0),
        "tokens": tokens,
    }


def _unpaired(pairs: dict[str, Any]) -> dict[str, Any]:
    """The chosen responses of even rows and the rejected ones of odd rows."""
    batch = json.loads(json.dumps(pairs))
    for place, name in enumerate(_ROLES):
        for row in range(len(batch["chosen"])):
            if row % 2 != place:
                batch[name][row] = batch[f"reference_{name}"][row] = 0.0
                batch[f"{name}_length"][row] = 0
                for values in batch["tokens"][name].values():
                    values[row] = []
    return batch


def _rewards() -> dict[str, Any]:
    return {
        "chosen": [1.3, -0.4, 0.05, 2.5, -1.75, 9.0],
        "rejected": [0.2, 0.9, 0.05, -2.25, -3.5, -8.0],
        "margin": [0.0, 0.5, 1.0, 0.25, 0.0, 2.0],
        "chosen_length": [3, 1, 5, 2, 4, 3],
        "rejected_length": [2, 4, 5, 1, 6, 3],
    }


def _as_json(value: Any, indent: int = 0) -> str:
    """JSON with a line for each list of numbers."""
    inner = " " * (indent + 1)
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {_as_json(part, indent + 1)}" for key, part in value.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + "\n" + " " * indent + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        items = [inner + _as_json(part, indent + 1) for part in value]
        return "[\n" + ",\n".join(items) + "\n" + " " * indent + "]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
