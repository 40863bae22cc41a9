"""The list of systems: its figures against counts made another way."""

from types import SimpleNamespace

import pytest
import torch

from chela.config.compose import resolve
from chela.config.groups import names
from chela.models import build_model
from chela.models.__main__ import cost, main

TASK = SimpleNamespace(num_classes=10, l_max=200, vocab_size=17, input_dim=1, pair=False)


def _config(name: str, *words: str):
    return resolve([f"model={name}", "preset=mini", "model.mixer.d_value=128", *words]).model


def test_flops_of_softmax_by_hand():
    """Per token and layer: four projections, two products with L keys, the feed-forward layer; and the head once."""
    d, v, ffn, depth, length = 64, 128, 128, 4, 200
    layer = 2 * d * 3 * v + 2 * v * d + 4 * length * v + 4 * d * ffn
    head = (2 * d * 128 + 2 * 128 * 10) / length
    assert cost(_config("softmax"), TASK).flops_per_token == pytest.approx(depth * layer + head)


@pytest.mark.parametrize(("name", "heads", "inside", "gate"), [("linear", 4, 0, 0), ("lightning", 8, 64, 16)])
def test_flops_of_linear_attention_by_hand(name, heads, inside, gate):
    """Two products with the state and a column that divides; looking back, two inside chunks of 64, and a gate."""
    d, v, ffn, depth = 64, 128, 128, 4
    width = v // heads
    projections = 2 * d * 3 * v + 2 * v * d + 2 * gate * (d + v)
    divides = 0 if inside else 4 * width
    layer = projections + heads * (4 * width * width + 4 * inside * width + divides) + 4 * d * ffn
    head = (2 * d * 128 + 2 * 128 * 10) / 200
    assert cost(_config(name), TASK).flops_per_token == pytest.approx(depth * layer + head)


@pytest.mark.parametrize("name", ["softmax", "mega"])
def test_full_attention_grows_with_the_length_and_the_others_do_not(name):
    longer = SimpleNamespace(**{**vars(TASK), "l_max": 800})
    grown = cost(_config(name), longer).flops_per_token / cost(_config(name), TASK).flops_per_token
    others = cost(_config("linear"), longer).flops_per_token / cost(_config("linear"), TASK).flops_per_token
    assert grown > 1.5
    assert others < 1.01


def test_parameters_are_those_of_the_real_network():
    task = SimpleNamespace(num_classes=2, l_max=64, vocab_size=30, input_dim=1, pair=True)
    for name in ("chela", "mega_chunk", "lion_s"):
        model = build_model(_config(name), task, 0)
        found = cost(_config(name), task)
        assert found.parameters == sum(p.numel() for p in model.parameters())
        mixers = [b.mixer.layer for b in model.backbone.blocks]
        assert found.mixer_parameters == sum(p.numel() for m in mixers for p in m.parameters())


def test_the_command_lists_every_system(capsys):
    assert main(["preset=tiny", "model.depth=1"]) == 0
    out = capsys.readouterr().out
    listed = [line.split()[0] for line in out.splitlines() if line and line.split()[0] in names("model")]
    assert listed == names("model")


def test_the_command_refuses_in_one_line(capsys):
    assert main(["model=lion_s"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["task=chess"]) == 2
    assert torch.is_grad_enabled()
