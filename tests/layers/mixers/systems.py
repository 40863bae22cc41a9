"""The systems under test: how each is built small, and its definition."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chela.layers.mixers import build_mixer
from chela.layers.param_groups import initialise
from tests.layers.mixers import definitions

D_MODEL, L_MAX = 16, 160


@dataclass(frozen=True, eq=False)  # each is itself: the cache tells them apart
class System:
    """One row: the mixer, its options, and the dense statement of it."""

    mixer: str
    options: dict
    definition: Callable[..., Tensor]
    bidirectional: bool = True
    layer: int = 0
    depth: int = 1

    def context(self, stream: Tensor) -> dict[str, Tensor]:
        """What the layer is told beside input and mask."""
        return {"stream": stream} if self.mixer == "mega" else {}

    def defined(self, layer: nn.Module, x: Tensor, real: Tensor, stream: Tensor) -> Tensor:
        """The update by the definition."""
        return self.definition(layer, x, real, **self.context(stream))

    def build(self, causal: bool) -> nn.Module:
        """A float64 layer whose parameters are all away from special values; drawn once and copied: far quicker."""
        return copy.deepcopy(_built(self, causal))


@functools.cache
def _built(system: System, causal: bool) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        mixer = build_mixer(
            system.mixer, D_MODEL, system.options, l_max=L_MAX, causal=causal, layer=system.layer, depth=system.depth
        )
        initialise(mixer, 1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    finally:
        torch.set_default_dtype(before)
    return mixer


def _lightning(layer: int, depth: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    return functools.partial(definitions.lightning, index=layer, depth=depth)


_CHELA = {"d_qk": 8, "d_value": 24, "heads": 2, "qk": "short", "gate": "highway", "pooled": 0.5}
_MEGA = {"d_qk": 8, "d_value": 24, "averages": 4}

SYSTEMS: dict[str, System] = {
    "linear": System("linear", {"heads": 2}, definitions.linear),
    "softmax": System("softmax", {"heads": 2, "d_value": 24}, definitions.softmax),
    "softmax-learned": System("softmax", {"heads": 2, "rotary": False}, definitions.softmax),
    "hedgehog": System("hedgehog", {"heads": 2, "d_value": 12}, definitions.hedgehog),
    "lightning": System("lightning", {"d_value": 24}, _lightning(0, 1), bidirectional=False),
    "lightning-deep": System("lightning", {}, _lightning(1, 3), bidirectional=False, layer=1, depth=3),
    "lightning-last": System("lightning", {}, _lightning(2, 3), bidirectional=False, layer=2, depth=3),
    "lion_lit": System("lion", {"heads": 2, "decay": "none"}, definitions.lion),
    "lion_d": System("lion", {"heads": 2, "decay": "head"}, definitions.lion),
    "lion_s": System("lion", {"heads": 2, "decay": "token"}, definitions.lion),
    "linear-short": System("linear", {"heads": 2, "short": 4}, definitions.linear),
    "softmax-short": System("softmax", {"heads": 2, "short": 4}, definitions.softmax),
    "hedgehog-short": System("hedgehog", {"heads": 2, "short": 3}, definitions.hedgehog),
    "lightning-short": System("lightning", {"short": 4}, _lightning(0, 1), bidirectional=False),
    "lion_s-short": System("lion", {"heads": 2, "short": 4}, definitions.lion),
    "s4d": System("s4d", {"d_state": 8}, definitions.s4d),
    "mega": System("mega", _MEGA, definitions.mega),
    "mega-laplace": System("mega", _MEGA | {"attention_function": "laplace"}, definitions.mega),
    "mega-chunk": System("mega", _MEGA | {"chunk": 5}, definitions.mega),
    "mega-chunk-laplace": System("mega", _MEGA | {"chunk": 5, "attention_function": "laplace"}, definitions.mega),
    "chela": System("chela", _CHELA, definitions.chela),
    "chela-no-gate": System("chela", _CHELA | {"gate": "none"}, definitions.chela),
    "chela-qk-long": System("chela", _CHELA | {"qk": "long"}, definitions.chela),
    "chela-select": System("chela", _CHELA | {"attention": "select", "d_qk": 1}, definitions.chela),
    "chela-pool": System("chela", _CHELA | {"attention": "pool"}, definitions.chela),
    "chela-no-branches": System("chela", _CHELA | {"reparam": False}, definitions.chela),
    "chela-conv-only": System("chela", _CHELA | {"attention": "none"}, definitions.chela),
    "chela-attention-only": System("chela", _CHELA | {"conv": "none"}, definitions.chela),
    "chela-short": System("chela", _CHELA | {"conv": "short"}, definitions.chela),
    "chela-ema": System("chela", _CHELA | {"long_kernel": "ema"}, definitions.chela),
    "chela-long": System("chela", _CHELA | {"conv": "long", "long_kernel": "ema"}, definitions.chela),
}

CASES = [
    (name, causal)
    for name, system in SYSTEMS.items()
    for causal in ((False, True) if system.bidirectional else (True,))
]
IDS = [f"{name}-{'causal' if causal else 'both'}" for name, causal in CASES]
