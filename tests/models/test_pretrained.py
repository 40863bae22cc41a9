"""Save and load: equal outputs, and every wrong folder refused in one line."""

import dataclasses
import importlib.machinery
import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from chela.config.compose import names, resolve
from chela.core.errors import UsageError
from chela.layers.mixers import mixer_options
from chela.models import TaskFacts, build_model
from chela.models.pretrained import RELEASED, from_pretrained, released, save_pretrained
from lra.tasks import get_task

TASKS = {
    "symbols": TaskFacts(num_classes=10, l_max=50, vocab_size=17),
    "pixels": TaskFacts(num_classes=3, l_max=50, vocab_size=None, input_dim=3),
    "pairs": TaskFacts(num_classes=2, l_max=50, vocab_size=17, pair=True),
    "tokens": TaskFacts(num_classes=17, l_max=50, vocab_size=17, objective="tokens"),
}


def _model(name: str = "chela", task: str = "symbols") -> torch.nn.Module:
    return build_model(resolve([f"model={name}", "preset=tiny"]).model, TASKS[task], seed=7).eval()


def _inputs(task: str) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 50, 3) if task == "pixels" else torch.randint(1, 17, (2, 50))


# The embedding and the head, which the task decides, know nothing of the mixer between them.
@pytest.mark.parametrize(
    ("name", "task"), [*((name, "symbols") for name in names("model")), *(("chela", task) for task in [*TASKS][1:])]
)
def test_what_was_saved_comes_back(name, task, tmp_path):
    model, inputs = _model(name, task), _inputs(task)
    mask = torch.arange(50) < torch.tensor([[50], [20]])
    again = from_pretrained(save_pretrained(model, tmp_path / "a" / "net"))
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(inputs, mask), model(inputs, mask))
    assert again.state_dict().keys() == model.state_dict().keys()
    twice = from_pretrained(save_pretrained(again, tmp_path / "b"))
    with torch.no_grad():
        assert torch.equal(twice(inputs, mask), model(inputs, mask))


def test_what_is_known_of_the_task_is_saved_with_a_card(tmp_path):
    config = resolve(["task=text", "preset=tiny"])
    model = build_model(config.model, get_task(config.task), seed=7)
    again = from_pretrained(save_pretrained(model, tmp_path / "text"))
    assert again.labels == ["negative", "positive"] and again.encoding["name"] == "text"
    assert "parameters; negative, positive." in (tmp_path / "text" / "README.md").read_text()
    save_pretrained(_model(), tmp_path / "own", card="# Mine\n")
    assert (tmp_path / "own" / "README.md").read_text() == "# Mine\n"
    said = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (said["labels"], said["encoding"]) == ([], {})  # it was built of facts alone


SCORES = {  # of ids or values 1, 2, …, as the released weights gave them on the day of their release
    "image-lite": [3.2068, -3.7323],
    "listops-lite": [1.6289, -1.7497],
    "pathfinder-lite": [-0.9694, 1.2528],
    "shakespeare": [-8.1597, 3.4429],
    "text-lite": [2.7654, -2.5004],
}


@pytest.mark.parametrize("name", released())
def test_released_weights_keep_their_scores_and_say_all_options(name):
    model = from_pretrained(name)
    size, length = model.built_from[1].vocab_size, min(200, model.built_from[1].l_max)
    inputs = torch.linspace(-2, 2, 200)[None, :, None] if size is None else torch.arange(200)[None] % (size - 1) + 1
    with torch.no_grad():
        np.testing.assert_allclose(model(inputs[:, :length]).flatten()[:2], SCORES[name], rtol=1e-3, atol=1e-3)
    said = json.loads((RELEASED / name / "config.json").read_text())
    options = {field.name for field in dataclasses.fields(mixer_options("chela"))}
    assert said["model"]["mixer"].keys() == options  # so that no default of later can change the network
    assert (said["model"]["mixer"]["qk"], said["model"]["mixer"]["gate"]) == ("short", "highway")
    card = (RELEASED / name / "README.md").read_text()
    assert all(word in card for word in ("**Data**", "**Size**", "**Score**", "**What it gets wrong**", "confident**"))


