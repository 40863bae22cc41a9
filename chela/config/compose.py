"""From ``key=value`` words to one typed, checked configuration.

A configuration begins as the defaults of ``chela.config.schema``, of the task's class and of the system's constructor.
Then values are set by dotted key, later ones win: ``configs/preset``, ``configs/task`` (and its section for the
preset), ``configs/model`` (the same), what the task's file says of this model, and last the words. A group (``task``,
``model``, ``preset``) is chosen by name or by a YAML file of one's own: ``model=softmax model.depth=2``.

The file of a task or a model holds sections of the configuration. Under ``presets`` it adds to one preset: for all
systems, for one system (``mixers``) or, in a task's file, for one row of the table (``models``, on top of the model's
own file). Under ``variants`` it defines further tasks of the given names, or systems called ``<file>_<variant>``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chela.config.identity import identity_of, of_today
from chela.config.schema import Config, ModelConfig, fields, seconds, values
from chela.core.errors import UsageError, first_line
from chela.core.files import expect_trusted, importable
from chela.core.options import check_value, closest, read_value, shown, split_words
from lra.tasks import get_task, task_options

Layer = dict[str, Any]
PRESETS = ("auto", "full", "mini", "tiny")
"""Sizes of task and network that every task has; ``auto`` is full with a CUDA GPU, mini without."""

GROUPS = {"task": "listops", "model": "chela", "preset": "auto"}
"""What is chosen by name, and the default choice."""

OTHER_NAMES = {"epochs": "max_steps", "max_epochs": "max_steps", "steps": "max_steps", "learning_rate": "lr"}
"""Names that other programs have for our options."""


def resolve(words: list[str]) -> Config:
    """Build the configuration that ``words`` (``key=value``) ask for; UsageError says what was expected."""
    pairs = [*split_words(words)]
    for key, value in pairs:
        if "${" in value or value == "???" or not value.isprintable():
            raise UsageError(f"{key}: expected a plain, printable value, got {shown(value)}")
    named = {"resume": "none", "config": "", "trust": ""} | dict(pairs)
    begun = [key for key in ("resume", "config") if named[key] not in ("none", "auto", "")]
    if len(begun) > 1:
        raise UsageError(f"expected resume=RUN or config=FILE, got both, {named['resume']} and {named['config']}")
    if begun:
        return _resolve_begun(begun[0], named[begun[0]], named["trust"], pairs)
    chosen = GROUPS | {key: value for key, value in pairs if key in GROUPS}
    files = {group: read_group(group, chosen[group]) for group in ("task", "model")}
    try:
        preset = resolve_preset(chosen["preset"], dict(pairs).get("trainer.accelerator", "auto"), files["task"])
        task = _tasks_named(files["task"])[-1]
        mixers = [layer.get("model", {}).get("mixer", {}) for layer in files["model"]]
        mixer = [str(section["name"]) for section in mixers if "name" in section][-1]
        layers = [(group, flat(layer)) for group, layer in _layers(files, preset, mixer, label(chosen["model"]))]
    except (AttributeError, IndexError, TypeError):  # a file of one's own
        found = [f"{key}:" for group, layers in files.items() if is_file(chosen[group]) for key in layers[0]]
        raise UsageError(
            f"expected task: {{name: …}} and sections such as trainer: {{…}} in the file of task={chosen['task']}, "
            f"model: {{mixer: {{name: …}}}} in that of model={chosen['model']}, got {', '.join(found)}; see "
            "docs/extend.md"
        ) from None
    config = defaults(task, mixer)
    known = values(config)
    for group, layer in layers:
        own = is_file(chosen[group])
        for key, value in layer.items():
            # a task's file gives sizes for several systems, and each takes those that it has
            if key in known or group == "model" or not key.startswith("model.mixer.") or (own and key not in _sizes()):
                _set(config, key, value, f"{group}={chosen[group]}: ")
    config.preset, config.model.name = preset, label(chosen["model"])
    for key, value in pairs:
        if key not in GROUPS:
            _set(config, key, value)
    return check(config)


def _layers(files: dict[str, list[Layer]], preset: str, mixer: str, model: str) -> Iterator[tuple[str, Layer]]:
    """Yield (group, section) in the order in which they are set."""
    shared = read_group("preset", preset) if preset in names("preset") else []
    for group, layers in {"preset": shared, **files}.items():
        for layer in layers:
            special = layer.get("presets", {}).get(preset, {})
            yield group, {key: value for key, value in layer.items() if key != "presets"}
            yield group, {key: value for key, value in special.items() if key not in ("mixers", "models")}
            yield group, {"model": {"mixer": special.get("mixers", {}).get(mixer, {})}}
    for layer in files["task"]:
        yield "task", layer.get("presets", {}).get(preset, {}).get("models", {}).get(model, {})


def _tasks_named(layers: list[Layer]) -> list[str]:
    """Return the names of tasks in the layers of a file; the last one holds."""
    return [str(layer["task"]["name"]) for layer in layers if "name" in layer.get("task", {})]


def defaults(task: str, mixer: str) -> Config:
    """Return the default configuration of a task and a system."""
    from chela.layers.mixers import mixer_options  # loads torch

    return Config(task=task_options(task)(), model=ModelConfig(mixer=mixer_options(mixer)()))


def _sizes() -> set[str]:
    """Return the option keys of all systems; this loads every one."""
    from chela.layers.mixers import mixer_options, systems

    return {f"model.mixer.{item.name}" for name in systems() for item in dataclasses.fields(mixer_options(name))}


def _set(config: Config, key: str, given: Any, where: str = "") -> None:
    """Set one value by its dotted key, read as its type; UsageError, which begins with ``where``, if that cannot be."""
    *path, name = key.split(".")
    section: Any = config
    for part in path:
        section = getattr(section, part, None)
    items = {item.name: item for item in dataclasses.fields(section)} if dataclasses.is_dataclass(section) else {}
    if name not in items:
        begin, _, last = key.rpartition(".")
        near = closest(f"{begin}.{OTHER_NAMES.get(last, last)}".lstrip("."), [*values(config), *GROUPS])
        what = f"{where}unknown key" if where else "expected key=value of a run, got"
        raise UsageError(f"{what} {shown(key)}{near}; see --help")
    before = getattr(section, name)
    if dataclasses.is_dataclass(before):
        raise UsageError(f"{where}{key}: expected one of its keys ({key}.NAME=…), got {shown(given)}; see --help")
    if key in ("task.name", "model.mixer.name", "model.name") and not where and before != given:
        raise UsageError(f"{key}: chosen by {key.split('.')[0]}=NAME, got {shown(given)}")
    setattr(section, name, read_value(f"{where}{key}", str(items[name].type), given))


def resolve_preset(asked: str, accelerator: str = "auto", task_layers: list[Layer] | None = None) -> str:
    """Return the preset that ``auto`` is on this machine; a task's file may list presets of its own."""
    known = dict.fromkeys([*PRESETS, *(name for layer in task_layers or [] for name in layer.get("presets", {}))])
    if asked not in known:
        raise UsageError(f"preset: expected one of {', '.join(known)}, got {shown(asked)}{closest(asked, known)}")
    if asked != "auto":
        return asked
    import torch

    return "full" if accelerator != "cpu" and torch.cuda.device_count() else "mini"


