"""Random words: each list either trains a tiny step or ends with status 2 and one line."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from chela.config.compose import names, resolve
from chela.config.schema import fields
from chela.layers.mixers import mixer_options, systems
from tests.training.launches import TINY, launch

LIMIT = 120  # ticks of a second in which this process may run (not stopped by somebody); a list that takes more hangs

KEYS = sorted(
    {key for model in names("model") for key, _, _ in fields(resolve([f"model={model}", "preset=tiny"]))}
    | {"task", "model", "preset"}
)
NUMBERS = ["-1", "0", "1", "2", "0.5", "1e-3", "nan", "inf", "1e400", "-0.0", "9" * 20, "9" * 5000, "0x10", "1_0", "٣"]
WORDS = ["", "null", "true", "false", "no", "~", "[]", "{}", "{a: 1}", "[1, 2]", "${seed}", "???", "a=b", "ü" * 200]

# Right, but not for a test: they start processes, compile for minutes, fetch data, or write outside of its folder.
TRUE = {"true", "yes", "on", "y", "1"}
LEFT_OUT = {
    "trainer.devices": {"2", "3", "10"},
    "trainer.compile": TRUE,
    "data.download": TRUE,
    "data.workers": {"1", "2", "3", "10"},
    "trainer.threads": {"0", "2", "3", "10"},
    "preset": {"auto", "full", "mini"},
}
FOLDERS = ("runs", "resume", "data.dir", "data.root")


OF_KIND = {"bool": ["true", "false"], "int": ["1", "2"], "float": ["1", "0.5", "0.1"]}


def _choices() -> dict[str, list[str]]:
    """Values of each key that are right, or nearly."""

    def of(field: dataclasses.Field[Any]) -> list[str]:
        return [str(choice) for choice in field.metadata.get("choices", ())] or OF_KIND.get(str(field.type), [])

    found: dict[str, list[str]] = {"task": names("task"), "model": names("model"), "preset": ["tiny"]}
    for mixer in systems():
        found |= {f"model.mixer.{field.name}": of(field) for field in dataclasses.fields(mixer_options(mixer))}
    return {key: of(field) for key, _, field in fields(resolve(["preset=tiny"]))} | found


CHOICES = _choices()


def _is_safe(key: str, value: str) -> bool:
    if key in FOLDERS:
        return not value.startswith(("/", "~")) and ".." not in value
    try:
        plain = str(int(value))  # 1_0 and the digits of other scripts are numbers, too
    except ValueError:
        plain = value.lower()
    if plain in LEFT_OUT.get(key, ()):
        return False
    return value in NUMBERS or not value.strip().lstrip("+").isdecimal()


def words_of(values: Callable[[str], list[str]]) -> Any:
    """Keys with one of their values; Hypothesis likes to repeat: a word that is there once is not said again."""
    known = {key: safe for key in KEYS if (safe := [value for value in values(key) if _is_safe(key, value)])}
    return st.sampled_from([*known]).flatmap(lambda key: st.sampled_from(known[key]).map(lambda text: f"{key}={text}"))


RIGHT = words_of(lambda key: CHOICES[key])
TEXT = st.text(max_size=20).filter(lambda text: "\0" not in text and text.partition("=")[0] not in KEYS)
MISTYPED = st.sampled_from(KEYS).flatmap(lambda key: st.sampled_from([key[:-1], key.upper(), f"{key}.x", f".{key}"]))
ANY = st.one_of(words_of(lambda key: [*NUMBERS, *WORDS]), TEXT, MISTYPED.map(lambda key: f"{key}s=1"))
LISTS = st.one_of(st.lists(RIGHT, max_size=4, unique=True), st.lists(st.one_of(RIGHT, ANY), max_size=4, unique=True))


class Hangs(BaseException):
    pass


@contextlib.contextmanager
def _limit(words: list[str]) -> Iterator[None]:
    left = LIMIT

    def tick(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Hangs(words)

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _try(words: list[str], data: str, folder: Path, seen: dict[int, int]) -> None:
    os.chdir(folder)  # relative folders in the words lie here
    base = (*TINY, f"data.dir={data}", "trainer.max_steps=1", "model.norm=layer", "data.download=false")
    with _limit(words):
        ended = launch(*base, *words)
    seen[ended.status] = seen.get(ended.status, 0) + 1
    if ended.status == 0:
        assert "--help" in words or "-h" in words or "--cfg" in words or "best validation" in ended.out
    else:
        assert ended.status in (2, 3)  # 3: a step with such values may leave the finite numbers
        assert ended.error and "Traceback" not in ended.err


def _run(examples: int, data: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CHELA_DATA", data)
    seen: dict[int, int] = {}

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(words=LISTS)
    def each(words: list[str]) -> None:
        _try(words, data, folder, seen)

    each()
    return seen


def test_a_few_random_lists(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _run(32, data, tmp_path, monkeypatch)
    assert seen[0] >= 5 and seen[2] >= 10, seen


@pytest.mark.slow
def test_a_thousand_random_lists(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _run(1000, data, tmp_path, monkeypatch)
    assert seen[0] >= 150 and seen[2] >= 300, seen
