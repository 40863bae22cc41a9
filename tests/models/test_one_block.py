"""One block for all: whatever the mixer, everything outside it has the same parameters and the same initial values."""

import functools
from types import SimpleNamespace

import pytest
import torch

from chela.config.compose import resolve
from chela.config.groups import names
from chela.core.errors import UsageError
from chela.models import build_model

LISTOPS = SimpleNamespace(num_classes=10, l_max=96, vocab_size=17, input_dim=1, pair=False)
PIXELS = SimpleNamespace(num_classes=2, l_max=64, vocab_size=None, input_dim=1, pair=False)
PAIRS = SimpleNamespace(num_classes=2, l_max=64, vocab_size=30, input_dim=1, pair=True)


TASKS = {"symbols": LISTOPS, "pixels": PIXELS, "pairs": PAIRS}


@functools.cache
def _outside(name: str, task: str) -> dict[str, torch.Tensor]:
    model = build_model(resolve([f"model={name}", "preset=tiny"]).model, TASKS[task], 0)
    return {key: value for key, value in model.state_dict().items() if ".mixer.layer." not in key}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", [name for name in names("model") if name != "chela"])
def test_all_but_the_mixer_is_the_same(name, task):
    ours, theirs = _outside("chela", task), {**_outside(name, task)}
    positions = theirs.pop("backbone.positions.weight", None)
    assert (positions is not None) == (resolve([f"model={name}"]).model.positions == "learned")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["model=lightning", "model.causal=false"], "model: lightning: expected causal=True"),
        (["model=softmax", "model.mixer.d_value=20", "model.mixer.heads=4"], "model: rotary: expected an even width"),
        (["model=s4d", "model.mixer.d_state=7"], "model: s4d: expected an even d_state"),
    ],
)
def test_options_that_do_not_fit_are_one_line(words, match):
    with pytest.raises(UsageError, match=match):
        build_model(resolve([*words, "preset=mini"]).model, LISTOPS, 0)
