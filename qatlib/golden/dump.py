"""The files of a device dump: found, matched with the names of the golden vectors, read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qatlib.golden.vectors import Array, GoldenError

SUFFIXES = (".npy", ".bin")


class UnreadableError(Exception):
    """A file of the dump holds no tensor; the text says why."""


@dataclass(frozen=True)
class Dumped:
    """Content of one file: ``array`` as a .npy file says it, None for a raw .bin; ``data`` its bytes."""

    data: bytes
    array: Array | None = None


def find_files(folder: str | Path) -> dict[str, Path]:
    """Tensor files under ``folder`` by name: the path inside it, without suffix.

    Raises GoldenError: QAT202 if there is none, QAT203 for two files of one name.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not paths:
        seen = "holds no .npy or .bin file" if folder.is_dir() else "is not a folder"
        raise GoldenError("QAT202", str(folder), seen, "Name the folder that the device wrote its tensors to")
    files: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise GoldenError(
                "QAT203", str(path), f"has the same name as {files[name].name}", "Keep one file per tensor"
            )
        files[name] = path
    return files


def load_map(path: str | Path) -> dict[str, str]:
    """A name map from YAML or JSON: device name to name in the golden vectors. GoldenError QAT203 if it is not one."""
    path = Path(path)
    fix = "Give a mapping such as {device_name: golden.name}"
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else YAML(typ="safe", pure=True).load(text)
    except OSError as error:
        raise GoldenError("QAT203", str(path), f"cannot be read ({error.strerror})", fix) from None
    except (YAMLError, ValueError) as error:
        raise GoldenError("QAT203", str(path), f"is not YAML or JSON ({' '.join(str(error).split())})", fix) from None
    if not isinstance(found, dict) or not all(isinstance(x, str) for pair in found.items() for x in pair):
        raise GoldenError("QAT203", str(path), "does not map names to names", fix)
    return found


def plain(name: str) -> str:
    """``name`` as devices write it: lower case, everything but letters and digits one underscore."""
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def device_names(name_map: Mapping[str, str] | None) -> dict[str, str]:
    """``name_map`` with its device names as :func:`find_files` gives them: without suffix."""
    return {
        str(Path(key).with_suffix("")) if Path(key).suffix in SUFFIXES else key: value
        for key, value in (name_map or {}).items()
    }


def match_names(
    files: Mapping[str, Path], names: Iterable[str], name_map: Mapping[str, str] | None = None
) -> dict[str, Path]:
    """File of each golden name that has one: by ``name_map``, else the exact name, else the :func:`plain` one.

    A name that the map gives to one file is no other's. A plain name that two golden names share matches none. Raises
    GoldenError: QAT203 for a map to an unknown name or two files of one name, QAT204 if nothing matches.
    """
    names = list(names)
    mapped = device_names(name_map)
    for device, value in mapped.items():
        if value not in names:
            raise GoldenError(
                "QAT203", f"name map, {device}", f"{value!r} is not among the golden vectors", f"Use one of {names[:8]}"
            )
    short: dict[str, list[str]] = {}
    for name in names:
        short.setdefault(plain(name), []).append(name)
    given = {value for device, value in mapped.items() if device in files}
    found: dict[str, Path] = {}
    for device, path in files.items():
        alike = short.get(plain(device), [])
        own = device if device in names else alike[0] if len(alike) == 1 else None
        meant = mapped.get(device, None if own in given else own)
        if meant is None:
            continue
        if meant in found:
            raise GoldenError(
                "QAT203", meant, f"is claimed by {found[meant].name} and {path.name}", "Say which in a name map"
            )
        found[meant] = path
    if not found:
        raise GoldenError(
            "QAT204",
            "dump",
            f"none of its {len(files)} names ({', '.join(list(files)[:4])}, ...) is a golden name ({names[0]}, ...)",
            "Give a name map (--map), or the golden vectors of this network",
        )
    return found


def read(path: Path) -> Dumped:
    """Content of a tensor file; raises :class:`UnreadableError`."""
    try:
        if path.suffix == ".bin":
            return Dumped(path.read_bytes())
        array: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UnreadableError(f"cannot be read ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise UnreadableError("is not an array of numbers")
    array = np.asarray(array.astype(np.int8) if array.dtype.kind == "b" else array, order="C")
    return Dumped(array.tobytes(), array)
