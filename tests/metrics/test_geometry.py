import math

import pytest
import torch
from peft import BOFTConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from torch import nn

from rotopo.errors import InputError
from rotopo.metrics.geometry import (
    cosine_gram,
    effective_rank,
    hyperspherical_energy,
    neuron_cosine,
    orthogonality_error,
    orthogonality_errors,
)
from rotopo.rotation import RotationConfig


class TwoLayers(nn.Module):
    def __init__(self, D: int):
        super().__init__()
        self.first = nn.Linear(D, 8)
        self.last = nn.Linear(8, 8)


def adapted(config: PeftConfig, D: int = 16, size: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(TwoLayers(D), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
    return model.base_model.model.first


TARGET = {"target_modules": ["first"]}
ORTHOGONAL = {
    "rotation": RotationConfig(**TARGET),
    "rotation two factors": RotationConfig(n_householder=0, givens_factors=2, **TARGET),
    "rotation chain": RotationConfig(layout="chain", **TARGET),
    "oft": OFTConfig(oft_block_size=4, use_cayley_neumann=False, **TARGET),
    "boft": BOFTConfig(boft_block_size=4, **TARGET),
    "hra": HRAConfig(r=4, **TARGET),
}


@pytest.mark.parametrize("adapter", ORTHOGONAL)
@pytest.mark.parametrize("D", [16, 2048])
def test_orthogonal_adapters_have_no_error(adapter: str, D: int):
    if adapter == "rotation chain" and D > 1024:
        pytest.skip("the chain builds D × D matrices")
    assert 0 < orthogonality_error(adapted(ORTHOGONAL[adapter], D)) < 2e-6


def test_the_cayley_neumann_series_drifts():
    config = OFTConfig(oft_block_size=8, use_cayley_neumann=True, **TARGET)
    assert orthogonality_error(adapted(config, size=0.02)) < 1e-3
    assert orthogonality_error(adapted(config, size=0.3)) > 0.1


def test_the_error_is_that_of_the_merged_map():
    layer = adapted(OFTConfig(oft_block_size=4, use_cayley_neumann=True, **TARGET), D=8)
    error = orthogonality_error(layer)
    before = layer.base_layer.weight.detach().double()
    layer.merge()
    after = layer.base_layer.weight.detach().double()
    R_t = torch.linalg.solve(before, after)  # W′ = W Rᵀ, W square here
    expected = (R_t @ R_t.T - torch.eye(8)).abs().max().item()
    assert expected > 0.01
    assert error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("D", [16, 2048])
def test_a_broken_rotation_is_seen(D: int):
    layer = adapted(ORTHOGONAL["rotation"], D)
    rotation = layer.rotation_adapter["default"]
    factors = rotation()
    rotation.forward = lambda: factors._replace(blocks=factors.blocks + 0.01)
    assert orthogonality_error(layer) > 0.01


def test_errors_by_name():
    model = get_peft_model(TwoLayers(16), RotationConfig(target_modules=["first", "last"]))
    errors = orthogonality_errors(model)
    assert set(errors) == {"base_model.model.first", "base_model.model.last"}
    assert errors["base_model.model.first"] == 0
    assert orthogonality_errors(get_peft_model(TwoLayers(16), LoraConfig(r=2, **TARGET))) == {}


def test_what_cannot_be_measured_is_named():
    with pytest.raises(InputError, match="Linear"):
        orthogonality_error(nn.Linear(4, 4))
    with pytest.raises(InputError, match=r"'other'.*default"):
        orthogonality_error(adapted(ORTHOGONAL["rotation"]), "other")


def test_energy_and_cosines_in_closed_form():
    # Orthogonal neurons: n(n − 1) pairs at distance √2; lengths do not count.
    weight = torch.diag(torch.tensor([1.0, 5.0, 0.1, 2.0], dtype=torch.float64))
    assert hyperspherical_energy(weight).item() == pytest.approx(12 / math.sqrt(2))
    assert neuron_cosine(weight).item() == 0
    # Two neurons at 60° (distance 1), and at 120° (distance √3): |cos| = ½ both times.
    for degrees, distance in [(60, 1.0), (120, math.sqrt(3))]:
        angle = math.radians(degrees)
        weight = torch.tensor([[3.0, 0.0], [math.cos(angle), math.sin(angle)]]).double()
        assert hyperspherical_energy(weight).item() == pytest.approx(2 / distance)
        assert neuron_cosine(weight).item() == pytest.approx(0.5)
    assert hyperspherical_energy(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).item() == math.inf


def test_energy_is_the_sum_over_ordered_pairs():
    weight = torch.randn(6, 5, dtype=torch.float64)
    unit = weight / weight.norm(dim=1, keepdim=True)
    expected = sum(1 / (unit[i] - unit[j]).norm() for i in range(6) for j in range(6) if i != j)
    torch.testing.assert_close(hyperspherical_energy(weight), expected)
    cosines = [abs(unit[i] @ unit[j]) for i in range(6) for j in range(6) if i != j]
    torch.testing.assert_close(neuron_cosine(weight), torch.stack(cosines).mean())


def test_half_types_are_computed_in_float32():
    weight = torch.randn(6, 5).bfloat16()
    for measure in (cosine_gram, hyperspherical_energy, neuron_cosine, effective_rank):
        assert measure(weight).dtype == torch.float32
        torch.testing.assert_close(measure(weight), measure(weight.float()))


def test_effective_rank_in_closed_form():
    basis = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    for rank in (1, 3, 9):
        hidden = torch.randn(9, 9, dtype=torch.float64)
        hidden = torch.linalg.qr(hidden).Q[:, :rank] @ basis[:rank]
        assert effective_rank(hidden).item() == pytest.approx(rank)
    # Singular values 3 and 1: shares ¾ and ¼.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(expected)
