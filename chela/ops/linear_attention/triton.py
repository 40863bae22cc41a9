"""The host side of the Triton backend: which kernels run in which order, cut as ``tiles.py`` says.

Triton is imported when the backend is first used, never before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela.ops.backend import Problem, interpreted, why_no_triton
from chela.ops.linear_attention.operator import Call, Gradients, Outputs, define, edge_gradient
from chela.ops.linear_attention.reference import lowest_log_decay
from chela.ops.linear_attention.tiles import INTERPRETED, Launch, launches, padded

MAX_WIDTH = 256


def why_not(problem: Problem) -> str | None:
    """Return why the kernels cannot run a problem, or None when they can."""
    reason = why_no_triton(problem)
    if reason is not None:
        return reason
    if problem.device.type == "cuda" and not interpreted():
        major, minor = torch.cuda.get_device_capability(problem.device)
        if major < 8 and torch.version.hip is None:
            return f"the kernels need compute capability 8.0 or later, this device has {major}.{minor}"
    if problem.dtype == torch.float64:
        return "the kernels take float32, float16 and bfloat16, got float64"
    if max(problem.widths, default=0) > MAX_WIDTH:
        return f"the kernels take widths up to {MAX_WIDTH}, got {max(problem.widths)}"
    return None


class Sums(NamedTuple):
    """Sums of log decays inside chunks, as two floats: a multiple of 1/16 and the rest."""

    data: Tensor  # (2, B, H, n, C), B and n being 1 where all rows or chunks agree; a stand-in without decay
    strides: tuple[int, ...] = (0, 0, 0, 0)  # of the first four axes, 0 where the axis is 1

    def across(self, x: Tensor) -> Tensor:
        """Return x ``(B, H, n)`` weighted by the decay over each whole chunk."""
        return x * (self.data[0] + self.data[1])[..., -1].exp()


def sums_of(p: Call, log_decay: Tensor | None, C: int) -> Sums:
    """Return the sums of log decays in chunks of C tokens."""
    if log_decay is None:
        return Sums(p.v.new_empty(1, dtype=torch.float32))
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
    data = torch.stack([coarse, sums - coarse]).float()
    strides = zip(data.shape[:4], data.stride(), strict=False)
    return Sums(data, tuple(stride if size > 1 else 0 for size, stride in strides))


class States(NamedTuple):
    """The states that reach each chunk, S ``(B, H, n, D, E)`` and z ``(B, H, n, D)``, and those after the last."""

    S: Tensor
    z: Tensor
    S_end: Tensor
    z_end: Tensor

    def write_end(self, to: Tensor) -> None:
        """Write those after the last to ``(B, H, D, E)`` or, with z as the last column, ``(B, H, D, E + 1)``."""
        E = self.S.shape[-1]
        to[..., :E] = self.S_end
        if to.shape[-1] > E:
            to[..., E] = self.z_end

    def dot(self, other: States) -> Tensor:
        """Return the inner products of the states of each chunk, ``(B, H, n)``."""
        return (self.S * other.S).sum((-1, -2)) + (self.z * other.z).sum(-1)


def load_kernels() -> Any:
    """Import the kernels: late, as Triton is not always there and decides then whether it compiles or interprets."""
    return importlib.import_module("chela.ops.linear_attention.kernels")


class Run:
    """The kernels of one call, with its tiles chosen; ``flow`` counts what flows over edges, for their gradient.

    ``kernels`` may stand in for the module, to count what would be launched.
    """

    def __init__(self, p: Call, launch: Launch, kernels: Any = None, *, flow: bool = False) -> None:
        self.p, self.launch, self.flow = p, launch, flow
        self.kernels = kernels or load_kernels()
        self.decay = p.log_decay is not None
        self.q, self.k, self.v = (x.contiguous() for x in (p.q, p.k, p.v))
        self.B, self.L, self.H, self.D = p.q.shape
        self.E = p.v.shape[-1]
        self.blocks = -(-self.L // launch.BT)
        self.NB = min(self.blocks, max(1, p.chunk // launch.BT) if p.chunk else launch.NB)
        if p.undecayed:  # nothing is computed inside chunks, and fewer chunks make fewer states to add
            self.NB = min(16, self.blocks)
        if flow:  # what flows over edges is counted tile by tile
            self.NB = 1
        self.chunks = -(-self.blocks // self.NB)
        C = self.NB * launch.BT
        self.ahead, self.back = sums_of(p, p.log_decay, C), sums_of(p, p.log_decay_back, C)
        # Stands in for pointers that are not read.
        self.nothing = self.scale = self.delta = torch.empty(1, dtype=torch.float32, device=p.q.device)
        self.mask = self.nothing if p.mask is None else p.mask.contiguous().view(torch.uint8)

    @property
    def common(self) -> dict[str, Any]:
        """What both kernels with products take."""
        tl, dtype = self.kernels.tl, self.q.dtype
        return {
            "BT": self.launch.BT,
            "NB": self.NB,
            "DECAY": self.decay,
            "MASKED": self.p.mask is not None,
            # Products with sums: float16 would overflow there; in tf32 they keep as many digits as float16 has.
            "DOT": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            "num_warps": self.launch.warps,
            "num_stages": self.launch.stages,
        }

    def states(
        self, x: Tensor, y: Tensor, sums: Sums, *, suffix: bool, with_z: bool, start: Tensor | None = None,
        scaled: bool = False,
    ) -> States:  # fmt: skip
        """Compute the states of x yᵀ over edges of these sums, from the left, or from the right when ``suffix``.

        ``start`` ``(B, H, D, E + 1)`` is the state before the first token, zeros unless given; ``scaled`` says that y
        is a gradient that is still to be divided by the normaliser.
        """
        n, D, E = self.chunks, self.D, self.E
        S, z = self.p.new(self.B, self.H, n, D, E), self.p.new(self.B, self.H, n, D)
        if not with_z:
            z.zero_()
        BD, BE = min(self.launch.BS, padded(D)), min(self.launch.BS, padded(E))
        self.kernels.states_kernel[(n * self.B * self.H, -(-D // BD) * -(-E // BE))](
            x, y, S, z, self.mask, self.scale, self.delta, sums.data,
            self.L, self.H, D, E, n, *sums.strides,
            BD=BD, BE=BE, SUFFIX=suffix, SCALED=scaled, WITH_Z=with_z, **self.common,
        )  # fmt: skip
        if self.p.undecayed:
            return States(S.sum(2), z.sum(2), self.nothing, self.nothing)
        first = (None, None) if start is None else (start[..., :-1], start[..., -1])
        return States(S, z, *(self.scan(s, sums, f, suffix=suffix) for s, f in zip((S, z), first, strict=True)))

    def scan(self, states: Tensor, sums: Sums, start: Tensor | None, *, suffix: bool) -> Tensor:
        """Carry states ``(B, H, n, ·)`` from chunk to chunk, in place, and return those that leave at the end."""
        M = states[0, 0, 0].numel()
        end = self.p.new(self.B, self.H, *states.shape[3:])
        BM = min(512, padded(M))
        self.kernels.scan_kernel[(self.B * self.H, -(-M // BM))](
            states, self.nothing if start is None else start.float().contiguous(), end, sums.data,
            self.H, M, self.chunks, *sums.strides, self.NB * self.launch.BT - 1,
            BM=BM, SUFFIX=suffix, DECAY=self.decay, STARTED=start is not None,
        )  # fmt: skip
        return end

    def attend(
        self, kind: str, a: Tensor, b: Tensor, c: Tensor, out: Tensor, left: States | None, right: States | None,
        total: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run ``attend_kernel`` and return what flowed over edges, ``(4, B, H, n, BT)``, where that is counted."""
        WA, WC = a.shape[-1], c.shape[-1]
        BC = min(self.launch.BC, padded(WC))
        columns = -(-WC // BC)
        across = (self.E, 1) if kind in ("out", "dv") else (1, self.E)
        ahead, back = (self.back, self.ahead) if kind in ("dk", "dv") else (self.ahead, self.back)  # over Mᵀ
        own = {"dq": self.q, "dk": self.k}.get(kind) if self.flow else None
        flow_part = self.B * self.H * self.blocks * self.launch.BT
        flow = self.nothing if own is None else torch.zeros(columns, 4, flow_part, device=self.q.device)
        given = left or right
        assert given is not None
        left_, right_ = left or given, right or given
        self.kernels.attend_kernel[(self.blocks * self.B * self.H, columns)](
            a, b, c, out, self.nothing if total is None else total, self.mask, self.scale, self.delta,
            left_.S, right_.S, left_.z, right_.z, ahead.data, back.data, self.nothing if own is None else own, flow,
            self.L, self.H, WA, WC, self.blocks, 1 if self.p.undecayed else self.chunks, *across,
            *max(ahead.strides, back.strides), flow_part, self.p.eps,  # both are alike, or one is a stand-in
            KIND=kind, BA=padded(WA), BK=min(self.launch.BK, padded(WA)), BC=BC,
            LOWER=left is not None, UPPER=right is not None, INTRA=not self.p.undecayed, FLOW=own is not None,
            NORMALIZE=self.p.normalize, WITH_Z={"dk": self.p.ones, "dv": False}.get(kind, self.p.normalize),
            **self.common,
        )  # fmt: skip
        return flow.sum(0).view(4, self.B, self.H, self.blocks, self.launch.BT) if own is not None else flow

    def divide(self, d_out: Tensor, out: Tensor, total: Tensor) -> None:
        """Work out scale = 1 / (eps + total) and delta = d_out · out of each token, both ``(B, H, L)``."""
        self.scale, self.delta = torch.empty_like(total), torch.empty_like(total)
        BT = 16
        blocks = -(-self.L // BT)
        self.kernels.delta_kernel[(blocks * self.B * self.H,)](
            d_out, out, total, self.mask, self.scale, self.delta, self.L, self.H, self.E, self.p.eps, blocks,
            BT=BT, BE=padded(self.E), MASKED=self.p.mask is not None,
        )  # fmt: skip


def forward(p: Call, launch: Launch, kernels: Any = None) -> Outputs:
    """Compute the output, the normaliser and the last state."""
    run = Run(p, launch, kernels)
    out, total, end = p.new_outputs()
    left, right = _states(run)
    run.attend("out", run.q, run.k, run.v, out, left, right, total)
    if p.causal:
        left.write_end(end)
    return out, total, end, p.new(0)


def _states(run: Run) -> tuple[States, States | None]:
    """Return the states of k vᵀ from the left and, when bidirectional with decay, from the right."""
    p = run.p
    left = run.states(run.k, run.v, run.ahead, suffix=False, with_z=p.ones, start=p.state)
    both = not p.causal and not p.undecayed
    return left, run.states(run.k, run.v, run.back, suffix=True, with_z=p.normalize) if both else None


def backward(
    p: Call, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, _: Tensor, decay_grad: bool,
    launch: Launch, kernels: Any = None,
) -> Gradients:  # fmt: skip
    """Compute the gradients of q, k, v, the log decays and the first state."""
    run = Run(p, launch, kernels, flow=decay_grad and p.log_decay is not None)
    d_out, d_left = d_out.contiguous(), None
    dq, dk, dv, d_decay, d_back, d_state = p.new_gradients(decay_grad)
    if p.normalize:
        run.divide(d_out, out, total)
    left, right = _states(run)
    options: dict[str, Any] = {"with_z": p.normalize, "scaled": p.normalize}
    d_right = run.states(run.q, d_out, run.ahead, suffix=True, start=d_end if p.ones else None, **options)
    if right is not None:
        d_left = run.states(run.q, d_out, run.back, suffix=False, **options)
    if p.causal:
        d_right.write_end(d_state)

    flow_q = run.attend("dq", d_out, run.v, run.k, dq, left, right)
    # Over Mᵀ left and right change places; where all tokens share one state there is but one.
    d_first, d_second = (d_right, None) if p.undecayed else (d_left, d_right)
    flow_k = run.attend("dk", run.v, d_out, run.q, dk, d_first, d_second)
    run.attend("dv", run.k, run.q, d_out, dv, d_first, d_second)
    if run.flow:
        through = run.ahead.across(left.dot(d_right))
        put_edge_gradient(p, edge_gradient(flow_q[2], flow_q[0], flow_k[1], through), d_decay)
    if run.flow and right is not None and d_left is not None:
        through = run.back.across(right.dot(d_left))
        put_edge_gradient(p, edge_gradient(flow_q[3], flow_k[0], flow_q[1], through), d_back)
    return dq, dk, dv, d_decay, d_back, d_state


def put_edge_gradient(p: Call, gradient: Tensor, to: Tensor) -> None:
    """Write the gradient ``(B, H, n, C)`` of all edges into that of ``(H,)`` or ``(B, L, H)`` log decays."""
    gradient = gradient.flatten(2)[..., : p.q.shape[1]]
    if p.mask is not None:
        gradient = gradient.masked_fill(~p.mask[:, None], 0)
    to.copy_(gradient.sum((0, 2)) if to.ndim == 1 else gradient.mT)


# Which launch of the table fits, once one did not, by device, dtype and widths.
_fitting: dict[tuple[Any, ...], int] = {}


def first_that_fits(p: Call, run: Callable[[Launch], Any]) -> Any:
    """Call ``run`` with the best launch of the table that the device has the resources for."""
    from triton.runtime.errors import OutOfResources

    choices = table(p)
    key = (p.q.device, p.q.dtype, padded(p.q.shape[-1]), padded(p.v.shape[-1]))
    while True:
        index = _fitting.get(key, 0)
        try:
            return run(choices[index])
        except OutOfResources as error:
            if index + 1 == len(choices):
                raise RuntimeError(
                    f"linear_attention: no tile of backend 'triton' fits this device ({error}); use backend='chunked'"
                ) from error
            _fitting[key] = index + 1


def table(p: Call) -> tuple[Launch, ...]:
    """Return the launches worth trying for a problem, best first."""
    if p.q.device.type != "cuda":
        return (INTERPRETED,)
    device = torch.cuda.get_device_properties(p.q.device)
    shared = int(getattr(device, "shared_memory_per_block_optin"))  # noqa: B009 (the stubs do not know it)
    return launches(p.q.shape[-1], p.v.shape[-1], p.q.dtype, shared)


linear_attention_triton = define(
    "linear_attention_triton",
    lambda p: first_that_fits(p, functools.partial(forward, p)),
    lambda p, *given: first_that_fits(p, functools.partial(backward, p, *given)),
    lambda p: (0,),
)
