"""From ``key=value`` words to one typed, checked configuration.

Later layers win: the schema's defaults, ``configs/preset``, ``configs/task`` (and its section for the preset),
``configs/model`` (and its section for the preset), what the task's file says of this model, then the command line. A
group (``task``, ``model``, ``preset``) is chosen by name or by a YAML file of one's own, everything else by its dotted
key: ``model=softmax model.depth=2``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from chela.checks import check_together
from chela.core.errors import UsageError
from chela.core.options import check_value, closest, shown
from chela.groups import Layer, flat, is_file, label, names, read_group, sections
from chela.identity import fields, identity_of
from chela.options import expect_trusted, importable, mixer_options, of_today, systems
from chela.presets import resolve_preset
from chela.results import TITLES
from chela.schema import Config
from lra.tasks import get_task, task_class, task_options

BOOLS = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")  # omegaconf takes any integer for true
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")


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
    for group in ("task", "model"):
        if is_file(chosen[group]):  # the user's own words name it, and by it the modules beside it
            importable(Path(chosen[group]).expanduser().parent)
    files = {group: read_group(group, chosen[group]) for group in ("task", "model")}
    preset = resolve_preset(chosen["preset"], dict(overrides).get("trainer.accelerator", "auto"), files["task"])[0]
    task = _named(files["task"], "task", chosen["task"], "task: {name: …}")["name"]
    mixer = _named(files["model"], "model", chosen["model"], "model: {mixer: {name: …}}")["mixer"]["name"]
    files["model"].append({"model": {"name": label(chosen["model"])}})

    cfg = _empty(task, mixer)
    if preset in names("preset"):
        for layer in read_group("preset", preset):
            _merge(cfg, layer, "preset", preset)
    for group, layers in files.items():
        for layer in layers:
            for section in filter(None, sections(layer, preset, mixer)):
                _merge(cfg, section, group, chosen[group])
    for layer in files["task"]:
        of_models = layer.get("presets", {}).get(preset, {}).get("models", {})
        _merge(cfg, of_models.get(label(chosen["model"]), {}), "task", chosen["task"])
    cfg.preset = preset
    for key, value in overrides:
        if key not in chosen:
            _set(cfg, key, value)
    return check(cfg)


def _named(layers: list[Layer], group: str, name: str, wanted: str) -> Layer:
    """Return a group's own section, joined over its layers; it must say which class is meant."""
    found = [layer.get(group, {}) for layer in layers]
    section: Any = OmegaConf.to_container(OmegaConf.merge({}, *(part for part in found if isinstance(part, dict))))
    named = section.get("mixer", {}) if group == "model" else section
    given = next((part for part in [*found, named] if not isinstance(part, dict)), None)
    if given is not None or not isinstance(named.get("name"), str):
        got = "there is none" if given is None else f"got {shown(given)}"
        raise UsageError(f"{group}={name}: expected {wanted} in the file, which says what is built; {got}")
    return dict(section)


def _resolve_resumed(folder: Path, overrides: list[tuple[str, str]]) -> Config:
    """Keep the configuration of a run that goes on; only what does not change its numbers may be said anew."""
    saved = load(folder / "config.yaml", dict(overrides).get("trust", ""))
    saved.trainer.max_time = ""  # a limit holds for one launch
    cfg = OmegaConf.structured(saved)
    OmegaConf.set_struct(cfg, True)
    changed = []
    for key, value in overrides:
        if key in ("task", "model"):
            have = saved.model.name if key == "model" else saved.task.name
            changed += [f"{key} {have} -> {shown(value)}"] if label(value) != label(have) else []
        elif (key, value) != ("preset", "auto"):
            _set(cfg, key, value)
    config = check(cfg)
    old, new = (identity_of({key: value for key, value, _ in fields(one)}) for one in (saved, config))
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
        raise UsageError(f"{key}: expected the folder of a run, got {shown(str(path))} ({error.strerror})") from None
    if not holds:
        what = "it holds no config.yaml" if folder.is_dir() else "there is no such folder"
        raise UsageError(f"{key}: expected the folder of a run, got {shown(str(path))}: {what}")
    return folder


