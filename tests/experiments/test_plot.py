from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from chela.config.groups import names
from experiments.plot import attention_adds, colours, learning_curves, main, mean_curve, with_curves
from experiments.report import main as report
from experiments.runs import read_runs
from experiments.summary import result_tables
from tests.experiments.conftest import MakeRun, strange

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra plots)")
PNG = b"\x89PNG\r\n\x1a\n"


def test_one_run_is_drawn_beside_its_metrics(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(accuracy=None)  # a run that still goes on has curves too
    assert main([str(folder)]) == 0
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    assert str(folder / "curves.png") in capsys.readouterr().out


def test_several_runs_go_to_the_file_that_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(seed=0), make_run(seed=1), make_run("model=softmax")
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
    assert main([str(folder)]) == 2
    assert main([str(tmp_path / "absent")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def test_metrics_without_a_column_are_left_out_and_the_others_are_drawn(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, out = make_run(seed=1), tmp_path / "curves.png"
    (odd / "metrics.csv").write_text("step,split,loss\n10,train,2.0\n10,validation,2.0\n")
    line = f"The curves of listops {odd.name} are left out: "
    assert main([str(odd), f"out={out}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}") and "got none of accuracy" in error and error.count("\n") == 1
    make_run(seed=0)
    assert main([str(tmp_path / "runs"), f"out={out}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("learning curves of 1 run") and said[1].startswith(line)
    assert report([str(tmp_path / "runs"), f"out={tmp_path / 'r.html'}"]) == 0
    assert line in (tmp_path / "r.html").read_text()


def test_one_task_shows_all_that_was_measured_and_each_of_several_its_score(make_run: MakeRun, tmp_path: Path) -> None:
    make_run()
    runs, _ = with_curves(read_runs([tmp_path / "runs"]))
    alone = learning_curves(runs)
    assert shown(alone) == [("listops tiny", "loss"), ("listops tiny", "accuracy, %")]
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["chela seed 0"]
    strange(make_run(seed=1), loss=0.5)
    runs, left_out = with_curves(read_runs([tmp_path / "runs"]))
    figure = learning_curves(runs)
    assert shown(figure) == [("listops tiny", "accuracy, %"), ("Recall tiny", "loss, nats")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chela", "mine"]
    assert not left_out and [len(axis.lines) for axis in figure.axes[:2]] == [3, 2]  # a majority class of one
    (bits,) = (child for child in figure.axes[1].child_axes if child.get_ylabel() == "bits")
    figure.draw_without_rendering()
    np.testing.assert_allclose(bits.get_ylim(), np.array(figure.axes[1].get_ylim()) / np.log(2))
    assert report([str(tmp_path / "runs"), f"out={tmp_path / 'r.html'}"]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "Validation accuracy or loss;" in text


def shown(figure: Figure) -> list[tuple[str, str]]:
    """Return the title and the y label of each panel that is seen."""
    return [(axis.get_title(), axis.get_ylabel()) for axis in figure.axes if axis.get_visible()]


def test_what_the_attention_adds_is_drawn_on_one_scale_for_each_score(make_run: MakeRun, tmp_path: Path) -> None:
    for folder, adds in ((make_run(), 2.5), (make_run(seed=1), 3.5), (strange(make_run(seed=2), loss=0.5), -0.01)):
        (folder / "probe.json").write_text(json.dumps({"adds": adds}))
    make_run("model=s4d")  # not probed
    (table,) = result_tables(read_runs([tmp_path / "runs"]))
    found = [
        (
            axis.get_xlabel(),
            [label.get_text() for label in axis.get_yticklabels()],
            [bar.get_width() for bar in axis.patches],
        )
        for axis in attention_adds(table).axes
    ]
    assert found == [
        ("what the attention adds: accuracy, %", ["ListOps, chela"], [3.0]),
        ("what the attention adds: loss, nats", ["Recall, mine"], [-0.01]),
    ]


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


def test_a_begun_seed_cuts_nobodys_curve(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(seed=0), make_run(seed=1)
    begun = make_run(seed=2, accuracy=None) / "metrics.csv"
    begun.write_text("".join(begun.read_text().splitlines(keepends=True)[:12]))  # up to its validation at step 10
    assert begun.read_text().count("validation") == 1
    figure = learning_curves(read_runs([tmp_path / "runs"]), training=False)
    for axis in figure.axes:
        np.testing.assert_allclose(axis.lines[0].get_xdata(), [10, 20])


def test_the_running_mean_trails() -> None:
    curve = mean_curve([pd.DataFrame({"step": [1.0, 2.0, 3.0, 4.0], "loss": [1.0, 2.0, 3.0, 4.0]})], "loss", window=2)
    assert curve is not None
    np.testing.assert_allclose(curve["mean"], [1.0, 1.5, 2.5, 3.5])


def test_a_system_has_the_same_colour_whatever_else_is_drawn() -> None:
    systems = names("model")
    everything = colours([*systems, "chela [model.mixer.gate=none]"])
    assert [colours([name])[name] for name in systems] == [everything[name] for name in systems]
    assert len(set(everything.values())) == len(everything)
    some = colours(["softmax", "chela [seed]", "chela [model.causal=true]"])
    assert some["softmax"] == everything["softmax"] and len(set(some.values())) == 3
    many = colours([f"way {number}" for number in range(50)])
    assert len(many) == 50
