"""What a causal layer remembers of the tokens so far: a flat dict of real tensors, batch first.

A state is saved as it is by safetensors, branched by cloning its tensors, and repeated by ``repeat_interleave`` on
each. A ``position`` is ``(B,)`` int64 on the CPU, the tokens seen, the same in all rows. What grows
with the tokens has room for more, which doubles when it is full: keys and values
(``chela.layers.cache``), inputs of a long kernel. Every system has these:

start(batch)        the state before the first token; a RuntimeError if the layer looks ahead
prefill(x, state)   feeds the tokens ``x: (B, L, D)`` that follow those of the state, which is not changed; returns what
                    ``forward`` gives them, with gradients to x and the parameters, and the new state
step(x, state)      feeds one token ``x: (B, D)``: what ``prefill`` of it gives, without gradients; may write to the
                    state's tensors: clone them to branch
state_size(length)  counts the numbers of a sequence that ``length`` tokens leave behind, room for more
                    included, beside the position
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

State: TypeAlias = dict[str, Tensor]


def expect_causal(layer: nn.Module) -> None:
    """Refuse a state to a layer that looks ahead, by a RuntimeError."""
    if not layer.causal:
        raise RuntimeError(f"{type(layer).__name__}.start: expected causal=True; a two-sided layer needs later tokens")


def nested(name: str, state: Mapping[str, Tensor]) -> State:
    """Put the state of a part into that of the whole.

    >>> nested("conv", {"recent": torch.zeros(1)})
    {'conv.recent': tensor([0.])}
    """
    return {f"{name}.{key}": tensor for key, tensor in state.items()}


def part(name: str, state: Mapping[str, Tensor]) -> State:
    """Take the state of a part out of that of the whole; undoes ``nested``."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


def detached(**tensors: Tensor) -> State:
    """Detach tensors, and copy those that are views of larger ones, so that they can be kept and saved."""

    def own(tensor: Tensor) -> Tensor:
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)

    return {name: own(tensor.detach()) for name, tensor in tensors.items()}
