"""Texts to model: where they come from, how they are split, and that each symbol is predicted once."""

import lzma
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from chela.core.errors import DataError
from lra.datamodule import LRADataModule
from lra.source import DataConfig
from lra.tasks import get_task, task_class
from lra.tasks.base import IGNORED, SPLITS
from lra.tasks.corpus import Corpus, Enwik8, Shakespeare, Text8, WikiText103
from lra.texts import Windows

WORDS = b"the quick brown fox jumps over the lazy dog and "


class Small8(Text8):
    """text8 without its checksum."""

    content = None


def own(tmp_path: Path, raw: bytes = WORDS * 40, **options: int) -> Corpus:
    path = tmp_path / "mine.txt"
    path.write_bytes(raw)
    task = Corpus(**{"window": 16, **options})
    task.prepare(DataConfig(root=str(path), dir=str(tmp_path / "data")))
    return task


def scored(records: Windows) -> np.ndarray:
    """The targets that count, in the order of the records."""
    return np.concatenate([targets[targets != IGNORED] for _, targets in records.read(range(len(records)))])


def test_facts_need_no_data():
    for task, symbols in ((Corpus(), 256), (Shakespeare(), 65), (Enwik8(), 256), (Text8(), 27), (WikiText103(), 256)):
        assert (task.num_classes, task.vocab_size) == (symbols + 1, symbols + 1)
        assert task.l_max == task.window == (256 if task.name in ("corpus", "shakespeare") else 2048)
        assert (task.objective, task.score, task.name) == ("tokens", "loss", type(task).__name__.lower())
        assert task_class(task.name) is type(task)
    assert sorted(Shakespeare.alphabet) == list(Shakespeare.alphabet)  # nanoGPT numbers them in this order


def test_shakespeare_is_split_as_nanogpt_does(shared, tmp_path):
    data = DataConfig(root=str(shared / "lm"), dir=str(tmp_path))
    task = Shakespeare(window=64)
    task.prepare(data)
    assert [len(task.span(split)) for split in SPLITS] == [1_003_854, 111_540, 111_540]
    assert "the test set is the validation split" in task.note
    first = scored(task.dataset("validation"))[:14]
    assert "".join(task.alphabet[i - 1] for i in first) == "?\n\nGREMIO:\nGoo"
    found = task.span("train").counts() + task.span("test").counts()
    assert "".join(map(chr, np.flatnonzero(found))) == Shakespeare.alphabet
    assert len(task.dataset("validation")) == 1743 and len(task.dataset("train")) == 1_003_854 - 63
    (unpacked,) = (tmp_path / "texts").glob("*/tinyshakespeare.txt")
    before = unpacked.stat().st_mtime_ns
    Shakespeare().prepare(data)  # unpacked once
    assert unpacked.stat().st_mtime_ns == before
    plain = DataConfig(root=str(unpacked), dir=str(tmp_path / "other"))
    Shakespeare().prepare(plain)  # the plain file is read where it lies
    assert not (tmp_path / "other").exists()


def test_words_of_wikitext(shared, tmp_path):
    """Its test file has 245,569 words: 241,211 between white space, and an end for each of 4,358 lines."""
    for name, file in (("valid", "valid"), ("test", "test"), ("train", "valid")):
        raw = lzma.decompress((shared / "lm" / f"wikitext103.{file}.txt.xz").read_bytes())
        (tmp_path / f"wiki.{name}.raw").write_bytes(raw)
    task = WikiText103()
    task.prepare(DataConfig(root=str(tmp_path), dir=str(tmp_path / "data")))
    assert task.words("test") == 245_569 and task.words("validation") == 217_646
    assert len(task.span("test")) == (tmp_path / "wiki.test.raw").stat().st_size
    assert Corpus().words("test") is None


