"""What a run stands on: devices, precision, processes, the allocator, versions."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from chela.config.schema import Config
from chela.core.errors import UsageError

# Set by torchrun, by srun, or by hand on each node: who else takes part, and where the first one is reached.
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "NODE_RANK", "GROUP_RANK")


def hardware(config: Config) -> dict[str, Any]:
    """Choose accelerator and precision, and set the threads; UsageError where a GPU is asked for and there is none."""
    has_gpu, wanted, precision = torch.cuda.is_available(), config.trainer.accelerator, config.trainer.precision
    if wanted == "gpu" and not has_gpu:
        raise UsageError("trainer.accelerator: expected a CUDA GPU for gpu, torch sees none; use cpu or auto")
    on_gpu = has_gpu and wanted != "cpu"
    if precision == "auto":
        precision = "bf16-mixed" if on_gpu else "32-true"
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    if not on_gpu:
        choose_matmul(config.trainer.matmul)
    return {"accelerator": "cuda" if on_gpu else "cpu", "precision": precision}


MATMUL = {"mkl": "highest", "onednn": "medium"}
"""Whose products of float32 matrices a CPU takes, and the precision by which PyTorch is told so."""


def choose_matmul(wanted: str) -> str:
    """Let MKL or oneDNN form a CPU's products of float32 matrices; return which it is.

    MKL is what PyTorch takes by itself; on an AMD processor it has less than half of the core's speed. oneDNN is
    asked for by a precision that *allows* it to round to bfloat16, which some processors then do. So "auto" takes it
    where the processor is not Intel's and a product shows that nothing is rounded. UsageError where that fails for
    "onednn".
    """
    use_matmul("mkl")
    if wanted == "mkl" or (wanted == "auto" and _cpu("vendor_id") == "GenuineIntel"):
        return "mkl"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else PyTorch stays with MKL and does not say so
        use_matmul("onednn")
        if product_error() < 1e-5:
            return "onednn"
        use_matmul("mkl")
    if wanted == "onednn":
        raise UsageError(
            "trainer.matmul=onednn: expected a processor with AVX-512 whose products keep float32, got "
            f"{device_name(torch.device('cpu'))}; use auto or mkl"
        )
    return "mkl"


def use_matmul(name: str) -> None:
    """Take the products of "mkl" or "onednn" from now on, in this process."""
    torch.set_float32_matmul_precision(MATMUL[name])


def matmul() -> str:
    """Return whose products are taken, "mkl" or "onednn"."""
    return "onednn" if torch.get_float32_matmul_precision() == MATMUL["onednn"] else "mkl"


def product_error() -> float:
    """Return the error of a product of known matrices, relative to its largest number: 1e-7, of bfloat16 1e-3."""
    a = torch.linspace(-1, 1, 256 * 256).sin().view(256, 256)
    exact = a.double() @ a.double().mT
    return float((a @ a.mT - exact).abs().max() / exact.abs().max())


def processes(config: Config, accelerator: str) -> dict[str, Any]:
    """Choose devices, nodes and strategy; UsageError where others were started, or there is no room for so many."""
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    on_gpu = accelerator == "cuda"
    room, what = (torch.cuda.device_count(), "GPUs") if on_gpu else (max(8, os.cpu_count() or 1), "processes")
    if devices > room:
        raise UsageError(f"trainer.devices: expected at most the {room} {what} of this node, got {devices}")
    if nodes > 1 and not any(name in os.environ for name in _LAUNCHERS):
        raise UsageError(f"trainer.num_nodes={nodes}: expected a launcher (torchrun or srun) on every node, got none")
    started = int(os.environ.get("WORLD_SIZE", devices * nodes))
    if "TORCHELASTIC_RUN_ID" in os.environ and started != devices * nodes:
        raise UsageError(
            f"expected trainer.devices x trainer.num_nodes = {started}, the processes that torchrun started, got "
            f"{devices} x {nodes}"
        )
    return {"devices": devices, "num_nodes": nodes, "strategy": "ddp" if devices * nodes > 1 else "auto"}


def rank() -> int:
    """Return this process's number among those of the run, from what a launcher set; 0 without one.

    Fabric knows it only later. On a node whose processes it starts itself, only ``NODE_RANK`` tells the first one that
    it does not lead.
    """
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def stdout_console() -> Console:
    """Return the console of a run: plain words, nothing folded; silent on all processes but the first."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=rank() != 0)


def quiet_lightning() -> None:
    """Silence Lightning's advertisements and hints that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*srun. command is available.*")


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc


def tune_allocator() -> bool:
    """Let glibc keep freed memory instead of handing it back to the kernel; return whether it could be done.

    Large tensors come and go at every step, and page faults cost up to half of the time on a CPU.
    """
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    values = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
    return mallopt is not None and all(mallopt(name, value) for name, value in values.items())


def git_commit() -> str | None:
    """Return the commit of this code, with "+changes" when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists() or not shutil.which("git"):
        return None
    words = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Return what a GPU or this machine's processor calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu("model name") or platform.processor() or platform.machine()


def _cpu(fact: str) -> str:
    """Return what Linux says of the first processor; empty where it says nothing."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fact)), "")


def arithmetic(device: torch.device) -> str:
    """Return what the last digits of a run hang on, beside its configuration: the processor and whose products."""
    if device.type == "cuda":
        return device_name(device)
    return f"{device_name(device)}, {torch.backends.cpu.get_cpu_capability()}, matmul {matmul()}"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was in use: of a GPU its own, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(device: torch.device) -> dict[str, Any]:
    """Return what ran this: device, threads, versions of Python and of what computes, whose products, commit."""
    versions = {"python": platform.python_version()}
    for name in ("chela", "torch", "lightning", "triton", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version({"chela": "chela-attention"}.get(name, name))
    facts = {"device": device_name(device), "threads": torch.get_num_threads(), "versions": versions}
    facts |= {"matmul": matmul()} if device.type == "cpu" else {}
    return {**facts, "git_commit": git_commit()}
