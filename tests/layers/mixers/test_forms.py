"""The forms of one system agree: chunks, recurrences, steps, and limits in which two definitions meet."""

import pytest
import torch

from chela.layers.mixers import build_mixer
from chela.layers.mixers.lightning import alibi_slopes
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
        q, k, v = (part.double() for part in layer.features(layer.project(x[None, row, tokens], None)[0]))
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
def test_the_recurrence_of_lion_agrees(name, padded, x):
    layer = SYSTEMS[name].build(False)
    mask = torch.arange(150) < torch.tensor([[150], [101]]) if padded else None
    real = torch.ones(2, 150, dtype=torch.bool) if mask is None else mask
    chunked, recurrent = layer(x, mask), _recurrent(layer, x, real)
    torch.testing.assert_close(chunked, recurrent, rtol=1e-9, atol=1e-10)


def test_mega_in_one_chunk_is_mega(x):
    whole = SYSTEMS["mega"].build(False)
    one_chunk = System("mega", SYSTEMS["mega"].options | {"chunk": L_MAX}, definitions.mega).build(False)
    longer = System("mega", SYSTEMS["mega"].options | {"chunk": 10 * L_MAX}, definitions.mega).build(False)
    for other in (one_chunk, longer):
        assert torch.equal(other(x), whole(x))


def test_the_slopes_of_the_paper():
    assert alibi_slopes(8) == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    twelve = alibi_slopes(12)
    assert twelve[:8] == alibi_slopes(8)
    assert twelve[8:] == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


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


def test_mega_drops_of_its_moving_average():
    """Half of what the gates, queries and keys read is 0 at a dropout of a half."""
    layer = build_mixer("mega", D_MODEL, {}, l_max=L_MAX, dropout=0.5).train()
    kept = []
    layer.gates.register_forward_pre_hook(lambda module, args: kept.append((args[0] == 0).float().mean().item()))
    layer(torch.randn(4, 50, D_MODEL))
    assert kept[0] == pytest.approx(0.5, abs=0.05)