def test_a_text_is_cut_by_position(tmp_path):
    task = own(tmp_path, bytes(range(10, 110)) * 10, window=8)
    assert [len(task.span(split)) for split in SPLITS] == [900, 50, 50]
    assert np.array_equal(task.span("validation").read(-1, 3), [109, 10, 11, 12])
    assert np.array_equal(task.span("train").read(-1, 2), [10, 10, 11])  # a newline stands before the text
    assert "mine.txt, 1,000 bytes, SHA-256" in task.note
    few = own(tmp_path, bytes(range(10, 110)) * 10, window=8, test=20)
    assert len(few.span("test")) == 20 and "test is the first 20 symbols of 50" in few.note


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (16, 1), (200, 77), (7, 3)])
def test_every_symbol_is_a_target_once(tmp_path, window, stride):
    task = own(tmp_path)
    records = task.pieces("test", window, stride)
    text = task.span("test").read(0, len(task.span("test")))
    assert np.array_equal(scored(records), text + 1)
    assert records.lengths().tolist() == [len(ids) for ids, _ in records.read(range(len(records)))]
    for i, (ids, targets) in enumerate(records.read(range(len(records)))):
        first = i * stride
        assert np.array_equal(ids, task.table[task.span("test").read(first - 1, first + len(ids) - 1)])
        if i:
            assert np.flatnonzero(targets != IGNORED)[0] == window - stride


