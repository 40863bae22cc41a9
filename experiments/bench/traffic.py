"""Linear attention on a GPU by count: bytes moved and FLOPs of each kernel, and the bound on an H100. Nothing is timed.

What is counted is what the backend "triton" would launch: its own host code runs on tensors without data and hands
every launch, with its grid and tiles, to a recorder. "moved" is what all programs load and store, of which a cache may
serve a part; "least" is each tensor once per kernel. FLOPs are those of products, padding included. The bound is that
of least bytes over 3.35 TB/s or FLOPs over 990 TFLOP/s (bfloat16), whichever is more, added over kernels. "torch" is
what is done between kernels. Beside it the same count for the kernels of flash-linear-attention's chunked form
(``chunk_simple_gla``: chunks of 64 tokens, states in bfloat16 forward and float32 backward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from chela.core.errors import UsageError
from chela.core.options import option
from chela.ops.linear_attention.operator import Call
from chela.ops.linear_attention.tiles import Launch, launches
from chela.ops.linear_attention.triton import backward, forward, load_kernels
from experiments.bench import Row

BYTES, FLOPS, SHARED = 3.35e12, 990e12, 227 * 1024  # of an H100: a second, a second, of memory that a program may use
CHUNK = 64  # of flash-linear-attention


@dataclass
class Options:
    """The problem that is counted."""

    batch: int = option(4, "sequences", ge=1)
    length: int = option(32768, "tokens of each", ge=1)
    heads: int = option(32, "heads", ge=1)
    width: int = option(128, "width of queries and keys", ge=1, le=256)
    values: int | None = option(None, "width of values; null is that of queries", ge=1, le=256)
    causal: bool = option(True, "one direction, not both")
    decay: str = option("head", "log decays", choices=("none", "head", "token"))
    learned: bool = option(False, "whether the decays need gradients")
    normalize: bool = option(False, "divide by the sum of weights")


class Count(NamedTuple):
    """Of one launch, or several."""

    moved: float = 0  # bytes
    least: float = 0
    flops: float = 0

    def __add__(self, other: Any) -> Count:
        return Count(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def bound(self) -> float:
        """Seconds."""
        return max(self.least / BYTES, self.flops / FLOPS)


class Launched(NamedTuple):
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, ...]
    given: SimpleNamespace  # arguments by name


class Recorder:
    """Stands in for the module of the kernels: keeps every launch and runs none."""

    def __init__(self) -> None:
        try:
            self.kernels = load_kernels()
        except ImportError as error:
            raise UsageError(f"traffic: expected Triton, whose kernels are counted, got {error}") from None
        self.tl = self.kernels.tl
        self.launches: list[Launched] = []

    def __getattr__(self, kernel: str) -> Kernel:
        return Kernel(kernel, getattr(self.kernels, kernel).arg_names, self.launches)


@dataclass
class Kernel:
    """Stands in for one kernel."""

    name: str
    arguments: list[str]
    launches: list[Launched]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.keep, grid)

    def keep(self, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        """Keep a launch."""
        named = dict(zip(self.arguments, given, strict=False))
        self.launches.append(Launched(self.name, grid, SimpleNamespace(**named, **constants)))


class Between(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that torch's own operations read and write; views and memory that is only asked for are none."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        if not (func.is_view or "empty" in func.__name__ or not returned):
            fresh = [] if returned[0].alias_info else [result]
            self.bytes += sum(size(x) for x in tensors([args, kwargs or {}, fresh]))
        return result


def tensors(x: Any) -> list[Tensor]:
    """Return the tensors in nested lists."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def size(x: Tensor) -> int:
    """Return the bytes of a tensor, counting once what is repeated without being copied."""
    return (
        int(torch.Size(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride).numel()) * x.element_size()
    )


