import pytest
from torch import nn

from rotopo.models.modes import evaluating


def test_each_module_is_as_it_was_behind_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval()))
    modes = [module.training for module in model.modules()]
    found = []

    def fail():
        with evaluating(model):
            found.extend(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert found == [False] * 4
    assert [module.training for module in model.modules()] == modes == [True, True, True, False]
