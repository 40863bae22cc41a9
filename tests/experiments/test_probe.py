from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pytest
import torch

from chela.config import load, resolve
from chela.identity import fingerprint
from chela.models import build_model
from chela.training import checkpoint
from experiments.probe import has_weights, long_kernels, receptive_field, trained_model
from experiments.report import main
from experiments.runs import read_run
from lra.tasks import get_task
from tests.experiments.conftest import MakeRun


def build(*words: str) -> torch.nn.Module:
    config = resolve(["task=listops", "preset=tiny", *words])
    return build_model(config.model, get_task(config.task), config.seed).double().eval()


def keep_weights(folder: Path) -> torch.nn.Module:
    """Write the weights of an untrained model as the run's best."""
    config = load(folder / "config.yaml")
    model = build_model(config.model, get_task(config.task), config.seed)
    save_best(folder, dict(model.state_dict()))
    return model


def save_best(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (folder / "checkpoints").mkdir()
    mark = fingerprint(load(folder / "config.yaml"))
    state = {"step": 1, "model": weights, "accuracy": 0.5, "fingerprint": mark}
    checkpoint.save(folder / "checkpoints" / "best.ckpt", state)


def test_kernels_are_those_of_the_layers() -> None:
    model = build("model=chela", "model.depth=3")
    kernels = long_kernels(model)
    assert [kernel.name for kernel in kernels] == ["layer 0", "layer 1", "layer 2"]
    assert kernels[0].forward.shape == (16, 32) and kernels[0].back is not None and kernels[0].back.shape == (16, 31)
    assert long_kernels(build("model=softmax")) == []
    assert all(kernel.back is None for kernel in long_kernels(build("model=chela", "model.causal=true")))


def test_a_short_convolution_sees_as_far_as_its_taps_reach() -> None:
    """Two layers of five taps: four positions to either side, and nothing beyond."""
    model = build("model=chela", "model.mixer.conv=short", "model.mixer.attention=none", "model.depth=2")
    strength = receptive_field(model)
    seen = np.flatnonzero(strength) - len(strength) // 2
    assert (seen.min(), seen.max()) == (-4, 4)


def test_a_causal_model_sees_nothing_later() -> None:
    strength = receptive_field(build("model=linear", "model.causal=true"))
    middle = len(strength) // 2
    assert (strength[middle + 1 :] == 0).all() and (strength[: middle + 1] > 0).all()


def test_chela_sees_everything_and_the_measure_repeats() -> None:
    model = build("model=chela")
    assert (receptive_field(model, seed=1) == receptive_field(model, seed=1)).all()
    assert (receptive_field(model, seed=1) > 0).all()


def test_the_report_draws_kernels_and_receptive_fields_from_checkpoints(make_run: MakeRun, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib (extra plots)")
    folder = make_run(seed=0)
    model = keep_weights(folder)
    run = read_run(folder)
    assert has_weights(run)
    loaded = trained_model(run)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, check_dtype=False)
    assert main([str(folder), "--out", str(tmp_path / "r.html"), "--figures", str(tmp_path / "f")]) == 0
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert f"tiny-holdout-listops-chela-{run.fingerprint}-kernels.png" in names
    assert "tiny-holdout-listops-receptive-field.png" in names
    assert "left out" not in (tmp_path / "r.html").read_text()


def test_a_run_whose_network_cannot_be_had_is_left_out_and_the_others_are_drawn(
    make_run: MakeRun, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib (extra plots)")
    whole, renamed = make_run(), make_run("model=softmax")
    characters = make_run("task=text", "task.encoding=s4")
    keep_weights(whole)
    save_best(characters, {})
    weights = build("model=softmax").float().state_dict()
    save_best(renamed, {name.replace("backbone", "trunk"): value for name, value in weights.items()})
    out, drawn = tmp_path / "r.html", tmp_path / "f"
    assert main([str(tmp_path / "runs"), "--out", str(out), "--figures", str(drawn)]) == 0
    text = " ".join(html.unescape(out.read_text()).split())
    left_out = "The kernels and receptive field of {} {} are left out: expected "
    assert left_out.format("text", characters.name) + "a task whose vocabulary is fixed" in text
    assert left_out.format("listops", renamed.name) + "weights of this run's network in " in text
    assert "tiny-holdout-listops-receptive-field.png" in {path.name for path in drawn.iterdir()}
    assert not list(drawn.glob("*-text-*"))
