"""Networks in a folder: weights as safetensors, and a JSON file that says what was built and for what.

Nothing in such a folder can run code: a system of somebody's own is imported only when its module is trusted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from chela import __version__
from chela.config.retired import of_today
from chela.config.schema import ModelConfig
from chela.core.errors import UsageError
from chela.core.files import expect_trusted
from chela.core.options import kind_of, read_value
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def save_pretrained(model: nn.Module, folder: Path | str) -> Path:
    """Write ``config.json`` and ``model.safetensors`` to ``folder``, which is made if it is not there; return it.

    Raises:
        ValueError: The model was not built by ``build_model`` or ``from_pretrained``.
    """
    from safetensors.torch import save_model

    built_from = getattr(model, "built_from", None)
    if built_from is None:
        raise ValueError("save_pretrained: expected a network made by build_model, got another module")
    config, task = built_from
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "format_version": FORMAT_VERSION,
        "chela_version": __version__,
        "model": dataclasses.asdict(config),
        "task": dataclasses.asdict(task),
    }
    save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    return folder


def from_pretrained(folder: Path | str, trust: str | Collection[str] = ()) -> nn.Module:
    """Read a network that ``save_pretrained`` wrote; on the CPU, in eval mode, float32 as it was built.

    ``trust`` has the names of modules that may be imported when the network's system is one of theirs.

    Raises:
        UsageError: No such folder, a pickle in place of safetensors (never read), another format version, a damaged or
            foreign file, a system from a module that is not trusted, or weights that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    folder = Path(folder)
    said = _read_config(folder)
    options: Any = said.get("model")
    mixer = options.get("mixer") if isinstance(options, dict) else None
    if not isinstance(mixer, dict):
        raise UsageError(f"expected the options of a network in {folder / CONFIG}, got none")
    name = str(mixer.get("name"))
    expect_trusted([name], {trust} if isinstance(trust, str) else trust, str(folder / CONFIG))
    try:
        known = mixer_options(name)
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG}: {error}") from None
    sizes = {key: options[key] for key in options.keys() - {"mixer"}}
    config: ModelConfig = _read(ModelConfig, sizes, folder, "model.")
    config.mixer = _read(known, mixer, folder, "model.mixer.")
    model = build_model(config, _read(TaskFacts, said.get("task"), folder), seed=0)
    where = folder / WEIGHTS
    try:
        load_model(model, where)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"expected weights in {where}, could not read them ({error})") from None
    except RuntimeError as error:
        raise UsageError(f"expected in {where} the weights of the network in {CONFIG}, got others: {error}") from None
    return model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UsageError(f"expected a folder with {CONFIG} and {WEIGHTS}, there is none at {folder}")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not (folder / WEIGHTS).is_file() and pickles:
        raise UsageError(
            f"expected {WEIGHTS} in {folder}, got {pickles[0]}: a pickle can run code when it is opened and is not "
            "read; write the network with save_pretrained"
        )
    try:
        said = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"expected {CONFIG} of a network in {folder}, could not read it ({error})") from None
    version = said.get("format_version") if isinstance(said, dict) else None
    if version != FORMAT_VERSION:
        raise UsageError(
            f"expected format version {FORMAT_VERSION} in {folder / CONFIG}, got {version!r}; "
            "use the version of chela that wrote it"
        )
    return said  # type: ignore[no-any-return]


def _read(cls: Any, saved: Any, folder: Path, prefix: str = "") -> Any:
    """Build a dataclass from JSON values, each of the type of its field; newer options may be absent."""
    declared = {f"{prefix}{field.name}": field for field in dataclasses.fields(cls) if field.name != "mixer"}
    try:
        found = of_today({f"{prefix}{key}": value for key, value in dict(saved or {}).items()}, declared)
        if found.keys() != declared.keys():
            raise ValueError(f"expected the options {sorted(declared)}, got {sorted(found)}")
        values = {field.name: read_value(key, kind_of(field), found[key]) for key, field in declared.items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder / CONFIG}: {error}") from None
    return cls(**values)
