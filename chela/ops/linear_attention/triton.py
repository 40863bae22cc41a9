"""The host side of the Triton backend: which kernels run in which order, cut as ``tiles.py`` says."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chela.ops.backend import Problem, interpreted, why_no_triton
from chela.ops.linear_attention.operator import Call, Gradients, Outputs, define, edge_gradient
from chela.ops.linear_attention.reference import lowest_log_decay
from chela.ops.linear_attention.tiles import INTERPRETED, Launch, launches, padded, precision

MAX_WIDTH = 256
SAFE_ON_HOPPER = (3, 7, 1)
"""The first Triton without two faults there: ``tl.trans`` of an accumulator (flash-linear-attention issue 640), and
operands of WGMMA in registers (Triton issue 11781, with the ptxas of CUDA 12.8 and 12.9)."""


@functools.cache
def triton_version() -> tuple[int, ...]:
    """Return which Triton is installed; read once, since every call of the op asks."""
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("triton"))[:3])


def why_not(problem: Problem) -> str | None:
    """Return why the kernels cannot run a problem, or None when they can."""
    if reason := why_no_triton(problem):
        return reason
    if problem.device.type == "cuda" and not interpreted():
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device here"
        major, minor = torch.cuda.get_device_capability(problem.device)
        if major < 8 and torch.version.hip is None:
            return f"the kernels need compute capability 8.0 or later, this device has {major}.{minor}"
        if major == 9 and torch.version.hip is None and triton_version() < SAFE_ON_HOPPER:
            return "Triton before 3.7.1 miscompiles such kernels on Hopper; pip install -U triton"
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
    """The states that reach each chunk, S ``(B, H, n, D, E)`` and z ``(B, H, n, D)``, and those after the last.

    ``through`` ``(B, H, n)`` are their inner products with the states that come the other way, where asked for.
    """

    S: Tensor
    z: Tensor
    S_end: Tensor
    z_end: Tensor
    through: Tensor

    def write_end(self, to: Tensor) -> None:
        """Write those after the last to ``(B, H, D, E)`` or, with z as the last column, ``(B, H, D, E + 1)``."""
        E = self.S.shape[-1]
        to[..., :E] = self.S_end
        if to.shape[-1] > E:
            to[..., E] = self.z_end


class Run:
    """The kernels of one call, with its tiles chosen; ``flow`` counts what flows over edges, for their gradient."""

    def __init__(self, p: Call, launch: Launch, *, flow: bool = False) -> None:
        self.p, self.launch, self.flow = p, launch, flow
        # Late, as Triton is not always there and decides then whether it compiles or interprets.
        self.kernels = importlib.import_module("chela.ops.linear_attention.kernels")
        self.decay = p.log_decay is not None
        self.q, self.k, self.v = (x.contiguous() for x in (p.q, p.k, p.v))
        self.B, self.L, self.H, self.D = p.q.shape
        self.E = p.v.shape[-1]
        self.blocks = -(-self.L // launch.BT)
        self.NB = min(self.blocks, max(1, p.chunk // launch.BT) if p.chunk else launch.NB)
        self.chunks = -(-self.blocks // self.NB)
        self.C = self.NB * launch.BT
        self.ahead, self.back = sums_of(p, p.log_decay, self.C), sums_of(p, p.log_decay_back, self.C)
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
            "PRECISION": precision(dtype),
            "num_warps": self.launch.warps,
            "num_stages": self.launch.stages,
        }

    def states(
        self, x: Tensor, y: Tensor, sums: Sums, *, suffix: bool, with_z: bool, start: Tensor | None = None,
        scaled: bool = False, meets: States | None = None,
    ) -> States:  # fmt: skip
        """Compute the states of x yᵀ over edges of these sums, from the left, or from the right when ``suffix``.

        ``start`` ``(B, H, D, E + 1)`` is the state before the first token, zeros unless given; ``scaled`` says that y
        is a gradient that is still to be divided by the normaliser; ``meets`` are the states that come the other way.
        """
        n, D, E = self.chunks, self.D, self.E
        S, z = self.p.new(self.B, self.H, n, D, E), self.p.new(self.B, self.H, n, D)
        if not with_z:
            z.zero_()
        BD, BE = min(self.launch.BS, padded(D)), min(self.launch.BS, padded(E))
        self.kernels.states_kernel[(n * self.B * self.H, -(-D // BD) * -(-E // BE))](
            x, y, S, z, self.mask, self.scale, self.delta, sums.data,
            self.L, self.H, D, E, n, sum_part=sums.strides[0], sum_b=sums.strides[1], sum_h=sums.strides[2],
            sum_n=sums.strides[3], BD=BD, BE=BE, SUFFIX=suffix, SCALED=scaled, WITH_Z=with_z, **self.common,
        )  # fmt: skip
        first = (None, None) if start is None else (start[..., :-1], start[..., -1])
        met = (None, None) if meets is None else (meets.S, meets.z)
        S_end, S_through = self.scan(S, sums, first[0], met[0], suffix=suffix)
        z_end, z_through = self.scan(z, sums, first[1], met[1], suffix=suffix)
        return States(S, z, S_end, z_end, S_through + z_through)

    def scan(
        self, states: Tensor, sums: Sums, start: Tensor | None, met: Tensor | None, *, suffix: bool
    ) -> tuple[Tensor, Tensor]:
        """Carry states ``(B, H, n, ·)`` from chunk to chunk, in place; return those that leave, and ``through``."""
        M = states[0, 0, 0].numel()
        end = self.p.new(self.B, self.H, *states.shape[3:])
        BM = min(512, padded(M))
        tiles = -(-M // BM)
        through = self.nothing if met is None else self.p.new(tiles, self.B, self.H, self.chunks)
        self.kernels.scan_kernel[(self.B * self.H, tiles)](
            states, self.nothing if start is None else start.float().contiguous(), end, sums.data,
            self.nothing if met is None else met, through,
            self.H, M, self.chunks, *sums.strides, self.C - 1,
            BM=BM, SUFFIX=suffix, DECAY=self.decay, STARTED=start is not None, MEETS=met is not None,
        )  # fmt: skip
        return end, through.sum(0)

    def attend(
        self, kind: str, a: Tensor, b: Tensor, c: Tensor, out: Tensor, left: States, right: States | None,
        total: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run ``attend_kernel``, for the output or the gradient of q; return what flowed over edges."""
        WA, WC = a.shape[-1], c.shape[-1]
        BC = min(self.launch.BC, padded(WC))
        columns = -(-WC // BC)
        state_a, state_c = (self.E, 1) if kind == "out" else (1, self.E)
        flow = self.new_flow(columns, 2 * self.NB) if self.flow and kind == "dq" else None
        shared = self.inside(left, right, self.ahead, self.back, flow)
        self.kernels.attend_kernel[(self.blocks * self.B * self.H, columns)](
            a, b, c, out, self.nothing if total is None else total, own_ptr=self.nothing if flow is None else self.q,
            WA=WA, WC=WC, state_a=state_a, state_c=state_c, eps=self.p.eps, KIND=kind, WITH_Z=self.p.normalize,
            BA=padded(WA), BK=min(self.launch.BK, padded(WA)), BC=BC, BR=min(self.launch.BR, padded(WA)), **shared,
        )  # fmt: skip
        return shared["flow_ptr"]  # type: ignore[no-any-return]

    def keys(self, d_out: Tensor, dk: Tensor, dv: Tensor, left: States | None, right: States | None) -> Tensor:
        """Run ``keys_kernel``, over Mᵀ, where the decays of both directions change places; return what flowed."""
        BD, BE = padded(self.D), padded(self.E)
        KD, KE = min(self.launch.BK, BD), min(self.launch.BK, BE)
        CD, CE = min(self.launch.BC, BD), min(self.launch.BC, BE)
        columns = max(-(-self.D // CD), -(-self.E // CE))
        shared = self.inside(left, right, self.back, self.ahead, self.new_flow(columns, 0) if self.flow else None)
        self.kernels.keys_kernel[(self.blocks * self.B * self.H, columns)](
            self.q, self.k, self.v, d_out, dk, dv, D=self.D, E=self.E,
            BD=BD, BE=BE, KD=KD, KE=KE, CD=CD, CE=CE,
            BR=min(self.launch.BU, KD, KE), BU=self.launch.BU, WITH_Z=self.p.ones, **shared,
        )  # fmt: skip
        return shared["flow_ptr"]  # type: ignore[no-any-return]

    def new_flow(self, columns: int, lanes: int) -> Tensor:
        """Return zeros ``(columns, 2 + lanes, B, H, n, C)`` for what flows over edges, see ``attend_kernel``."""
        return torch.zeros(columns, 2 + lanes, self.B, self.H, self.chunks, self.C, device=self.q.device)

    def inside(
        self, left: States | None, right: States | None, ahead: Sums, back: Sums, flow: Tensor | None
    ) -> dict[str, Any]:
        """Return what both kernels that work inside chunks take."""
        given = left or right
        assert given is not None
        left_, right_ = left or given, right or given
        return {
            "mask_ptr": self.mask, "scale_ptr": self.scale, "delta_ptr": self.delta,
            "left_ptr": left_.S, "right_ptr": right_.S, "z_left_ptr": left_.z, "z_right_ptr": right_.z,
            "ahead_ptr": ahead.data, "back_ptr": back.data, "flow_ptr": self.nothing if flow is None else flow,
            "L": self.L, "H": self.H, "blocks": self.blocks,
            # Both have the same strides, or one is a stand-in.
            **dict(zip(("sum_part", "sum_b", "sum_h", "sum_n"), max(ahead.strides, back.strides), strict=True)),
            "flow_rows": 0 if flow is None else flow.shape[1], "flow_part": self.B * self.H * self.chunks * self.C,
            "LOWER": left is not None, "UPPER": right is not None, "FLOW": flow is not None,
            "NORMALIZE": self.p.normalize, **self.common,
        }  # fmt: skip

    def crossing(self, flow: Tensor, side: int) -> Tensor:
        """Return what crosses each edge on its way rightward (side 0) or leftward inside a chunk, ``(B, H, n, C)``."""
        return flow[:, 2 + side * self.NB :][:, : self.NB].sum((0, 1))

    def divide(self, d_out: Tensor, out: Tensor, total: Tensor) -> None:
        """Work out scale = 1 / (eps + total) and delta = d_out · out of each token, both ``(B, H, L)``."""
        self.scale, self.delta = torch.empty_like(total), torch.empty_like(total)
        BT = 16
        blocks = -(-self.L // BT)
        self.kernels.delta_kernel[(blocks * self.B * self.H,)](
            d_out, out, total, self.mask, self.scale, self.delta, self.L, self.H, self.E, self.p.eps, blocks,
            BT=BT, BE=padded(self.E), MASKED=self.p.mask is not None,
        )  # fmt: skip


def forward(p: Call, launch: Launch) -> Outputs:
    """Compute the output, the normaliser and the last state."""
    run = Run(p, launch)
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
    return left, None if p.causal else run.states(run.k, run.v, run.back, suffix=True, with_z=p.normalize)


def backward(
    p: Call, d_out: Tensor, d_end: Tensor | None, out: Tensor, total: Tensor, _: Tensor, decay_grad: bool,
    launch: Launch,
) -> Gradients:  # fmt: skip
    """Compute the gradients of q, k, v, the log decays and the first state."""
    run = Run(p, launch, flow=decay_grad and p.log_decay is not None)
    d_out, d_left = d_out.contiguous(), None
    dq, dk, dv, d_decay, d_back, d_state = p.new_gradients(decay_grad)
    if p.normalize:
        run.divide(d_out, out, total)
    left, right = _states(run)
    options: dict[str, Any] = {"with_z": p.normalize, "scaled": p.normalize}
    start, met = d_end if p.ones else None, left if run.flow else None
    d_right = run.states(run.q, d_out, run.ahead, suffix=True, start=start, meets=met, **options)
    if right is not None:
        d_left = run.states(run.q, d_out, run.back, suffix=False, meets=right if run.flow else None, **options)
    if p.causal:
        d_right.write_end(d_state)

    flow_q = run.attend("dq", d_out, run.v, run.k, dq, left, right)
    flow_k = run.keys(d_out, dk, dv, d_left, d_right)  # over Mᵀ left and right change places
    if run.flow:
        through = run.ahead.across(d_right.through)
        # What each token exchanges with the state on its left is in row 0, on its right in row 1.
        gradient = edge_gradient(run.crossing(flow_q, 0), flow_q[:, 0].sum(0), flow_k[:, 1].sum(0), through)
        put_edge_gradient(p, gradient, d_decay)
    if run.flow and right is not None and d_left is not None:
        through = run.back.across(d_left.through)
        gradient = edge_gradient(run.crossing(flow_q, 1), flow_k[:, 0].sum(0), flow_q[:, 1].sum(0), through)
        put_edge_gradient(p, gradient, d_back)
    return dq, dk, dv, d_decay, d_back, d_state


def put_edge_gradient(p: Call, gradient: Tensor, to: Tensor) -> None:
    """Write the gradient ``(B, H, n, C)`` of all edges into that of ``(H,)`` or ``(B, L, H)`` log decays."""
    gradient = gradient.flatten(2)[..., : p.q.shape[1]]
    if p.mask is not None:
        gradient = gradient.masked_fill(~p.mask[:, None], 0)
    to.copy_(gradient.sum((0, 2)) if to.ndim == 1 else gradient.mT)


# Which launch of the table fits, once one did not, by device, dtype and widths.
_fitting: dict[tuple[Any, ...], int] = {}


def first_that_fits(p: Call, run: Callable[[Launch], Any], *, backward: bool = False) -> Any:
    """Call ``run`` with the best launch of the table that the device has the resources for."""
    from triton.runtime.errors import OutOfResources

    choices = table(p, backward=backward)
    key = (p.q.device, p.q.dtype, padded(p.q.shape[-1]), padded(p.v.shape[-1]), backward)
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


def table(p: Call, *, backward: bool) -> tuple[Launch, ...]:
    """Return the launches worth trying for a problem, best first."""
    if p.q.device.type != "cuda":
        return (INTERPRETED,)
    device: Any = torch.cuda.get_device_properties(p.q.device)
    hopper = device.major == 9 and torch.version.hip is None
    memory = device.shared_memory_per_block_optin
    found = launches(p.q.shape[-1], p.v.shape[-1], p.q.dtype, memory, gradients=backward, hopper=hopper)
    B, L, H, _ = p.q.shape
    return tuple(launch.filling(L, B * H, device.multi_processor_count) for launch in found)


linear_attention_triton = define(
    "linear_attention_triton",
    lambda p: first_that_fits(p, functools.partial(forward, p)),
    lambda p, *given: first_that_fits(p, functools.partial(backward, p, *given), backward=True),
    lambda p: (0,),
)
