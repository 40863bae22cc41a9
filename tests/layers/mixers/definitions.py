"""The systems, written densely from their equations in O(L²) or by plain loops; no op of the package is called.

Every function takes the layer only for its parameters. Shapes: x (B, L, D), real (B, L) bool; weights (B, H, L, L).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chela.layers.long_kernel import MultiscaleKernel

EPS = 1e-6


def affine(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    y = torch.einsum("oi,...i->...o", linear.weight, x)
    return y if linear.bias is None else y + linear.bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def shifted_sum(taps: Tensor, x: Tensor, ahead: int) -> Tensor:
    """Σ_j taps[:, j] x_{t + j − (K − 1 − ahead)}, x being 0 outside."""
    size = taps.shape[1]
    padded = torch.nn.functional.pad(x, (0, 0, size - 1 - ahead, ahead))
    return sum(taps[:, j] * padded[:, j : j + x.shape[1]] for j in range(size))


def heads(layer, x: Tensor, real: Tensor) -> list[Tensor]:
    """Queries, keys, values (B, H, L, Z)."""
    y = affine(layer.qkv, x)
    if layer.short is not None:
        taps = layer.short.weight
        ahead = 0 if layer.causal else taps.shape[1] // 2
        y = silu(shifted_sum(taps, y * real[..., None], ahead))
    return [part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in y.split(y.shape[-1] // 3, dim=-1)]


def join(o: Tensor) -> Tensor:
    """(B, H, L, E) to (B, L, H·E)."""
    return torch.cat(list(o.unbind(1)), dim=-1)


def visible(x: Tensor, real: Tensor, causal: bool) -> Tensor:
    """1 where query i sees key j: (B, 1, L, L)."""
    L = x.shape[1]
    seen = real[:, None, None, :].expand(-1, 1, L, L)
    if causal:
        seen = seen & (torch.arange(L)[:, None] >= torch.arange(L))
    return seen.to(x.dtype)


def divided(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v / (EPS + weights.sum(-1, keepdim=True))


def distance(L: int) -> Tensor:
    return (torch.arange(L)[:, None] - torch.arange(L)).to(torch.float64)


def linear(layer, x: Tensor, real: Tensor) -> Tensor:
    q, k, v = heads(layer, x, real)
    q, k = (torch.where(t > 0, t + 1, torch.exp(t)) for t in (q, k))
    o = divided(q @ k.transpose(-1, -2) * visible(x, real, layer.causal), v)
    return affine(layer.out, join(o)) * real[..., None]


def rotated(x: Tensor) -> Tensor:
    """Pairs (i, i + Z/2) as complex numbers, turned by position · 10000^(−2i/Z)."""
    L, Z = x.shape[-2:]
    rate = 10_000.0 ** (-torch.arange(Z // 2, dtype=torch.float64) * 2 / Z)
    turn = torch.exp(1j * torch.arange(L, dtype=torch.float64)[:, None] * rate)
    turned = torch.complex(x[..., : Z // 2], x[..., Z // 2 :]) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def softmax(layer, x: Tensor, real: Tensor) -> Tensor:
    q, k, v = heads(layer, x, real)
    if layer.rotary:
        q, k = rotated(q), rotated(k)
    weights = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])) * visible(x, real, layer.causal)
    o = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return affine(layer.out, join(o)) * real[..., None]


def hedgehog(layer, x: Tensor, real: Tensor) -> Tensor:
    q, k, v = heads(layer, x, real)

    def phi(y: Tensor, learned) -> Tensor:
        y = torch.stack([y[:, h] @ learned.weight[h].T + learned.bias[h] for h in range(layer.heads)], dim=1)
        positive = torch.exp(torch.cat([y, -y], dim=-1))
        return positive / positive.sum(-1, keepdim=True)

    weights = phi(q, layer.query_map) @ phi(k, layer.key_map).transpose(-1, -2)
    o = divided(weights * visible(x, real, layer.causal), v)
    return affine(layer.out, join(o)) * real[..., None]


def lightning(layer, x: Tensor, real: Tensor, index: int, depth: int) -> Tensor:
    """o_t = Σ_{s≤t} λ^(t−s) (q_t·k_s) v_s with the slopes of eight heads, 2^−1 … 2^−8, times the layer's factor."""
    assert layer.heads == 8
    factor = 1.0 if depth == 1 else 1 - index / (depth - 1) + 1e-5
    rate = torch.tensor([2.0**-h for h in range(1, 9)], dtype=torch.float64) * factor
    q, k, v = heads(layer, x, real)
    if layer.short is None:
        q, k, v = silu(q), silu(k), silu(v)
    steps = torch.cumsum(real.to(torch.float64), 1)  # a masked token's edge does not decay
    decay = torch.exp(-rate[:, None, None] * (steps[:, None, :, None] - steps[:, None, None, :]).clamp(min=0))
    o = join((q @ k.transpose(-1, -2) * decay * visible(x, real, True)) @ v)
    gate = 1 / (1 + torch.exp(-affine(layer.gate[1], affine(layer.gate[0], x))))
    return affine(layer.out, layer_norm(o, layer.norm.weight, layer.norm.bias) * gate) * real[..., None]


