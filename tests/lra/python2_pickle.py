"""Writes a batch of CIFAR-10 byte for byte as the authors' Python 2 `cPickle` wrote it, to test the reader of it."""

from __future__ import annotations

import struct

import numpy as np

MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}


class Writer:
    """Opcodes of protocol 2 with cPickle's memo, which counts from 1."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo = 0

    def put(self) -> None:
        self.memo += 1
        self.out += b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo)

    def string(self, text: bytes, memoise: bool = True) -> None:
        short = len(text) < 256
        self.out += b"U" + bytes([len(text)]) + text if short else b"T" + struct.pack("<I", len(text)) + text
        if memoise:
            self.put()

    def integer(self, value: int) -> None:
        self.out += b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    def sequence(self, write, items) -> None:  # type: ignore[no-untyped-def]
        self.out += b"]"
        self.put()
        for start in range(0, len(items), 1000):
            self.out += b"("
            for item in items[start : start + 1000]:
                write(item)
            self.out += b"e"


def batch(title: str, labels: list[int], pixels: np.ndarray, filenames: list[str]) -> bytes:
    """A batch: labels, pixels uint8 `(N, 3072)` and file names."""
    w = Writer()
    w.out += b"}"
    w.put()
    w.out += b"("
    w.string(b"batch_label")
    w.string(title.encode())
    w.string(b"labels")
    w.sequence(w.integer, labels)
    w.string(b"data")
    for name in (b"numpy.core.multiarray\n_reconstruct\n", b"numpy\nndarray\n"):
        w.out += b"c" + name
        w.put()
    w.out += b"K\x00\x85U\x01b\x87R"  # what nothing else refers to is not memoised
    w.put()
    w.out += b"(K\x01"
    w.integer(pixels.shape[0])
    w.integer(pixels.shape[1])
    w.out += b"\x86cnumpy\ndtype\n"
    w.put()
    w.out += b"U\x02u1K\x00K\x01\x87R"
    w.put()
    w.out += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    w.string(pixels.tobytes(), memoise=False)
    w.out += b"tb"
    w.string(b"filenames")
    w.sequence(lambda name: w.string(name.encode()), filenames)
    w.out += b"u."
    return bytes(w.out)
