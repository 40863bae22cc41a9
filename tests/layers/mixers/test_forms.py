"""The forms of one system agree: chunks, recurrences, steps, and limits in which two definitions meet."""

import math

import pytest
import torch

from chela.layers.mixers import build_mixer
from chela.layers.mixers.lightning import alibi_slopes
from chela.layers.mixers.lion import from_previous
from chela.ops import linear_attention
from tests.layers.mixers import definitions
from tests.layers.mixers.systems import D_MODEL, L_MAX, SYSTEMS, System

LIONS = ["lion_lit", "lion_d", "lion_s"]


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 150, D_MODEL, dtype=torch.float64)  # longer than two chunks of the op


def _recurrent(layer, x, real):
    """LION by its two recurrences, token by token (2502.16249, section 3.3), on the real tokens alone."""
    out = torch.zeros_like(x)
    for row, tokens in enumerate(real):
        q, k, v = (part.double() for part in layer.features(x[row, tokens]))
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last column sums the weights
        edges = layer.edges(x[None, row, tokens], None)[1]
        decay = torch.ones_like(q[..., 0]) if edges is None else edges.double().exp().expand(1, len(q), -1)[0]
        total = -(q * k).sum(-1, keepdim=True) * v  # both sweeps have the diagonal
        for order in (range(len(q)), reversed(range(len(q)))):
            sums = 0.0
            for t in order:  # an edge has the decay of the token that it leaves
                sums = sums + k[t, :, :, None] * v[t, :, None, :]
                total[t] += (q[t, :, None, :] @ sums)[:, 0]
                sums = sums * decay[t, :, None, None]
        out[row, tokens] = layer.merge((total[..., :-1] / (1e-6 + total[..., -1:])).to(x), x[row, tokens], None)
    return out


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LIONS)
def test_the_three_forms_of_lion_agree(name, padded, x):
    layer = SYSTEMS[name].build(False)
    mask = torch.arange(150) < torch.tensor([[150], [101]]) if padded else None
    real = torch.ones(2, 150, dtype=torch.bool) if mask is None else mask
    chunked, recurrent = layer(x, mask), _recurrent(layer, x, real)
    torch.testing.assert_close(chunked, recurrent, rtol=1e-9, atol=1e-10)
    short, few = x[:, 80:120], real[:, 80:120]  # the full form, across the end of the second sequence
    full = definitions.lion(layer, short, few)
    torch.testing.assert_close(layer(short, few), full, rtol=1e-8, atol=1e-9)
    single, single_mask = layer.float(), mask
    torch.testing.assert_close(single(x.float(), single_mask), chunked.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(_recurrent(single, x.float(), real), chunked.float(), rtol=0, atol=1e-6)


def test_mega_in_one_chunk_is_mega(x):
    whole = SYSTEMS["mega"].build(False)
    one_chunk = System("mega", SYSTEMS["mega"].options | {"chunk": L_MAX}, definitions.mega).build(False)
    longer = System("mega", SYSTEMS["mega"].options | {"chunk": 10 * L_MAX}, definitions.mega).build(False)
    for other in (one_chunk, longer):
        assert torch.equal(other(x), whole(x))


def test_a_mega_chunk_hears_no_other_by_attention(x):
    """Only the moving average crosses the border of a chunk; with ω alone, nothing does."""
    layer = SYSTEMS["mega-chunk"].build(False)
    torch.nn.init.zeros_(layer.ema.gamma)
    changed = x.clone()
    changed[:, 5:10] += 1
    a, b = layer(x, stream=x), layer(changed, stream=x)
    moved = (a - b).abs().amax((0, 2)) > 1e-12  # the FFT rounds
    assert moved.nonzero().flatten().tolist() == list(range(5, 10))


def test_the_slopes_of_the_paper():
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    twelve = alibi_slopes(12)
    assert twelve[:8] == alibi_slopes(8)
    assert twelve[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_the_decay_of_lightning_fades_with_the_layer():
    decays = [build_mixer("lightning", 16, {}, causal=True, layer=i, depth=4).log_decay for i in range(4)]
    slopes = torch.tensor([2.0**-h for h in range(1, 9)])
    for i, decay in enumerate(decays):
        torch.testing.assert_close(decay, -slopes * (1 - i / 3 + 1e-5))


def test_lightning_is_causal_only():
    with pytest.raises(ValueError, match="causal=True"):
        build_mixer("lightning", 16, {}, causal=False)


def test_lightning_is_a_decayed_sum():
    """A key written at s is read at t with weight λ^(t−s): one impulse through a layer whose rest is the identity."""
    layer = SYSTEMS["lightning"].build(True)
    q, k, v = (torch.ones(1, 40, 8, 3, dtype=torch.float64) for _ in range(3))
    k[:, 1:] = 0
    o = linear_attention(q, k, v, causal=True, log_decay=layer.log_decay)
    expected = [3 * math.exp(-(2.0**-h) * 30) for h in range(1, 9)]
    torch.testing.assert_close(o[0, 30, :, 0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_edge_carries_the_last_real_token():
    values = torch.arange(1.0, 7.0).view(1, 6, 1)
    assert from_previous(values).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    mask = torch.tensor([[False, True, False, False, True, True]])
    assert from_previous(values, mask).flatten().tolist() == [0, 0, 2, 2, 2, 5]


def test_the_kernel_of_s4d_does_not_depend_on_the_length():
    kernel = SYSTEMS["s4d"].build(False).kernel
    forward, back = kernel(100)
    again, again_back = kernel(37)
    torch.testing.assert_close(forward[:, :37], again)
    torch.testing.assert_close(back[:, :36], again_back)
    longer, _ = kernel(3 * L_MAX)  # it is defined beyond l_max
    torch.testing.assert_close(longer[:, :100], forward)


@pytest.mark.parametrize("chunk", [0, 11])
def test_mega_without_chunks_refuses_more_than_l_max_tokens(chunk):
    layer = build_mixer("mega", 4, {"chunk": chunk}, l_max=10, causal=True)
    layer(torch.randn(1, 10, 4))
    with pytest.raises(ValueError, match="expected at most l_max=10 tokens, got 11; build the layer with a larger"):
        layer(torch.randn(1, 11, 4))
    state = layer.start(1)
    for _ in range(10):
        _, state = layer.step(torch.randn(1, 4), state)
    for feed, x in ((layer.step, torch.randn(1, 4)), (layer.prefill, torch.randn(1, 1, 4))):
        with pytest.raises(ValueError, match="expected at most l_max=10 tokens, got 11"):
            feed(x, state)


def test_mega_with_chunks_takes_more_than_l_max_tokens():
    layer = build_mixer("mega", 4, {"chunk": 5}, l_max=10, causal=False)
    assert layer(torch.randn(1, 23, 4)).shape == (1, 23, 4)


def test_mega_drops_of_its_moving_average():
    """Half of what the gates, queries and keys read is 0 at a dropout of a half."""
    layer = build_mixer("mega", D_MODEL, {}, l_max=L_MAX, dropout=0.5).train()
    kept = []
    layer.gates.register_forward_pre_hook(lambda module, args: kept.append((args[0] == 0).float().mean().item()))
    layer(torch.randn(4, 50, D_MODEL))
    assert kept[0] == pytest.approx(0.5, abs=0.05)