def test_training_windows_depend_on_seed_and_step_alone(tmp_path):
    task = own(tmp_path)
    records = task.dataset("train")
    assert records.epochs(60) == 60 * 16 / len(task.span("train"))  # by symbols read, not by places to begin at
    drawn = [records.batch(64, 8, seed, step) for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert np.array_equal(drawn[0], drawn[3])
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    many = np.concatenate([records.batch(512, 8, 0, step) for step in range(40)])
    assert many.min() >= 0 and many.max() == len(records) - 1  # the last window is reached
    counts = np.bincount(many * 8 // len(records), minlength=8)
    assert abs(counts / len(many) - 1 / 8).max() < 0.02
    ids, targets = records.read([5])[0]
    assert np.array_equal(ids[1:], targets[:-1]) and len(ids) == 16
    assert records.lengths().strides == (0,)  # of ninety million windows no list is kept
    assert len(pickle.dumps(records)) < 2_000  # a worker gets the file's name, not the text


def test_the_order_of_drawn_windows_is_pinned():
    """What runs have drawn stays so from version to version."""
    task = Shakespeare(window=64)
    task._spans["train"] = range(1_003_854)
    assert task.dataset("train").batch(4, 8, 0, 1).tolist() == [160666, 705098, 253982, 960454]


def test_rows_read_on(tmp_path):
    task = own(tmp_path)
    records, text = task.dataset("train"), task.span("train")
    part = len(text) // 3
    seen = [records.ordered(3, step) for step in range(2 * (part // 16) + 1)]
    assert [step for step, (_, fresh) in enumerate(seen) if fresh] == [0, part // 16, 2 * (part // 16)]
    for step, (starts, _) in enumerate(seen):
        assert starts.tolist() == [row * part + step % (part // 16) * 16 for row in range(3)]
    with pytest.raises(DataError, match=r"data.carry: expected a text of at least a window of 16 for each of 1000"):
        records.ordered(1000, 0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_read_on(tmp_path, accumulate):
    task = own(tmp_path)
    options = {"batch_size": 4, "seed": 0, "max_steps": 30, "accumulate": accumulate}
    data = LRADataModule(task, DataConfig(root=str(tmp_path / "mine.txt"), carry=True), **options)
    last: dict[int, np.ndarray] = {}
    for batch in data.train_dataloader():
        ends = last.get(batch["part"])
        if not batch["fresh"]:
            assert np.array_equal(batch["inputs"][:, 0].numpy(), ends)
        last[batch["part"]] = batch["labels"][:, -1].numpy()
    assert set(last) == set(range(accumulate))
    plain = LRADataModule(task, DataConfig(root=str(tmp_path / "mine.txt")), **options)
    assert "fresh" not in next(iter(plain.train_dataloader()))


def test_a_line_is_read():
    task = Shakespeare()
    ids = task.read_line("To be, or not")
    assert "".join(task.alphabet[i - 1] for i in ids) == "To be, or not" and ids.min() >= 1
    with pytest.raises(ValueError, match="'é' at position 2 is none of the 65 symbols"):
        task.read_line("cré")
    task.check(ids)
    with pytest.raises(ValueError, match="expected at most 256"):
        task.check(task.read_line("a" * 257))
    assert (Corpus().read_line("é") - 1).tolist() == list("é".encode())


def archived(path: Path, name: str, raw: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, raw)
    return path


@pytest.mark.parametrize("form", ["text8", "text8.txt", "text8.xz", "named.zip", "folder/text8", "text8/text8.txt"])
def test_forms_of_a_text(tmp_path, form):
    raw = WORDS * 40
    path = tmp_path / "mine" / form
    path.parent.mkdir(parents=True)
    if form.endswith(".zip"):
        archived(path, "named", raw)
    else:
        path.write_bytes(lzma.compress(raw) if form.endswith(".xz") else raw)
    roots = {"named.zip": path, "text8/text8.txt": path.parent}  # a folder of the text's name is not the text
    root = roots.get(form, tmp_path / "mine")
    task = Small8(window=16)
    task.prepare(DataConfig(root=str(root), dir=str(tmp_path / "data")))
    assert [len(task.span(split)) for split in SPLITS] == [1728, 96, 96]
    assert task.span("test").read(0, 9).tobytes() == raw[1824:1833]


def refused(task: Corpus, root: Path | None, tmp_path: Path) -> str:
    with pytest.raises(DataError) as error:
        task.prepare(DataConfig(root=root and str(root), dir=str(tmp_path / "data"), download=False))
    message = str(error.value)
    assert "\n" not in message
    assert not list((tmp_path / "data").rglob("*.tmp"))
    return message


def test_a_bad_text_is_one_line(tmp_path):
    path = tmp_path / "mine.txt"
    assert "expected data.root=FILE, the text that is to be learned, got nothing" in refused(Corpus(), None, tmp_path)
    assert f"{tmp_path}, which is no file" in refused(Corpus(), tmp_path, tmp_path)
    path.write_bytes(b"ab\n" * 5000 + b"c\xc3(" + b"d" * 5000)
    message = refused(Corpus(), path, tmp_path)
    assert "expected UTF-8" in message and "got b'\\xc3' in line 5,001: convert it" in message
    path.write_bytes(WORDS)
    assert "train has 43 symbols, expected more than task.window=256" in refused(Corpus(), path, tmp_path)
    path.write_bytes(WORDS * 40)
    message = refused(Corpus(window=96), path, tmp_path)
    assert "validation has 96 symbols, expected more than task.window=96: give a longer text or a smaller" in message
    path.write_bytes(b"")
    assert "train has 0 symbols" in refused(Corpus(), path, tmp_path)


def test_a_known_text_must_be_that_one(tmp_path):
    path = tmp_path / "enwik8"
    path.write_bytes(WORDS)
    assert "has 48 bytes, expected 100,000,000: it is truncated or another" in refused(Enwik8(), path, tmp_path)
    shakespeare = tmp_path / "input.txt"
    shakespeare.write_bytes(b"a" * 1_115_394)
    assert "has SHA-256" in refused(Shakespeare(), tmp_path, tmp_path)
    assert "text8.zip is not at" in refused(Text8(), None, tmp_path)
    assert "expected a file at" in refused(WikiText103(), archived(tmp_path / "wiki.train.raw", "x", b""), tmp_path)
    packed = archived(tmp_path / "a.zip", "other", WORDS)
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("third", WORDS)
    assert "expected a in the archive, or one file alone, got other, third" in refused(Small8(), packed, tmp_path)
    packed.write_bytes(packed.read_bytes()[:-30])
    assert "it is truncated or another file" in refused(Small8(), packed, tmp_path)


def test_before_prepare_there_is_no_text():
    with pytest.raises(DataError, match="call prepare"):
        get_task(Corpus()).dataset("train")
    with pytest.raises(ValueError, match="expected one of train"):
        Corpus().dataset("valid")
