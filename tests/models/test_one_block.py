"""One block for all: whatever the mixer, everything outside it has the same parameters and the same initial values."""

import functools
from types import SimpleNamespace

import pytest
import torch

from chela.config import resolve
from chela.errors import UsageError
from chela.groups import names
from chela.models import build_model

LISTOPS = SimpleNamespace(num_classes=10, l_max=96, vocab_size=17, input_dim=1, pair=False)
PIXELS = SimpleNamespace(num_classes=2, l_max=64, vocab_size=None, input_dim=1, pair=False)
PAIRS = SimpleNamespace(num_classes=2, l_max=64, vocab_size=30, input_dim=1, pair=True)


TASKS = {"symbols": LISTOPS, "pixels": PIXELS, "pairs": PAIRS}


@functools.cache
def _outside(name: str, task: str, seed: int = 0) -> dict[str, torch.Tensor]:
    model = build_model(resolve([f"model={name}", "preset=tiny"]).model, TASKS[task], seed)
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


def test_another_seed_gives_other_values():
    a, b = _outside("chela", "symbols"), _outside("chela", "symbols", seed=1)
    assert not torch.equal(a["backbone.embedding.weight"], b["backbone.embedding.weight"])


@pytest.mark.parametrize("name", names("model"))
def test_padding_does_not_move_the_scores(name):
    model = build_model(resolve([f"model={name}", "preset=tiny"]).model, LISTOPS, 0).double().eval()
    inputs = torch.randint(1, 17, (2, 40), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([inputs, torch.zeros(2, 56, dtype=torch.long)], dim=1)
    with torch.no_grad():
        scores = model(padded, torch.arange(96).expand(2, 96) < 40)
        torch.testing.assert_close(scores, model(inputs), rtol=0, atol=1e-10)


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
