import pytest
import torch
from torch import nn

from chela.layers.param_groups import initialise


def net(width: int) -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(4, width), "last": nn.Linear(3, 2)})


def test_values_depend_on_seed_and_path_alone() -> None:
    one, other = net(5), net(50)  # the second draws more numbers before it reaches "last"
    initialise(one, seed=3)
    torch.randn(7)
    initialise(other, seed=3)
    assert torch.equal(one["last"].weight, other["last"].weight)
    initialise(other, seed=4)
    assert not torch.equal(one["last"].weight, other["last"].weight)


def test_global_generator_is_left_alone() -> None:
    model = net(5)
    before = torch.get_rng_state()
    initialise(model, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_module_that_cannot_be_reset_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

    with pytest.raises(TypeError, match=r"inner: expected reset_parameters\(\) on Bare"):
        initialise(nn.ModuleDict({"inner": Bare()}), seed=0)
