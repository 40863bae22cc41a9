import pickle
from pathlib import Path

import numpy as np
import pytest

from lra.errors import DataError
from lra.safe_pickle import Call, read

PLAIN = {
    "labels": [6, 9, 300, 70_000, -1],
    "name": "é",
    b"raw": b"\x00\xff",
    "t": (None, True, False, 1.5),
    "d": {1: []},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(protocol: int) -> None:
    plain = {k: v for k, v in PLAIN.items() if protocol > 2 or k != b"raw"}  # older ones write bytes as a call
    if protocol == 0:
        with pytest.raises(DataError):  # line by line, written by nothing we read
            read(pickle.dumps(plain, protocol))
    else:
        assert read(pickle.dumps(plain, protocol)) == plain


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
def test_nothing_is_ever_called(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    raw = pickle.dumps({"data": Evil(marker)}, protocol)
    try:
        found = read(raw)["data"]
        assert isinstance(found, Call)
    except DataError:
        pass
    assert not marker.exists()
    pickle.loads(raw)
    assert marker.exists()  # it would have run


def test_an_array_is_kept_as_an_inert_call() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    found = read(pickle.dumps(array, 2))
    assert isinstance(found, Call) and "_reconstruct" in found.name
    assert found.state[1] == (2, 3)


def test_truncated_or_no_pickle() -> None:
    raw = pickle.dumps(PLAIN, 4)
    for stop in range(0, len(raw) - 1, 3):
        with pytest.raises(DataError, match="truncated or not plain data"):
            read(raw[:stop])
    with pytest.raises(DataError):
        read(b"<html>")
