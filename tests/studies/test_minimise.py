"""The descent, on functions whose minima are known."""

import pytest
import torch

from rotopo.studies.minimise import minimise


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_bent_valley_is_followed_to_its_end_at_any_scale(scale):
    def rosenbrock(x):
        return scale * (100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)

    found = minimise(rosenbrock, vector(-1.2, 1.0))
    assert found.status == "stationary"
    torch.testing.assert_close(found.point, vector(1, 1), rtol=0, atol=1e-6)


def test_far_minima_of_shallow_losses_are_reached():
    found = minimise(lambda x: (1e-4 * (x - 5000)).cosh().log().sum(), vector(0.0))
    torch.testing.assert_close(found.point, vector(5000), rtol=1e-8, atol=0)


def test_the_minimum_of_a_piecewise_linear_loss_is_called_a_kink():
    found = minimise(lambda x: (x[0] - 1).abs() + 3 * (x[0] - x[1] + 2).abs(), vector(7.0, -4.0))
    assert found.status == "kink"
    torch.testing.assert_close(found.point, vector(1, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", [lambda x: x.sum(), lambda x: -x.square().sum()])
def test_a_loss_that_falls_for_ever_is_called_unbounded(loss):
    assert minimise(loss, vector(1.0, 2.0)).status == "unbounded"


def test_a_flat_loss_is_stationary_where_it_stands():
    found = minimise(lambda x: 0 * x.sum() + 3, vector(1.0, 2.0))
    assert (found.status, found.value, found.gradient) == ("stationary", 3.0, 0.0)
    assert torch.equal(found.point, vector(1, 2))


def test_a_sigmoid_is_descended_until_nothing_is_left_to_gain():
    found = minimise(lambda x: x.sigmoid().sum(), vector(3.0))
    assert found.status == "stationary"
    assert found.value < 1e-15
