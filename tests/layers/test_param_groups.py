"""Learning rates travel with the layers: into any optimiser, through copies and pickles."""

import copy
import io

import pytest
import torch

from chela import ChelaLayer, param_groups
from chela.layers.mixers import build_mixer
from chela.layers.param_groups import mark


def _rates(module) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in module.named_parameters()}
    groups = param_groups(module, lr=0.1, weight_decay=0.5)
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.fixture
def network():
    return torch.nn.ModuleDict({"a": ChelaLayer(16, l_max=64), "b": build_mixer("s4d", 16, {}, l_max=64)})


def test_every_parameter_is_in_one_group(network):
    groups = param_groups(network, lr=0.1, weight_decay=0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())


def test_matrices_decay_as_adamw_has_it_unless_said(network):
    named = {group["name"]: group["weight_decay"] for group in param_groups(network, lr=0.1)}
    assert (named["decay"], named["no_decay"]) == (0.01, 0.0)


def test_what_a_layer_asks_for_is_what_it_gets(network):
    rates = _rates(network)
    assert rates["a.conv.long.kernel.weight"] == (1e-3, 0.5)
    assert rates["a.conv.long.gain"] == (0.1, 0.0)
    assert rates["a.cores.0.gamma"] == rates["a.cores.0.norm.weight"] == (0.1, 0.0)
    assert rates["a.value.weight"] == (0.1, 0.5)
    assert rates["a.value.bias"] == (0.1, 0.0)
    assert rates["b.kernel.frequency"] == (1e-3, 0.0)
    assert rates["b.kernel.output_matrix"] == (0.1, 0.5)


def test_the_averages_of_mega_have_the_rate_of_kernels_where_asked():
    for asked in (False, True):
        rates = _rates(build_mixer("mega", 4, {"kernel_rate": asked}, l_max=10))
        averages = {name for name in rates if name.startswith("ema.")}
        assert len(averages) == 4
        assert {name for name, pair in rates.items() if pair == (1e-3, 0.5)} == (averages if asked else set())


def test_a_copy_asks_for_the_same(network):
    assert _rates(copy.deepcopy(network)) == _rates(network)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    assert _rates(torch.load(buffer, weights_only=False)) == _rates(network)
    assert _rates(copy.deepcopy(network).double()) == _rates(network)


def test_another_rate_for_the_kernels(network):
    groups = {g["name"]: g["lr"] for g in param_groups(network, lr=0.1, weight_decay=0.5, kernel_lr=3e-4)}
    assert groups["marked(lr=0.0003, weight_decay=0)"] == groups["marked(lr=0.0003, weight_decay=0.5)"] == 3e-4
    assert groups["decay"] == 0.1
    groups = param_groups(network["a"], lr=0.1, weight_decay=0.5, kernel_lr=3e-4, kernel_weight_decay=0.3)
    assert {group["weight_decay"] for group in groups if group["lr"] == 3e-4} == {0.3}


def test_frozen_parameters_are_left_out(network):
    everything = _rates(network)
    network["a"].out.weight.requires_grad_(False)
    assert everything.keys() - _rates(network).keys() == {"a.out.weight"}
    network["a"].requires_grad_(False)
    assert not any(name.startswith("a.") for name in _rates(network))


def test_marking_some_or_all():
    layer = torch.nn.Linear(2, 3)
    mark(layer, "weight", lr=0.01)
    assert _rates(layer) == {"weight": (0.01, 0.5), "bias": (0.1, 0.0)}
    mark(layer, weight_decay=0.2)
    assert _rates(layer) == {"weight": (0.1, 0.2), "bias": (0.1, 0.2)}