def test_a_repository_of_the_hub_is_a_name_too(saved, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name != "me/net":
            raise OSError("404\nno such repository")
        return str(saved)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download, hub.__spec__ = snapshot_download, importlib.machinery.ModuleSpec("huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert from_pretrained("me/net").built_from[1] == TASKS["symbols"]
    assert asked == [("me/net", ["config.json", "model.safetensors", "README.md"])]
    _refused("you/net", r"got you/net, which the Hugging Face Hub does not give \(404\)")


def test_an_integer_where_a_number_is_meant_comes_back(tmp_path):
    config = resolve(["preset=tiny"]).model
    config.dropout = 0
    again = from_pretrained(save_pretrained(build_model(config, TASKS["symbols"], seed=7), tmp_path))
    assert again.built_from[0].dropout == 0


def test_a_network_of_an_earlier_version_comes_back(saved):
    said = json.loads((saved / "config.json").read_text())
    assert said["task"].pop("objective") == "classification"
    (saved / "config.json").write_text(json.dumps(said))
    assert from_pretrained(saved).built_from[1] == TASKS["symbols"]


OWN = """
import pathlib, torch
pathlib.Path(__file__).with_suffix(".trace").touch()

class Scale(torch.nn.Module):
    def __init__(self, d_model, *, power: int = 1):
        super().__init__()
        self.power, self.weight, self.map = power, torch.nn.Parameter(torch.rand(d_model)), torch.nn.Linear(d_model, 1)

    def forward(self, x):
        return self.map(x) * self.weight**self.power
"""


def test_a_system_of_ones_own_is_imported_only_when_trusted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_system.py").write_text(OWN)
    config = resolve(["preset=tiny"]).model
    config.mixer = mixer_options("own_system:Scale")(power=2)
    first, again, other = (build_model(config, TASKS["symbols"], seed) for seed in (7, 7, 8))
    for (name, a), b in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    weights = [block.mixer.layer.weight for net in (first, other) for block in net.backbone.blocks]
    assert len({tuple(weight.tolist()) for weight in weights}) == len(weights)

    folder, trace = save_pretrained(first.eval(), tmp_path / "net"), tmp_path / "own_system.trace"
    monkeypatch.delitem(sys.modules, "own_system")
    trace.unlink()
    for trust in ((), "own_system:Scale", ["own", "torch"], "other_own_system"):
        _refused(
            folder,
            "names the module own_system, whose code would be run: if you trust it, say trust=own_system$",
            trust,
        )
    assert not trace.exists() and "own_system" not in sys.modules
    with torch.no_grad():
        assert torch.equal(from_pretrained(folder, trust="own_system")(_inputs("symbols")), first(_inputs("symbols")))
    assert trace.exists()


@pytest.fixture
def saved(tmp_path):
    return save_pretrained(_model(), tmp_path / "net")


def _refused(folder, match, trust=()):
    with pytest.raises(UsageError, match=match) as caught:
        from_pretrained(folder, trust)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(saved):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    _refused(saved, "could not read")
    (saved / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    _refused(saved, "could not read")


def test_wrong_folders_are_refused(saved, tmp_path):
    _refused(tmp_path / "absent", "there is none")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "could not read it")
    torn = (saved / "model.safetensors").read_bytes()[:500]
    (saved / "model.safetensors").write_bytes(torn)
    _refused(saved, "could not read them")
    (saved / "model.safetensors").unlink()
    _refused(saved, "could not read them")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda said: said.update(format_version=2), "expected format version 1"),
        (lambda said: said.pop("format_version"), "expected format version 1"),
        (lambda said: said["model"].update(depth="two"), "depth: expected a whole number, got 'two'"),
        (lambda said: said["model"].update(depth=3), "got others"),
        (lambda said: said["model"].update(colour="red"), "expected the options"),
        (lambda said: said["model"]["mixer"].update(name="tiger"), "'tiger'"),
        (lambda said: said["model"]["mixer"].pop("heads"), "expected the options"),
        (lambda said: said.update(model=[]), "could not read it"),
        (lambda said: said.update(task=None), "expected the options"),
    ],
)
def test_another_config_is_refused(saved, change, match):
    said = json.loads((saved / "config.json").read_text())
    change(said)
    (saved / "config.json").write_text(json.dumps(said))
    _refused(saved, match)


def test_another_module_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="build_model"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