def states(grid: tuple[int, ...], g: SimpleNamespace) -> Count:
    """Count ``states_kernel``: x and y once per tile of the other's columns, a state written per chunk."""
    of_D, of_E = -(-g.D // g.BD), -(-g.E // g.BE)
    heads, tiles, item = grid[0] // g.chunks, grid[1], g.x_ptr.element_size()
    blocks = g.chunks * g.NB
    loaded = g.L * item * (g.D * of_E + g.E * of_D)
    loaded += tiles * g.L * (g.MASKED + 4 * g.SCALED * (1 + g.WITH_Z))
    loaded += tiles * blocks * g.DECAY * 8 * (g.BT + (not g.SUFFIX))
    stored = 4 * g.chunks * g.D * (g.E + g.WITH_Z)
    return Count(heads * (loaded + stored), 0, heads * tiles * blocks * 2 * g.BT * g.BD * g.BE)


def scan(grid: tuple[int, ...], g: SimpleNamespace) -> Count:
    """Count ``scan_kernel``: every state is read and written, and those it meets are read."""
    numbers = (2 + g.MEETS) * g.chunks * g.M + g.M * (1 + g.STARTED) + grid[1] * g.chunks * (2 * g.DECAY + g.MEETS)
    return Count(grid[0] * 4 * numbers)


def delta(grid: tuple[int, ...], g: SimpleNamespace) -> Count:
    """Count ``delta_kernel``: two tensors are read, three numbers per token read or written."""
    heads = grid[0] // g.blocks
    return Count(heads * g.L * (2 * g.E * g.d_out_ptr.element_size() + 12 + g.MASKED))


class Inside:
    """What is added up inside chunks: each block of BT tokens hears tiles of its own chunk."""

    def __init__(self, g: SimpleNamespace, tile: int) -> None:
        self.g, self.tile, self.sides = g, tile, g.LOWER + g.UPPER
        chunks = [(block // g.NB * g.NB, min(block // g.NB * g.NB + g.NB, g.blocks)) for block in range(g.blocks)]
        self.heard = [  # first tokens of the tiles that each block hears
            range((first if g.LOWER else block) * g.BT, (end if g.UPPER else block + 1) * g.BT, tile)
            for block, (first, end) in enumerate(chunks)
        ]
        self.tiles = sum(len(tiles) for tiles in self.heard)
        self.tokens = sum(max(0, min(tile, g.L - start)) for tiles in self.heard for start in tiles)

    def product(self, width: int, padded: int, BK: int) -> int:
        """Return the elements that one product loads, and a block's own tokens for what states give.

        Of its own tokens a block loads BK columns once, others again for each tile; all, if a state comes in parts.
        """
        g, first = self.g, min(BK, width)
        own = [min(g.BT, g.L - block * g.BT) for block in range(g.blocks)]
        again = sum(tokens * len(tiles) for tokens, tiles in zip(own, self.heard, strict=True))
        from_states = self.sides * width * g.L * (padded > g.BR)
        return int(first * g.L + (width - first) * again + width * self.tokens + from_states)

    def numbers(self) -> int:
        """Return the bytes of masks and decays."""
        decays = self.sides * (self.g.blocks * self.g.BT + self.tiles * self.tile) + self.g.UPPER * self.g.blocks
        return int(self.g.MASKED * (self.g.L + self.tokens) + 8 * self.g.DECAY * decays)


def attend(grid: tuple[int, ...], g: SimpleNamespace) -> Count:
    """Count ``attend_kernel``: its own tokens, those of its chunk and the states, for each tile of columns."""
    heads, columns, item, dq = grid[0] // g.blocks, grid[1], g.a_ptr.element_size(), g.KIND == "dq"
    inside = Inside(g, g.BT)
    states = inside.sides * g.blocks
    loaded = columns * (item * inside.product(g.WA, g.BA, g.BK) + inside.numbers() + 8 * g.L * (g.NORMALIZE and dq))
    loaded += item * g.WC * (inside.tokens + g.L * g.FLOW)
    loaded += 4 * states * (g.WA * g.WC + g.WITH_Z * (g.WC if dq else columns * g.WA))
    stored = item * g.L * g.WC + 4 * g.L * (g.NORMALIZE and not dq)
    if g.FLOW:  # a chunk's last token has no edge after it that what it gives could cross
        last = sum(start // g.BT % g.NB == g.NB - 1 for tiles in inside.heard for start in tiles)
        stored += columns * 4 * (states * g.BT + inside.sides * inside.tiles * g.BT - last)
    products = states * g.BA * g.BC + inside.tiles * g.BT * (g.BA + g.BC * (1 + g.FLOW))
    return Count(heads * (loaded + stored), 0, heads * columns * 2 * g.BT * products)


def keys(grid: tuple[int, ...], g: SimpleNamespace) -> Count:
    """Count ``keys_kernel``: all four inputs and each state twice."""
    heads, columns, item = grid[0] // g.blocks, grid[1], g.q_ptr.element_size()
    inside = Inside(g, g.BU)
    states = inside.sides * g.blocks
    parts_D, parts_E = not g.KD == g.CD == g.BD, not g.KE == g.CE == g.BE  # then outputs need tiles of their own
    products = inside.product(g.D, g.BD, g.KD) + inside.product(g.E, g.BE, g.KE)
    loaded = columns * (item * products + inside.numbers() + 8 * inside.tokens * g.NORMALIZE)
    loaded += item * (inside.tokens * (g.D * parts_D + g.E * parts_E) + inside.sides * g.L * g.D * (g.FLOW and parts_D))
    loaded += 4 * states * g.D * (2 * g.E + g.WITH_Z)
    stored = item * g.L * (g.D + g.E) + columns * 4 * states * g.BT * g.FLOW
    multiplied = states * (g.BE * g.CD + g.BD * g.CE) + inside.tiles * g.BU * (g.BD + g.BE + g.CD + g.CE)
    return Count(heads * (loaded + stored), 0, heads * columns * 2 * g.BT * multiplied)


COUNTS = {
    "states_kernel": states,
    "scan_kernel": scan,
    "delta_kernel": delta,
    "attend_kernel": attend,
    "keys_kernel": keys,
}


def count(launched: Launched) -> Count:
    """Count one launch: what all programs move, each tensor once (twice where it is changed in place), FLOPs."""
    counted = COUNTS[launched.kernel](launched.grid, launched.given)
    given = vars(launched.given)
    unused = () if given.get("WITH_Z") else ("z_ptr", "z_left_ptr", "z_right_ptr")
    once = {
        id(x): size(x) for name, x in given.items() if isinstance(x, Tensor) and x.numel() > 1 and name not in unused
    }
    twice = size(launched.given.states_ptr) if launched.kernel == "scan_kernel" else 0
    return counted._replace(least=sum(once.values()) + twice)


def ours(o: Options, launch: Launch) -> dict[str, Count]:
    """Return the count of each kernel, and of what torch does between them, by "pass kernel"."""
    call = problem(o)
    out, total, end = call.new_outputs()
    found: dict[str, Count] = {}
    for name, run in (
        ("forward", partial(forward, call, launch)),
        ("backward", partial(backward, call, out, None, out.clone(), total, end, o.learned, launch)),
    ):
        recorder = Recorder()
        with torch.no_grad(), Between() as between:  # type: ignore[no-untyped-call]
            run(recorder)
        for launched in recorder.launches:
            kind = getattr(launched.given, "KIND", "")
            label = f"{name} {launched.kernel.removesuffix('_kernel')} {kind}".rstrip()
            found[label] = found.get(label, Count()) + count(launched)
        found[f"{name} torch"] = Count(between.bytes, between.bytes)
    return found


def problem(o: Options) -> Call:
    """Return the call, on tensors without data."""
    B, L, H, D, E = o.batch, o.length, o.heads, o.width, o.values or o.width
    q, k = (torch.empty(B, L, H, D, dtype=torch.bfloat16, device="meta") for _ in range(2))
    v = torch.empty(B, L, H, E, dtype=torch.bfloat16, device="meta")
    shape = {"none": None, "head": (H,), "token": (B, L, H)}[o.decay]
    decay = None if shape is None else torch.empty(shape, device="meta")
    back = None if o.causal else decay
    return Call(q, k, v, decay, back, None, None, o.causal, o.normalize, o.normalize, 1e-6, 0)


def theirs(o: Options) -> dict[str, Count]:
    """Return the count of flash-linear-attention's kernels: each tensor once, each product once."""
    tokens, D, E = o.batch * o.length * o.heads, o.width, o.values or o.width
    state = D * E / CHUNK  # elements per token
    inside_D, inside_E, outer = CHUNK * D, CHUNK * E, D * E  # multiply-adds per token
    decay = 4 * (o.decay == "token")
    per_token = {  # bytes, multiply-adds
        "forward chunk_h": (2 * (D + E) + 2 * state, outer),
        "forward chunk_o": (2 * (2 * D + E) + 2 * state + 2 * E, inside_D + inside_E + outer),
        "backward chunk_h": (2 * (D + E) + 4 * state, outer),
        "backward chunk_dh": (2 * (D + E) + 4 * state, outer),
        "backward chunk_dqkwg": (2 * (2 * D + 2 * E) + 8 * state + 4 * D, inside_E + 3 * inside_D + 2 * outer),
        "backward chunk_dv": (2 * (2 * D + E) + 4 * state + 2 * E, inside_D + inside_E + outer),
    }
    return {
        f"fla {name}": Count(0, tokens * (moved + decay), 2 * tokens * products)
        for name, (moved, products) in per_token.items()
    }


def run(quick: bool, options: Options) -> list[Row]:
    """Count one problem; ``quick`` changes nothing, as nothing takes long."""
    D, E = options.width, options.values or options.width
    key: dict[str, Any] = {"B": options.batch, "L": options.length, "H": options.heads, "D": D, "E": E}
    key |= {name: getattr(options, name) for name in ("causal", "decay", "learned", "normalize")}
    key |= {"dtype": "bfloat16", "figures": "arithmetic, not measured"}
    rows = columns(key, with_total("total", ours(options, launches(D, E, torch.bfloat16, SHARED)[0])))
    comparable = options.causal and not options.normalize
    return rows + (columns(key, with_total("fla total", theirs(options)))[1:] if comparable else [])


def with_total(name: str, counted: dict[str, Count]) -> dict[str, Count]:
    """Add the sum of all; its bound is the sum of bounds, as kernels run one after another."""
    return counted | {name: sum(counted.values(), Count())}


def columns(key: dict[str, Any], counted: dict[str, Count]) -> list[Row]:
    """Return a row for each quantity, which the table shows as a column."""
    bounds = {name: count.bound for name, count in counted.items()}
    total = list(counted)[-1]
    bounds[total] = sum(bounds.values()) - bounds[total]
    quantities = {
        "moved GB": {name: count.moved / 1e9 for name, count in counted.items()},
        "least GB": {name: count.least / 1e9 for name, count in counted.items()},
        "GFLOP": {name: count.flops / 1e9 for name, count in counted.items()},
        "bound ms": {name: bound * 1e3 for name, bound in bounds.items()},
    }
    return [Row(key | {"count": quantity}, values) for quantity, values in quantities.items()]
