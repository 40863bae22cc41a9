"""The full recipes are MEGA's: its table of sizes, and the parameters that its equations make of them."""

from __future__ import annotations

import pytest

from chela.config import resolve
from chela.models import build_model
from lra.tasks import get_task

# arXiv 2209.10655, table 8: depth, d_model, width of values and feed-forward, width of queries, attention, norm,
# pre-norm, rate, weight decay, effective batch, updates, warm-up.
TABLE = {
    "listops": (6, 80, 160, 64, "softmax", "layer", False, 1e-3, 0.01, 64, 90_000, 3_000),
    "text": (4, 128, 256, 64, "softmax", "scale", False, 4e-3, 0.01, 50, 25_000, 10_000),
    "retrieval": (6, 128, 256, 64, "softmax", "scale", False, 3e-3, 0.04, 64, 91_960, 10_000),
    "image": (8, 160, 320, 96, "laplace", "batch", True, 1e-2, 0.02, 50, 180_000, 9_000),
    "pathfinder": (6, 128, 256, 64, "laplace", "batch", True, 1e-2, 0.01, 128, 250_000, 50_000),
    "pathx": (4, 64, 128, 32, "laplace", "batch", True, 1e-2, 0.01, 128, 125_000, 25_000),
}
AVERAGES = 16  # of MEGA's moving average, per channel and direction


def linear(d_in: int, d_out: int) -> int:
    return d_in * d_out + d_out


@pytest.mark.parametrize("task", TABLE)
def test_a_full_recipe_is_the_table(task: str) -> None:
    config = resolve([f"task={task}", "preset=full", "model=mega"])
    model, optimizer, trainer = config.model, config.optimizer, config.trainer
    found = (
        model.depth,
        model.d_model,
        model.mixer.d_value,
        model.mixer.d_qk,
        model.mixer.attention_function,
        model.norm,
        model.prenorm,
        optimizer.lr,
        optimizer.weight_decay,
        trainer.batch_size,
        trainer.max_steps,
        optimizer.warmup_steps,
    )
    assert found == TABLE[task]
    assert model.d_ff == model.d_head == model.mixer.d_value


@pytest.mark.parametrize("task", TABLE)
def test_mega_has_the_parameters_of_its_equations(task: str) -> None:
    depth, d, v, z, _, norm, prenorm, *_ = TABLE[task]
    config = resolve([f"task={task}", "preset=full", "model=mega"])
    about = get_task(config.task)
    per_norm = 1 if norm == "scale" else 2 * d
    average = 2 * 4 * d * AVERAGES + d  # δ, α, β, γ in both directions; ω
    attention = linear(d, v) + linear(d, d + z + v + d) + linear(v, d) + 2 * 2 * z + 2 * about.l_max - 1
    block = average + attention + per_norm + linear(d, v) + linear(v, d) + per_norm
    embedding = about.vocab_size * d if about.vocab_size else linear(about.input_dim, d)
    head = linear((2 if about.pair else 1) * d, v) + linear(v, about.num_classes)
    expected = embedding + depth * block + (per_norm if prenorm else 0) + head
    model = build_model(config.model, about, 0)
    assert sum(p.numel() for p in model.parameters()) == expected
