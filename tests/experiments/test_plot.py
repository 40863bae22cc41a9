from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from experiments.plot import learning_curves, mean_curve
from experiments.report import main
from experiments.runs import read_runs
from tests.experiments.conftest import MakeRun, strange

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra plots)")
PNG = b"\x89PNG\r\n\x1a\n"


def test_several_runs_go_to_the_file_that_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(seed=0), make_run(seed=1), make_run("model=softmax", accuracy=None)  # one that still goes on
    out = tmp_path / "figures" / "listops.png"
    assert main([str(tmp_path / "runs"), f"out={out}"]) == 0
    first = out.read_bytes()
    assert first.startswith(PNG)
    assert main([str(tmp_path / "runs"), f"out={out}"]) == 0
    assert out.read_bytes() == first  # the same runs give the same bytes


def test_errors_are_one_line(make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run()
    assert main([str(folder), f"out={tmp_path / 'a.nonsense'}"]) == 2
    (folder / "metrics.csv").unlink()
    assert main([str(folder), f"out={tmp_path / 'a.png'}"]) == 2
    assert main([str(tmp_path / "absent")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def test_one_task_shows_all_that_was_measured_and_each_of_several_its_score(make_run: MakeRun, tmp_path: Path) -> None:
    make_run()
    alone = learning_curves(read_runs([tmp_path / "runs"]))
    assert shown(alone) == [("listops tiny", "loss"), ("listops tiny", "accuracy, %")]
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["chela seed 0"]
    strange(make_run(seed=1), loss=0.5)
    figure = learning_curves(read_runs([tmp_path / "runs"]))
    assert shown(figure) == [("listops tiny", "accuracy, %"), ("Recall tiny", "loss, nats")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chela", "mine"]
    assert [len(axis.lines) for axis in figure.axes] == [2, 1]  # a majority class of one


def shown(figure: Figure) -> list[tuple[str, str]]:
    """Return the title and the y label of each panel that is seen."""
    return [(axis.get_title(), axis.get_ylabel()) for axis in figure.axes if axis.get_visible()]


def test_a_loss_is_cut_off_above_all_validations(make_run: MakeRun, tmp_path: Path) -> None:
    make_run()
    axis = learning_curves(read_runs([tmp_path / "runs"])).axes[0]
    training, validation = (np.asarray(line.get_ydata()) for line in axis.lines)
    assert validation.max() < axis.get_ylim()[1] < training.max()
    assert axis.get_ylim()[0] < min(training.min(), validation.min())


def test_at_each_step_the_seeds_that_have_reached_it_are_averaged() -> None:
    one = pd.DataFrame({"step": [10.0, 20.0, 30.0], "loss": [1.0, 2.0, 3.0]})
    other = pd.DataFrame({"step": [10.0, 20.0], "loss": [3.0, 6.0]})
    curve = mean_curve([one, other, pd.DataFrame()], "loss", window=1)
    assert curve is not None
    np.testing.assert_allclose(curve.index, [10, 20, 30])
    np.testing.assert_allclose(curve.T, [[2, 4, 3], [1, 2, 3], [3, 6, 3]])


def test_the_running_mean_trails() -> None:
    curve = mean_curve([pd.DataFrame({"step": [1.0, 2.0, 3.0, 4.0], "loss": [1.0, 2.0, 3.0, 4.0]})], "loss", window=2)
    assert curve is not None
    np.testing.assert_allclose(curve["mean"], [1.0, 1.5, 2.5, 3.5])
