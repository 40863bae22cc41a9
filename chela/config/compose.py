"""From ``key=value`` words to one typed, checked configuration.

A configuration begins as the defaults of ``chela.config.schema``, of the task's class and of the system's constructor.
Then values are set by dotted key, later ones win: ``configs/preset``, ``configs/task`` (and its section for the
preset), ``configs/model`` (the same), what the task's file says of this model, and last the words. A group (``task``,
``model``, ``preset``) is chosen by name or by a YAML file of one's own: ``model=softmax model.depth=2``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from chela.config.groups import PRESETS, Layer, flat, is_file, label, names, read_group, sections
from chela.config.identity import identity_of
from chela.config.retired import of_today
from chela.config.schema import Config, fields, seconds
from chela.core.errors import UsageError, first_line
from chela.core.files import expect_trusted, importable
from chela.core.options import check_value, closest, kind_of, read_value, shown, spelled
from lra.tasks import get_task, task_options

GROUPS = {"task": "listops", "model": "chela", "preset": "auto"}
"""What is chosen by name, and what is chosen when nothing is said."""

OTHER_NAMES = {
    "epochs": "trainer.max_steps",
    "max_epochs": "trainer.max_steps",
    "steps": "trainer.max_steps",
    "learning_rate": "optimizer.lr",
    "layers": "model.depth",
}
"""What other programs call an option of ours."""


def resolve(words: list[str]) -> Config:
    """Build the configuration that ``words`` (``key=value``) ask for; UsageError says what was expected."""
    said = [_split(word, after) for word, after in itertools.pairwise([*words, ""])]
    told = {"resume": "none", "config": "", "trust": ""} | dict(said)
    if told["resume"] not in ("none", "auto"):
        return _resolve_resumed(run_folder(told["resume"], "resume"), said)
    if told["config"]:
        config, changed = _said_anew(_load_any(told["config"], told["trust"]), said)
        if changed:
            raise UsageError(f"config: expected words beside its task, model and preset, got {', '.join(changed)}")
        return check(config)
    chosen = GROUPS | {key: value for key, value in said if key in GROUPS}
    files = {group: read_group(group, chosen[group]) for group in ("task", "model")}
    for group in files:
        if is_file(chosen[group]):  # the user's own words name it, and by it the modules beside it
            importable(Path(chosen[group]).expanduser().parent)
    try:
        preset = resolve_preset(chosen["preset"], dict(said).get("trainer.accelerator", "auto"), files["task"])
        task = [str(layer["task"]["name"]) for layer in files["task"] if "name" in layer.get("task", {})][-1]
        mixers = [layer.get("model", {}).get("mixer", {}) for layer in files["model"]]
        mixer = [str(section["name"]) for section in mixers if "name" in section][-1]
        layers = [(group, flat(layer)) for group, layer in _layers(files, preset, mixer, label(chosen["model"]))]
    except (AttributeError, IndexError, TypeError):  # a file of one's own
        raise UsageError(
            f"expected task: {{name: …}} and sections such as trainer: {{…}} in the file of task={chosen['task']}, "
            f"model: {{mixer: {{name: …}}}} in that of model={chosen['model']}; see docs/extend.md"
        ) from None
    config = defaults(task, mixer)
    for group, layer in layers:
        _set_layer(config, layer, group, chosen[group])
    config.preset, config.model.name = preset, label(chosen["model"])
    for key, value in said:
        if key not in GROUPS:
            _set_word(config, key, value)
    return check(config)


def _layers(files: dict[str, list[Layer]], preset: str, mixer: str, model: str) -> Iterator[tuple[str, Layer]]:
    """Name the group of each section, and the section, in the order in which they are set."""
    for layer in read_group("preset", preset) if preset in names("preset") else ():
        yield "preset", layer
    for group, layers in files.items():
        for layer in layers:
            yield from ((group, section) for section in sections(layer, preset, mixer))
    for layer in files["task"]:
        yield "task", layer.get("presets", {}).get(preset, {}).get("models", {}).get(model, {})


def defaults(task: str, mixer: str) -> Config:
    """Return the configuration of a task and a system in which nothing was said."""
    from chela.layers.mixers import mixer_options  # loads torch

    try:
        config = Config(task=task_options(task)())
        config.model.mixer = mixer_options(mixer)()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return config


def _set(config: Config, key: str, given: Any) -> None:
    """Set one value by its dotted key, read as its type. Raises ``ValueError`` where it is not of it."""
    *path, name = key.split(".")
    section = functools.reduce(getattr, path, config)
    kind = next(kind_of(item) for item in dataclasses.fields(section) if item.name == name)
    setattr(section, name, read_value(key, kind, given))


def _set_layer(config: Config, layer: Layer, group: str, name: str) -> None:
    """Set the values of a section of a file.

    A task's file gives sizes for several systems, and each takes those that it has. What none has is an error in a
    file of one's own; of those of this package a test looks at that.
    """
    known = [key for key, _, _ in fields(config)]
    for key, value in layer.items():
        if key in known:
            try:
                _set(config, key, value)
            except ValueError as error:
                raise UsageError(f"{group}={name}: {error}") from None
        elif group == "model" or not key.startswith("model.mixer.") or (is_file(name) and key not in _of_all()):
            raise UsageError(f"{group}={name}: unknown key {shown(key)} in its file{closest(key, known)}")


def _of_all() -> set[str]:
    """Return the keys of the options of all systems, each of which is loaded for it."""
    from chela.layers.mixers import mixer_options, systems

    return {f"model.mixer.{item.name}" for name in systems() for item in dataclasses.fields(mixer_options(name))}


def _set_word(config: Config, key: str, value: str) -> None:
    known = {name: now for name, now, _ in fields(config)}
    if key not in known:
        if any(name.startswith(f"{key}.") for name in known):
            raise UsageError(f"{key}: expected one of its keys ({key}.NAME=…), got {shown(value)}; see --help")
        raise UsageError(f"expected key=value of a run, got {shown(key)}{_meant(key, [*known, *GROUPS])}; see --help")
    if key in ("task.name", "model.mixer.name", "model.name") and known[key] != value:
        raise UsageError(f"{key}: chosen by {key.split('.')[0]}=NAME, got {shown(value)}")
    try:
        _set(config, key, value)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _meant(key: str, known: list[str]) -> str:
    """Return the hint for a key that there is not: the one of the same ending, or the one most like it."""
    meant = {name.rpartition(".")[2]: name for name in reversed(known)} | OTHER_NAMES
    name = meant.get(key.rpartition(".")[2])
    return f" (did you mean {name!r}?)" if name else closest(key, known)


def _split(word: str, after: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or word.startswith("-"):
        raise UsageError(f"expected key=value, got {shown(word)}{spelled(word, after)}; see --help")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key, re.ASCII):
        raise UsageError(f"expected a dotted key such as model.depth, got {shown(key)}; see --help")
    if "${" in value or value == "???" or not value.isprintable():
        raise UsageError(f"{key}: expected a plain, printable value, got {shown(value)}")
    return key, value


def resolve_preset(asked: str, accelerator: str = "auto", task_layers: list[Layer] | None = None) -> str:
    """Return the preset that ``auto`` is on this machine; a task's file may list presets of its own."""
    known = list(dict.fromkeys([*PRESETS, *(name for layer in task_layers or [] for name in layer.get("presets", {}))]))
    if asked not in known:
        raise UsageError(f"preset: expected one of {', '.join(known)}, got {shown(asked)}{closest(asked, known)}")
    if asked != "auto" or accelerator == "cpu":
        return "mini" if asked == "auto" else asked
    import torch

    return "full" if torch.cuda.device_count() else "mini"


