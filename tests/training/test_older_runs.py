"""A run of version 0.1, whose CHELA had batch norms and one head, is still read and scored (``older_run``)."""

import json
from pathlib import Path

import pytest
import torch

from chela import evaluate, predict, train
from chela.models.pretrained import CONFIG, WEIGHTS, from_pretrained
from experiments.runs import read_run

OLDER = Path(__file__).with_name("older_run")
RESULT = json.loads((OLDER / "result.json").read_text())


def test_its_checkpoint_gives_its_result_to_the_last_digit(tmp_path, capsys):
    assert evaluate.main([f"run={OLDER}", f"data.dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert f"test accuracy {RESULT['test']['accuracy']!r} of {RESULT['test']['count']}" in " ".join(said.split())
    loss = float(said.split("loss ")[1].split(",")[0])
    assert loss == pytest.approx(RESULT["test"]["loss"], rel=1e-6)


def test_a_table_names_it_by_what_it_was():
    run = read_run(OLDER)
    assert (run.model, run.state, run.value) == ("chela", "finished", 100 * RESULT["test"]["accuracy"])
    assert run.config["model.mixer.attention"] == "linear"


def test_a_saved_network_of_that_version_is_converted(tmp_path):
    from safetensors.torch import save_file

    model, _ = predict.load_run(str(OLDER))
    weights = torch.load(OLDER / "checkpoints" / "best.ckpt", weights_only=True)["model"]
    assert any("running_var" in name for name in weights)
    save_file(weights, tmp_path / WEIGHTS)
    config, facts = model.built_from
    options = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "mixer"}
    mixer = {"name": "chela", "d_qk": 8, "d_value": 32, "heads": 1, "conv": "short-long", "short_kernel": 5}
    mixer |= {"long_kernel": "multiscale", "reparam": True, "attention": "linear", "feature_map": "elu"}
    mixer |= {"normalize": True, "gate": "mega"}
    said = {"format_version": 1, "model": {**options, "mixer": mixer}, "task": vars(facts)}
    (tmp_path / CONFIG).write_text(json.dumps(said))
    inputs = torch.randint(1, 16, (3, 20))
    torch.testing.assert_close(from_pretrained(tmp_path)(inputs), model(inputs))


def test_it_does_not_train_on(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text((OLDER / "config.yaml").read_text())
    for name in ("last", "best"):
        (run / "checkpoints" / f"{name}.ckpt").write_bytes((OLDER / "checkpoints" / "best.ckpt").read_bytes())
    assert train.main([f"resume={run}", f"data.dir={tmp_path / 'data'}"]) == 2
    assert "expected a checkpoint of this" in " ".join(capsys.readouterr().err.split())
