from __future__ import annotations

import base64
import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from experiments.report import main, page
from experiments.runs import read_runs
from tests.experiments.conftest import MakeRun

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra plots)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def results(make_run: MakeRun, tmp_path: Path) -> Path:
    for seed, accuracy in enumerate((0.4, 0.6)):
        make_run(seed=seed, accuracy=accuracy)
        make_run("model=softmax", seed=seed, accuracy=accuracy - 0.2, parameters=700, training_seconds=9.0)
    return tmp_path / "runs"


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.images: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.links += [given[name] for name in ("src", "href") if name in given]
        if tag == "img":
            self.images.append(given)


def test_the_page_holds_everything_in_itself(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main([str(results), f"out={out}", f"figures={tmp_path / 'figures'}"]) == 0
    text = out.read_text()
    page = Page(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"@import|url\(|<script|<link", text)
    assert all(image["alt"] for image in page.images)
    assert all(base64.b64decode(image["src"].partition(",")[2]).startswith(b"\x89PNG") for image in page.images)
    first, _, _ = text.partition("<table>")
    assert "First, with all that two standard errors do not tell from the best: chela and softmax on ListOps." in first
    assert "50.00 ± 14.14 (2)" in text and "Published, not measured here" in text
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == ["tiny-holdout-curves.png"]
    assert len(page.images) == len(written)


def test_runs_without_results_make_a_page_too(make_run: MakeRun, tmp_path: Path) -> None:
    (make_run(accuracy=None) / "metrics.csv").unlink()
    assert main([str(tmp_path / "runs"), f"out={tmp_path / 'r.html'}"]) == 0
    assert "1 unfinished" in (tmp_path / "r.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="expected chromium to open the page, none is installed")
def test_a_browser_without_a_network_shows_the_page(results: Path, tmp_path: Path) -> None:
    out, shot = tmp_path / "report.html", tmp_path / "shot.png"
    assert main([str(results), f"out={out}"]) == 0
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --hide-scrollbars --window-size=1200,2400"
    words = [
        str(CHROMIUM),
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    subprocess.run([*words, f"--screenshot={shot}", out.as_uri()], capture_output=True, timeout=120, check=True)
    pixels = _pixels(shot)
    assert pixels.shape[:2] == (2400, 1200)
    dark, coloured = (pixels < 90).all(-1), np.ptp(pixels.astype(int), axis=-1) > 60
    assert dark[:600].mean() > 0.003, "expected text in the upper part, it is nearly empty"
    assert coloured.mean() > 0.0005, "expected coloured curves, there are none"


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def test_what_a_language_model_writes_stands_beside_the_table(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(sample="<ROMEO>")
    make_run("model=softmax")
    text = page(read_runs([tmp_path / "runs"]), "A page")
    assert text.count("<pre>") == 1 and "chela, tiny, writes</h3><pre>&lt;ROMEO&gt;</pre>" in text