def check(config: Config) -> Config:
    """Return a configuration whose values are all within their bounds and go together; UsageError where not."""
    try:
        for key, value, item in fields(config):
            if not key.startswith("task."):  # a task checks its own
                check_value(key, value, item.metadata)
        task = get_task(config.task)
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_together(config, task)
    return config


def _check_together(config: Config, task: Any) -> None:
    """Refuse options that do not go together on this task; UsageError says which."""
    seconds(config.trainer.max_time)
    if not config.runs:
        raise UsageError("runs: expected a folder, got ''")
    model, trainer, carry, tokens = config.model, config.trainer, config.data.carry, task.objective == "tokens"
    on = f"for task={config.task.name}"
    if tokens and model.causal and model.norm == "batch":
        raise UsageError(
            f"model.norm: expected layer, rms or scale {on} with model.causal=true, got batch: in training its "
            "statistics over positions tell earlier tokens of later ones"
        )
    if tokens and task.in_order and not model.causal:
        raise UsageError(f"model.causal: expected true {on}, got false: each target is the next input")
    if carry and not task.in_order:
        raise UsageError(f"data.carry: expected false {on}, got true: it is no text to go on in")
    processes, pieces = trainer.devices * trainer.num_nodes, trainer.sequence_parallel
    if carry and processes > 1:
        raise UsageError(f"data.carry: expected one process, got {processes}; use trainer.accumulate")
    if trainer.compile and (trainer.checkpoint_activations or pieces > 1):
        raise UsageError("trainer.compile: expected false with checkpoint_activations or sequence_parallel, got true")
    if processes % pieces:
        raise UsageError(f"trainer.sequence_parallel: expected a divisor of the {processes} processes, got {pieces}")
    processes //= pieces  # those of different records
    shares = processes * trainer.accumulate
    if trainer.batch_size % shares:
        what = f"the {shares} processes" if shares == processes else f"{shares}, processes times trainer.accumulate"
        raise UsageError(f"trainer.batch_size: expected a multiple of {what}, got {trainer.batch_size}")
    width, key = (model.d_model, "model.d_model")
    if getattr(model.mixer, "d_value", None):
        width, key = (model.mixer.d_value, "model.mixer.d_value")
    heads = getattr(model.mixer, "heads", 1)
    if width % heads and not hasattr(model.mixer, "pooled"):  # CHELA's heads share what its pool leaves
        raise UsageError(f"{key}: expected a multiple of model.mixer.heads={heads}, got {width}")


