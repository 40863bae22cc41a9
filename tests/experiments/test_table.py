from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.runs import read_run, read_runs
from experiments.summary import published, result_tables
from experiments.table import main, to_csv
from tests.experiments.conftest import MakeRun, strange

Table = Callable[..., str]


@pytest.fixture
def table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Table:
    """What the command prints of all runs made, given further words."""

    def printed(*words: str) -> str:
        assert main([str(tmp_path), *words]) == 0
        return capsys.readouterr().out

    return printed


def markdown_rows(text: str) -> dict[str, list[str]]:
    rows = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows.setdefault(name, cells)
    return rows


def test_mean_and_deviation_over_all_seeds(make_run: MakeRun, table: Table) -> None:
    for seed, accuracy in enumerate((0.40, 0.50, 0.60)):
        make_run(seed=seed, accuracy=accuracy, learned=seed != 0)
    rows = markdown_rows(table("published=false"))
    assert rows["system"][:6] == ["ListOps", "Text", "Retrieval", "Image", "Pathfinder", "Path-X"]
    assert rows["chela"][0] == "50.00 ± 10.00 (3; 1 at chance)"  # the mean is of the unlucky seed too; n - 1
    assert rows["chela"][1:7] == ["–"] * 6  # five tasks without a run, hence no average
    assert rows["majority class"][0] == "17.00"


def test_what_is_below_the_majority_class_is_nowhere_first(make_run: MakeRun, table: Table) -> None:
    for model, accuracy in (("chela", 0.16), ("softmax", 0.16), ("linear", 0.18)):
        make_run(f"model={model}", accuracy=accuracy)
        make_run(f"model={model}", "task=text", accuracy=0.1)
    rows = markdown_rows(table("published=false"))
    assert [rows[name][0] for name in ("chela", "softmax", "linear")] == ["16.00 (1)", "16.00 (1)", "**18.00 (1)**"]
    assert not any("**" in rows[name][1] for name in ("chela", "softmax", "linear"))


def test_columns_without_a_run_can_be_left_out(make_run: MakeRun, table: Table) -> None:
    make_run(accuracy=0.4)
    make_run("model=linear", "task=image", accuracy=0.3)
    rows = markdown_rows(table("published=false", "compact=true"))
    assert rows["system"] == ["ListOps", "Image"]
    assert rows["chela"] == ["40.00 (1)", "–"] and rows["linear"] == ["–", "30.00 (1)"]  # one cell may be empty


def test_failed_and_unfinished_runs_are_counted(make_run: MakeRun, table: Table) -> None:
    make_run(seed=0, accuracy=0.4)
    make_run(seed=1, accuracy=None)
    failed = make_run(seed=2, accuracy=None)
    (failed / "failed.json").write_text(json.dumps({"fingerprint": read_run(failed).fingerprint, "error": "e"}))
    only_failed = make_run("model=softmax", accuracy=None)
    (only_failed / "failed.json").write_text(json.dumps({"fingerprint": read_run(only_failed).fingerprint}))
    rows = markdown_rows(table())
    assert rows["chela"][0] == "40.00 (1; 1 failed; 1 unfinished)"
    assert rows["softmax"][0] == "– (1 failed)"


def test_costs_stand_beside_softmax(make_run: MakeRun, table: Table) -> None:
    make_run(parameters=1500, tokens_per_second=25_000, peak_memory_bytes=100 * 2**20)
    assert markdown_rows(table())["chela"][-3:] == ["–", "–", "–"]  # without softmax there is nothing to be beside
    make_run("model=softmax", parameters=1000, tokens_per_second=10_000, peak_memory_bytes=400 * 2**20)
    rows = markdown_rows(table())
    assert rows["system"][-3:] == ["parameters ×", "tokens/s ×", "memory ×"]
    assert rows["chela"][-3:] == ["1.50×", "2.50×", "0.25×"]
    detail = next(line for line in table().splitlines() if line.startswith("| ListOps | chela "))
    assert "1,500 (1.50×)" in detail and "25,000 (2.50×)" in detail and "100 (0.25×)" in detail