def check(config: Config) -> Config:
    """Return the configuration if its values are within bounds and fit together; else raise a UsageError."""
    try:
        for key, value, item in fields(config):
            check_value(key, value, item.metadata)
        task = get_task(config.task)
    except ValueError as error:
        raise UsageError(str(error)) from None
    seconds(config.trainer.max_time)
    trainer = config.trainer
    if not config.runs:
        raise UsageError("runs: expected a folder, got nothing")
    if config.data.carry and not task.in_order:
        raise UsageError(f"data.carry: expected false for task={config.task.name}, got true: it is no text to go on in")
    if task.objective == "tokens" and task.in_order and not config.model.causal:
        what = f"expected true for task={config.task.name}, got false: each target is the next input"
        raise UsageError(f"model.causal: {what}")
    processes, pieces = trainer.devices * trainer.num_nodes, trainer.sequence_parallel
    if config.data.carry and processes > 1:
        raise UsageError(f"data.carry: expected one process, got {processes}; use trainer.accumulate")
    if trainer.compile and (trainer.checkpoint_activations or pieces > 1):
        raise UsageError("trainer.compile: expected false with checkpoint_activations or sequence_parallel, got true")
    if processes % pieces:
        raise UsageError(f"trainer.sequence_parallel: expected a divisor of the {processes} processes, got {pieces}")
    shares = processes // pieces * trainer.accumulate  # parts of a batch with different records
    if trainer.batch_size % shares:
        what = f"the {shares} processes" if trainer.accumulate == 1 else f"{shares}, processes times trainer.accumulate"
        raise UsageError(f"trainer.batch_size: expected a multiple of {what}, got {trainer.batch_size}")
    return config


# ---- the YAML files --------------------------------------------------------------------------------------------------


def configs_folder() -> Path:
    """Return the folder of the YAML files: in the repository, or packed into an installed wheel."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def names(group: str) -> list[str]:
    """List what can be chosen by ``group=name``, e.g. ``names("model")``."""
    return sorted(_shipped(group))


def is_file(name: str) -> bool:
    """Whether a name is the path of a YAML file of one's own."""
    return name.endswith((".yaml", ".yml"))


def label(name: str) -> str:
    """Return a short name, fit for a folder, of ``./mine.yaml``, ``module:Class`` or a name.

    >>> label("./mine.yaml"), label("my.module:MyTask"), label("listops")
    ('mine', 'MyTask', 'listops')
    """
    return Path(name).stem if is_file(name) else name.rpartition(":")[2]


def read_group(group: str, name: str) -> list[Layer]:
    """Return the layers of a chosen file, the later ones on top; UsageError where there is no such name or file."""
    shipped = _shipped(group)
    if name in shipped:
        return shipped[name]
    if not is_file(name):
        listed = ", ".join(sorted(shipped))
        raise UsageError(f"{group}: expected one of {listed} or a YAML file, got {shown(name)}{closest(name, shipped)}")
    path = Path(name).expanduser()
    importable(path.parent)  # the user's own word names the file, and by it the modules beside it
    return [_read(path)]


