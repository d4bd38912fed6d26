"""What one adapter trains on one layer."""

import math

import torch
from torch import nn

from rotopo.rotation.config import RotationConfig
from rotopo.rotation.folding import Factors
from rotopo.rotation.givens import Delta, chain, tree
from rotopo.rotation.householder import after_reflections


class Rotation(nn.Module):
    """The parameters of one adapter on one layer; calling it gives their `Factors`.

    Parameters (those that the configuration turns off are None): `angles` (sweeps, D − 1) radians,
    zeros, with 1 or 2 sweeps for each factor, the first factor's first; `householder`
    (n_householder, D), equal pairs from N(0, I), so that a learning rate turns them by about as
    much as it turns an angle [ours]; `magnitude` (out,) = s − 1, zeros, with s the ratio of the
    neuron's magnitude to the norm of its frozen weight. Without `init_weights` they are random:
    angles in (−π, π), vectors that are no pairs, s from N(1, 0.1²).
    """

    def __init__(self, config: RotationConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layout = config.layout
        self.factors = config.givens_factors
        sweeps = {"bidirectional": 2, "forward": 1, "none": 0}[config.givens] * self.factors
        self.angles = nn.Parameter(torch.zeros(sweeps, in_features - 1)) if sweeps else None
        pairs = torch.randn(config.n_householder // 2, in_features)
        self.householder = nn.Parameter(pairs.repeat_interleave(2, 0)) if len(pairs) else None
        self.magnitude = nn.Parameter(torch.zeros(out_features)) if config.magnitude else None
        if not config.init_weights:
            if self.angles is not None:
                nn.init.uniform_(self.angles, -math.pi, math.pi)
            if self.householder is not None:
                nn.init.normal_(self.householder)
            if self.magnitude is not None:
                nn.init.normal_(self.magnitude, std=0.1)

    def forward(self) -> Factors:
        """The factors, in float32 or, for float64 parameters, float64."""
        angles, vectors, magnitude = (
            None if p is None else p.to(torch.promote_types(p.dtype, torch.float32))
            for p in (self.angles, self.householder, self.magnitude)
        )
        device = next(self.parameters()).device
        with torch.autocast(device.type, enabled=False):
            delta = Delta()
            if angles is not None:
                factor = tree if self.layout == "tree" else chain
                delta, *second = (factor(part) for part in angles.chunk(self.factors))
                if second:
                    delta = second[0].shifted(angles.shape[1] + 1).after(delta)
            if vectors is not None:
                delta = after_reflections(delta, vectors)
        # A copy: FSDP1 frees a parameter's own memory behind the call that gathered it.
        return Factors(*delta, None if magnitude is None else magnitude.clone())
