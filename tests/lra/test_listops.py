import hashlib
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest

from chela.core.errors import DataError
from lra.batches import key
from lra.generators.listops import _block, generate
from lra.source import DataConfig
from lra.tasks.listops import VOCABULARY, ListOps, depth, evaluate, tokenize
from tests.lra.conftest import text


def test_the_vocabulary_is_fixed() -> None:
    assert " ".join(VOCABULARY) == "<pad> 0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ] <oov>"
    assert tokenize("( ( ( [MED 0 ) ( ( ( [SM 9 ) 1 ) ] ) ) ] )").tolist() == [13, 1, 14, 10, 2, 15, 15]
    assert tokenize("[MAX 3 x ]").tolist() == [12, 4, 16, 15]
    assert text(tokenize("[MIN 3 4 ]")) == "[MIN 3 4 ]"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MIN 3 1 2 ]", 1),
        ("[MAX 3 1 2 ]", 3),
        ("[SM 9 9 9 ]", 7),
        ("[MED 1 2 ]", 1),  # 1.5, truncated
        ("[MED 9 0 5 ]", 5),
        ("[MED 1 4 8 9 ]", 6),
        ("[MAX [MIN 4 [SM 6 6 ] ] 1 ]", 2),
    ],
)
def test_values(expression: str, value: int) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize("wrong", ["", "1 2", "[MIN ]", "[MIN 1", "1 ]", "[MAX 1 ? ]"])
def test_what_is_no_expression_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        evaluate(wrong)


