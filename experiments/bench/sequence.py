"""A training step of one long sequence over processes: memory and bytes sent by each, measured and by the cost model.

One causal CHELA block of width 32 with its feed-forward layer, a language model of 65 symbols, batch 1, float32, gloo,
one thread a process: forward, backward, the sum of the gradients over processes, AdamW. Values are the most of any one.
"held" is what tensors held at once beyond weights and moments, "resident" how far that raised the size of the process.
Bytes are those of the collectives in ``chela.ops.sequence_parallel``, counted there. docs/scale.md has the cost model.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed as dist

from chela.config.schema import ModelConfig
from chela.core.errors import UsageError
from chela.core.options import option
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.models.cost import cost
from chela.ops.sequence_parallel import sequence_parallel
from experiments.bench import Row
from experiments.bench.timing import peak_memory

PLOT = ("held", "sent", "softmax in a ring, by the model")
SYMBOLS, WIDTH, FLOAT = 65, 32, 4


@dataclass
class Options:
    """What to measure; a list is split by commas."""

    length: list[int] = option([8192, 16384, 32768, 65536], "tokens of the sequence")
    processes: list[int] = option([1, 2, 4], "over how many")
    limit: float = option(0.0, "GiB of address space that a process may have; 0: no limit", ge=0, le=4096)


def run(quick: bool, options: Options) -> list[Row]:
    """Measure every length over every number of processes."""
    if quick:
        return [row(256, count, options.limit) for count in (1, 2)]
    return [row(length, count, options.limit) for length in options.length for count in options.processes]


def configuration(system: str) -> ModelConfig:
    """Return the network that is measured, with another mixer if asked for."""
    return ModelConfig(d_model=WIDTH, depth=1, d_ff=4 * WIDTH, causal=True, mixer=mixer_options(system)(name=system))


def facts(length: int) -> TaskFacts:
    """Return what the network must know of its task."""
    return TaskFacts(SYMBOLS, length, SYMBOLS, objective="tokens")


def row(length: int, count: int, limit: float) -> Row:
    """Measure one length over one number of processes; the note says so where they have not room enough."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=measure, args=(rank, count, length, limit, Path(folder))) for rank in range(count)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        ended = [process.exitcode for process in started]
        saved = [] if any(ended) else [Path(folder) / str(rank) for rank in range(count)]
        found = [torch.load(path, weights_only=True) for path in saved]
    key = {"L": length, "over": f"P={count}"}
    if not found and limit:  # each has said why on its way out
        return Row(key, {}, f"L {length:,}, P={count}: not within {limit:g} GiB of address space a process")
    if not found:
        raise UsageError(f"sequence: expected {count} processes to end with status 0, got {ended}")
    values = {name: max(of_one[name] for of_one in found) for name in found[0]}
    if count > 1:
        values["by the model [MiB sent]"] = sent_by_the_model(length, count) / 2**20
        values["softmax in a ring, by the model [MiB sent]"] = sent_in_a_ring(length, count) / 2**20
    for system in ("chela", "softmax"):
        per_token = cost(configuration(system), facts(length)).flops_per_token
        values[f"forward GFLOPs, {system}"] = per_token * length / count / 1e9
    return Row(key, values)


def measure(rank: int, count: int, length: int, limit: float, folder: Path) -> None:
    """Take a step as one of several processes, and write down what it took."""
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit * 2**30),) * 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=count)
    torch.manual_seed(0)
    text = torch.randint(1, SYMBOLS, (1, length + 1))
    model = build_model(configuration("chela"), facts(length), seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters())
    sent = 0

    def step(length: int) -> None:
        nonlocal sent
        with sequence_parallel(length) as piece:
            inputs, labels = piece.cut(text[:, :length]), piece.cut(text[:, 1 : length + 1])
            loss = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), reduction="sum") / length
        loss.backward()  # type: ignore[no-untyped-call]
        sent = sum(piece.sent.values())
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
        optimizer.step()
        optimizer.zero_grad()

    step(64)  # first calls, and Adam's moments
    before, began = resident(), time.process_time()
    held = peak_memory(lambda: step(length))
    took = time.process_time() - began
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    values = {"held [MiB held]": held, "resident [MiB held]": most - before, "sent [MiB sent]": sent}
    if count == 1:
        del values["sent [MiB sent]"]
    torch.save({name: x / 2**20 for name, x in values.items()} | {"step [CPU s]": took}, folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()


def resident() -> int:
    """Return the bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def sent_by_the_model(length: int, count: int) -> float:
    """Return the bytes that a process sends in a step by the cost model of docs/scale.md, with CHELA's options."""
    mixer: Any = build_model(configuration("chela"), facts(1024), seed=0).backbone.mixers()[0]
    states: int = sum(core.heads * (core.d_qk * (core.width // core.heads + 1) + 1) for core in mixer.cores)
    halo: int = 2 * (mixer.conv.short.weight.shape[1] - 1) * WIDTH
    channels = 4 * length * WIDTH * (count - 1) / count**2
    return FLOAT * (channels + 2 * states * (count - 1) + (halo if count > 1 else 0))


def sent_in_a_ring(length: int, count: int) -> float:
    """Return the same of softmax attention: keys and values go round, in the backward pass with their gradients."""
    return FLOAT * 6 * length / count * WIDTH * (count - 1)
