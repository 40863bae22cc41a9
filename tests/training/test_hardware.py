from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from chela.config.compose import resolve
from chela.config.schema import Config
from chela.core.errors import UsageError
from chela.training import machine
from chela.training.machine import processes, rank


def config(devices: int, nodes: int = 1) -> Config:
    return resolve(["preset=tiny", f"trainer.devices={devices}", f"trainer.num_nodes={nodes}"])


ELASTIC = ("TORCHELASTIC_RUN_ID",)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "SLURM_NTASKS", *ELASTIC):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),  # torchrun
        ({"LOCAL_RANK": "1"}, 1),  # started by Lightning
        ({"SLURM_PROCID": "2"}, 2),  # srun
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, 1),  # started by Lightning, within a job
        ({"NODE_RANK": "1"}, 1),  # the first process of the second node does not lead
    ],
)
def test_rank(environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank() == expected


def test_torchrun_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*ELASTIC, "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes(config(2, 2), "cpu") == {"devices": 2, "num_nodes": 2, "strategy": "ddp"}
    with pytest.raises(UsageError, match="= 4, the processes that torchrun started, got 4 x 2"):
        processes(config(4, 2), "cpu")


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"trainer.devices: expected at most the 1 GPUs of this node, got 2"):
        processes(config(2), "cuda")


def rounded(a: Tensor, b: Tensor) -> Tensor:
    """Multiply as a processor does that rounds to bfloat16."""
    return torch.mul(a.bfloat16().float()[..., None], b.bfloat16().float()).sum(-2)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def become(vendor: str, *, onednn: bool = True, rounds: bool = False) -> None:
        monkeypatch.setattr(machine, "_cpu", lambda fact: vendor)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        if rounds:
            product = Tensor.__matmul__
            monkeypatch.setattr(
                Tensor, "__matmul__", lambda a, b: rounded(a, b) if a.dtype == torch.float32 else product(a, b)
            )

    return become


@pytest.mark.parametrize(
    ("wanted", "facts", "taken"),
    [
        ("auto", {"vendor": "AuthenticAMD"}, "onednn"),
        ("auto", {"vendor": "GenuineIntel"}, "mkl"),
        ("auto", {"vendor": "AuthenticAMD", "onednn": False}, "mkl"),
        ("auto", {"vendor": "AuthenticAMD", "rounds": True}, "mkl"),
        ("onednn", {"vendor": "GenuineIntel"}, "onednn"),
        ("mkl", {"vendor": "AuthenticAMD"}, "mkl"),
    ],
)
def test_products_are_the_faster_ones_that_are_exact(
    wanted: str, facts: dict[str, Any], taken: str, processor: Callable[..., None]
) -> None:
    processor(**facts)
    assert machine.choose_matmul(wanted) == machine.matmul() == taken
    assert machine.describe(torch.device("cpu"))["matmul"] == taken
    assert f"matmul {taken}" in machine.arithmetic(torch.device("cpu"))


@pytest.mark.parametrize("facts", [{"onednn": False}, {"rounds": True}])
def test_products_that_round_are_refused(facts: dict[str, bool], processor: Callable[..., None]) -> None:
    processor("AuthenticAMD", **facts)
    with pytest.raises(UsageError, match=r"expected a processor .* whose products keep float32"):
        machine.choose_matmul("onednn")
    assert machine.matmul() == "mkl"
