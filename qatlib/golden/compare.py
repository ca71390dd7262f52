"""Aligning a device dump with golden vectors: the first tensor that parts, how far, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qatlib.golden.causes import Cause, Parted
from qatlib.golden.diagnose import explain, unexplained
from qatlib.golden.dump import Dumped, UnreadableError, device_names, find_files, match_names, read
from qatlib.golden.inputs import other_size
from qatlib.golden.storage import Match, Storage, describe, fit
from qatlib.golden.vectors import Entry, Golden, Statistics, load_golden, statistics

Status = Literal["equal", "stored otherwise", "differs", "unusable", "missing"]


@dataclass(frozen=True)
class TensorResult:
    """One golden tensor. ``share`` is the part of its elements that differ.

    Distances are in LSB (codes, or the unit of the accumulator behind a float output); in the tensor's own unit for
    other floats, where ``unit`` is "real". "stored otherwise": equal once the storage named in ``note`` is undone.
    """

    name: str
    kind: str
    status: Status
    file: str = ""
    samples: int = 0
    elements: int = 0
    differing: int = 0
    share: float = 0.0
    max_distance: float = 0.0
    mean_distance: float = 0.0
    unit: str = "lsb"
    note: str = ""


@dataclass(frozen=True)
class Parting:
    """Where a dump parts from the golden vectors. ``also`` are further causes that explain the same numbers."""

    tensor: str
    kind: str
    cause: Cause
    also: tuple[Cause, ...] = ()
    not_compared: tuple[str, ...] = ()
    """Its inputs that the dump does not hold, or holds in no usable form: the fault may lie before them."""


@dataclass(frozen=True)
class Comparison:
    """``tensors`` are in execution order, inputs first.

    ``first`` is the first tensor that is not equal as stored, ``first_numbers`` the first whose numbers differ after
    its storage is undone; None if there is none. ``unknown_files`` belong to no golden tensor, ``unused_names`` of the
    name map to no file. ``statistics`` are those of inputs and their codes: by name, of "golden" and "device".
    """

    golden: str
    dump: str
    tensors: tuple[TensorResult, ...]
    first: Parting | None = None
    first_numbers: Parting | None = None
    unknown_files: tuple[str, ...] = ()
    unused_names: tuple[str, ...] = ()
    statistics: Mapping[str, Mapping[str, Statistics]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether every tensor that the dump holds is equal, as stored."""
        return self.first is None

    def document(self) -> dict[str, Any]:
        """Plain data for JSON, which has no NaN and no infinity: null stands for them."""
        found: dict[str, Any] = _finite({"equal": self.equal, **asdict(self)})
        return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare_dump(
    golden_folder: str | Path, dump_folder: str | Path, name_map: Mapping[str, str] | None = None
) -> Comparison:
    """Compare the tensors of a device dump with golden vectors.

    ``name_map`` maps device names (paths in the dump, without suffix) to golden names; names that are equal up to case
    and punctuation need none. Raises GoldenError: QAT200, QAT201 for the golden folder, QAT202 to QAT204 for a dump or
    map that cannot be used.
    """
    golden = load_golden(golden_folder)
    files = find_files(dump_folder)
    matched = match_names(files, golden.by_name, name_map)
    unknown = tuple(name for name, path in files.items() if path not in matched.values())
    unused = tuple(name for name in device_names(name_map) if name not in files)
    walk = _Walk(golden)
    with np.errstate(all="ignore"):  # a dump may hold any numbers, and is read in ways that are not its own
        results = tuple(walk.visit(entry, matched.get(entry.name)) for entry in golden.entries)
    return Comparison(
        str(golden_folder), str(dump_folder), results, walk.first, walk.first_numbers, unknown, unused, walk.statistics
    )