def flat(nested: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one by dotted key.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


@functools.cache
def _shipped(group: str) -> dict[str, list[Layer]]:
    """Return the layers of each file in ``configs``, by name. Files are read once: do not change what is returned."""
    found: dict[str, list[Layer]] = {}
    for path in (configs_folder() / group).glob("*.yaml"):
        base = _read(path)
        variants = base.pop("variants", {})
        if base or not variants:
            found[path.stem] = [base]
        prefix = f"{path.stem}_" if group == "model" else ""
        found |= {f"{prefix}{variant}": [base, layer] for variant, layer in variants.items()}
    return found


def _read(path: Path) -> Layer:
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the parser may raise anything on a file that is no YAML
        raise UsageError(f"{path}: expected YAML, could not read it ({first_line(error)})") from None
    if not isinstance(found, dict | None):
        raise UsageError(f"{path}: expected sections such as model: {{…}}, got a {type(found).__name__}")
    return found or {}


# ---- configurations of runs that were begun -----------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def load(path: Path | str, trust: str = "") -> Config:
    """Read the configuration of a run: its folder, its ``config.yaml``, or ``runs.jsonl:RUN`` of collected results.

    ``trust`` lists the modules, separated by commas, that the file may name: their code will be run. UsageError if it
    cannot be read or is of another version.
    """
    file, collected, run = str(path).partition(".jsonl:")
    where = Path(os.path.expanduser(f"{file}.jsonl" if collected else file))
    try:
        if collected:
            lines = map(json.loads, where.read_text(encoding="utf-8").splitlines())
            configs = {record["run"]: record["config"] for record in lines}
            if run not in configs:
                raise ValueError(f"it has no run {run!r}")
            saved: Any = OmegaConf.create(configs[run])
        else:
            saved = OmegaConf.load(where / "config.yaml" if where.is_dir() else where)
        str(saved.task.name), str(saved.model.mixer.name)  # or an error that says which is not there
        saved = OmegaConf.to_container(saved)
    except Exception as error:  # the parser may raise anything on a foreign file
        raise UsageError(f"expected a run's config.yaml at {path}, could not read it ({first_line(error)})") from None
    return from_saved(saved, path, trust)


def from_saved(saved: dict[str, Any], path: Path | str, trust: str = "") -> Config:
    """Return the configuration that was saved as sections at ``path``; see ``load``."""
    task, mixer = str(saved["task"]["name"]), str(saved["model"]["mixer"]["name"])
    expect_trusted([task, mixer], trust.split(","), str(path))
    config = defaults(task, mixer)
    where = f"expected a config.yaml of this version at {path}, got another (use the version of chela that wrote it): "
    try:
        found = of_today(flat(saved), {key: item for key, _, item in fields(config)})
    except ValueError as error:
        raise UsageError(f"{where}{error}") from None
    for key, value in found.items():
        _set(config, key, value, where)
    return check(config)


def _resolve_begun(key: str, name: str, trust: str, pairs: list[tuple[str, str]]) -> Config:
    """Return the configuration of the run ``name``, with the other words applied.

    With ``resume`` they may not change the run's numbers, with ``config`` not its task, model or preset.
    """
    folder = run_folder(name, key) if key == "resume" else None
    config = load(folder or name, trust)
    before = values(config)
    have = {"task": label(config.task.name), "model": config.model.name, "preset": config.preset}
    config.trainer.max_time, config.resume, config.again = "", "none", False  # they hold for one launch
    changed = []
    for word, value in pairs:
        if word in GROUPS:
            named = _tasks_named(read_group("task", value)) if word == "task" else []
            if label([value, *named][-1]) != have[word] and (word, value) != ("preset", "auto"):
                changed.append(f"{word} {have[word]} -> {shown(value)}")
        else:
            _set(config, word, value)
    check(config)
    if folder:
        config.resume = str(folder)
        old, new = identity_of(before), identity_of(values(config))
        keys = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        changed += [f"{name} {old.get(name)} -> {new.get(name)}" for name in keys]
    if changed:
        raise UsageError(
            f"{key}: expected the configuration of {folder or name}, got another ({', '.join(changed)}); "
            "start a new run for it"
        )
    return config


def run_folder(path: Path | str, key: str = "run") -> Path:
    """Return the folder of a run (``last``: the newest under ``runs``); UsageError if there is no run in it."""
    if str(path) == "last":
        begun = [found.parent for found in Path("runs").rglob("checkpoints")]
        begun = [folder / "config.yaml" for folder in begun if (folder / "config.yaml").is_file()]
        if not begun:
            raise UsageError(f"{key}: expected the folder of a run, there is none under {Path('runs').resolve()}")
        return max(begun, key=lambda file: file.stat().st_mtime_ns).parent
    folder = Path(os.path.expanduser(path))
    if not (folder / "config.yaml").is_file():
        what = "it holds no config.yaml" if folder.is_dir() else "there is no such folder"
        raise UsageError(f"{key}: expected the folder of a run, got {shown(str(path))}: {what}")
    return folder