def load(path: Path, trust: str = "") -> Config:
    """Read a resolved configuration back from a run's ``config.yaml``.

    Args:
        path: The file.
        trust: Names of modules, separated by commas, that the file may name; a module is code that will be run.

    Raises:
        UsageError: It cannot be read, is of another version, or names a module that is not trusted.
    """
    try:
        saved = OmegaConf.load(path)
        task, mixer = str(saved.task.name), str(saved.model.mixer.name)
    except Exception as error:  # a foreign file can make the reader raise anything
        raise UsageError(f"expected a run's config.yaml at {path}, could not read it ({first_line(error)})") from None
    expect_trusted([task, mixer], trust.split(","), str(path))
    empty = _empty(task, mixer)
    for option, value in task_class(task).retired.items():
        if saved.task.pop(option, value) != value:
            raise UsageError(
                f"{path}: expected task.{option}={value}, the one value that this version knows, got another; "
                "use the version of chela that wrote it"
            )
    try:
        saved.model.mixer = of_today(dict(saved.model.mixer))
        cfg = OmegaConf.merge(empty, saved)
    except OmegaConfBaseException as error:
        raise UsageError(
            f"expected a config.yaml of this version at {path}, got another ({first_line(error)}); "
            "use the version of chela that wrote it"
        ) from None
    return check(cfg)


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def seconds(duration: str) -> float | None:
    """Read ``9m`` or ``1h30m`` as seconds; an empty string is no limit (None)."""
    if not duration:
        return None
    parts = DURATION.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise UsageError(f"trainer.max_time: expected a time such as 30s, 9m, 1h30m or 2d, got {shown(duration)}")
    return sum(float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit] for number, unit in parts)


