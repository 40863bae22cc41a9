"""Benchmarks of whole networks: a training step, and one token more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chela.config.compose import names, resolve
from chela.config.schema import Config, ModelConfig
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.training.machine import hardware
from chela.training.step import build_optimizer
from experiments.bench import Options, Row, timing
from experiments.bench.timing import Step, interleaved, peak_memory
from lra.tasks import get_task

RIVAL = "softmax"
CONTEXTS = (1024, 4096, 16384, 65536)
SYSTEMS = {"chela": {}, "chela ema": {"long_kernel": "ema"}, "lightning": {}, "s4d": {}, "softmax": {}}
L_MAX = 2**17  # taps of the long kernel: more than there will be context
PIECE = 2048  # prefilled at once
STEPS = 64


def train(options: Options) -> list[Row]:
    """Whole training steps: every system (configs/model) at each task's shape, against softmax.

    Forward, loss, backward, clipping and AdamW of the real model on random records, each as long as the longest to
    learn from: no data is needed. Precision and allocator are those of ``chela.train``. At full a CPU takes one record,
    a GPU the recipe's batch. Memory is what a step holds beyond weights and Adam's moments.
    """
    tasks = options.task or (["listops"] if options.quick else names("task"))
    usual = ["mini", "full"] if torch.cuda.is_available() else ["mini"]
    presets = options.preset or (["tiny"] if options.quick else usual)
    shapes = [
        [f"preset={preset}", f"task={task}", f"trainer.matmul={options.matmul}"] for preset in presets for task in tasks
    ]
    models = [f"model={model}" for model in options.model or names("model")]
    plan = [[resolve([*shape, model]) for model in models] for shape in shapes]  # a name may be wrong: before measuring
    return [task_row(configs, options.batch, 0.05 if options.quick else 1.0) for configs in plan]


def task_row(configs: list[Config], batch: int | None, seconds: float) -> Row:
    """Measure all systems on one task by turns, each so many seconds; the note names what cannot be measured.

    ``configs`` are one of each system, of the same task and preset. Without ``batch`` a step takes the recipe's, on a
    CPU one record at full.
    """
    shape, platform = configs[0], hardware(configs[0])
    on_gpu = platform["accelerator"] == "cuda"
    size = batch or (1 if shape.preset == "full" and not on_gpu else shape.trainer.batch_size)
    about = get_task(shape.task)
    records = random_records(about, size, platform["accelerator"])

    steps: dict[str, Step] = {}
    memory: dict[str, int] = {}
    notes = []
    for config in configs:
        name, step = config.model.name, partial(training_step(config, about, **platform), *records)
        try:
            step()  # Adam's moments are there from here on
            memory[name], steps[name] = peak_memory(step), step
        except (torch.OutOfMemoryError, MemoryError):
            notes.append(f"{shape.task.name} {shape.preset} {name} not run: {size} records do not fit; try batch=N")
    key = {"task": shape.task.name, "preset": shape.preset, "L": about.train_length, "batch": size}
    key |= {"recipe's batch": shape.trainer.batch_size, "precision": platform["precision"]}
    key["allocator"] = timing.allocator(keep=not on_gpu)
    times = interleaved(steps, seconds=seconds, least=3)
    median = times.median()
    values = {f"{name} [tokens/s]": records[0].shape[0] * about.train_length / median[name] for name in steps}
    values |= {f"{name} [MiB]": memory[name] / 2**20 for name in steps}
    for name in steps if RIVAL in steps else ():
        if name != RIVAL:
            values[f"speed, {name} / {RIVAL}"] = median[RIVAL] / median[name]
            values[f"memory, {name} / {RIVAL}"] = memory[name] / memory[RIVAL]
    return Row.timed(key, times, values, "; ".join(notes))


def random_records(about: Any, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Return inputs ``(B, L)`` or ``(B, L, F)``, of pairs ``2B`` rows, and labels ``(B,)`` or ``(B, L)``."""
    torch.manual_seed(0)
    rows = 2 * size if about.pair else size
    if about.vocab_size is None:
        inputs = torch.randn(rows, about.train_length, about.input_dim, device=device)
    else:
        inputs = torch.randint(1, about.vocab_size, (rows, about.train_length), device=device)
    shape = inputs.shape[:2] if about.objective == "tokens" else (size,)
    return inputs, torch.randint(about.num_classes, shape, device=device)


def training_step(config: Config, about: Any, accelerator: str, precision: str) -> Callable[..., None]:
    """Return a step of the run's own model and optimiser; it takes inputs and labels."""
    model = build_model(config.model, about, 0).to(accelerator).train()
    optimizer = build_optimizer(model, config.optimizer)
    for group in optimizer.param_groups:  # as in the first step of the warm-up
        group["lr"] = group["peak_lr"] * config.optimizer.lr_factor(0, config.trainer.max_steps)

    def step(inputs: Tensor, labels: Tensor) -> None:
        with torch.autocast(accelerator, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def generate(options: Options) -> list[Row]:
    """One token more, after a context: time, and memory of the state, per system.

    Two blocks of width 128 without a feed-forward layer, one text, float32. The context is random bytes that are
    prefilled; then single steps are timed, the systems taking turns.
    """
    rows = []
    for length in CONTEXTS[: 1 if options.quick else None]:
        torch.manual_seed(0)
        symbols = torch.randint(1, 257, (1, length))
        steps, sizes = {}, {}
        for system, changed in SYSTEMS.items():
            mixer = mixer_options(system.split()[0])(**changed)
            config = ModelConfig(d_model=128, depth=2, d_ff=0, causal=True, mixer=mixer)
            model: Any = build_model(config, TaskFacts(257, L_MAX, 257, objective="tokens"), seed=0).eval()
            state: dict[str, Tensor] = {}
            for start in range(0, length, PIECE):
                _, state = model.prefill(symbols[:, start : start + PIECE], state or None)
            _, state = model.step(symbols[:, 0], state)  # which works out what a prefill leaves to the first step
            steps[system] = partial(make_steps, model, symbols[:, 0], state)
            sizes[system] = sum(part.nbytes for part in state.values())
        times = interleaved(steps, seconds=2.0, least=3, most=20)
        values = {f"{name} [ms]": took / STEPS for name, took in times.median().items()}
        values |= {f"{name} [KiB]": size / 1024 for name, size in sizes.items()}
        rows.append(Row({"L": length}, values, f"the median of turns of {STEPS} steps, divided by {STEPS}"))
    return rows


def make_steps(model: Any, symbol: Tensor, state: dict[str, Tensor]) -> None:
    """Make some steps from a copy of the state."""
    now = {name: part.clone() for name, part in state.items()}
    for _ in range(STEPS):
        _, now = model.step(symbol, now)
