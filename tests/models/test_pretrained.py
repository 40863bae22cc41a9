"""Save and load: equal outputs, and every wrong folder refused in one line."""

import json
import pickle

import pytest
import torch

from chela.config import names, resolve
from chela.errors import UsageError
from chela.models import TaskFacts, build_model
from chela.models.pretrained import from_pretrained, save_pretrained

TASKS = {
    "symbols": TaskFacts(num_classes=10, l_max=50, vocab_size=17),
    "pixels": TaskFacts(num_classes=3, l_max=50, vocab_size=None, input_dim=3),
    "pairs": TaskFacts(num_classes=2, l_max=50, vocab_size=17, pair=True),
}


def _model(name: str = "chela", task: str = "symbols") -> torch.nn.Module:
    return build_model(resolve([f"model={name}", "preset=tiny"]).model, TASKS[task], seed=7).eval()


def _inputs(task: str) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 50, 3) if task == "pixels" else torch.randint(1, 17, (2, 50))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", names("model"))
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


def test_an_integer_where_a_number_is_meant_comes_back(tmp_path):
    config = resolve(["preset=tiny"]).model
    config.dropout = 0
    again = from_pretrained(save_pretrained(build_model(config, TASKS["symbols"], seed=7), tmp_path))
    assert again.built_from[0].dropout == 0


@pytest.fixture
def saved(tmp_path):
    return save_pretrained(_model(), tmp_path / "net")


def _refused(folder, match):
    with pytest.raises(UsageError, match=match) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(saved):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    _refused(saved, "got pytorch_model.bin: a pickle")
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
        (lambda said: said["model"].update(depth="two"), "depth: expected int"),
        (lambda said: said["model"].update(depth=3), "got others"),
        (lambda said: said["model"].update(colour="red"), "expected the options"),
        (lambda said: said["model"]["mixer"].update(name="tiger"), "expected a system of"),
        (lambda said: said["model"]["mixer"].pop("heads"), "expected the options"),
        (lambda said: said.update(model=[]), "expected a system of"),
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


def test_the_hub_model_goes_through_a_folder(tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from chela.models.hub import HubModel

    model, inputs = _model(), _inputs("symbols")
    HubModel(model).save_pretrained(tmp_path)
    again = HubModel.from_pretrained(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs), model(inputs))