def duration(seconds: float) -> str:
    """Write seconds for people.

    >>> duration(42), duration(190), duration(7260)
    ('42 s', '3 min 10 s', '2 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def to_the_letter(config: Config) -> bool:
    """Whether a run's task is one of LRA's as ``preset=full`` has it: its data, encoding, lengths and splits."""
    full = resolve([f"task={config.task.name}", "preset=full"])
    return config.task.name in TITLES and (config.task, config.data.source) == (full.task, full.data.source)


def check(cfg: Any) -> Config:
    """Turn a composed configuration into a ``Config``, every value within its bounds."""
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UsageError(first_line(error)) from None
    assert isinstance(config, Config)
    try:
        for key, value, item in fields(config):
            check_value(key, value, item.metadata)
        task = get_task(config.task)
    except ValueError as error:
        raise UsageError(str(error)) from None
    seconds(config.trainer.max_time)
    if not config.runs:
        raise UsageError("runs: expected a folder, got ''")
    check_together(config, task)
    return config


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise UsageError(f"expected key=value, got {shown(word)}; see --help")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key, re.ASCII):
        raise UsageError(f"expected a dotted key such as model.depth, got {shown(key)}; see --help")
    if "${" in value or value == "???" or not value.isprintable():
        raise UsageError(f"{key}: expected a plain, printable value, got {shown(value)}")
    return key, value


def _empty(task: str, mixer: str) -> DictConfig:
    """Return a configuration of the defaults, in which nothing but the options of this task and system can be set."""
    return copy.deepcopy(_defaults(task, mixer)[0])


@functools.cache  # made once: omegaconf takes 30 ms
def _defaults(task: str, mixer: str) -> tuple[DictConfig, dict[str, str]]:
    """Return the configuration of the defaults, to be copied, and the type of each option by its dotted key."""
    try:
        options = task_options(task)
    except ValueError as error:
        raise UsageError(str(error)) from None
    cfg: DictConfig = OmegaConf.structured(Config)
    cfg.task = OmegaConf.structured(options)
    cfg.model.mixer = OmegaConf.structured(mixer_options(mixer))
    OmegaConf.set_struct(cfg, True)
    return cfg, {key: type_name(item) for key, _, item in fields(OmegaConf.to_object(cfg))}


def _types(cfg: DictConfig) -> dict[str, str]:
    return _defaults(cfg.task.name, cfg.model.mixer.name)[1]


def _merge(cfg: DictConfig, layer: Layer, group: str, name: str) -> None:
    """Merge a section of a file in place.

    A task's file gives sizes for several systems; each takes those that it has. A key that no system has is an error.
    """
    known = _types(cfg)
    every = {f"model.mixer.{option}" for option in _options_of_all()} if group in ("task", "preset") else set()
    for key in flat(layer):
        if key not in known and key not in every:
            raise UsageError(f"{group}={name}: unknown key {shown(key)} in its file{closest(key, [*known, *every])}")
    taken: Any = OmegaConf.create(layer)
    for key in flat(layer):
        if key not in known:
            del taken.model.mixer[key.rpartition(".")[2]]
    try:
        cfg.merge_with(taken)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        if key not in known:
            raise UsageError(f"{group}={name}: {first_line(error)}") from None
        raise UsageError(f"{group}={name}: {unfit(key, known[key], flat(layer).get(key))}") from None


@functools.cache
def _options_of_all() -> frozenset[str]:
    return frozenset(item.name for name in systems() for item in dataclasses.fields(mixer_options(name)))


def _set(cfg: DictConfig, key: str, value: str) -> None:
    keys = _types(cfg)
    if key not in keys:
        if any(name.startswith(f"{key}.") for name in keys):
            raise UsageError(f"{key}: expected one of its keys ({key}.NAME=…), got {shown(value)}; see --help")
        raise UsageError(f"unknown key {shown(key)}{closest(key, [*keys, 'task', 'model', 'preset'])}; see --help")
    if key in ("task.name", "model.mixer.name", "model.name"):
        if OmegaConf.select(cfg, key) != value:
            raise UsageError(f"{key}: chosen by {key.split('.')[0]}=NAME, got {shown(value)}")
        return
    if keys[key] == "bool" and value.lower() not in BOOLS:
        raise UsageError(f"{key}: expected true or false, got {shown(value)}")
    read: Any = None if value == "null" else value
    if read is not None and keys[key].startswith("list["):
        read = _numbers(key, value)
    try:
        OmegaConf.update(cfg, key, read)
    except (OmegaConfBaseException, OverflowError):  # a number with hundreds of digits overflows
        raise UsageError(unfit(key, keys[key], value)) from None


def unfit(key: str, kind: str, value: Any) -> str:
    """Say that a value is not of an option's type.

    >>> unfit("model.depth", "int", "deep")
    "model.depth: expected a whole number, got 'deep'"
    """
    wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    wanted |= {"None": "null", "list[int]": "a list of whole numbers", "list[float]": "a list of numbers"}
    words = " or ".join(wanted.get(part, part) for part in kind.split(" | "))
    return f"{key}: expected {words}, got {shown(value)}"


def type_name(item: dataclasses.Field[Any]) -> str:
    """Return the type of an option in words."""
    return item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))


def _numbers(key: str, value: str) -> list[int | float]:
    """Read a list as YAML writes it; all options that are lists hold numbers."""
    try:
        read = OmegaConf.to_container(OmegaConf.create(value))
    except Exception:  # a word that is no YAML can make the reader raise anything
        read = None
    if not isinstance(read, list) or not read or any(type(number) not in (int, float) for number in read):
        raise UsageError(f"{key}: expected a list of numbers such as '[1, 2]', got {shown(value)}")
    return read


def first_line(error: Exception) -> str:
    """Return what an error says first; omegaconf's next lines are for its own developers."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