# ---- configurations of runs that were begun -----------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def load(path: Path, trust: str = "") -> Config:
    """Read a resolved configuration back from a run's ``config.yaml``; UsageError where it is none of this version.

    ``trust`` has the names of modules, separated by commas, that it may name; a module is code that will be run.
    """
    try:
        saved: Any = OmegaConf.load(path)
        str(saved.task.name), str(saved.model.mixer.name)  # or an error that says which is not there
        saved = OmegaConf.to_container(saved)
    except Exception as error:  # a foreign file can make the reader raise anything
        raise UsageError(f"expected a run's config.yaml at {path}, could not read it ({first_line(error)})") from None
    return from_saved(saved, path, trust)


def from_saved(saved: dict[str, Any], path: Path, trust: str = "") -> Config:
    """Return the configuration that was saved as sections at ``path``; see ``load``."""
    task, mixer = str(saved["task"]["name"]), str(saved["model"]["mixer"]["name"])
    expect_trusted([task, mixer], trust.split(","), str(path))
    config = defaults(task, mixer)
    known = {key: item for key, _, item in fields(config)}
    try:
        for key, value in of_today(flat(saved), known).items():
            if key not in known:
                raise ValueError(f"unknown key {shown(key)}")
            _set(config, key, value)
    except ValueError as error:
        raise UsageError(
            f"expected a config.yaml of this version at {path}, got another ({error}); "
            "use the version of chela that wrote it"
        ) from None
    return check(config)


def _load_any(name: str, trust: str) -> Config:
    """Load what ``config=`` names: a run's folder, its ``config.yaml``, or ``runs.jsonl:RUN`` of collected results."""
    file, collected, run = name.partition(".jsonl:")
    path = Path(os.path.expanduser(file + ".jsonl" if collected else name))
    if not collected:
        return load(path / "config.yaml" if path.is_dir() else path, trust)
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        configs = {str(record["run"]): record["config"] for record in records}
        if run not in configs:
            raise UsageError(f"config: expected a run of {path}, got {shown(run)}{closest(run, configs)}")
        return from_saved(configs[run], path, trust)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"config: expected collected runs at {path}, could not read them ({error})") from None


def _said_anew(saved: Config, said: list[tuple[str, str]]) -> tuple[Config, list[str]]:
    """Return a saved configuration with what is said besides, and which groups were said to be others."""
    config, changed = copy.deepcopy(saved), []
    config.trainer.max_time, config.resume, config.again = "", "none", False  # they hold for one launch
    have = {"task": label(saved.task.name), "model": saved.model.name, "preset": saved.preset}
    for key, value in said:
        if key not in GROUPS:
            _set_word(config, key, value)
        elif label(value) != have[key] and (key, value) != ("preset", "auto"):
            changed.append(f"{key} {have[key]} -> {shown(value)}")
    return config, changed


def _resolve_resumed(folder: Path, said: list[tuple[str, str]]) -> Config:
    """Keep the configuration of a run that goes on; only what does not change its numbers may be said anew."""
    saved = load(folder / "config.yaml", dict(said).get("trust", ""))
    config, changed = _said_anew(saved, said)
    config.resume = str(folder)
    old, new = (identity_of({key: value for key, value, _ in fields(one)}) for one in (saved, check(config)))
    keys = dict.fromkeys([*old, *new])
    changed += [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    if changed:
        raise UsageError(
            f"resume: expected the configuration of {folder}, got another ({', '.join(changed)}); "
            "start a new run for it"
        )
    return config


def run_folder(path: Path | str, key: str = "run") -> Path:
    """Return the folder of a run; UsageError where it is not there or holds none. ``last`` is the newest under runs."""
    if str(path) == "last":
        begun = [
            found.parent for found in Path("runs").rglob("checkpoints") if (found.parent / "config.yaml").is_file()
        ]
        if not begun:
            raise UsageError(f"{key}: expected the folder of a run, there is none under {Path('runs').resolve()}")
        return max(begun, key=lambda folder: (folder / "config.yaml").stat().st_mtime_ns)
    folder = Path(os.path.expanduser(path))
    if not (folder / "config.yaml").is_file():
        what = "it holds no config.yaml" if folder.is_dir() else "there is no such folder"
        raise UsageError(f"{key}: expected the folder of a run, got {shown(str(path))}: {what}")
    return folder
