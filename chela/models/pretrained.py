"""Networks in a folder: weights as safetensors, and a JSON file that says what was built and for what.

Nothing in such a folder can run code. Needs the package ``safetensors``, nothing else beside torch and einops.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from chela.errors import UsageError
from chela.models import TaskFacts, build_model
from chela.schema import MIXERS, ModelConfig
from chela.version import __version__

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def save_pretrained(model: nn.Module, folder: Path | str) -> Path:
    """Write ``model`` to ``folder``, which is made if it is not there.

    Args:
        model: As ``build_model`` or ``from_pretrained`` returned it.
        folder: Gets ``config.json`` and ``model.safetensors``; what these names held before is replaced.

    Returns:
        The folder.

    Raises:
        ValueError: The model was not built by ``build_model``.
    """
    from safetensors.torch import save_file

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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    return folder


def from_pretrained(folder: Path | str) -> nn.Module:
    """Read a network that ``save_pretrained`` wrote; on the CPU, in eval mode, float32 as it was built.

    Raises:
        UsageError: No such folder, a pickle in place of safetensors (never read), another format version, a file that
            is torn or foreign, or weights that do not fit.
    """
    folder = Path(folder)
    said = _read_config(folder)
    config, task = _model_config(folder, said), _task_facts(folder, said)
    model = build_model(config, task, seed=0)
    tensors = _read_weights(folder)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(
            f"expected in {folder / WEIGHTS} the weights of the network in {CONFIG}, got others: {error}"
        ) from None
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
    found: dict[str, Any] = said
    return found


def _model_config(folder: Path, said: dict[str, Any]) -> ModelConfig:
    options = said.get("model")
    mixer = options.get("mixer") if isinstance(options, dict) else None
    name = mixer.get("name") if isinstance(mixer, dict) else None
    if not isinstance(options, dict) or name not in MIXERS:
        raise UsageError(f"expected a system of {sorted(MIXERS)} in {folder / CONFIG}, got {name!r}")
    config: ModelConfig = _typed(ModelConfig, {**options, "mixer": None}, folder)
    config.mixer = _typed(MIXERS[name], mixer, folder)
    return config


def _task_facts(folder: Path, said: dict[str, Any]) -> TaskFacts:
    facts: TaskFacts = _typed(TaskFacts, said.get("task"), folder)
    return facts


def _typed(cls: type, values: Any, folder: Path) -> Any:
    """Build a dataclass from JSON values, each of the type of its field."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or values.keys() != fields.keys():
        got = sorted(values) if isinstance(values, dict) else values
        raise UsageError(f"expected the options {sorted(fields)} in {folder / CONFIG}, got {got}")
    for name, value in values.items():
        allowed = fields[name].split(" | ")
        if "float" in allowed:
            allowed.append("int")  # as Python takes one for the other
        if allowed != ["Any"] and type(value).__name__.replace("NoneType", "None") not in allowed:
            raise UsageError(f"{name}: expected {fields[name]} in {folder / CONFIG}, got {value!r}")
    return cls(**values)


def _read_weights(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"expected weights in {folder / WEIGHTS}, could not read them ({error})") from None
