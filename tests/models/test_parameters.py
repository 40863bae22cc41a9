"""Parameter counts: MEGA's published ones, and that the rows of the mini table are of one size."""

import functools

import pytest
import torch

from chela.config.compose import resolve
from chela.config.groups import names
from chela.config.schema import ModelConfig
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from tests.models.test_one_block import LISTOPS


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_mega_on_raw_speech_has_the_published_size():
    """SC-raw, big: 6 layers, d 72, v = FFN = 144, z 36, batch norm before each layer, chunk 1000: 476K parameters."""
    options = {"d_qk": 36, "d_value": 144, "averages": 16, "attention_function": "laplace", "chunk": 1000}
    mixer = mixer_options("mega")(**options)
    config = ModelConfig(mixer=mixer, d_model=72, depth=6, d_ff=144, d_head=144, norm="batch")
    model = build_model(config, TaskFacts(num_classes=10, l_max=16_000, vocab_size=None), 0)
    assert round(count(model) / 1000) == 476


@functools.cache
def mini_size(name: str) -> int:
    return count(build_model(resolve([f"model={name}", "task=listops", "preset=mini"]).model, LISTOPS, 0))


@pytest.mark.parametrize("name", [name for name in names("model") if not name.startswith("chela")])
def test_the_mini_rows_are_of_one_size(name):
    assert 0.89 <= mini_size(name) / mini_size("chela") <= 1.10