def test_the_evaluator_agrees_with_the_labels_of_nyu(shared: Path) -> None:
    archive = lzma.decompress((shared / "listops" / "nyu_listops_test.tar.xz").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        (member,) = [m for m in tar.getmembers() if m.name.endswith(".tsv")]
        lines = tar.extractfile(member).read().decode().splitlines()  # type: ignore[union-attr]
    pairs = [line.split("\t") for line in lines]
    assert len(pairs) == 10_000
    assert [evaluate(e) for _, e in pairs] == [int(label) for label, _ in pairs]


@pytest.fixture(scope="module")
def full() -> tuple[ListOps, object]:
    config = ListOps(train=10_000, validation=1_000, test=1_000)
    return config, generate(config)


def test_statistics_of_the_full_task(full) -> None:  # type: ignore[no-untyped-def]
    _, trees = full
    lengths = np.array([len(tree) for tree, _ in trees])
    assert lengths.min() >= 501 and lengths.max() <= 1999
    # Mean and median of 424,221 trees of a plain recursive sampler of the same rules: 1,035.3 (± 0.6) and 953.
    assert abs(lengths.mean() - 1035) < 16
    assert abs(np.median(lengths) - 953) < 20
    assert abs(len(_block(key(0, "listops"), 0, 40_000, 501, 1999, 10, 10)[1]) / 40_000 - 0.082) < 0.003
    share = np.bincount([value for _, value in trees], minlength=10) / len(trees)
    assert abs(share[0] - 0.17) < 0.012 and abs(share[9] - 0.17) < 0.012
    assert share[1:9].min() > 0.065 and share[1:9].max() < 0.10


def test_generated_values_by_the_independent_evaluator(full) -> None:  # type: ignore[no-untyped-def]
    _, trees = full
    for tree, value in trees[:1000]:
        assert evaluate(text(tree)) == value


def test_rules_of_a_tree(full) -> None:  # type: ignore[no-untyped-def]
    _, trees = full
    deepest, arguments = 0, set()
    for tree, _ in trees[:500]:
        counts: list[int] = []
        for token in tree.tolist():
            if 11 <= token <= 14:
                counts.append(0)
            elif token == 15:
                arguments.add(counts.pop())
            if token not in (11, 12, 13, 14) and counts:
                counts[-1] += 1
            deepest = max(deepest, len(counts) + (token < 11))
    assert deepest == 10
    assert arguments == set(range(2, 11))


def test_same_bytes_for_any_number_of_workers_and_other_bytes_for_another_seed() -> None:
    def digest(seed: int, threads: int) -> str:
        config = ListOps(train=4000, validation=10, test=10, min_length=10, max_length=60, seed=seed)
        trees, values = zip(*generate(config, threads), strict=True)
        offsets = np.cumsum([0, *map(len, trees)])
        made = np.concatenate(trees), np.array(values, np.uint8), offsets
        return hashlib.sha256(b"".join(part.tobytes() for part in made)).hexdigest()

    assert digest(0, 1) == digest(0, 2) == digest(0, 5) != digest(1, 1)
    # The bytes are a promise: whoever changes them raises `ListOps.version`.
    assert digest(0, 1)[:16] == "b4912f5a6e655446"


def test_no_tree_comes_twice() -> None:
    config = ListOps(train=3000, validation=500, test=500, min_length=4, max_length=6, max_depth=3, max_args=4)
    trees = generate(config, 1)
    assert len({tree.tobytes() for tree, _ in trees}) == len(trees) == 4000


def test_asking_for_more_trees_than_there_are_is_an_error() -> None:
    config = ListOps(train=2000, validation=1, test=1, min_length=1, max_length=4, max_depth=2, max_args=2)
    with pytest.raises(DataError, match="only 410 different ones"):  # ten digits and four operators of two digits
        generate(config, 2)


def test_depth_is_that_of_the_tree_and_groups_the_records(small_listops: ListOps, data_folder: DataConfig) -> None:
    """Against a count of the brackets that are open."""
    small_listops.prepare(data_folder)
    records = small_listops.dataset("test")
    found = records.groups()
    assert found is not None and len(set(found.tolist())) > 1
    for (tokens, _), number in zip(records.read(range(50)), found.tolist(), strict=True):
        words = text(tokens).split()
        opened = [sum(w[0] == "[" for w in words[:n]) - words[:n].count("]") for n in range(len(words) + 1)]
        assert number == max(opened) == depth(tokens)


def test_room_adds_a_test_set_of_longer_trees_and_leaves_the_others(
    small_listops: ListOps, data_folder: DataConfig, tmp_path: Path
) -> None:
    small_listops.prepare(data_folder)
    options = {
        name: getattr(small_listops, name) for name in ("train", "validation", "test", "min_length", "max_length")
    }
    task = ListOps(**options, max_depth=4, max_args=4, room=80)
    assert (task.train_length, task.l_max) == (40, 80)
    assert (task.l_max, task.further, small_listops.l_max, small_listops.further) == (80, ("longer",), 40, ())
    task.prepare(DataConfig(dir=str(tmp_path), processes=1))
    longer = task.dataset("longer")
    assert len(longer) == 2_000 and longer.lengths().min() == 41 and 60 < longer.lengths().max() <= 80
    depths = longer.groups()
    assert depths is not None and depths.max() > 3  # max_depth 4 has three levels of operators
    for tokens, label in longer.read(range(0, 2_000, 40)):
        task.check(tokens, label)
        assert evaluate(text(tokens)) == label
    for split in ("train", "validation", "test"):
        pairs = zip(task.dataset(split).read(range(40)), small_listops.dataset(split).read(range(40)), strict=True)
        assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in pairs)
    with pytest.raises(ValueError, match="split is 'longer': expected one of train, validation, test"):
        small_listops.dataset("longer")
    with pytest.raises(ValueError, match=r"task.room: expected 0 or more than max_length=40, got 40"):
        ListOps(**options, room=40)


def test_the_outermost_operator_alone_is_a_score_to_beat(small_listops: ListOps, data_folder: DataConfig) -> None:
    small_listops.prepare(data_folder)

    def table(split: str) -> np.ndarray:
        """Count the trees of each first token and value."""
        counts = np.zeros((len(VOCABULARY), 10), int)
        for tokens, value in (records := small_listops.dataset(split)).read(range(len(records))):
            counts[tokens[0], value] += 1
        return counts

    train, test = table("train"), table("test")
    expected = sum(test[root, train[root].argmax()] for root in range(len(train)) if train[root].any()) / test.sum()
    assert small_listops.baseline() == f"{expected:.2%} by the outermost operator alone"
