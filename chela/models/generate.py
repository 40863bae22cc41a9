"""Symbols from a causal network, one after another. Needs torch and einops only.

Shapes: B batch, P symbols of the prompt, T new symbols, K symbols to choose from, id 0 being padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from chela.models.heads import TokenModel


def generate(model: TokenModel, prompt: Tensor | str, tokens: int, **how: Any) -> Tensor | str:
    """Return the prompt and its continuation: ids ``(B, P + T)`` for ids ``(B, P)``, or text for text.

    Args:
        model: A causal network of tokens, as ``build_model`` or ``from_pretrained`` gives it.
        prompt: Ids; or text, where the network knows its alphabet.
        tokens: New symbols T.
        how: As for ``Continuation``.

    Raises:
        ValueError: A symbol that the network does not know, or an option out of its limits.
    """
    if not isinstance(prompt, str):
        return torch.cat([prompt, *(ids[:, None] for ids in Continuation(model, prompt, tokens, **how))], dim=1)
    alphabet = model.built_from[1].alphabet
    if not alphabet:
        raise ValueError("expected a network of text, got one of ids without characters; give and take ids")
    ids: Any = generate(model, encode(prompt, alphabet), tokens, **how)
    return decode(ids[0], alphabet).decode(errors="replace")


class Continuation(Iterator[Tensor]):
    """The ids ``(B,)`` that follow a prompt, each drawn when it is asked for.

    The prompt is read at once, then every symbol is a step: O(1) time and memory for systems whose state does not grow.

    Args:
        model: In eval mode.
        prompt: Ids ``(B, P)``, P ≥ 1.
        tokens: How many symbols to draw.
        temperature: Scores are divided by it; 0 takes the best.
        top_k: Draw from the k best only; 0 from all.
        seed: The same seed gives the same symbols.
        state: What came before the prompt, as ``model.prefill`` or ``model.step`` returned it.

    Attributes:
        state: What the network remembers of all symbols but the last; a step may write into it.
        made: Symbols so far.

    Raises:
        ValueError: An empty prompt, an option out of its limits, or more than a network with an end can make.
    """

    def __init__(
        self,
        model: TokenModel,
        prompt: Tensor,
        tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        if prompt.ndim != 2 or not prompt.shape[1]:
            raise ValueError(f"prompt: expected ids of shape (B, P) with P >= 1, got {tuple(prompt.shape)}")
        if not 0 <= temperature < math.inf or top_k < 0 or tokens < 0:
            raise ValueError(f"expected tokens, temperature, top_k >= 0, got {tokens}, {temperature} and {top_k}")
        read, most = prompt.shape[1] + (0 if state is None else int(state["position"][0])), model.backbone.l_max + 1
        if model.backbone.ends() and read + tokens > most:  # the last one is not read
            raise ValueError(
                f"tokens: expected at most {most} with the prompt, got {read} of the prompt and {tokens}: this network "
                f"goes no further ({model.backbone.ends()})"
            )
        self.made, self._tokens, self._model, self._last = 0, tokens, model, prompt
        self._how: Any = {"temperature": temperature, "top_k": top_k, "draw": torch.Generator().manual_seed(seed)}
        with torch.no_grad():
            scores, self.state = model.prefill(prompt.to(next(model.parameters()).device), state)
        self._scores = scores[:, -1]

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self.made == self._tokens:
            raise StopIteration
        if self.made:
            self._scores, self.state = self._model.step(self._last.to(self._scores.device), self.state)
        self._last = sample(self._scores, **self._how)
        self.made += 1
        return self._last


def sample(scores: Tensor, *, temperature: float, top_k: int, draw: torch.Generator) -> Tensor:
    """Draw ids ``(B,)`` by scores ``(B, K)``, on the CPU in float64; never id 0, which is padding.

    >>> sample(torch.tensor([[9.0, 0.0, 3.0, 1.0]]), temperature=1.0, top_k=1, draw=torch.Generator()).tolist()
    [2]
    """
    scores = scores.detach().double().cpu().index_fill(1, torch.tensor(0), float("-inf"))
    if temperature == 0:
        return scores.argmax(1)
    scores = (scores - scores.amax(1, keepdim=True)) / temperature  # the best is 0, however cold it is
    shares, order = scores.softmax(1).sort(dim=1, descending=True)
    shares[:, top_k or len(shares[0]) :] = 0.0
    return order.gather(1, torch.multinomial(shares, 1, generator=draw))[:, 0]


def encode(text: str | bytes, alphabet: str) -> Tensor:
    """Return text as ids ``(1, P)``, one for each byte of its UTF-8 form.

    ``alphabet`` has a character for each id from 1 on; it stands for the byte of its number.

    Raises:
        ValueError: A character that is not in the alphabet.

    >>> encode("cab", "abc").tolist()
    [[3, 1, 2]]
    """
    data = text.encode() if isinstance(text, str) else text
    ids = {ord(character): id for id, character in enumerate(alphabet, 1)}
    for place, byte in enumerate(data):
        if byte not in ids:
            at = len(data[:place].decode(errors="ignore"))  # the byte may be one of several of a character
            got = f"{data.decode(errors='replace')[at]!r} at {at}"
            raise ValueError(f"prompt: expected the {len(alphabet)} characters that the network knows, got {got}")
    return torch.tensor([[ids[byte] for byte in data]], dtype=torch.long)


def decode(ids: Tensor, alphabet: str) -> bytes:
    """Return the bytes that ids ``(P,)`` stand for.

    >>> decode(torch.tensor([3, 1, 2]), "abc")
    b'cab'
    """
    return bytes(ord(alphabet[id - 1]) for id in ids.tolist())
