"""Muon for matrices and AdamW for all else, as one optimiser."""

import re
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rotopo.errors import InputError


class Muon(Optimizer):
    """Muon for matrices and AdamW for all else, as one optimiser: each computed by torch's class.

    Muon (Jordan 2024) takes the matrices of layers, LoRA's A and B among them. AdamW takes vectors,
    tensors of three dimensions and more (experts in one tensor), and what ``adamw`` names:
    embeddings, the output head, and adapters' parameters of two dimensions that are no matrices but
    stacks of angles or of vectors: those of the rotation, OFT, BOFT and HRA.

    Args:
        params: with their names, ``model.named_parameters()``, or groups of them. A group may have
            any of the settings below.
        lr: Muon's learning rate, before ``adjust_lr_fn``.
        weight_decay: of both, decoupled.
        momentum: Muon's.
        nesterov: whether Muon's momentum is.
        ns_coefficients: of Muon's Newton-Schulz iteration.
        eps: Muon's, against division by zero.
        ns_steps: of that iteration.
        adjust_lr_fn: what ``lr`` is multiplied by for a matrix of A rows and B columns, as torch's:
            ``match_rms_adamw`` 0.2 √max(A, B) (arXiv 2502.16982), which makes steps as large as
            AdamW's, so that one rate serves both and one that was found for AdamW is a good start;
            ``original`` √max(1, A/B), for rates of about 0.02, beside which ``adamw_lr`` has to be
            set. (torch's own default is ``original``.)
        adamw_lr: AdamW's learning rate; None is ``lr``.
        adamw_betas: AdamW's.
        adamw_eps: AdamW's.
        adamw: regular expression, looked for in names: matrices that AdamW takes.

    Raises:
        InputError: parameters without names, none for Muon, or no learning rate for AdamW.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw: str = "embed|wte|wpe|lm_head|score|rotation_|oft_|boft_|hra_",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "adamw_lr": adamw_lr,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "adamw": adamw,
        }
        super().__init__(params, defaults)
        if not any(group["algorithm"] == "Muon" for group in self.param_groups):
            raise InputError(
                "model.optimizer (Muon): of what trains nothing is a matrix for it, all is "
                "AdamW's: take torch.optim.AdamW."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take parameters, each for the algorithm that is its own."""
        group = dict(param_group)
        params = group.pop("params")
        names = group.pop("param_names", None)
        named = list(zip(names, params, strict=True)) if names is not None else list(params)
        if not all(isinstance(one, tuple) for one in named):
            raise InputError(
                "Muon tells embeddings and heads by their names: give it model.named_parameters()."
            )
        own = {name: group.pop(name, default) for name, default in self.defaults.items()}
        label = group.pop("name", f"pg{1 + len({g['of'] for g in self.param_groups})}")
        group |= {"of": label}
        matrices = [
            (name, p) for name, p in named if p.ndim == 2 and not re.search(own["adamw"], name)
        ]
        taken = {name for name, _ in matrices}
        shares = {"Muon": matrices, "AdamW": [one for one in named if one[0] not in taken]}
        for algorithm, share in shares.items():
            if share:
                settings = self._settings(algorithm, own)
                whole = {**group, "params": share, **settings, "algorithm": algorithm}
                super().add_param_group(whole | {"name": f"{label}/{algorithm}"})

    @staticmethod
    def _settings(algorithm: str, own: dict[str, Any]) -> dict[str, Any]:
        """What a group has for torch's class; it says what the class will not take."""
        probe = [Parameter(torch.zeros(1, 1))]
        if algorithm == "Muon":
            made: Optimizer = torch.optim.Muon(
                probe, **{k: v for k, v in own.items() if not k.startswith("adamw")}
            )
        else:
            if own["adamw_lr"] is None and own["adjust_lr_fn"] == "original":
                raise InputError(
                    "model.optimizer (Muon): with adjust_lr_fn original its lr is of another kind "
                    "than AdamW's, which takes what is no matrix: set adamw_lr."
                )
            made = torch.optim.AdamW(
                probe,
                lr=own["lr"] if own["adamw_lr"] is None else own["adamw_lr"],
                betas=own["adamw_betas"],
                eps=own["adamw_eps"],
                weight_decay=own["weight_decay"],
            )
        return {k: v for k, v in made.param_groups[0].items() if k != "params"}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        adamw = [group for group in self.param_groups if group["algorithm"] == "AdamW"]
        if adamw:
            part = torch.optim.AdamW(adamw)  # of the same groups and states, not of copies
            part.state = self.state
            part.step()
        for group in self.param_groups:
            if group["algorithm"] == "Muon":
                for parameter in group["params"]:
                    self._step_matrix(parameter, group)
        return loss

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Muon's step of one matrix: whole, also where each rank holds a share of it. A half of a
        matrix would be made orthogonal by itself, and torch's products of shares round otherwise.
        """
        from rotopo.models.sharding import gathered, share_of  # slow to import

        if parameter.grad is None:
            return
        matrix = Parameter(gathered(parameter.detach()))
        matrix.grad = gathered(parameter.grad)
        part = torch.optim.Muon([{**group, "params": [matrix]}])
        state = self.state[parameter]
        part.state[matrix] = {name: gathered(value) for name, value in state.items()}
        part.step()
        if matrix.data_ptr() != parameter.data_ptr():
            parameter.copy_(share_of(matrix.detach(), parameter))
        for name, value in part.state[matrix].items():
            state[name] = share_of(value, parameter)
