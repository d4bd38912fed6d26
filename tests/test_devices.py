"""What is done about what Apple's GPU lacks, without one: tensors that say that they are there, and
refuse float64 as it does."""

import pytest
import torch
from torch import nn

from rotopo.devices import exact, for_float64, refuse_on_mps
from rotopo.errors import InputError
from rotopo.metrics.means import PairMeans
from rotopo.models.loading import resolve_dtype
from rotopo.objectives import BCO, DPO

MPS = torch.device("mps")


class OnMps(torch.Tensor):
    """Values that say that they are on mps, and that refuse float64 there as it does."""

    @property
    def device(self):
        return MPS

    def to(self, where, *_, **__):
        assert where == torch.device("cpu")
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")


def on_mps(values: list) -> torch.Tensor:
    return torch.tensor(values).as_subclass(OnMps)


def test_values_are_exact_on_the_processor():
    assert for_float64(MPS) == torch.device("cpu")
    assert for_float64(torch.device("cuda", 1)) == torch.device("cuda", 1)
    found = exact(on_mps([0.1, 0.2]))
    assert found.dtype == torch.float64
    assert found.device.type == "cpu"


def test_means_of_values_on_mps():
    means = PairMeans(["loss"])
    means.to(for_float64(MPS))
    means.update({"loss": (on_mps([1.0, 2.0, 7.0]), on_mps([True, True, False]))})
    assert means.compute() == {"loss": 1.5}


def test_auto_is_float32_on_an_apple_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_dtype("auto") == torch.float32


@pytest.mark.parametrize(
    ("module", "dtype", "attention", "expected"),
    [
        (nn.Linear(1, 1), "float64", "segments", "policy.dtype is float64"),
        (nn.Linear(1, 1), "auto", "flex_attention", "policy.attention is 'flex_attention'"),
        (BCO(), "auto", "segments", "BCO keeps reward_sums in float64"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(module, dtype, attention, expected):
    with pytest.raises(InputError, match=expected) as refusal:
        refuse_on_mps(MPS, module, dtype, attention)
    assert "\n" not in str(refusal.value)
    refuse_on_mps(torch.device("cpu"), module, dtype, attention)
    refuse_on_mps(MPS, DPO(), "auto", "segments")
