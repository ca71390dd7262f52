"""The four idx files of Fashion-MNIST: what they must contain, and how they are read."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from dataclasses import dataclass
from gzip import BadGzipFile, GzipFile
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qatlib.errors import DataError

_UNSIGNED_BYTE = 0x08


@dataclass(frozen=True)
class IdxFile:
    """One file of the dataset, by the size in bytes and the SHA-256 of its decompressed content."""

    name: str
    size: int
    sha256: str

    def read(self, path: Path) -> bytes:
        """Content of ``path``, decompressed if it ends in ``.gz``, and checked.

        Raises DataError QAT117 if it is truncated or altered, OSError if it cannot be read.
        """
        content = path.read_bytes()
        return self.unpack(content, path) if path.suffix == ".gz" else self.check(content, path)

    def unpack(self, packed: bytes, where: str | Path) -> bytes:
        """Decompress a gzip file and check what was in it; raises DataError QAT117."""
        try:
            # One byte more than expected is enough to see that there is too much.
            with GzipFile(fileobj=io.BytesIO(packed)) as stream:
                content = stream.read(self.size + 1)
        except (EOFError, BadGzipFile, zlib.error) as error:
            raise _altered(where, f"is not a whole gzip file ({error})") from None
        return self.check(content, where)

    def check(self, content: bytes, where: str | Path) -> bytes:
        """Return ``content`` if it is that of the dataset; raises DataError QAT117 otherwise."""
        if len(content) != self.size:
            seen = f"more than {self.size}" if len(content) == self.size + 1 else str(len(content))
            raise _altered(where, f"holds {seen} bytes; {self.name} has {self.size}")
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise _altered(where, f"has SHA-256 {digest}; {self.name} has {self.sha256}")
        return content


def _altered(where: str | Path, seen: str) -> DataError:
    return DataError("QAT117", str(where), seen, "Fetch the file again: it is truncated, altered or of another dataset")


def decode(content: bytes, where: str | Path = "idx file") -> NDArray[np.uint8]:
    """The array in an idx file of unsigned bytes, of the shape in its header; raises DataError QAT117.

    Format: two zero bytes, type code, number of dimensions, then each dimension as big-endian uint32, then the values.
    """
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTE)) or len(content) < 4 + 4 * content[3]:
        raise _altered(where, f"begins with {content[:4].hex(' ') or 'nothing'}: no idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != prod(shape):
        raise _altered(where, f"holds {len(content) - start} values; its header says {list(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


FILES: dict[str, IdxFile] = {
    file.name: file
    for file in (
        IdxFile(
            "train-images-idx3-ubyte", 47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        IdxFile("train-labels-idx1-ubyte", 60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        IdxFile("t10k-images-idx3-ubyte", 7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        IdxFile("t10k-labels-idx1-ubyte", 10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    )
}