def lion(layer, x: Tensor, real: Tensor) -> Tensor:
    """Y = scale(QKᵀ ⊙ M) V with M made entry by entry."""
    q, k, v = heads(layer, x, real)
    q, k = silu(q) + 0.5, silu(k) + 0.5
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    B, L, _ = x.shape
    if layer.token_decay is not None:
        decay = 1 / (1 + torch.exp(-affine(layer.token_decay, x)))  # (B, L, H)
    elif layer.head_decay is not None:
        decay = (1 / (1 + torch.exp(layer.head_decay.raw))).expand(B, L, -1)  # λ = σ(a), the parameter being −a
    else:
        decay = torch.ones(B, L, layer.heads, dtype=x.dtype)
    decay = torch.where(real[..., None], decay, 1.0)  # a token that is absent does not decay
    rows = []
    for i in range(L):
        row = [decay[:, j:i].prod(1) if j <= i else decay[:, i + 1 : j + 1].prod(1) for j in range(L)]
        rows.append(torch.stack(row, dim=-1))
    M = torch.stack(rows, dim=2) * visible(x, real, layer.causal)  # (B, H, L, L)
    o = divided(q @ k.transpose(-1, -2) * M, v)
    return affine(layer.out, join(o)) * real[..., None]


def toeplitz(forward: Tensor, back: Tensor | None, x: Tensor) -> Tensor:
    """Σ_s forward[s] x_{t−s} + Σ_s back[s] x_{t+1+s}, by a (C, L, L) matrix."""
    L = x.shape[1]
    lag = torch.arange(L)[:, None] - torch.arange(L)
    matrix = forward[:, lag.clamp(min=0)] * (lag >= 0)
    if back is not None and L > 1:
        matrix = matrix + back[:, (-lag - 1).clamp(min=0)] * (lag < 0)
    return torch.einsum("cts,bsc->btc", matrix, x)


def s4d(layer, x: Tensor, real: Tensor) -> Tensor:
    """The kernel term by term; Ā = exp(ΔA), B̄ = (Ā − 1)/A, y by its matrix."""
    kernel, L = layer.kernel, x.shape[1]
    x = x * real[..., None]
    A = -torch.exp(kernel.log_damping) + 1j * kernel.frequency
    A_bar = torch.exp(torch.exp(kernel.log_dt)[:, None] * A)
    B_bar = (A_bar - 1) / A
    C = kernel.output_matrix[..., 0] + 1j * kernel.output_matrix[..., 1]
    taps = torch.stack([2 * (C * B_bar * A_bar**t).sum(-1).real for t in range(L)], dim=-1)  # (directions, D, L)
    y = toeplitz(taps[0], None if layer.causal else taps[1], x) + layer.skip * x
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))  # GELU
    a, b = affine(layer.out, y).chunk(2, dim=-1)
    return a / (1 + torch.exp(-b)) * real[..., None]


def ema(layer, x: Tensor) -> Tensor:
    """h_t = α β x_t + (1 − αδ) h_{t−1}, one direction after the other, by the recurrence."""
    e, total = layer.ema, 0.0
    for direction in range(1 if layer.causal else 2):
        alpha, delta = torch.sigmoid(e.delta[direction]), torch.sigmoid(e.alpha[direction])  # named as in the paper
        h, outputs = torch.zeros(len(x), *alpha.shape, dtype=x.dtype), []
        for x_t in (x if direction == 0 else x.flip(1)).unbind(1):
            h = alpha * e.beta[direction] * x_t[..., None] + (1 - alpha * delta) * h
            outputs.append((h * e.gamma[direction]).sum(-1) / math.sqrt(alpha.shape[-1]))
        out = torch.stack(outputs, dim=1)
        total = total + (out if direction == 0 else out.flip(1))
    return total


