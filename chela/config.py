"""From ``key=value`` words to one typed, checked configuration.

Later layers win: the schema's defaults, ``configs/preset``, ``configs/task`` (and its section for the preset),
``configs/model`` (and its section for the preset), then the command line. A group (``task``, ``model``, ``preset``) is
chosen by name, everything else by its dotted key: ``model=softmax model.depth=2 optimizer.lr=1e-3``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chela.errors import UsageError
from chela.schema import MIXERS, Config
from lra.schema import GENERATED, TASKS

PRESETS = ("auto", "full", "mini", "tiny")
MOST_PARAMETERS = 2_000_000_000  # systems of the Long Range Arena have a million
BOOLS = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")  # omegaconf takes any integer for true
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")

# Where a run lies, how it is watched and how it is cut into launches: none of it changes the numbers that come out.
NOT_IN_IDENTITY = {
    "runs",
    "resume",
    "allocator",
    "tensorboard",
    "wandb",
    "data.dir",
    "data.download",
    "data.root",
    "data.processes",
    "data.workers",
    "trainer.max_time",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.progress",
    "trainer.test",
}
# Options that came later, at the value that changes nothing: left out there, so that older runs keep their fingerprint.
LATER = {"trainer.accumulate": 1}

_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


def configs_folder() -> Path:
    """Return the folder of the YAML files: in the repository, or packed into an installed wheel."""
    here = Path(__file__).parent
    return next(folder for folder in (here / "configs", here.parent / "configs") if folder.is_dir())


def names(group: str) -> list[str]:
    """List the files of a group, e.g. ``names("model")``."""
    return sorted(path.stem for path in (configs_folder() / group).glob("*.yaml"))


def resolve(words: list[str]) -> Config:
    """Build the configuration that ``words`` (``key=value``) ask for.

    Raises:
        UsageError: An unknown key, name or value, with what was expected.
    """
    overrides = [_split(word) for word in words]
    resumed = dict(overrides).get("resume", "none")
    if resumed not in ("none", "auto"):
        return _resolve_resumed(run_folder(resumed, "resume"), overrides)
    chosen = {"task": "listops", "model": "chela", "preset": "auto"}
    chosen.update({key: value for key, value in overrides if key in chosen})
    preset = resolve_preset(chosen["preset"], dict(overrides).get("trainer.accelerator", "auto"))[0]
    task_file, model_file = _group_file("task", chosen["task"]), _group_file("model", chosen["model"])
    model_file["model"]["name"] = chosen["model"]
    mixer = model_file["model"]["mixer"]["name"]
    files = (task_file, model_file)
    layers = [_group_file("preset", preset), *(part for file in files for part in _sections(file, preset, mixer))]

    cfg = _empty(TASKS[task_file["task"]["name"]], MIXERS[mixer])
    for layer in layers:
        _merge(cfg, layer)
    cfg.preset = preset
    for key, value in overrides:
        if key not in chosen:
            _set(cfg, key, value)
    return check(cfg)


def _resolve_resumed(folder: Path, overrides: list[tuple[str, str]]) -> Config:
    """A run that goes on keeps its configuration; only what does not change its numbers may be said anew."""
    saved = load(folder / "config.yaml")
    saved.trainer.max_time = ""  # a limit holds for one launch
    cfg = OmegaConf.structured(saved)
    OmegaConf.set_struct(cfg, True)
    changed = []
    for key, value in overrides:
        if key in ("task", "model"):
            have = OmegaConf.select(cfg, f"{key}.name")
            changed += [f"{key} {have} -> {_shown(value)}"] if value != have else []
        elif (key, value) != ("preset", "auto"):
            _set(cfg, key, value)
    config = check(cfg)
    old, new = _identity(saved), _identity(config)
    keys = dict.fromkeys([*old, *new])
    changed += [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    if changed:
        raise UsageError(
            f"resume: expected the configuration of {folder}, got another ({', '.join(changed)}); "
            "start a new run for it"
        )
    return config


def run_folder(path: Path | str, key: str = "run") -> Path:
    """Return the folder of a run.

    Raises:
        UsageError: The folder is not there or holds no run.
    """
    folder = Path(os.path.expanduser(path))
    try:
        holds = folder.is_dir() and (folder / "config.yaml").is_file()
    except OSError as error:
        raise UsageError(f"{key}: expected the folder of a run, got {_shown(str(path))} ({error.strerror})") from None
    if not holds:
        what = "it holds no config.yaml" if folder.is_dir() else "there is no such folder"
        raise UsageError(f"{key}: expected the folder of a run, got {_shown(str(path))}: {what}")
    return folder


def load(path: Path) -> Config:
    """Read a resolved configuration back from a run's ``config.yaml``."""
    try:
        saved = OmegaConf.load(path)
        assert isinstance(saved, DictConfig), "no mapping"
        cfg = OmegaConf.merge(_empty(TASKS[saved.task.name], MIXERS[saved.model.mixer.name]), saved)
    except OmegaConfBaseException as error:
        raise UsageError(
            f"expected a config.yaml of this version at {path}, got another ({_first_line(error)}); "
            "use the version of chela that wrote it"
        ) from None
    except Exception as error:  # a foreign file can make the reader raise anything
        raise UsageError(f"expected a run's config.yaml at {path}, could not read it ({_first_line(error)})") from None
    return check(cfg)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, as it is stored."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def fingerprint(config: Config) -> str:
    """Return 8 hexadecimal digits that are equal for runs that must give equal numbers."""
    identity = {key: value for key, value in _identity(config).items() if (key, value) not in LATER.items()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def _identity(config: Config) -> dict[str, Any]:
    return identity_of({key: value for key, value, _ in fields(config)})


def identity_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return, of a configuration by dotted key, what makes a run's numbers.

    Where data lies does not; but a task that is generated otherwise has other data with a folder of its own.
    """
    kept = {key: value for key, value in options.items() if key not in NOT_IN_IDENTITY}
    released = options.get("task.name") in GENERATED and options.get("data.root") is not None
    return kept | ({"data.released": True} if released else {})


def resolve_preset(asked: str, accelerator: str = "auto") -> tuple[str, str]:
    """Return the preset and, in a few words, why it is this one."""
    if asked not in PRESETS:
        raise UsageError(f"preset: expected one of {', '.join(PRESETS)}, got {_shown(asked)}{_closest(asked, PRESETS)}")
    if asked != "auto":
        return asked, "asked for"
    if accelerator == "cpu":
        return "mini", "trainer.accelerator=cpu"
    if cuda_devices() > 0:
        return "full", "a CUDA GPU is here"
    return "mini", "no CUDA GPU is here"


def cuda_devices() -> int:
    """Count the CUDA devices by asking the driver: importing torch for it would take 1.5 s."""
    if importlib.metadata.version("torch").endswith("+cpu") or sys.platform != "linux":
        return 0
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def seconds(duration: str) -> float | None:
    """Read ``9m`` or ``1h30m`` as seconds; an empty string is no limit (None)."""
    if not duration:
        return None
    parts = DURATION.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise UsageError(f"trainer.max_time: expected a time such as 30s, 9m, 1h30m or 2d, got {_shown(duration)}")
    return sum(float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for number, unit in parts)


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Walk over ``(dotted key, value, field)`` of a configuration's leaves."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item


def check(cfg: Any) -> Config:
    """Turn a composed configuration into a ``Config``, every value within its bounds."""
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UsageError(_first_line(error)) from None
    assert isinstance(config, Config)
    for key, value, item in fields(config):
        _check_value(key, value, item.metadata)
    seconds(config.trainer.max_time)
    for section in (config.task, config.data):
        try:
            section.check()
        except ValueError as error:
            raise UsageError(str(error)) from None
    if not config.runs:
        raise UsageError("runs: expected a folder, got ''")
    _check_processes(config)
    _check_sizes(config)
    return config


def _check_processes(config: Config) -> None:
    processes = config.trainer.devices * config.trainer.num_nodes
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
    if width % heads:
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
    return int(getattr(config.model.mixer, "d_value", config.model.d_model))


def _check_value(key: str, value: Any, limits: Any) -> None:
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise UsageError(f"{key}: expected a finite number, got {number}")
    for name, (holds, text) in _BOUNDS.items():
        if value is not None and name in limits and not holds(value, limits[name]):
            raise UsageError(f"{key}: expected {text} {limits[name]}, got {_shown(value)}")
    if "choices" in limits and value not in limits["choices"]:
        expected = ", ".join(limits["choices"])
        raise UsageError(f"{key}: expected one of {expected}, got {_shown(value)}{_closest(value, limits['choices'])}")
    if limits.get("odd") and value % 2 == 0:
        raise UsageError(f"{key}: expected an odd number, so that the kernel has a middle, got {value}")


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise UsageError(f"expected key=value, got {_shown(word)}; see --help")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key, re.ASCII):
        raise UsageError(f"expected a dotted key such as model.depth, got {_shown(key)}; see --help")
    if "${" in value or value == "???" or not value.isprintable():
        raise UsageError(f"{key}: expected a plain, printable value, got {_shown(value)}")
    return key, value


def _empty(task: type, mixer: type) -> DictConfig:
    cfg: DictConfig = OmegaConf.structured(Config)
    cfg.task = OmegaConf.structured(task)
    cfg.model.mixer = OmegaConf.structured(mixer)
    OmegaConf.set_struct(cfg, True)
    return cfg


def _group_file(group: str, name: str) -> dict[str, Any]:
    if name not in names(group):
        listed = ", ".join(names(group))
        raise UsageError(f"{group}: expected one of {listed}, got {_shown(name)}{_closest(name, names(group))}")
    return OmegaConf.to_container(OmegaConf.load(configs_folder() / group / f"{name}.yaml")) or {}  # type: ignore[return-value]


def _sections(layer: dict[str, Any], preset: str, mixer: str) -> list[dict[str, Any]]:
    """Split a group file into what always holds, what holds for the preset, and what does so for one mixer only."""
    always = {key: value for key, value in layer.items() if key != "presets"}
    special = layer.get("presets", {}).get(preset, {})
    own = special.get("mixers", {}).get(mixer, {})
    return [always, {key: value for key, value in special.items() if key != "mixers"}, {"model": {"mixer": own}}]


def _merge(cfg: DictConfig, layer: dict[str, Any]) -> None:
    """Merge a layer in place; sizes that it gives for mixers are taken by those that have such an option."""
    sizes = layer.get("model", {}).get("mixer")
    if sizes:
        known = {key: value for key, value in sizes.items() if key in cfg.model.mixer}
        layer = {**layer, "model": {**layer["model"], "mixer": known}}
    try:
        cfg.merge_with(layer)
    except OmegaConfBaseException as error:
        raise UsageError(f"in the configs folder: {_first_line(error)}") from None


def _set(cfg: DictConfig, key: str, value: str) -> None:
    keys = {name: item.type for name, _, item in fields(OmegaConf.to_object(cfg))}
    if key not in keys:
        if any(name.startswith(f"{key}.") for name in keys):
            raise UsageError(f"{key}: expected one of its keys ({key}.NAME=…), got {_shown(value)}; see --help")
        raise UsageError(f"unknown key {_shown(key)}{_closest(key, [*keys, 'task', 'model', 'preset'])}; see --help")
    if key in ("task.name", "model.mixer.name", "model.name"):
        if OmegaConf.select(cfg, key) != value:
            raise UsageError(f"{key}: chosen by {key.split('.')[0]}=NAME, got {_shown(value)}")
        return
    if keys[key] == "bool" and value.lower() not in BOOLS:
        raise UsageError(f"{key}: expected true or false, got {_shown(value)}")
    read: Any = None if value == "null" else value
    if read is not None and keys[key].startswith("list["):
        read = _numbers(key, value)
    try:
        OmegaConf.update(cfg, key, read)
    except (OmegaConfBaseException, OverflowError) as error:  # the latter of numbers with hundreds of digits
        raise UsageError(f"{key}: {_first_line(error)}") from None


def _numbers(key: str, value: str) -> list[int | float]:
    """Read a list as YAML writes it; all options that are lists hold numbers."""
    try:
        read = OmegaConf.to_container(OmegaConf.create(value))
    except Exception:  # a word that is no YAML can make the reader raise anything
        read = None
    if not isinstance(read, list) or not read or any(type(number) not in (int, float) for number in read):
        raise UsageError(f"{key}: expected a list of numbers such as '[1, 2]', got {_shown(value)}")
    return read


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _closest(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name)[:80], list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
