"""One token more, after a context: time, and memory of the state, per system.

Two blocks of width 128 without a feed-forward layer, one text, float32. The context is random bytes that are prefilled;
then single steps are timed, the systems taking turns.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from chela.config.schema import ModelConfig
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.models.heads import TokenModel
from experiments.bench import Options, Row
from experiments.bench.timing import interleaved

CONTEXTS = (1024, 4096, 16384, 65536)
SYSTEMS = {
    "chela": ("chela", {}),
    "chela ema": ("chela", {"long_kernel": "ema"}),
    "lightning": ("lightning", {}),
    "s4d": ("s4d", {}),
    "softmax": ("softmax", {}),
}
L_MAX = 2**17  # taps of the long kernel
PIECE = 2048  # prefilled at once
STEPS = 64


def run(options: Options) -> list[Row]:
    """Measure after every context."""
    return [context_row(length) for length in (CONTEXTS[:1] if options.quick else CONTEXTS)]


def language_model(system: str) -> TokenModel:
    """Build a network of bytes; its long kernel has as many taps as there will be context."""
    name, options = SYSTEMS[system]
    config = ModelConfig(d_model=128, depth=2, d_ff=0, causal=True, mixer=mixer_options(name)(**options))
    model = build_model(config, TaskFacts(257, L_MAX, 257, objective="tokens"), seed=0).eval()
    assert isinstance(model, TokenModel)
    return model


@torch.no_grad()
def context_row(length: int) -> Row:
    """Return the time of a step, and the bytes of the state, after ``length`` symbols."""
    torch.manual_seed(0)
    symbols = torch.randint(1, 257, (1, length))
    steps, sizes = {}, {}
    for system in SYSTEMS:
        model, state = language_model(system), None
        for start in range(0, length, PIECE):
            _, state = model.prefill(symbols[:, start : start + PIECE], state)
        assert state is not None
        _, state = model.step(symbols[:, 0], state)  # which works out what a prefill leaves to the first step
        steps[system] = partial(make_steps, model, symbols[:, 0], state)
        sizes[system] = sum(part.nbytes for part in state.values())
    times = interleaved(steps, seconds=2.0, least=3, most=20)
    values = {f"{name} [ms]": took / STEPS for name, took in times.median().items()}
    values |= {f"{name} [KiB]": size / 1024 for name, size in sizes.items()}
    return Row({"L": length}, values, f"the median of turns of {STEPS} steps, divided by {STEPS}")


def make_steps(model: TokenModel, symbol: Tensor, state: dict[str, Tensor]) -> None:
    """Make some steps from a copy of the state."""
    now = {name: part.clone() for name, part in state.items()}
    for _ in range(STEPS):
        _, now = model.step(symbol, now)
