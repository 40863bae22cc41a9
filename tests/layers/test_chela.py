"""The CHELA layer: gradients, padding, causality, and the equations written out once more."""

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from chela.layers.mixers.chela import ChelaLayer

D, L_MAX = 6, 24
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "multi-head": {"heads": 3, "d_value": 12},
    "decay": {"attention": "decay", "heads": 2},
    "output-gate": {"gate": "output"},
    "no-gate": {"gate": "none"},
    "conv-only": {"attention": "none"},
    "attention-only": {"conv": "none"},
    "short-only": {"conv": "short"},
    "long-only": {"conv": "long"},
    "free-kernel": {"long_kernel": "free"},
    "ema-kernel": {"long_kernel": "ema"},
    "no-reparam": {"reparam": False},
    "unnormalised": {"normalize": False, "feature_map": "silu"},
}


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> ChelaLayer:
    return ChelaLayer(D, l_max=L_MAX, **{"d_qk": 4, "d_value": 8, **options}).to(dtype).eval()


@pytest.mark.parametrize("causal", [False, True], ids=["two-sided", "causal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_does_not_matter(variant: str, causal: bool) -> None:
    mixer = layer(causal=causal, **VARIANTS[variant])
    x, lengths = torch.randn(3, 17, D, dtype=torch.float64), torch.tensor([17, 9, 1])
    mask = torch.arange(17) < lengths[:, None]
    out = mixer(x, mask)
    assert torch.equal(out[~mask], torch.zeros_like(out[~mask]))

    other = torch.where(mask[..., None], x, 1e3)  # other content
    longer, longer_mask = F.pad(other, (0, 0, 0, 5), value=-7.0), F.pad(mask, (0, 5))  # and more of it
    torch.testing.assert_close(mixer(longer, longer_mask)[:, :17][mask], out[mask], rtol=0, atol=1e-10)
    for row, length in enumerate(lengths):
        alone = mixer(x[row : row + 1, :length])
        torch.testing.assert_close(alone[0], out[row, :length], rtol=0, atol=1e-10)


def test_padding_does_not_matter_in_float32() -> None:
    mixer = layer(torch.float32)
    x, mask = torch.randn(2, 20, D), torch.arange(20) < torch.tensor([[20], [11]])
    longer, longer_mask = F.pad(x, (0, 0, 0, 4), value=9.0), F.pad(mask, (0, 4))
    torch.testing.assert_close(mixer(longer, longer_mask)[:, :20][mask], mixer(x, mask)[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_sees_no_future(variant: str) -> None:
    mixer = layer(causal=True, **VARIANTS[variant])
    x = torch.randn(2, 20, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 12:] += 1.0
    before, after = mixer(x), mixer(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 12:], after[:, 12:])


@pytest.mark.parametrize("variant", ["default", "long-only", "attention-only"])
def test_two_sided_sees_the_future(variant: str) -> None:
    mixer = layer(**VARIANTS[variant])
    x = torch.randn(1, 20, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 12:] += 1.0
    assert not torch.allclose(mixer(x)[:, :12], mixer(changed)[:, :12])


@pytest.mark.parametrize(("causal", "masked"), list(itertools.product([False, True], repeat=2)))
def test_gradients(causal: bool, masked: bool) -> None:
    mixer = layer(causal=causal, heads=2)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if masked else None
    names = [name for name, _ in mixer.named_parameters()]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x, mask))

    values = [value.detach().clone().requires_grad_() for value in mixer.parameters()]
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_default_is_the_equations() -> None:
    """Steps 1 to 5 of the definition, with direct sums in place of the ops."""
    m = layer(reparam=False)
    x = torch.randn(1, 9, D, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 2, 2))
    short = sum(m.conv.short.weight[:, j] * padded[:, j : j + 9] for j in range(5))
    u = F.silu(short)
    forward, back = m.conv.long.kernel(9)
    long = torch.zeros_like(u)
    for t, s in itertools.product(range(9), range(9)):
        long[:, t] += u[:, s] * (forward[:, t - s] if s <= t else back[:, s - t - 1])
    c = F.silu(long + m.conv.long.skip * u)
    z = m.query_key.project(c)
    (gamma_q, gamma_k), (beta_q, beta_k) = m.query_key.gamma[:, 0], m.query_key.beta[:, 0]
    q, k = F.elu(z * gamma_q + beta_q) + 1, F.elu(z * gamma_k + beta_k) + 1
    v = F.silu(m.value(x))
    weights = q @ k.transpose(1, 2)
    o = (weights / weights.sum(-1, keepdim=True)) @ v
    h = F.silu(m.skip(c) + m.out(m.norm(o) * F.silu(m.gate_in(c))))
    stream = torch.randn_like(x)
    torch.testing.assert_close(m(x, stream=stream), torch.sigmoid(m.highway(c)) * (h - stream), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_one_head_need_not_be_normalised(causal: bool) -> None:
    x = torch.randn(2, L_MAX, D, dtype=torch.float64)
    for heads, same in ((1, True), (2, False)):
        divided, plain = (layer(causal=causal, heads=heads, normalize=normalize) for normalize in (True, False))
        divided.norm.eps = plain.norm.eps = 0.0
        with torch.no_grad():
            for parameter in divided.parameters():
                parameter.normal_()  # at the start the heads are one like the other
        plain.load_state_dict(divided.state_dict())
        assert torch.allclose(divided(x), plain(x), rtol=0, atol=1e-9) == same


@pytest.mark.parametrize("option", [{"conv": "wide"}, {"attention": "softmax"}, {"gate": "x"}, {"feature_map": "relu"}])
def test_unknown_names_say_what_is_known(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected one of .*, got"):
        ChelaLayer(D, l_max=L_MAX, **option)


def test_heads_must_divide_the_value_width() -> None:
    with pytest.raises(ValueError, match="multiple of heads=3, got 8"):
        layer(heads=3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_equals_the_whole(variant: str) -> None:
    mixer = layer(causal=True, **VARIANTS[variant])
    x = torch.randn(2, L_MAX, D, dtype=torch.float64)
    with torch.no_grad():
        expected = mixer(x)
    state, outs = mixer.start(2), []
    for t in range(L_MAX):
        out, state = mixer.step(x[:, t], state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), expected, rtol=0, atol=1e-10)


def test_step_needs_a_causal_layer() -> None:
    with pytest.raises(RuntimeError, match="expected causal=True"):
        layer().start(1)


def test_merged_equals_eval_after_training_steps() -> None:
    mixer = layer(torch.float32).train()
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=1e-2)
    x, mask = torch.randn(3, 20, D), torch.arange(20) < torch.tensor([[20], [9], [3]])
    for _ in range(5):
        optimizer.zero_grad()
        mixer(x, mask).square().mean().backward()
        optimizer.step()
    mixer.eval()
    expected = mixer(x, mask)
    mixer.conv.merge()
    torch.testing.assert_close(mixer(x, mask), expected, rtol=0, atol=1e-5)
