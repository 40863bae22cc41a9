import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chela.core.errors import DataError
from lra.source import DataConfig, Layout, Remote, fetch, locate, members, verify

BODY = bytes(range(256)) * 20_000  # 5 MB


def remote(url: str = "http://127.0.0.1:1/set.bin", body: bytes = BODY) -> Remote:
    return Remote("set.bin", url, len(body), hashlib.sha256(body).hexdigest())


class Server(http.server.BaseHTTPRequestHandler):
    """Sends BODY; can break off, or send something else."""

    log: list[str]
    break_at: int | None = None
    body = BODY

    def do_GET(self) -> None:
        type(self).log.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: self.break_at])
        if self.break_at is not None:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[type[Server], str]]:
    handler = type("Handler", (Server,), {"log": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{made.server_port}/set.bin"
        made.shutdown()


def test_a_download_says_size_and_address_first(
    server: tuple[type[Server], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handler, url = server
    assert fetch("text", remote(url), tmp_path / "new").read_bytes() == BODY
    assert f"fetching set.bin (5 MB) from {url}" in caplog.text
    fetch("text", remote(url), tmp_path / "new")
    assert len(handler.log) == 1  # what is there is verified, not fetched again
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["set.bin"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"break_at": 3_000_000}, r"text: set.bin could not be fetched .*: get http"),
        ({"body": BODY[:-1] + b"?"}, r"sent is not the expected file .* expected"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    server: tuple[type[Server], str], tmp_path: Path, fault: dict[str, Any], message: str
) -> None:
    handler, url = server
    for name, value in fault.items():
        setattr(handler, name, value)
    with pytest.raises(DataError, match=message):
        fetch("text", remote(url), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_network_the_error_names_file_place_and_command(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        fetch("text", remote(), tmp_path)
    named = ("set.bin could not be fetched", "http://127.0.0.1:1/set.bin", str(tmp_path / "set.bin"))
    assert all(part in str(error.value) for part in (*named, "chela prepare task=text data.root=FOLDER"))
    with pytest.raises(DataError, match=r"data.download is false: get http"):
        fetch("text", remote(), tmp_path, allowed=False)


def test_a_wrong_checksum_leaves_the_file_of_the_user_alone(tmp_path: Path) -> None:
    mine = tmp_path / "set.bin"
    mine.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(DataError, match=r"has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        locate("text", DataConfig(root=str(tmp_path)), [Layout("it", "set.bin", remote=remote())])
    mine.write_bytes(BODY[:-1])
    with pytest.raises(DataError, match="has 5,119,999 bytes, expected 5,120,000: it is truncated"):
        verify(mine, remote())
    assert mine.exists()


LAYOUTS = [
    Layout("a tree", "aclImdb/train/pos/0_*.txt"),
    Layout("an archive", "set*.tar.gz"),
]


@pytest.mark.parametrize("below", ["", "a", "a/b", "a/b/c"])
@pytest.mark.parametrize("made", ["aclImdb/train/pos/0_7.txt", "set1.tar.gz"])
def test_forms_are_found_at_the_root_and_below(tmp_path: Path, below: str, made: str) -> None:
    path = tmp_path / below / made
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    assert locate("text", DataConfig(root=str(tmp_path)), LAYOUTS)[1] == path


def test_the_root_may_be_the_tree_or_the_archive_itself(tmp_path: Path) -> None:
    tree = tmp_path / "aclImdb" / "train" / "pos" / "0_7.txt"
    tree.parent.mkdir(parents=True)
    tree.write_text("")
    assert locate("text", DataConfig(root=str(tmp_path / "aclImdb")), LAYOUTS)[1] == tree
    archive = tmp_path / "set.tar.gz"
    archive.write_text("")
    assert locate("text", DataConfig(root=str(archive)), LAYOUTS) == (LAYOUTS[1], archive)


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which does not exist"):
        locate("text", DataConfig(root=str(tmp_path / "none")), LAYOUTS)
    with pytest.raises(DataError, match=r"holds none of: a tree \(aclImdb/train/pos/0_\*\.txt\); an archive"):
        locate("text", DataConfig(root=str(tmp_path)), LAYOUTS)
    with pytest.raises(DataError, match=rf"cannot be fetched for you; .* put it into {tmp_path / 'downloads'}"):
        locate("text", DataConfig(dir=str(tmp_path)), LAYOUTS)


def test_what_lies_in_the_downloads_is_taken(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "set.bin").write_bytes(BODY)
    form = Layout("it", "set.bin", remote=remote())
    assert locate("text", DataConfig(dir=str(tmp_path)), [form])[1].read_bytes() == BODY


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def test_members_of_an_archive(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", {"x/a.txt": b"1", "x/b.bin": b"2", "x/c.txt": b"3"})
    assert list(members(path, lambda name: name.endswith(".txt"))) == [("x/a.txt", b"1"), ("x/c.txt", b"3")]


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
def test_a_truncated_archive_is_named(tmp_path: Path, kept: float) -> None:
    noise = hashlib.shake_256(b"noise").digest(300_000)
    path = archive(tmp_path / "a.tar.gz", {"x/a.txt": noise, "x/b.txt": noise[::-1]})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(DataError, match=r"a\.tar\.gz cannot be read .*truncated"):
        list(members(path, lambda name: True))
    path.write_text("<html>not found</html>")
    with pytest.raises(DataError, match="or no archive"):
        list(members(path, lambda name: True))
