"""What holds for the state of every causal system: it goes on from where it was, and is a dict of plain tensors."""

import math

import pytest
import torch
from safetensors.torch import load, save
from torch.profiler import ProfilerActivity, profile

from chela.layers.mixers import build_mixer
from tests.layers.mixers.systems import CASES, D_MODEL, L_MAX, SYSTEMS

NAMES = [name for name, causal in CASES if causal]
FOR_EVER = [name for name in NAMES if name != "mega" and name != "mega-laplace"]
CONSTANT = [name for name in NAMES if name.startswith(("linear", "hedgehog", "lightning", "lion", "s4d", "chela-long"))]


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 149, D_MODEL, dtype=torch.float64)  # odd, longer than two chunks of the op


def _fed(layer, x, ends, state=None, **context):
    """Prefill up to each of ``ends``, then step."""
    state, outputs, at = layer.start(len(x)) if state is None else state, [], 0
    for end in ends:
        y, state = layer.prefill(x[:, at:end], state, **{name: given[:, at:end] for name, given in context.items()})
        outputs, at = [*outputs, y], end
    for t in range(at, x.shape[1]):
        y, state = layer.step(x[:, t], state, **{name: given[:, t] for name, given in context.items()})
        outputs.append(y[:, None])
    return torch.cat(outputs, dim=1), state


def _cloned(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prefills_and_steps_equal_the_whole(name, dtype, x):
    layer, x = SYSTEMS[name].build(True).to(dtype).eval(), x.to(dtype)
    context = SYSTEMS[name].context(x.flip(1))
    whole, near = layer(x, **context), 1e-8 if dtype == torch.float64 else 1e-4
    every = ((), (37, 38, 101, 140), (1, 66, 130), (x.shape[1],))
    for ends in every if dtype == torch.float64 else ((37, 101),):
        torch.testing.assert_close(_fed(layer, x, ends, **context)[0], whole, rtol=near, atol=near / 10)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_has_the_gradients_of_the_whole(name, x):
    layer, found = SYSTEMS[name].build(True), []
    for run in (layer, lambda x: layer.prefill(x, layer.start(2))[0]):
        leaf = x.clone().requires_grad_()
        grads = torch.autograd.grad(run(leaf).square().sum(), [leaf, *layer.parameters()], allow_unused=True)
        found.append([grad for grad in grads if grad is not None])
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_can_be_kept_branched_repeated_and_saved(name, x):
    layer = SYSTEMS[name].build(True).eval()
    _, state = layer.prefill(x[:, :70], layer.start(2))
    assert not any(t.requires_grad for t in state.values())
    state = layer.step(x[:, 70], state)[1]
    assert all(type(t) is torch.Tensor and len(t) == 2 and not t.is_complex() for t in state.values())
    kept, twice, saved = _cloned(state), {n: t.repeat_interleave(2, 0) for n, t in state.items()}, load(save(state))
    with torch.no_grad():
        wide, _ = _fed(layer, x[:, 71:].repeat_interleave(2, 0), (20,), twice)
        want, _ = _fed(layer, x[:, 71:], (20,), state)
        assert _same(kept, state)  # a prefill does not change it
        torch.testing.assert_close(wide[::2], want, rtol=0, atol=1e-10)
        torch.testing.assert_close(wide[1::2], want, rtol=0, atol=1e-10)
        for branch in (kept, saved):
            got, _ = _fed(layer, x[:, 71:], (), _cloned(branch))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_state_size_counts_the_state(name, x):
    layer = SYSTEMS[name].build(True)
    x = x.repeat(1, 2, 1)
    for length in (0, 5, 65, 130, *((L_MAX + 30,) if name in FOR_EVER else ())):  # whole chunks
        state = _fed(layer, x[:, :length], (length - 1,) if length > 65 else ())[1] if length else layer.start(2)
        numbers = sum(tensor[0].numel() for key, tensor in state.items() if "position" not in key)
        assert layer.state_size(length) == numbers


@pytest.mark.parametrize("name", ["softmax", "mega"])
@torch.no_grad()
def test_a_step_writes_its_own_keys_and_values_alone(name):
    layer = build_mixer(name, 64, {}, l_max=2048, causal=True).eval()
    x = torch.randn(1, 1280, 64)
    whole, (_, state) = layer(x), layer.prefill(x[:, :1023], layer.start(1))
    cache, outputs = state["keys"].nbytes + state["values"].nbytes, []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for token in x[:, 1023:].unbind(1):
            y, state = layer.step(token, state)
            outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), whole[:, 1023:], rtol=1e-4, atol=1e-6)
    events = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    allocated = sum(size for size in sizes if size > 0)  # the others are freed
    assert 2 * cache < allocated < 64 * cache  # it doubles once; a copy a step would be 257


@pytest.mark.parametrize("name", FOR_EVER)
@torch.no_grad()
def test_far_beyond_l_max_steps_and_prefill_agree(name):
    layer = SYSTEMS[name].build(True).eval()
    x = torch.randn(1, 15 * L_MAX, D_MODEL, dtype=torch.float64)  # more than two pieces of a sum of exponentials
    whole, state = _fed(layer, x, (x.shape[1],))
    torch.testing.assert_close(_fed(layer, x, (7 * L_MAX, 14 * L_MAX + 11))[0], whole, rtol=1e-8, atol=1e-8)
    if name in CONSTANT:
        assert {k: t.shape for k, t in state.items()} == {k: t.shape for k, t in layer.start(1).items()}
        assert layer.state_size(1) == layer.state_size(10**6)


@pytest.mark.parametrize("name", sorted({name for name, causal in CASES if not causal}))
def test_a_layer_that_looks_ahead_has_no_state(name):
    with pytest.raises(RuntimeError, match="expected causal=True"):
        SYSTEMS[name].build(False).start(1)


def test_half_precision_goes_on_under_autocast(x):
    for name in ("chela", "softmax", "mega-chunk", "s4d", "lion_s"):
        layer = SYSTEMS[name].build(True).float().eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            whole = layer(x.float()).float()
            got = _fed(layer, x.float(), (70,))[0].float()
        assert (got - whole).norm() <= 0.05 * whole.norm() and math.isfinite(got.sum())
