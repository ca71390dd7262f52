"""The places from which the four files can be had, each as a function that returns their checked content."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

from examples.fashion_mnist.idx import IdxFile
from qatlib.errors import DataError

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package puts the files; also their place inside the package."""
OFFICIAL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
"""The download address in the README of the dataset. Plain HTTP: the SHA-256 of each file is what is trusted."""
_APT_SECONDS = 300
_HTTP_SECONDS = 30

Contents = dict[str, bytes]


class UnavailableError(Exception):
    """A place that does not have the files; the message says why."""


def from_folder(folder: Path, files: Mapping[str, IdxFile]) -> Contents:
    """Read ``NAME`` or ``NAME.gz`` of every file; raises UnavailableError, or DataError QAT117 for altered content."""
    if not folder.is_dir():
        raise UnavailableError(f"{folder} is not a folder")
    contents: Contents = {}
    for name, file in files.items():
        path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        if path is None:
            raise UnavailableError(f"{folder} has neither {name} nor {name}.gz")
        try:
            contents[name] = file.read(path)
        except OSError as error:
            raise UnavailableError(f"{path} cannot be read ({error.strerror})") from None
    return contents


def from_debian_package(files: Mapping[str, IdxFile], scratch: Path) -> Contents:
    """Download the Debian package and unpack it in a temporary folder under ``scratch``; needs no root.

    If the package is not found, package lists are fetched into that folder, those of the system left as they are, and
    the download is tried once more. Raises UnavailableError, DataError QAT117.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise UnavailableError("this system has no apt-get")
    with tempfile.TemporaryDirectory(prefix="package.", dir=scratch) as name:
        folder = Path(name)
        _download_package(folder)
        for package in folder.glob("*.deb"):
            _run(["dpkg", "-x", str(package), str(folder / "content")], folder)
        return from_folder(folder / "content" / INSTALLED.relative_to("/"), files)


def _download_package(folder: Path) -> None:
    try:
        _run(["apt-get", "download", PACKAGE], folder)
    except UnavailableError:
        lists, cache = folder / "lists", folder / "cache"
        (lists / "partial").mkdir(parents=True)
        (cache / "archives" / "partial").mkdir(parents=True)
        own = ["apt-get", "-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
        _run([*own, "update"], folder)
        _run([*own, "download", PACKAGE], folder)


def _run(command: list[str], folder: Path) -> None:
    """Run ``command`` in ``folder``; raise UnavailableError with the last line it wrote if it fails."""
    shown = " ".join(word for word in (command[0], command[-2], command[-1]) if not word.startswith(("Dir::", "/")))
    try:
        ended = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_APT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{shown} gave no answer in {_APT_SECONDS} s") from None
    except OSError as error:
        raise UnavailableError(f"{shown} cannot be run ({error.strerror})") from None
    if ended.returncode:
        lines = [line for line in (ended.stderr or ended.stdout).splitlines() if not line.startswith("W:")]
        raise UnavailableError(f"{shown}: {lines[-1] if lines else f'exit code {ended.returncode}'}")


def from_official(files: Mapping[str, IdxFile]) -> Contents:
    """Download the files from the dataset's own address; raises UnavailableError, DataError QAT117."""
    contents: Contents = {}
    for name, file in files.items():
        url = f"{OFFICIAL}{name}.gz"
        try:
            with urllib.request.urlopen(url, timeout=_HTTP_SECONDS) as answer:
                # Images shrink to about half; more than the decompressed size is not this file.
                packed = answer.read(file.size + 1024)
        except (OSError, HTTPException) as error:
            seen = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise UnavailableError(f"{url}: {seen}") from None
        contents[name] = file.unpack(packed, url)
    return contents


def reason(error: UnavailableError | DataError) -> str:
    """Why a place gave nothing, in one phrase."""
    return f"{error.where} {error.seen}" if isinstance(error, DataError) else str(error)
