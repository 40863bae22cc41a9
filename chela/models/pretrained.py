"""Networks in a folder: weights as safetensors, a JSON file that says what was built and for what, and a card.

Nothing in such a folder can run code: a system of somebody's own is imported only when its module is trusted. Folders
in ``chela/weights`` go by their names, and where ``huggingface_hub`` is installed, repositories of the Hub by theirs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from chela import __version__
from chela.config.identity import of_today
from chela.config.schema import ModelConfig
from chela.core.errors import UsageError, first_line
from chela.core.files import expect_trusted
from chela.core.options import read_value
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.models.heads import Network

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
RELEASED = Path(__file__).parents[1] / "weights"


def save_pretrained(model: nn.Module, folder: Path | str, card: str = "") -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``README.md`` to ``folder``, made if it is not there; return it.

    ``card`` is what the last of them says: data, size, score, what goes wrong. Without it, size and labels.
    ``model.labels`` and ``model.encoding``, the task's name and options, are those of the task it was built for.

    Raises:
        ValueError: The model was not built by ``build_model`` or ``from_pretrained``.
    """
    from safetensors.torch import save_model

    if not isinstance(model, Network):
        raise ValueError("save_pretrained: expected a network made by build_model, got another module")
    config, task = model.built_from
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        "format_version": FORMAT_VERSION,
        "chela_version": __version__,
        "model": dataclasses.asdict(config),
        "task": dataclasses.asdict(task),
        "labels": model.labels,
        "encoding": model.encoding,
    }
    size = sum(parameter.numel() for parameter in model.parameters())
    labels = ", ".join(model.labels) or f"{task.num_classes} classes"
    short = f"# {config.name}, {model.encoding.get('name', task.objective)}\n\n{size:,} parameters; {labels}.\n"
    save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(saved, indent=2) + "\n")
    (folder / CARD).write_text(card or short, encoding="utf-8")
    return folder


def released() -> list[str]:
    """List the names of the weights in this package.

    >>> released()
    ['image-lite', 'listops-lite', 'pathfinder-lite', 'shakespeare', 'text-lite']
    """
    return sorted(path.parent.name for path in RELEASED.glob(f"*/{CONFIG}"))


def find(weights: Path | str, **download: Any) -> Path:
    """Return the folder of weights: a path, a name of ``released``, or a repository of the Hub, which is fetched.

    Raises:
        UsageError: It is none of them, or cannot be fetched.
    """
    if (folder := Path(weights).expanduser()).is_dir():
        return folder
    if weights in released():
        return RELEASED / weights
    none = f"weights: expected one of {', '.join(released())}, or a folder with {CONFIG} and {WEIGHTS}, got {weights}"
    if str(weights).count("/") != 1 or importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError(f"{none}: there is none")
    from huggingface_hub import snapshot_download  # type: ignore[import-not-found]

    try:
        return Path(snapshot_download(str(weights), allow_patterns=[CONFIG, WEIGHTS, CARD], **download))
    except (OSError, ValueError) as error:  # no such repository, no network, no name of one
        raise UsageError(f"{none}, which the Hugging Face Hub does not give ({first_line(error)})") from None


def from_pretrained(weights: Path | str, trust: str | Collection[str] = ()) -> Network:
    """Read a network that ``save_pretrained`` wrote; on the CPU, in eval mode, float32 as it was built.

    Args:
        weights: A folder, one of ``released``, or a repository of the Hub.
        trust: Names of modules that may be imported when the network's system is one of theirs.

    Raises:
        UsageError: No such weights, no safetensors (a pickle is never read), another format version, a damaged or
            foreign file, a system from a module that is not trusted, or weights that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    folder = find(weights)
    try:
        saved = json.loads((folder / CONFIG).read_text())
        version, options = saved.get("format_version"), dict(saved["model"])
        mixer = dict(options.pop("mixer"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"expected {CONFIG} of a network in {folder}, could not read it ({error})") from None
    if version != FORMAT_VERSION:
        what = f"expected format version {FORMAT_VERSION} in {folder / CONFIG}, got {version!r}"
        raise UsageError(f"{what}; use the version of chela that wrote it")
    name = str(mixer.get("name"))
    expect_trusted([name], {trust} if isinstance(trust, str) else trust, str(folder / CONFIG))
    config: ModelConfig = read_options(ModelConfig, options, folder, "model.")
    config.mixer = read_options(mixer_options(name), mixer, folder, "model.mixer.")
    model = build_model(config, read_options(TaskFacts, saved.get("task"), folder), seed=0)
    model.labels, model.encoding = saved.get("labels", []), saved.get("encoding", {})
    where = folder / WEIGHTS
    try:
        load_model(model, where)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"expected weights in {where}, could not read them ({error})") from None
    except RuntimeError as error:
        raise UsageError(f"expected in {where} the weights of the network in {CONFIG}, got others: {error}") from None
    return model.eval()


def read_options(cls: Any, saved: Any, folder: Path | str, prefix: str = "") -> Any:
    """Build a dataclass from JSON values, each of the type of its field; newer options may be absent."""
    declared = {f"{prefix}{field.name}": field for field in dataclasses.fields(cls) if field.name != "mixer"}
    try:
        found = of_today({f"{prefix}{key}": value for key, value in dict(saved or {}).items()}, declared)
        if found.keys() != declared.keys():
            raise ValueError(f"expected the options {sorted(declared)}, got {sorted(found)}")
        values = {field.name: read_value(key, str(field.type), found[key]) for key, field in declared.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"{Path(folder) / CONFIG}: {error}") from None
    return cls(**values)
