"""One block for all: whatever the mixer, everything outside it has the same parameters and the same initial values.

And each system can fit a handful of sequences: gradients reach what has to move, at the rates of ``param_groups``.
"""

import functools
from types import SimpleNamespace

import pytest
import torch

from chela.config.compose import names, resolve
from chela.core.errors import UsageError
from chela.layers.param_groups import param_groups
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


FAST = ("chela", "mega_chunk")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names("model")]
)
def test_fits_sixteen_sequences(name):
    torch.manual_seed(0)
    inputs, labels = torch.randint(1, 17, (16, 20)), torch.randint(0, 10, (16,))
    mask = torch.arange(20) < torch.randint(8, 21, (16, 1))
    model = build_model(resolve([f"model={name}", "preset=tiny", "model.d_model=32"]).model, LISTOPS, 0)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.0))
    losses = []
    for _ in range(80):
        loss = torch.nn.functional.cross_entropy(model(inputs, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0], losses[::10]
