"""Reading, encoding, bucketing and collating must be far faster than the model that takes the batches."""

import pytest

from chela.config import resolve
from experiments.bench.data import row


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "image"])
def test_loading_is_twenty_times_faster_than_the_mini_model(task: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(f"real_{task}")
    found = row(resolve([f"task={task}", "preset=mini", f"data.dir={data.dir}", f"data.root={data.root}"]))
    assert found.values["loaded / taken"] >= 20, found


def test_absent_records_are_said(tmp_path) -> None:  # type: ignore[no-untyped-def]
    found = row(resolve(["task=text", "preset=mini", "data.download=false", f"data.dir={tmp_path}"]))
    assert not found.values and "not run: text: aclImdb_v1.tar.gz is not at" in found.note
