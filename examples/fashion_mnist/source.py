"""Finding Fashion-MNIST: a folder of the user's, the cache, the Debian package, the dataset's own download."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from examples.fashion_mnist import fetch, idx
from examples.fashion_mnist.fetch import Contents, UnavailableError
from qatlib.atomic import write_bytes
from qatlib.errors import DataError

Part = Literal["train", "t10k"]


def read_part(part: Part, root: str | Path | None = None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images ``[N, 28, 28]`` (0 black, 255 white) and labels ``[N]`` (0 to 9): 60,000 of ``train``, 10,000 of ``t10k``.

    With ``root`` the files are read from that folder, ``.gz`` or not, and from nowhere else. Otherwise the first of
    these that has them: the cache folder, the installed Debian package, that package downloaded, the dataset's own
    address; what was found is kept in the cache, decompressed. Raises DataError QAT116 if the files are nowhere, with
    what was tried, and QAT117 if a file under ``root`` is truncated or altered.
    """
    names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
    contents = _from_root(Path(root), names) if root is not None else _from_cache(names) or _fill_cache()
    images, labels = (idx.decode(contents[name], name) for name in names)
    return images, labels


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/qatlib-examples/fashion-mnist``, under ``~/.cache`` where that variable is unset."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "qatlib-examples" / "fashion-mnist"


def _from_root(root: Path, names: tuple[str, ...]) -> Contents:
    try:
        return fetch.from_folder(root, {name: idx.FILES[name] for name in names})
    except UnavailableError as error:
        raise DataError(
            "QAT116",
            "Fashion-MNIST root",
            str(error),
            f"Put {', '.join(idx.FILES)} there (.gz or not), or leave root out to have them fetched",
        ) from None


def _from_cache(names: tuple[str, ...]) -> Contents | None:
    """Content from the cache; None if a file is not there or was altered, so that it is fetched again."""
    try:
        return {name: idx.FILES[name].read(cache_folder() / name) for name in names}
    except (OSError, DataError):
        return None


def _fill_cache() -> Contents:
    """Content of all files from the first place that has them, put into the cache."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        contents = _first_place(cache)
        for name, content in contents.items():
            write_bytes(cache / name, content)
    except OSError as error:
        raise DataError(
            "QAT116",
            str(error.filename or cache),
            f"the cache for Fashion-MNIST cannot be written ({error.strerror})",
            "Set XDG_CACHE_HOME to a folder with 60 MB to spare, or name the folder of the files as root",
        ) from None
    return contents


def _first_place(cache: Path) -> Contents:
    places: dict[str, Callable[[], Contents]] = {
        "installed package": lambda: fetch.from_folder(fetch.INSTALLED, idx.FILES),
        "Debian package": lambda: fetch.from_debian_package(idx.FILES, cache),
        "official download": lambda: fetch.from_official(idx.FILES),
    }
    tried = []
    for place, get in places.items():
        try:
            return get()
        except (UnavailableError, DataError) as error:
            tried.append(f"\n  {place}: {fetch.reason(error)}")
    raise DataError(
        "QAT116",
        "Fashion-MNIST",
        f"is found in none of these places:{''.join(tried)}",
        f"\nInstall the package {fetch.PACKAGE}, or put the four idx files into a folder and name it as root",
    )