def highway(h: Tensor, gate: Tensor, stream: Tensor, real: Tensor) -> Tensor:
    """The update of x + g ⊙ (h − x), g = σ(gate)."""
    return (h - stream) / (1 + torch.exp(-gate)) * real[..., None]


def mega(layer, x: Tensor, real: Tensor, stream: Tensor) -> Tensor:
    D, L = x.shape[2], x.shape[1]
    x = x * real[..., None]
    c = silu(ema(layer, x) + layer.omega * x)
    update, z, reset, candidate = affine(layer.gates, c).split([D, layer.gamma.shape[1], layer.out.in_features, D], -1)
    z, reset = silu(z), silu(reset)
    q, k = z * layer.gamma[0] + layer.beta[0], z * layer.gamma[1] + layer.beta[1]
    v = silu(affine(layer.value, x))
    place = torch.arange(L)
    seen = visible(x, real, layer.causal)[:, 0] * (place[:, None] // layer.chunk == place // layer.chunk)
    lag = (place - place[:, None]).clamp(1 - layer.chunk, layer.chunk - 1)
    bias = layer.position_bias[layer.chunk - 1 + lag]
    scores = q @ k.transpose(-1, -2)
    if layer.attention_function == "softmax":
        weights = torch.exp(scores / math.sqrt(z.shape[-1]) + bias) * seen
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    else:
        scores = scores / seen.sum(-1, keepdim=True).clamp(min=1) + bias
        sigma = math.sqrt(1 / (4 * math.pi))
        weights = 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) / (sigma * math.sqrt(2)))) * seen
    h = silu(candidate + affine(layer.out, (weights @ v) * reset))
    return highway(h, update, stream, real)


def chela(layer, x: Tensor, real: Tensor) -> Tensor:
    present = real[..., None].to(x.dtype)
    c = x
    if layer.conv.short is not None:
        taps = layer.conv.short.weight.flip(1)  # lag order: the last tap is that of the present when causal
        ahead = 0 if layer.causal else taps.shape[1] // 2
        padded = torch.nn.functional.pad(c * present, (0, 0, taps.shape[1], taps.shape[1]))
        c = sum(
            taps[:, s] * padded[:, taps.shape[1] + ahead - s : taps.shape[1] + ahead - s + x.shape[1]]
            for s in range(taps.shape[1])
        )
        c = silu(c) * present
    u = c
    if layer.conv.long is not None:
        long, c = layer.conv.long, c * present
        if isinstance(long.kernel, MultiscaleKernel):
            kernels = long.kernel.pieces().flatten(2) @ long.kernel.near(x.shape[1])
            forward, back = kernels[0], None if layer.causal else kernels[1]
        else:
            forward, back = long.kernel(x.shape[1])
        y = long.bias + long.gain[0] * (toeplitz(forward, back, c) + long.skip * c)
        for gain, taps in zip(long.gain[1:], long.branches, strict=True):
            ahead = 0 if layer.causal else taps.shape[1] // 2
            y = y + gain * shifted_sum(taps, c, ahead)
        c = silu(y) * present
    if layer.norm is not None:
        o = layer_norm(silu(affine(layer.value, c)), layer.norm.weight, layer.norm.bias)
    else:
        v = silu(affine(layer.value, x)).split([core.width for core in layer.cores], -1)
        read = c if layer.conv.short is None or layer.qk == "long" else u  # by the heads that select
        o = [chela_core(core, c if core.pools else read, part, real) for core, part in zip(layer.cores, v, strict=True)]
        o = torch.cat(o, -1)
    if layer.gate == "none":
        return affine(layer.out, o) * present
    h = affine(layer.out, o * silu(affine(layer.gate_in, c)))
    return highway(silu(h + affine(layer.skip, c)), affine(layer.highway, c), x, real)


def chela_core(core, c: Tensor, v: Tensor, real: Tensor) -> Tensor:
    """Every weight written out."""
    outs = []
    for h, value in enumerate(v.chunk(core.heads, -1)):
        z = affine(core.project, c).unflatten(-1, (core.heads, -1))[:, :, h]
        q, k = (z * core.gamma[i, h] + core.beta[i, h] for i in (0, 1))
        q, k = (torch.where(t > 0, t + 1, torch.exp(t)) if core.pools else silu(t) for t in (q, k))
        weights = q @ k.transpose(-1, -2) * visible(c, real, core.causal)[:, 0]
        outs.append((divided(weights, value) if core.pools else weights @ value) * real[..., None])
    return layer_norm(torch.cat(outs, -1), core.norm.weight, core.norm.bias)
