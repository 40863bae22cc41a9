import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from chela.core.errors import DataError
from lra.source import DataConfig
from lra.tasks import text
from lra.tasks.text import Text
from tests.lra.test_source import archive

REVIEWS = {
    (split, name): [f"{split} {name} review number {i} \n".encode() for i in range(4)]
    for split in ("train", "test")
    for name in ("neg", "pos")
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task with 8 + 8 reviews, and the digest that these have."""
    monkeypatch.setattr(text, "COUNTS", {"train": 8, "test": 8})
    whole = hashlib.sha256()
    for split in ("train", "test"):
        digests = []
        for label, name in enumerate(("neg", "pos")):
            for raw in REVIEWS[split, name]:
                digests.append(hashlib.blake2b(raw.strip(), digest_size=16, key=bytes([label])).digest())
        for digest in sorted(digests):
            whole.update(digest)
    monkeypatch.setattr(text, "CONTENT", whole.hexdigest())


def tree(root: Path) -> Path:
    for (split, name), reviews in REVIEWS.items():
        folder = root / "aclImdb" / split / name
        folder.mkdir(parents=True)
        for i, raw in enumerate(reviews):
            (folder / f"{i}_7.txt").write_bytes(raw)
    (root / "aclImdb" / "README").write_text("read me")
    return root


def packed(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    files = {f"aclImdb/{s}/{n}/{i}_7.txt": raw for (s, n), texts in REVIEWS.items() for i, raw in enumerate(texts)}
    files |= {"aclImdb/README": b"", "aclImdb/train/unsup/0_0.txt": b"no label", "aclImdb/train/pos/x.feat": b""}
    return archive(root / "aclImdb_mine.tar.gz", files)


@pytest.mark.parametrize("form", [tree, packed])
@pytest.mark.usefixtures("small")
def test_records_do_not_depend_on_the_form_they_came_in(tmp_path: Path, form) -> None:  # type: ignore[no-untyped-def]
    task = Text(validation=2)
    task.prepare(DataConfig(dir=str(tmp_path / "records"), root=str(form(tmp_path / "mine"))))
    records = task.records("train")
    texts = [r["text"].tobytes().decode() for r in records.read(range(8))]
    assert sorted(texts) == sorted(raw.strip().decode() for n in ("neg", "pos") for raw in REVIEWS["train", n])
    assert [("neg", "pos").index(t.split()[1]) for t in texts] == records.labels.tolist()
    assert texts[0] == "train pos review number 2"  # whatever the form
    train, held = task.dataset("train"), task.dataset("validation")
    assert len(train) == 6 and held.labels().tolist() in ([0, 1], [1, 0])
    seen = {x.tobytes() for split in (train, held) for x, _ in split.read(range(len(split)))}
    assert len(seen) == 8  # apart, and together everything


@pytest.mark.usefixtures("small")
def test_any_source_gives_the_same_set(tmp_path: Path) -> None:
    records = tmp_path / "records"
    for root in (str(tree(tmp_path / "mine")), str(packed(tmp_path / "packed")), None):
        task = Text()
        task.prepare(DataConfig(dir=str(records), root=root, download=False))
        assert task.folder == records / "lra_text" / "plain_text" / "1.0.0"


@pytest.mark.usefixtures("small")
def test_the_habit_of_the_literature(tmp_path: Path) -> None:
    task = Text(test=4)
    task.prepare(DataConfig(dir=str(tmp_path / "r"), root=str(tree(tmp_path / "mine")), validation="test"))
    assert len(task.dataset("train")) == 8
    assert np.array_equal(task.dataset("validation").labels(), task.dataset("test").labels())
    assert len(task.dataset("test")) == 4


@pytest.mark.usefixtures("small")
def test_what_is_not_the_release_is_refused(tmp_path: Path) -> None:
    task, data = Text(), DataConfig(dir=str(tmp_path / "r"), root=str(tree(tmp_path / "mine")))
    changed = tmp_path / "mine" / "aclImdb" / "test" / "neg" / "0_7.txt"
    kept = changed.read_bytes()
    changed.write_bytes(kept + b"!")
    with pytest.raises(DataError, match="this is not the content of the release"):
        task.prepare(data)
    changed.unlink()
    with pytest.raises(DataError, match=r"text: test has 7 reviews, expected 8: fetch"):
        task.prepare(data)
    changed.write_bytes(kept)
    task.prepare(data)


@pytest.mark.usefixtures("small")
def test_a_truncated_archive_leaves_nothing(tmp_path: Path) -> None:
    path = packed(tmp_path / "mine")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="it is truncated"):
        Text().prepare(DataConfig(dir=str(tmp_path / "r"), root=str(path)))
    assert not list((tmp_path / "r").rglob("*.array_record*"))
    with pytest.raises(DataError, match="train has 7 reviews, expected 8"):
        files = {f"aclImdb/{s}/{n}/{i}.txt": raw for (s, n), t in REVIEWS.items() for i, raw in enumerate(t)}
        files.pop("aclImdb/train/pos/2.txt")
        Text().prepare(DataConfig(dir=str(tmp_path / "r"), root=str(archive(tmp_path / "aclImdb.tar.gz", files))))


def test_lengths_are_known_without_encoding() -> None:
    made = Text(max_length=5)
    (example,) = made.examples([(0, "naïve".encode())])
    ids = made.encode(example.fields)
    assert isinstance(ids, np.ndarray) and ids.tolist() == [111, 98, 196, 176, 119] and ids.dtype == np.uint16
    stored = SimpleNamespace(sizes={"bytes": np.array(example.sizes)})
    assert made.encoded_lengths(stored).tolist() == [5]  # type: ignore[arg-type]


def test_facts_of_the_real_reviews(real_text: DataConfig) -> None:
    task = Text()
    task.prepare(real_text)
    for split, total, longer in (("train", 33_132_823, 792), ("test", 32_350_685, 718)):
        sizes = task.records(split).sizes["bytes"]
        assert (len(sizes), sizes.sum(), np.count_nonzero(sizes > 4000)) == (25_000, total, longer)
    assert task.records("train").sizes["bytes"].max() == 13_704
    assert [len(task.dataset(s)) for s in ("train", "validation", "test")] == [22_500, 2_500, 25_000]
    for split in ("train", "validation", "test"):
        assert task.dataset(split).majority_accuracy() == 0.5