def test_a_pause_counts_as_no_slowness(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run(tokens_per_second=2_500)  # three quarters of its time it stood still
    lines = [f"{step},train,1.0,0.5,0.001,10000,{step}.0\n" for step in range(1, 5)]
    (folder / "metrics.csv").write_text("step,split,loss,accuracy,lr,tokens_per_second,seconds\n" + "".join(lines))
    (part,) = result_tables(read_runs([tmp_path / "runs"]))
    assert part.cells["tokens_per_second"]["chela", "listops"] == 10_000


def test_presets_and_policies_never_share_a_table(make_run: MakeRun, tmp_path: Path, table: Table) -> None:
    make_run(accuracy=0.1)
    make_run("preset=mini", accuracy=0.2)
    make_run("preset=mini", "data.validation=test", accuracy=0.3)
    make_run("preset=mini", "edition=1", accuracy=0.4)
    text = table()
    headings = re.findall(r"^## (Measured.*)$", text, re.M)
    assert headings == [
        "Measured here: preset mini, validation holdout, edition 3",
        "Measured here: preset mini, validation holdout",
        "Measured here: preset mini, validation test, edition 3",
        "Measured here: preset tiny, validation holdout",
    ]
    assert "must not be compared with one another" in text
    for part in result_tables(read_runs([tmp_path])):
        assert len({(run.preset, run.policy, run.edition) for run in part.runs}) == 1


def test_columns_stand_in_groups_each_with_its_average(make_run: MakeRun, table: Table) -> None:
    for task, accuracy in (("recall", 0.9), ("select", 0.7), ("shakespeare", 0.5), ("text8", 0.4)):
        make_run(f"task={task}", accuracy=accuracy)
    rows = markdown_rows(table("published=false"))
    lra = ["ListOps", "Text", "Retrieval", "Image", "Pathfinder", "Path-X", "average of LRA"]
    groups = [*lra, "select", "recall", "average of selection", "shakespeare", "text8"]
    assert rows["system"][:12] == groups  # titles come with results of version 2
    assert rows["chela"][6:12] == ["–", "70.00 (1)", "90.00 (1)", "80.00", "50.00 (1)", "40.00 (1)"]


def test_the_best_is_bold_and_all_that_is_level_with_it(make_run: MakeRun, tmp_path: Path, table: Table) -> None:
    """By hand: variances of 1 (3 seeds), 4 (2) and 0 (2) are pooled to (2 · 1 + 1 · 4 + 1 · 0) / 4 = 1.5."""
    for model, accuracies in (
        ("chela", (0.49, 0.50, 0.51)),
        ("linear", (0.4773 - 0.02 / 2**0.5, 0.4773 + 0.02 / 2**0.5)),  # two errors are 2 · √(1.5 / 3 + 1.5 / 2) = 2.236
        ("mega", (0.4777, 0.4777)),
        ("s4d", (0.4718,)),  # 2 · √(1.5 / 3 + 1.5) = 2.828
        ("softmax", (0.4716,)),
    ):
        for seed, accuracy in enumerate(accuracies):
            make_run(f"model={model}", seed=seed, accuracy=accuracy)
    for seed in (0, 1):  # at chance: neither the best nor a deviation of 0 to be pooled
        make_run("model=lightning", seed=seed, accuracy=0.51, learned=False)
    text = table("published=false")
    (part,) = result_tables(read_runs([tmp_path]))
    assert part.leaders("listops") == ["chela", "mega", "s4d"] and part.leaders("text") == []
    main_table = markdown_rows(text)
    bold = {name for name, cells in main_table.items() if cells[0].startswith("**")}
    assert bold == {"chela", "mega", "s4d"} and main_table["chela"][0] == "**50.00 ± 1.00 (3)**"
    assert "<td><b>50.00 ± 1.00 (3)</b></td>" in table("format=html")
    assert r"\textbf{50.00 ± 1.00 (3)}" in table("format=latex")


def test_a_test_set_tells_single_seeds_apart_by_its_size(make_run: MakeRun, tmp_path: Path) -> None:
    """By hand: of 90 % in 1,800 records the variance is 0.5, two errors of a difference are 2 · √(0.5 + 0.5) = 2."""
    for model, mean in (("chela", 0.90), ("linear", 0.882), ("mega", 0.879)):
        make_run(f"model={model}", test={"accuracy": mean, "count": 1800})
    (part,) = result_tables(read_runs([tmp_path]))
    assert part.leaders("listops") == ["chela", "linear"]


def test_a_loss_is_best_where_it_is_least(make_run: MakeRun, tmp_path: Path) -> None:
    strange(make_run(seed=1), loss=0.5)
    other = strange(make_run("model=softmax", seed=1), loss=0.4)
    config = (other / "config.yaml").read_text().replace("name: mine", "name: yours")
    (other / "config.yaml").write_text(config)
    (part,) = result_tables(read_runs([tmp_path]))
    assert part.leaders("Recall") == ["yours"]


def test_scores_by_group_and_on_further_test_sets_have_a_table(make_run: MakeRun, table: Table) -> None:
    for seed, accuracy in enumerate((0.2, 0.4)):
        by = {"1": {"accuracy": 0.9, "count": 3}, "2": {"accuracy": accuracy, "count": 5}}
        folder = make_run(seed=seed, accuracy=0.5)
        result = json.loads((folder / "result.json").read_text())
        longer = {"accuracy": accuracy / 2, "count": 9, "by_depth": by}
        (folder / "result.json").write_text(json.dumps(result | {"test_by_depth": by, "test_longer": longer}))
    make_run("model=softmax")
    text = table("published=false").partition("### ListOps by group")[2]
    assert markdown_rows(text) == {"system": ["depth 1", "depth 2", "longer"], "chela": ["90.00", "30.00", "15.00"]}


def test_since_edition_2_speed_comes_from_one_session_of_the_benchmark(
    make_run: MakeRun, tmp_path: Path, table: Table
) -> None:
    make_run("preset=mini", tokens_per_second=7000), make_run("preset=mini", "model=softmax")
    assert markdown_rows(table())["chela"][-3:] == ["1.00×", "–", "–"]
    values = {"speed, chela / softmax": 0.5, "memory, chela / softmax": 1.25}
    rows = [{"key": {"task": "listops", "preset": preset}, "values": values} for preset in ("mini",)]
    (tmp_path / "train.json").write_text(json.dumps({"name": "train", "machine": {}, "rows": rows}))
    beside = markdown_rows(table(f"bench={tmp_path / 'train.json'}"))
    assert beside["chela"][-3:] == ["1.00×", "0.50×", "1.25×"] and beside["softmax"][-3:] == ["1.00×"] * 3
    lines = csv.DictReader(io.StringIO(table(f"bench={tmp_path / 'train.json'}", "format=csv")))
    assert "0.5" in next(line for line in lines if line["system"] == "chela").values()


def test_what_qualifies_the_table_is_said(make_run: MakeRun, table: Table) -> None:
    make_run(git_commit="a" * 40 + "+changes")
    make_run("model=softmax", "trainer.max_steps=40", threads=2)
    text = table()
    assert "preset tiny: a smaller task, not an LRA number" in text
    assert "commit 0123456789, aaaaaaaaaa+changes" in text
    assert "listops: the steps differ (20, 40)" in text
    assert "speed and memory on x86_64 (threads: 1); x86_64 (threads: 2), compared within a machine only" in text
    assert markdown_rows(text)["chela"][-3:] == ["1.00×", "–", "–"]


def test_another_objective_is_shown_by_its_own_score(make_run: MakeRun, tmp_path: Path, table: Table) -> None:
    """Of a task and a system that cannot be imported here; their title and score come from the result."""
    make_run(accuracy=0.4)
    strange(make_run(seed=1), loss=0.5), strange(make_run(seed=2), loss=0.75)
    text = table("compact=true")
    rows = markdown_rows(text)
    assert rows["system"] == ["ListOps", "Recall (loss, nats)"]
    assert rows["chela"] == ["40.00 (1)", "–"] and rows["mine"] == ["–", "0.625 ± 0.177 (2)"]
    assert rows["majority class"] == ["17.00", "–"]  # the accuracy of the majority class is no loss
    assert "Test accuracy in % (another score where a task's column names one)" in text
    assert "| task | system | score |" in text and "| Recall (loss, nats) | mine | 0.625 ± 0.177 (2) |" in text
    lines = list(csv.DictReader(io.StringIO(to_csv(result_tables(read_runs([tmp_path]))))))
    assert [line["system"] for line in lines] == ["chela", "mine"]  # a line for each task and system
    mine = lines[1]
    assert (mine["task"], mine["score"], mine["unit"], mine["preset"]) == ("Recall", "loss", "nats", "tiny")
    assert float(mine["mean"]) == pytest.approx(0.625) and mine["seeds"] == "2"


def test_lite_rows_stand_apart_with_their_size_and_epochs(make_run: MakeRun, tmp_path: Path, table: Table) -> None:
    told = {"lra": True, "epochs": 10.0}
    make_run("preset=lite", accuracy=0.3, **told), make_run("preset=full", accuracy=0.6, **(told | {"epochs": 60.0}))
    make_run("preset=lite", "task.max_length=600", seed=1, accuracy=0.9, **(told | {"lra": False}))
    lite, full = (found for found in reversed(result_tables(read_runs([tmp_path]))))
    assert (full.preset, lite.preset) == ("full", "lite")
    assert full.cells["mean"]["chela", "listops"] == pytest.approx(60)
    text = table()
    ours, _, theirs = text.partition("## Published, not measured here")
    assert "listops: not LRA's task to the letter" in ours
    assert re.search(r"^\| ListOps \| chela \| 30.00 \(1\) .* \| 10.00 \|$", ours, re.M)
    assert "Rows of preset lite are of smaller networks" in theirs and "no number measured here" not in theirs
    assert "30.00" not in theirs


def test_published_rows_stand_apart_and_carry_their_sources(make_run: MakeRun, table: Table) -> None:
    make_run()
    text = table()
    ours, _, theirs = text.partition("## Published, not measured here")
    assert "MEGA" not in ours and "88.21" not in ours
    assert "no number measured here may be set beside them" in theirs
    assert markdown_rows(theirs)["CHELA"] == ["–"] * 8 + ["not obtained: its text could not be had"]
    assert "Published" not in table("published=false")


def test_published_rows_are_marked_and_their_averages_are_right() -> None:
    for row in published():
        assert row["source"] and row["mark"] in ("A", "B", "–")
        values = [value for value in row["values"] if isinstance(value, float | int)]
        assert all(10 < value < 100 for value in values)
        if row["average"] is None or not values:
            continue
        mean = sum(values) / (6 if "counts Path-X as 0" in row["source"] else len(values))
        noted = re.search(r"its values give ([\d.]+)", row["source"])  # a slip of the source, said beside it
        assert mean == pytest.approx(float(noted.group(1)) if noted else row["average"], abs=0.025), row["name"]


def test_a_terminal_is_drawn_on(make_run: MakeRun, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("model.mixer.gate=none"), make_run()
    monkeypatch.setenv("COLUMNS", "200")
    assert "| system |" in table()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    drawn = table()
    assert re.search("[─━]{3}", drawn) and "chela" in drawn and "| system |" not in drawn and "**" not in drawn
    assert "| system |" in table("format=md")


def test_latex_escapes_what_latex_reads(make_run: MakeRun, table: Table) -> None:
    make_run(seed=0), make_run(seed=1, accuracy=0.6)
    text = table("format=latex")
    assert "55.00 ± 7.07 (2)" in text and text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 3
    assert not re.search(r"(?<!\\)[%_#]", "".join(line for line in text.splitlines() if not line.startswith("% ")))


def test_the_table_needs_neither_lightning_nor_matplotlib(make_run: MakeRun) -> None:
    code = "import sys; from experiments.table import main; assert main([sys.argv[1]]) == 0; "
    code += "assert not {'lightning', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(make_run())], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
