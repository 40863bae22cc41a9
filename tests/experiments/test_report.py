from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.report import main, page
from experiments.runs import read_runs
from tests.experiments.conftest import MakeRun, strange

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra plots)")

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def results(make_run: MakeRun, tmp_path: Path) -> Path:
    for seed, accuracy in enumerate((0.4, 0.6)):
        make_run(seed=seed, accuracy=accuracy)
        make_run("model=softmax", seed=seed, accuracy=accuracy - 0.2, parameters=700)
    return tmp_path / "runs"


def test_the_page_holds_everything_in_itself(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main([str(results), f"out={out}"]) == 0
    text = out.read_text()
    links = re.findall(r' (?:src|href)="([^"]*)"', text)
    assert links and all(link.startswith(("data:", "#table")) for link in links)
    assert not re.search(r"@import|url\(|<script", text)
    (curves,) = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="[^"]+">', text)
    assert base64.b64decode(curves).startswith(b"\x89PNG")
    first, _, folded = text.partition("</main>")
    assert "<details" not in first and folded.count("<details>") == 3
    assert "50.00 ± 14.14 (2)" in folded and "Published, not measured here" in folded


def test_runs_without_results_make_a_page_too(make_run: MakeRun, tmp_path: Path) -> None:
    (make_run(accuracy=None) / "metrics.csv").unlink()
    assert main([str(tmp_path / "runs"), f"out={tmp_path / 'r.html'}"]) == 0
    text = (tmp_path / "r.html").read_text()
    assert "No run is finished yet" in text and "1 unfinished" in text and "there is none yet" in text


def first_screen(tmp_path: Path, **how: Any) -> str:
    """What a reader sees of the first screen: its texts, with a bar between each two."""
    shown, _, _ = page(read_runs([tmp_path / "runs"]), **how).partition("</main>")
    return re.sub(r"(\s*<[^>]+>\s*)+", " | ", shown.partition("<main>")[2])


def test_the_finding_is_computed(make_run: MakeRun, tmp_path: Path) -> None:
    for task, gain in (("listops", 0.3), ("text", 0.0), ("image", -0.1)):
        for seed in (0, 1):
            make_run(f"task={task}", seed=seed, accuracy=0.5 + 0.01 * seed + gain)
            make_run(f"task={task}", "model=chela_conv_only", seed=seed, accuracy=0.5 + 0.01 * seed, parameters=1100)
            make_run(f"task={task}", "model=softmax", seed=seed, accuracy=0.4, tokens_per_second=4500)
    make_run("model=s4d", accuracy=None)
    text = first_screen(tmp_path)
    assert "Attention pays on 1 of 3 tasks, most on ListOps: 3 systems, every run a dot" in text
    sides = "ahead on ListOps (30.0 points); behind on Image (10.0 points); not told apart on Text."
    assert f"CHELA against its convolution alone: {sides}" in text
    assert "+30 points | on ListOps over its convolution alone (80.5 against 50.5)" in text
    assert "2.0× softmax | training speed; 2.0× on " in text
    assert "18 of 19 runs | finished; 2 seeds; sizes within 10 %" in text
    assert "Not LRA numbers | tiny tasks, made small |" in text
    assert page(read_runs([tmp_path / "runs"])).count("<circle") == 24  # and speed and memory of three tasks


def test_a_strangers_sweep_says_less(make_run: MakeRun, tmp_path: Path) -> None:
    strange(make_run(), loss=0.5)
    text = first_screen(tmp_path, title="Mine & yours")
    assert text.startswith(
        " | Mine &amp; yours | 1 of 1 runs | finished; 1 seed; sizes within 0 % | Recall, loss, nats ←"
    )
    assert "mine | 0.50 |" in text and "points" not in text and "LRA" not in text
    assert "mine on 1 task: 1 system, every run a dot" in first_screen(tmp_path)
    make_run("model=softmax", accuracy=0.1)
    make_run("model=linear", accuracy=0.4)
    assert "linear among the first on 1 of 2 tasks: 3 systems" in first_screen(tmp_path)


def test_speed_and_memory_have_their_places(results: Path, tmp_path: Path) -> None:
    values = {"speed, chela / softmax": 3.0, "memory, chela / softmax": 1.5}
    rows = [{"key": {"task": "listops", "preset": "tiny"}, "values": values}]
    (tmp_path / "train.json").write_text(json.dumps({"name": "train", "rows": rows}))
    text = first_screen(tmp_path, bench=tmp_path / "train.json")
    assert "3.0× softmax | training speed; 3.0× on ListOps" in text
    assert "Memory of a step, × softmax | ListOps | 1.5" in text


FRAMES = """<!doctype html><body><script>
const page = PAGE, found = {errors: []};
addEventListener("load", () => {
  for (const width of [1280, 420]) {
    const frame = document.createElement("iframe");
    frame.style = `border: 0; height: 900px; width: ${width}px`;
    frame.srcdoc = page;
    frame.onload = () => {
      const root = frame.contentDocument.documentElement, view = frame.contentWindow;
      const colour = (name, what) => view.getComputedStyle(root.querySelector(name))[what];
      found[width] = {
        bottom: root.querySelector("main").getBoundingClientRect().bottom, width: root.scrollWidth,
        texts: ["p", ".soft"].map(name => colour(name, "color")),
        fills: ["text.g", "text.c", "text.k"].map(name => colour(name, "fill")),
        ground: colour("body", "backgroundColor"),
      };
      document.body.dataset.found = JSON.stringify(found);
    };
    document.body.append(frame);
  }
});
</script></body>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="expected chromium to open the page, none is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_first_screen_whole(dark: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a desk it is within 1280 × 900, on a telephone it does not scroll sideways; light and dark can be read."""
    monkeypatch.setattr("experiments.report.curves", lambda tables: iter(()))
    text = page(read_runs([RESULTS / "lra_mini"]), bench=RESULTS / "bench" / "epyc" / "train_mini.json")
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES.replace("PAGE", json.dumps(text).replace("</", "<\\/")))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    flags += f"--disable-component-update --enable-logging=stderr --blink-settings=preferredColorScheme={int(not dark)}"
    words = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frames.as_uri()]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--window-size=1400,1000"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.findall(r'data-found="([^"]*)"', done.stdout)[0]))
    assert found["1280"]["bottom"] <= 900 and found["1280"]["width"] <= 1280 and found["420"]["width"] <= 420
    assert (_light(found["420"]["ground"]) < 0.1) == dark
    for colour in found["420"]["texts"] + found["420"]["fills"]:
        low, high = sorted((_light(colour), _light(found["420"]["ground"])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{colour} cannot be read"


def _light(colour: str) -> float:
    """Return the relative luminance of ``rgb(…)``, as the guidelines for accessible content have it."""
    parts = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
    return float(np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def test_what_a_language_model_writes_stands_beside_the_table(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(sample="<ROMEO>")
    make_run("model=softmax")
    text = page(read_runs([tmp_path / "runs"]), "A page")
    assert text.count("<pre>") == 1 and "chela, tiny, writes</h3><pre>&lt;ROMEO&gt;</pre>" in text
