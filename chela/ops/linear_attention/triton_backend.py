"""The host side of the Triton backend: which tiles, which kernels in which order.

Triton is imported when the backend is first used, never before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from chela.ops.linear_attention import op
from chela.ops.linear_attention.edges import edge_gradient, lowest_log_decay
from chela.ops.linear_attention.launch import INTERPRETED, Launch, launches, padded
from chela.ops.linear_attention.op import Gradients, Problem
from chela.ops.linear_attention.recurrent import LinearAttentionState

MAX_WIDTH = 256


def why_not(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'chela[triton]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return "Triton kernels need a CUDA device; elsewhere set TRITON_INTERPRET=1 before starting (slow, for tests)"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8 and torch.version.hip is None:
        return f"the kernels need compute capability 8.0 or later, this device has {major}.{minor}"
    return None


def linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    log_decay: Tensor | None,
    log_decay_back: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    eps: float,
    initial_state: LinearAttentionState | None,
    return_state: bool,
    chunk_size: int | None,
) -> tuple[Tensor, LinearAttentionState | None]:
    """Compute ``linear_attention`` by Triton kernels; ``chunk_size`` is rounded to whole blocks."""
    if q.dtype == torch.float64 or max(q.shape[-1], v.shape[-1]) > MAX_WIDTH:
        raise ValueError(
            f"linear_attention: backend 'triton' takes float32, float16 and bfloat16 and widths up to {MAX_WIDTH}, "
            f"got {q.dtype} and widths {q.shape[-1]}, {v.shape[-1]}; use backend='chunked'"
        )
    inputs = (q, k, v, log_decay, log_decay_back, mask)
    return op.call(_operator, inputs, initial_state, return_state, causal, normalize, eps, chunk_size or 0)


@dataclass(frozen=True)
class Sums:
    """Sums of log decays inside chunks, `(2, B, H, n, C)`: a multiple of 1/16 and the rest.

    Differences of the two, added, keep all digits.

    Axes B and n have stride 0 where all rows or chunks agree.
    """

    data: Tensor

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """The strides of all axes but the last, 0 where the axis is 1."""
        part, *rest = (
            stride if size > 1 else 0 for size, stride in zip(self.data.shape, self.data.stride(), strict=True)
        )
        return part, rest[0], rest[1], rest[2]

    def across(self, x: Tensor) -> Tensor:
        """Return x `(B, H, n)` weighted by the decay over each whole chunk."""
        return x * (self.data[0] + self.data[1])[..., -1].exp()


def sums_of(p: Problem, log_decay: Tensor | None, C: int) -> Sums | None:
    """Return the sums of log decays in chunks of C tokens; None without decay."""
    if log_decay is None:
        return None
    B, L, H, _ = p.q.shape
    edges = log_decay.detach().double().clamp(min=lowest_log_decay(torch.float32))
    if edges.ndim == 1 and p.mask is None and L % C == 0:
        sums = edges[None, :, None, None] * torch.arange(1, C + 1, dtype=torch.float64, device=edges.device)
    else:
        edges = edges.expand(B, L, H).transpose(1, 2)
        if p.mask is not None:
            edges = edges.masked_fill(~p.mask[:, None], 0)
        sums = torch.nn.functional.pad(edges, (0, -L % C)).reshape(B, H, -1, C).cumsum(-1)
    coarse = (sums * 16).round() / 16
    return Sums(torch.stack([coarse, sums - coarse]).float())


@dataclass(frozen=True)
class States:
    """The states that reach each chunk, S `(B, H, n, D, E)` and z `(B, H, n, D)`, and those that leave the last one."""

    S: Tensor
    z: Tensor
    S_end: Tensor
    z_end: Tensor

    def write_end(self, to: Tensor) -> None:
        """Write the states that leave to ``to``, `(B, H, D, E)` or, with z in its last column, `(B, H, D, E + 1)`."""
        E = self.S.shape[-1]
        to[..., :E] = self.S_end
        if to.shape[-1] > E:
            to[..., E] = self.z_end

    def dot(self, other: States) -> Tensor:
        """Return the inner products of the states of each chunk, `(B, H, n)`."""
        return (self.S * other.S).sum((-1, -2)) + (self.z * other.z).sum(-1)


class Run:
    """The kernels of one call, with its tiles chosen."""

    def __init__(self, p: Problem, launch: Launch, *, flow: bool = False) -> None:
        # Imported here: Triton decides at import whether it compiles or interprets, and is not always there.
        self.kernels = importlib.import_module("chela.ops.linear_attention.kernels")
        self.p, self.launch = p, launch
        self.q, self.k, self.v = (x.contiguous() for x in (p.q, p.k, p.v))
        self.B, self.L, self.H, self.D = p.q.shape
        self.E = p.v.shape[-1]
        self.blocks = -(-self.L // launch.BT)
        self.NB = self._blocks_per_chunk(flow)
        self.chunks = -(-self.blocks // self.NB)
        C = self.NB * launch.BT
        self.ahead, self.back = sums_of(p, p.log_decay, C), sums_of(p, p.log_decay_back, C)
        self.nothing = torch.empty(1, dtype=torch.float32, device=p.q.device)
        self.mask = self.nothing if p.mask is None else p.mask.contiguous().view(torch.uint8)

    def _blocks_per_chunk(self, flow: bool) -> int:
        if flow:  # what flows over edges is counted tile by tile
            return 1
        if self.p.plain:  # nothing is computed inside chunks, and fewer chunks make fewer states to add
            return min(16, self.blocks)
        return min(self.blocks, max(1, self.p.chunk // self.launch.BT) if self.p.chunk else self.launch.NB)

    def new(self, *shape: int) -> Tensor:
        """Return an uninitialised float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    @property
    def common(self) -> dict[str, Any]:
        """What both kernels with products take."""
        tl, dtype = self.kernels.tl, self.q.dtype
        return {
            "BT": self.launch.BT,
            "NB": self.NB,
            "MASKED": self.p.mask is not None,
            # Products with sums: float16 would overflow there; in tf32 they keep as many digits as float16 has.
            "DOT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            "num_warps": self.launch.warps,
            "num_stages": self.launch.stages,
        }

    def states(
        self,
        x: Tensor,
        y: Tensor,
        sums: Sums | None,
        *,
        suffix: bool,
        with_z: bool,
        start: tuple[Tensor, Tensor] | None = None,
        scale: Tensor | None = None,
        delta: Tensor | None = None,
    ) -> States:
        """Compute the states of x yᵀ from the left, or from the right when ``suffix``."""
        n, D, E = self.chunks, self.D, self.E
        S, z = self.new(self.B, self.H, n, D, E), self.new(self.B, self.H, n, D)
        if not with_z:
            z.zero_()
        BD, BE = min(self.launch.BS, padded(D)), min(self.launch.BS, padded(E))
        self.kernels.states_kernel[(n * self.B * self.H, -(-D // BD) * -(-E // BE))](
            x, y, S, z, self.mask, self.or_nothing(scale), self.or_nothing(delta), self.data(sums),
            self.L, self.H, D, E, n, *self.strides(sums),
            BD=BD, BE=BE, SUFFIX=suffix, DECAY=sums is not None, SCALED=scale is not None, WITH_Z=with_z,
            **self.common,
        )  # fmt: skip
        if self.p.plain:
            return States(S.sum(2), z.sum(2), self.nothing, self.nothing)
        first = (None, None) if start is None else start
        return States(S, z, *(self.scan(s, sums, f, suffix=suffix) for s, f in zip((S, z), first, strict=True)))

    def scan(self, states: Tensor, sums: Sums | None, start: Tensor | None, *, suffix: bool) -> Tensor:
        """Carry states `(B, H, n, ·)` from chunk to chunk, in place, and return those that leave at the end."""
        M = states[0, 0, 0].numel()
        end = self.new(self.B, self.H, *states.shape[3:])
        BM = min(512, padded(M))
        self.kernels.scan_kernel[(self.B * self.H, -(-M // BM))](
            states, self.or_nothing(start), end, self.data(sums), self.H, M, self.chunks, *self.strides(sums),
            self.NB * self.launch.BT - 1, BM=BM, SUFFIX=suffix, DECAY=sums is not None, STARTED=start is not None,
        )  # fmt: skip
        return end

    def attend(
        self,
        kind: str,
        tensors: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        left: States | None,
        right: States | None,
        edges: tuple[Sums | None, Sums | None],
        *,
        with_z: bool,
        total: Tensor | None = None,
        scale: Tensor | None = None,
        delta: Tensor | None = None,
        own: Tensor | None = None,
    ) -> Tensor:
        """Run ``attend_kernel`` and return what flowed over edges, `(4, B, H, n, BT)`, when ``own`` is given."""
        a, _, c = tensors
        WA, WC = a.shape[-1], c.shape[-1]
        BC = min(self.launch.BC, padded(WC))
        columns = -(-WC // BC)
        across = (self.E, 1) if kind in ("out", "dv") else (1, self.E)
        flow_part = self.B * self.H * self.blocks * self.launch.BT
        flow = self.nothing if own is None else torch.zeros(columns, 4, flow_part, device=self.q.device)
        given = left or right
        assert given is not None
        left_, right_ = left or given, right or given
        self.kernels.attend_kernel[(self.blocks * self.B * self.H, columns)](
            *tensors, out, self.or_nothing(total), self.mask, self.or_nothing(scale), self.or_nothing(delta),
            left_.S, right_.S, left_.z, right_.z, *(self.data(e) for e in edges), self.or_nothing(own), flow,
            self.L, self.H, WA, WC, self.blocks, 1 if self.p.plain else self.chunks, *across,
            *self.strides(edges[0] or edges[1]), flow_part, self.p.eps,
            KIND=kind, BA=padded(WA), BK=min(self.launch.BK, padded(WA)), BC=BC,
            LOWER=left is not None, UPPER=right is not None, INTRA=not self.p.plain,
            DECAY=self.p.log_decay is not None, NORMALIZE=self.p.normalize, WITH_Z=with_z, FLOW=own is not None,
            **self.common,
        )  # fmt: skip
        return flow.sum(0).view(4, self.B, self.H, self.blocks, self.launch.BT) if own is not None else flow

    def delta(self, d_out: Tensor, out: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 / (eps + total) and d_out · out of each token, both `(B, H, L)`."""
        scale, delta = torch.empty_like(total), torch.empty_like(total)
        BT = 16
        blocks = -(-self.L // BT)
        self.kernels.delta_kernel[(blocks * self.B * self.H,)](
            d_out, out, total, self.mask, scale, delta, self.L, self.H, self.E, self.p.eps, blocks,
            BT=BT, BE=padded(self.E), MASKED=self.p.mask is not None,
        )  # fmt: skip
        return scale, delta

    def or_nothing(self, x: Tensor | None) -> Tensor:
        """Return x, or a stand-in for a pointer that is not read."""
        return self.nothing if x is None else x

    def data(self, sums: Sums | None) -> Tensor:
        """Return the sums' tensor, or a stand-in."""
        return self.nothing if sums is None else sums.data

    def strides(self, sums: Sums | None) -> tuple[int, int, int, int]:
        """Return the sums' strides, or zeros."""
        return (0, 0, 0, 0) if sums is None else sums.strides


def split(state: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return S and z, contiguous float32, of a state `(B, H, D, E + 1)`."""
    if state is None:
        return None
    return state[..., :-1].float().contiguous(), state[..., -1].float().contiguous()


def _forward(p: Problem, state: Tensor | None, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = Run(p, launch)
    out, total, end = p.new_outputs()
    saved = p.new(*_saved_shape(p))
    if saved.numel():
        saved.copy_(state) if state is not None else saved.zero_()
    left = run.states(run.k, run.v, run.ahead, suffix=False, with_z=p.ones, start=split(state))
    right = None
    if not p.causal and not p.plain:
        right = run.states(run.k, run.v, run.back, suffix=True, with_z=p.ones)
    inputs = (run.q, run.k, run.v)
    run.attend("out", inputs, out, left, right, (run.ahead, run.back), with_z=p.normalize, total=total)
    if p.causal:
        left.write_end(end)
    return out, total, end, saved


def _backward(
    p: Problem, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, saved: Tensor, decay_grad: bool,
    launch: Launch,
) -> Gradients:  # fmt: skip
    flow = decay_grad and p.log_decay is not None
    run = Run(p, launch, flow=flow)
    d_out = d_out.contiguous()
    dq, dk, dv, d_decay, d_back, d_state = p.new_gradients(decay_grad)
    scale, delta = run.delta(d_out, out, total) if p.normalize else (None, None)
    both = not p.causal and not p.plain
    options: dict[str, Any] = {"scale": scale, "delta": delta}
    first, last = split(saved if saved.numel() else None), split(d_end if p.ones else None)
    left = run.states(run.k, run.v, run.ahead, suffix=False, with_z=p.ones, start=first)
    right = run.states(run.k, run.v, run.back, suffix=True, with_z=p.normalize) if both else None
    d_right = run.states(run.q, d_out, run.ahead, suffix=True, with_z=p.normalize, start=last, **options)
    d_left = run.states(run.q, d_out, run.back, suffix=False, with_z=p.normalize, **options) if both else None
    if p.causal:
        d_right.write_end(d_state)

    own_q, own_k = (run.q, run.k) if flow else (None, None)
    edges: tuple[Sums | None, Sums | None] = (run.ahead, run.back)
    flow_q = run.attend("dq", (d_out, run.v, run.k), dq, left, right, edges, own=own_q, with_z=p.normalize, **options)
    # Over Mᵀ left and right change places; where all tokens share one state there is but one.
    d_first, d_second = (d_right, None) if p.plain else (d_left, d_right)
    inputs = (run.v, d_out, run.q)
    flow_k = run.attend("dk", inputs, dk, d_first, d_second, edges[::-1], own=own_k, with_z=p.ones, **options)
    run.attend("dv", (run.k, run.q, d_out), dv, d_first, d_second, edges[::-1], with_z=False, **options)
    if flow:
        assert run.ahead is not None
        through = run.ahead.across(left.dot(d_right))
        put_edge_gradient(p, edge_gradient(flow_q[2], flow_q[0], flow_k[1], through), d_decay)
    if flow and right is not None and d_left is not None and run.back is not None:
        through = run.back.across(right.dot(d_left))
        put_edge_gradient(p, edge_gradient(flow_q[3], flow_k[0], flow_q[1], through), d_back)
    return dq, dk, dv, d_decay, d_back, d_state


def put_edge_gradient(p: Problem, gradient: Tensor, to: Tensor) -> None:
    """Write the gradient `(B, H, n, C)` of all edges into that of `(H,)` or `(B, L, H)` log decays."""
    gradient = gradient.flatten(2)[..., : p.q.shape[1]]
    if p.mask is not None:
        gradient = gradient.masked_fill(~p.mask[:, None], 0)
    to.copy_(gradient.sum((0, 2)) if to.ndim == 1 else gradient.mT)


def _saved_shape(p: Problem) -> tuple[int, ...]:
    return p.state_shape if p.causal and p.ones else (0,)


Answer = TypeVar("Answer")

# Which launch of the table fits, once one did not, by device, dtype and widths.
_fitting: dict[tuple[Any, ...], int] = {}


def first_that_fits(p: Problem, run: Callable[[Launch], Answer]) -> Answer:
    """Call ``run`` with the best launch of the table that the device has the resources for."""
    from triton.runtime.errors import OutOfResources

    choices = table(p)
    key = (p.q.device, p.q.dtype, padded(p.q.shape[-1]), padded(p.v.shape[-1]))
    for index in range(_fitting.get(key, 0), len(choices)):
        try:
            return run(choices[index])
        except OutOfResources as error:
            if index + 1 == len(choices):
                raise RuntimeError(
                    f"linear_attention: no tile of backend 'triton' fits this device ({error}); use backend='chunked'"
                ) from error
            _fitting[key] = index + 1
    raise AssertionError("unreachable: the table is not empty")


def table(p: Problem) -> tuple[Launch, ...]:
    """Return the launches worth trying for a problem, best first."""
    if p.q.device.type != "cuda":
        return (INTERPRETED,)
    device = torch.cuda.get_device_properties(p.q.device)
    shared = int(getattr(device, "shared_memory_per_block_optin"))  # noqa: B009 (the stubs do not know it)
    return launches(p.q.shape[-1], p.v.shape[-1], p.q.dtype, shared)


_operator = op.define(
    "linear_attention_triton",
    lambda p, *given: first_that_fits(p, functools.partial(_forward, p, *given)),
    lambda p, *given: first_that_fits(p, functools.partial(_backward, p, *given)),
    _saved_shape,
)
