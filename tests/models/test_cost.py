"""The list of systems: its figures against counts made another way."""

from types import SimpleNamespace

import torch

from chela.config.compose import names, resolve
from chela.models import build_model
from chela.models.__main__ import cost, main

TASK = SimpleNamespace(num_classes=10, l_max=200, vocab_size=17, input_dim=1, pair=False)


def _config(name: str, *words: str):
    return resolve([f"model={name}", "preset=mini", "model.mixer.d_value=128", *words]).model


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
