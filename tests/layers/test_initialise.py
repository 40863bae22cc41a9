import pytest
import torch
from torch import nn

from chela.layers.param_groups import initialise, param_groups


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


def test_param_groups_hold_every_parameter_once() -> None:
    from chela import ChelaLayer

    layer = ChelaLayer(16, l_max=64)
    layer.out.weight.requires_grad_(False)
    groups = {group["name"]: group for group in param_groups(layer, lr=2e-3, weight_decay=0.1)}
    found = [parameter for group in groups.values() for parameter in group["params"]]
    assert len(found) == len({id(p) for p in found}) == sum(p.requires_grad for p in layer.parameters())
    where = {id(p): name for name, group in groups.items() for p in group["params"]}
    assert groups[where[id(layer.conv.long.kernel.weight)]]["lr"] == 1e-3
    assert groups[where[id(layer.conv.long.kernel.weight)]]["weight_decay"] == 0.1
    assert groups[where[id(layer.conv.long.gain)]]["weight_decay"] == 0
    assert groups[where[id(layer.cores[0].gamma)]]["weight_decay"] == 0
    assert groups[where[id(layer.cores[0].gamma)]]["lr"] == 2e-3
    assert groups[where[id(layer.cores[0].norm.weight)]]["weight_decay"] == 0
    assert groups[where[id(layer.value.weight)]]["weight_decay"] == 0.1


def test_param_groups_take_another_rate_and_decay_for_kernels() -> None:
    from chela import ChelaLayer

    layer = ChelaLayer(16, l_max=64)
    groups = param_groups(layer, lr=2e-3, weight_decay=0.1, kernel_lr=5e-4, kernel_weight_decay=0.3)
    assert {group["lr"] for group in groups} == {2e-3, 5e-4}
    assert {group["weight_decay"] for group in groups if group["lr"] == 5e-4} == {0.3}