class _Walk:
    """State of one comparison: storages seen so far, tensors known to be equal, the first partings."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden
        self.first: Parting | None = None
        self.first_numbers: Parting | None = None
        self.statistics: dict[str, dict[str, Statistics]] = {}
        self._seen: list[Storage] = []
        self._equal: set[str] = set()

    def visit(self, entry: Entry, path: Path | None) -> TensorResult:
        if path is None:
            return TensorResult(entry.name, entry.kind, "missing", note="no file of this name")
        try:
            dumped = read(path)
        except UnreadableError as error:
            return self._unusable(entry, path, str(error), None)
        matches = fit(dumped, self.golden, entry, self._seen)
        if not matches:
            return self._unusable(entry, path, _size(dumped, entry), dumped)
        match, causes = self._explained(entry, matches)
        if self.golden.is_input(entry):
            self._note_statistics(entry, match)
        if match.storage not in self._seen and match.count < match.got.size / 2:
            self._seen.insert(0, match.storage)
        result = self._result(entry, match, path)
        if match.count == 0:
            self._equal.add(entry.name)
        self._record(entry, match, result, causes)
        return result

    def _part(self, entry: Entry, match: Match) -> Parted:
        return Parted(self.golden, entry, match.got, match.want, match.samples, frozenset(self._equal))

    def _explained(self, entry: Entry, matches: list[Match]) -> tuple[Match, tuple[Cause, ...]]:
        """The reading that is equal, else the first that a cause explains, else the likeliest. Causes are looked for
        only where numbers differ for the first time.
        """
        if matches[0].count == 0 or self.first_numbers is not None:
            return matches[0], ()
        for match in matches:
            if causes := explain(self._part(entry, match)):
                return match, causes
        return matches[0], (unexplained(self._part(entry, matches[0])),)

    def _result(self, entry: Entry, match: Match, path: Path) -> TensorResult:
        notes = [] if match.storage.plain else [describe(match.storage, entry)[1]]
        if match.samples != self.golden.batch:
            notes.append(f"{match.samples} of {self.golden.batch} samples")
        made = TensorResult(
            entry.name,
            entry.kind,
            "differs" if match.count else "equal" if match.storage.plain else "stored otherwise",
            path.name,
            match.samples,
            match.got.size,
            match.count,
            unit="real" if entry.is_float and self.golden.lsb(entry.name) is None else "lsb",
            note="; ".join(notes),
        )
        if not match.count:
            return made
        distance = self._part(entry, match).distance
        away = np.abs(distance[np.isfinite(distance)])
        return replace(
            made,
            share=match.count / match.got.size,
            max_distance=float(away.max(initial=0.0)),
            mean_distance=float(away.mean()) if away.size else 0.0,
        )

    def _record(self, entry: Entry, match: Match, result: TensorResult, causes: tuple[Cause, ...]) -> None:
        numbers: Parting | None = None
        if causes:
            likely, *also = causes
            numbers = self.first_numbers = Parting(entry.name, entry.kind, likely, tuple(also), self._unseen(entry))
        if self.first is not None or result.status == "equal":
            return
        if match.storage.plain:
            self.first = numbers
            return
        kind, text = describe(match.storage, entry)
        cause = Cause(kind, f"{kind.replace('_', ' ')}: {text}", {"differing_after_undoing": match.count})
        self.first = Parting(entry.name, entry.kind, cause, () if numbers is None else (numbers.cause, *numbers.also))

    def _unseen(self, entry: Entry) -> tuple[str, ...]:
        return tuple(name for name in entry.inputs if name not in self._equal)

    def _unusable(self, entry: Entry, path: Path, reason: str, dumped: Dumped | None) -> TensorResult:
        """A file without a usable tensor; an image of another size is looked into."""
        cause = None
        if dumped is not None and dumped.array is not None and self.golden.is_input(entry):
            cause = other_size(self.golden, entry.name, dumped.array)
        if self.first is None:
            found = cause or Cause("file", f"file: {path.name} {reason}")
            self.first = Parting(entry.name, entry.kind, found, (), self._unseen(entry))
            if cause is not None and self.first_numbers is None:
                self.first_numbers = self.first
        return TensorResult(entry.name, entry.kind, "unusable", path.name, note=reason)

    def _note_statistics(self, entry: Entry, match: Match) -> None:
        got = match.got
        if match.storage.dtype == "" and np.issubdtype(got.dtype, np.integer) and not entry.is_float:
            lo, hi = np.iinfo(entry.dtype).min, np.iinfo(entry.dtype).max
            got = got.astype(entry.dtype) if got.size and lo <= got.min() and got.max() <= hi else got
        self.statistics[entry.name] = {"golden": statistics(match.want), "device": statistics(got)}


def _size(dumped: Dumped, entry: Entry) -> str:
    wanted = int(np.prod(entry.shape))
    if dumped.array is not None:
        return f"has shape {list(dumped.array.shape)}, golden is {list(entry.shape)}"
    bytes_ = wanted * np.dtype(entry.dtype).itemsize
    cut = ", truncated" if len(dumped.data) < bytes_ else ""
    return f"has {len(dumped.data)} bytes{cut}; {entry.dtype} {list(entry.shape)} has {bytes_}"
