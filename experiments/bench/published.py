"""MEGA's and S4D's layers here beside their authors' code, forward + backward of one sequence on the CPU.

Needs clones of github.com/facebookresearch/mega and github.com/state-spaces/s4, whose files are imported from there:
``chela bench published mega=FOLDER s4=FOLDER``. Width 128, float32; MEGA with 64 queries, 256 values, both directions
and no chunks, as a whole residual layer with its norm; S4D with 64 states, causal.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from chela.core.errors import UsageError
from chela.core.options import option
from chela.layers.mixers.mega import MEGA
from chela.layers.mixers.s4d import S4D
from experiments.bench import Row, timing
from experiments.bench.timing import interleaved, training_step

PLOT = ("MEGA", "MEGA, published", "S4D", "S4D, published")
WIDTH, QUERY, VALUE, AVERAGES, STATES = 128, 64, 256, 16, 64
LENGTHS = (1024, 2048, 4096, 8192)
MEGA_UP_TO = 4096  # its attention is quadratic: a step at 8,192 takes many seconds


@dataclass
class Options:
    """Where the authors' code lies."""

    mega: Path | None = option(None, "a clone of facebookresearch/mega")
    s4: Path | None = option(None, "a clone of state-spaces/s4")


class OurMEGA(nn.Module):
    """Our MEGA as the authors' class is: norm, update, sum."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = MEGA(WIDTH, l_max=length, d_qk=QUERY, d_value=VALUE, averages=AVERAGES)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x: (1, L, D)``."""
        return x + self.layer(self.norm(x), stream=x)  # type: ignore[no-any-return]


class Theirs(nn.Module):
    """A layer of the authors': it takes another order of dimensions and returns a pair."""

    def __init__(self, layer: nn.Module, order: tuple[int, int, int]) -> None:
        super().__init__()
        self.layer, self.order = layer, order

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x: (1, L, D)``."""
        return self.layer(x.permute(self.order))[0].permute(self.order)  # type: ignore[no-any-return]


def run(quick: bool, options: Options) -> list[Row]:
    """Measure every length."""
    if options.mega is None or options.s4 is None:
        raise UsageError("expected mega=FOLDER and s4=FOLDER, clones of facebookresearch/mega and state-spaces/s4")
    mega = _module(options.mega, "fairseq.modules.moving_average_gated_attention", "fairseq/modules")
    s4d = _module(options.s4, "models.s4.s4d", "models/s4")
    kept = timing.allocator(keep=True)
    return [_row(length, mega, s4d, kept) for length in (LENGTHS[:1] if quick else LENGTHS)]


def _row(length: int, mega: Any, s4d: Any, allocator: str) -> Row:
    layers: dict[str, nn.Module] = {
        "S4D": S4D(WIDTH, l_max=length, causal=True, d_state=STATES),
        "S4D, published": Theirs(s4d.S4D(WIDTH, d_state=STATES), (0, 2, 1)),
    }
    if length <= MEGA_UP_TO:
        published = mega.MovingAverageGatedAttention(
            WIDTH, QUERY, VALUE, AVERAGES, bidirectional=True, max_positions=length
        )
        layers |= {"MEGA": OurMEGA(length), "MEGA, published": Theirs(published, (1, 0, 2))}
    x, d_out = torch.randn(2, 1, length, WIDTH).unbind()
    steps = {name: training_step(layer, x, d_out=d_out, weights=layer.parameters()) for name, layer in layers.items()}
    times = interleaved(steps, seconds=5.0, least=5)
    ours = [name for name in layers if f"{name}, published" in layers]
    values = {f"{name} / published": times[name].median / times[f"{name}, published"].median for name in ours}
    return Row.timed({"L": length, "allocator": allocator}, times, values)


def _module(clone: Path, name: str, folder: str) -> ModuleType:
    """Import one file of a clone, with what it needs of its package and without the package's own ``__init__``."""
    if not (clone / folder).is_dir():
        raise UsageError(f"expected a clone with {folder} in it, got {clone}")
    parents = name.split(".")[:-1]
    for depth in range(len(parents)):
        package = ModuleType(".".join(parents[: depth + 1]))
        package.__path__ = [str(clone.joinpath(*parents[: depth + 1]))]
        sys.modules[package.__name__] = package
    if parents[0] == "fairseq":  # its utils import a whole trainer; the layer wants three functions of it
        utils: Any = ModuleType("fairseq.utils")
        utils.get_activation_fn = lambda activation: nn.functional.silu
        utils.softmax = lambda x, dim, onnx_trace: nn.functional.softmax(x, dim=dim)
        sys.modules["fairseq.utils"] = sys.modules["fairseq"].utils = utils  # type: ignore[attr-defined]
    else:  # S4D asks for a dropout that it does not use at rate 0
        nn_module: Any = ModuleType("src.models.nn")
        nn_module.DropoutNd = nn.Dropout
        sys.modules |= {"src": ModuleType("src"), "src.models": ModuleType("src.models"), "src.models.nn": nn_module}
    return importlib.import_module(name)
