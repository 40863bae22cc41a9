"""What the options of a run must agree on, each being within its own bounds."""

from __future__ import annotations

import re
from typing import Any

from chela.config.schema import Config
from chela.core.errors import UsageError
from chela.core.options import shown

MOST_PARAMETERS = 2_000_000_000  # systems of the Long Range Arena have a million
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def check_together(config: Config, task: Any) -> None:
    """Refuse options that do not go together on this task; UsageError says which."""
    seconds(config.trainer.max_time)
    if not config.runs:
        raise UsageError("runs: expected a folder, got ''")
    if task.objective == "tokens" and config.model.causal and config.model.norm == "batch":
        raise UsageError(
            f"model.norm: expected layer, rms or scale for task={config.task.name} with model.causal=true, got batch: "
            "in training its statistics over positions tell earlier tokens of later ones"
        )
    if task.objective == "tokens" and task.in_order and not config.model.causal:
        raise UsageError(
            f"model.causal: expected true for task={config.task.name}, got false: each target is the next input"
        )
    _check_processes(config, task)
    _check_sizes(config)


def _check_processes(config: Config, task: Any) -> None:
    if config.trainer.checkpoint_activations and config.trainer.compile:
        raise UsageError("trainer.compile: expected false with trainer.checkpoint_activations=true, got true")
    processes = config.trainer.devices * config.trainer.num_nodes
    if config.data.carry and not task.in_order:
        raise UsageError(f"data.carry: expected false for task={config.task.name}, got true: it is no text to go on in")
    if config.data.carry and processes > 1:
        raise UsageError(
            f"data.carry: expected one process, got {processes}: states are kept of one only; use trainer.accumulate"
        )
    pieces = config.trainer.sequence_parallel
    if processes % pieces:
        raise UsageError(
            f"trainer.sequence_parallel: expected a divisor of trainer.devices x trainer.num_nodes = {processes}, the "
            f"processes, got {pieces}"
        )
    if pieces > 1 and config.trainer.compile:
        raise UsageError("trainer.compile: expected false with trainer.sequence_parallel, got true")
    processes //= pieces  # those of different records
    shares, got = processes * config.trainer.accumulate, config.trainer.batch_size
    if got % shares:
        what = f"the {shares} processes" if shares == processes else f"{shares}, processes times trainer.accumulate"
        raise UsageError(f"trainer.batch_size: expected a multiple of {what}, got {got}")
    if config.trainer.eval_batch_size < processes:
        got = config.trainer.eval_batch_size
        raise UsageError(f"trainer.eval_batch_size: expected at least one for each of {processes} processes, got {got}")


def _check_sizes(config: Config) -> None:
    model = config.model
    heads = getattr(model.mixer, "heads", 1)
    width = _value_width(config)
    if width % heads and not hasattr(model.mixer, "pooled"):  # CHELA's heads share what its pool leaves
        key = "model.mixer.d_value" if hasattr(model.mixer, "d_value") else "model.d_model"
        raise UsageError(f"{key}: expected a multiple of model.mixer.heads={heads}, got {width}")
    at_least = parameters_at_least(config)
    if at_least > MOST_PARAMETERS:
        raise UsageError(
            f"model: expected at most {MOST_PARAMETERS:,} parameters, depth={model.depth} d_model={model.d_model} "
            f"d_ff={model.d_ff} has {at_least:,} or more; make one of them smaller"
        )


def parameters_at_least(config: Config) -> int:
    """Return a lower bound of the model's parameters, from the matrices that every system has."""
    model = config.model
    return model.depth * model.d_model * (model.d_model + 2 * model.d_ff + _value_width(config))


def _value_width(config: Config) -> int:
    return int(getattr(config.model.mixer, "d_value", None) or config.model.d_model)


def seconds(duration: str) -> float | None:
    """Read ``9m`` or ``1h30m`` as seconds; an empty string is no limit (None)."""
    if not duration:
        return None
    parts = _DURATION.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise UsageError(f"trainer.max_time: expected a time such as 30s, 9m, 1h30m or 2d, got {shown(duration)}")
    return sum(float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for number, unit in parts)
