"""The full recipes are MEGA's: its table of sizes and the parameters of its equations; mini's rows are of one size."""

from __future__ import annotations

import functools

import pytest
import torch

from chela.config.compose import names, resolve
from chela.config.schema import ModelConfig
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.results import to_the_letter
from lra.tasks import get_task
from tests.models.test_one_block import LISTOPS

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


@pytest.mark.parametrize("task", ["listops", "text", "image", "pathfinder"])
def test_lite_is_the_task_of_full(task: str) -> None:
    full, lite = (resolve([f"task={task}", f"preset={preset}"]) for preset in ("full", "lite"))
    assert lite.task == full.task and lite.data.validation == "holdout" and to_the_letter(lite) and to_the_letter(full)
    assert (lite.model.depth, lite.model.d_model, lite.model.d_ff, lite.trainer.batch_size) == (4, 64, 128, 32)
    records = {"listops": 96_000, "text": 22_500, "image": 45_000, "pathfinder": 160_000}
    assert 9.9 < lite.trainer.max_steps * 32 / records[task] < 10.1
    for words in (["preset=mini"], ["preset=lite", "weights=of/easier/pictures"]):
        assert not to_the_letter(resolve([f"task={task}", *words]))


def test_a_rival_at_full_has_its_own_recipe() -> None:
    """S4's for S4D (state-spaces/s4), S5's sizes for LION; the command line still wins."""
    s4d = resolve(["task=image", "preset=full", "model=s4d", "optimizer.lr=0.5"])
    assert (s4d.model.d_model, s4d.model.d_ff, s4d.model.norm, s4d.trainer.max_steps) == (512, 0, "batch", 180_000)
    assert s4d.optimizer.lr == 0.5 and s4d.optimizer.schedule == "cosine"
    lion = resolve(["task=listops", "preset=full", "model=lion_d"])
    assert (lion.model.depth, lion.model.d_model, lion.optimizer.lr) == (8, 128, 5e-4)
    assert resolve(["task=pathx", "preset=full", "model=chela_sgconv"]).model.mixer.scale_decay_max == 3.0
    assert resolve(["task=pathx", "preset=full"]).model.mixer.scale_decay_max == 2.0


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
    assert count(model) == expected


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_mega_on_raw_speech_has_the_published_size():
    """SC-raw, big: 6 layers, d 72, v = FFN = 144, z 36, batch norm before each layer, chunk 1000: 476K parameters."""
    options = {"d_qk": 36, "d_value": 144, "averages": 16, "attention_function": "laplace", "chunk": 1000}
    mixer = mixer_options("mega")(**options)
    config = ModelConfig(mixer=mixer, d_model=72, depth=6, d_ff=144, d_head=144, norm="batch")
    model = build_model(config, TaskFacts(num_classes=10, l_max=16_000, vocab_size=None), 0)
    assert round(count(model) / 1000) == 476


@functools.cache
def mini_size(name: str) -> int:
    return count(build_model(resolve([f"model={name}", "task=listops", "preset=mini"]).model, LISTOPS, 0))


@pytest.mark.parametrize("name", [name for name in names("model") if not name.startswith("chela")])
def test_the_mini_rows_are_of_one_size(name):
    assert 0.89 <= mini_size(name) / mini_size("chela") <= 1.10


MINI = [*((task, "mini") for task in names("task")), ("recall", "hard"), ("shakespeare", "nano")]


@pytest.mark.parametrize(("task", "preset"), MINI)
def test_chela_and_its_convolution_are_of_one_size(task, preset):
    sizes = []
    for name in ("chela", "chela_conv_only"):
        config = resolve([f"task={task}", f"model={name}", f"preset={preset}"])
        sizes.append(count(build_model(config.model, get_task(config.task), 0)))
    assert abs(sizes[1] / sizes[0] - 1) <= 0.02


@pytest.mark.parametrize("preset", ["full", "mini"])
@pytest.mark.parametrize("name", ["softmax", "linear", "lightning", "hedgehog", "lion_lit", "lion_d", "lion_s"])
def test_a_rival_has_a_short_convolution_but_at_full(name, preset):
    assert resolve([f"model={name}", f"preset={preset}"]).model.mixer.short == (0 if preset == "full" else 4)


@pytest.mark.parametrize("task", ["image", "pathfinder", "pathx"])
def test_mega_reads_pixels_at_mini_as_at_full(task):
    mini, full = (
        resolve([f"task={task}", "model=mega", f"preset={preset}"]).model.mixer for preset in ("mini", "full")
    )
    assert mini.attention_function == full.attention_function == "laplace"
    assert mini.kernel_rate and not full.kernel_rate  # its paper has one rate
