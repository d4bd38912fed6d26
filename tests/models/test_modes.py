import pytest
from torch import nn

from rotopo.models.modes import evaluating


def test_each_module_is_as_it_was_behind_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval()))
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before == [True, True, True, False]
