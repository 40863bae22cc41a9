"""docs/extend.md shows the examples as they are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["my_mixer.py", "my_mixer.yaml", "my_task.py", "my_task.yaml"])
def test_what_is_shown_is_the_example(name: str) -> None:
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)
    assert (ROOT / "examples" / name).read_text() in blocks


def test_the_examples_are_short() -> None:
    files = [path for path in (ROOT / "examples").iterdir() if path.name.startswith("my_") and path.is_file()]
    assert sum(len(path.read_text().splitlines()) for path in files) < 60
