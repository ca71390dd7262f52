"""Golden vectors: the inputs of one run of a Program and every integer that it computes, as files.

A folder of golden vectors holds ``manifest.json``, ``inputs.safetensors`` (the float inputs as given),
``values.safetensors`` (the output of every op) and ``program/``, the Program itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import Tensor

from qatlib.atomic import Contents, atomic_folder
from qatlib.emulator import Emulator
from qatlib.errors import QatError
from qatlib.program import Op, Program

SCHEMA = 1
"""Version of the folder's format; golden vectors of another version are refused."""
LAYOUT = "torch axis order (batch first, channels second), C order, little endian"
_CONTENTS = Contents(("manifest.json",), ("inputs.safetensors", "values.safetensors", "program"))
_FILES = ("inputs.safetensors", "values.safetensors", "program/program.json", "program/constants.safetensors")

Array = NDArray[Any]


class GoldenError(QatError, ValueError):
    """Golden vectors or a device dump cannot be read or do not fit (QAT200 to QAT205)."""


@dataclass(frozen=True)
class Entry:
    """One tensor. ``shape`` is that of the file; in ``template`` a size of -k is k times the batch.

    ``kind`` is the Program op that wrote it, "input" for an input of the Program; ``scale`` is its unit, None for
    float32 and int32.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    template: tuple[int, ...]
    scale: float | None
    inputs: tuple[str, ...] = ()
    module: str = ""

    @property
    def is_float(self) -> bool:
        return self.dtype == "float32"

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Shape for a batch of ``batch``."""
        return tuple(-size * batch if size < 0 else size for size in self.template)

    @property
    def batch_axis(self) -> int | None:
        """The axis whose size grows with the batch; None for a constant."""
        return next((axis for axis, size in enumerate(self.template) if size < 0), None)


@dataclass(frozen=True)
class Statistics:
    """Of one tensor: hash of its bytes (C order, little endian), range, mean and deviation in its own unit."""

    sha256: str
    min: float
    max: float
    mean: float
    std: float


def statistics(x: Array) -> Statistics:
    """Statistics of ``x``, formed in float64; zeros for a tensor without elements."""
    wide = x.astype(np.float64)
    digest = hashlib.sha256(np.asarray(x, dtype=x.dtype.newbyteorder("<"), order="C").tobytes()).hexdigest()
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = [wide.min(), wide.max(), wide.mean(), wide.std()] if wide.size else [0.0] * 4
    return Statistics(digest, *(float(number) for number in numbers))


@dataclass(frozen=True)
class Golden:
    """What :func:`load_golden` read. ``entries`` are inputs first, then ops in execution order."""

    folder: Path
    batch: int
    entries: tuple[Entry, ...]
    tensors: Mapping[str, Array]
    program: Program
    _runs: dict[int, Mapping[str, Array]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def ops(self) -> dict[str, Op]:
        """Op of the Program by the name of its output."""
        return {op.output: op for op in self.program.ops}

    def is_input(self, entry: Entry) -> bool:
        """Whether only pre-processing, and at most the quantization of an input, is behind ``entry``."""
        return entry.kind == "input" or (entry.kind == "quantize" and entry.inputs[0] in self.program.inputs)

    def samples(self, name: str, count: int) -> Array:
        """Tensor ``name`` for the first ``count`` samples of the batch; all of it where it has no batch axis."""
        entry = self.by_name[name]
        axis = entry.batch_axis
        if axis is None or count == self.batch:
            return self.tensors[name]
        if entry.template[axis] == -1:
            return self.tensors[name][tuple(slice(0, size) for size in entry.sizes(count))]
        if count not in self._runs:  # batch and another axis are merged, in an order that only the Program knows
            inputs = (torch.tensor(self.samples(x, count)) for x in self.program.inputs)
            self._runs[count] = {key: value.numpy() for key, value in Emulator(self.program).trace(*inputs).items()}
        return self._runs[count][name]

    def lsb(self, name: str) -> Array | None:
        """Real value of one code behind a float tensor that a ``dequantize`` wrote, to broadcast; else None."""
        op = self.ops.get(name)
        if op is None or op.kind != "dequantize":
            return None
        if "scale" in op.consts:
            return np.asarray(self.program.constant(op, "scale").double().numpy())
        return np.asarray(self.by_name[op.inputs[0]].scale)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_golden(program: Program, inputs: Tensor | Sequence[Tensor], folder: str | Path) -> None:
    """Run ``program`` on one batch and write inputs, every value and the Program to ``folder``, whole or not at all.

    ``inputs`` holds one tensor per input of the Program, batch first. Raises ProgramError (QAT180, QAT181) for inputs
    that do not fit or hold NaN, GoldenError (QAT205) for a batch of 0, OutputError (QAT225, QAT226) for a folder that
    holds anything but golden vectors or cannot be written.
    """
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if any(x.numel() == 0 for x in given):
        raise GoldenError("QAT205", "inputs", "hold no sample", "Give at least one")
    values = Emulator(program).trace(*given)
    arrays = {name: np.asarray(value.cpu().numpy(), order="C") for name, value in values.items()}
    entries = _entries(program, arrays)
    with atomic_folder(folder, _CONTENTS) as target:
        (target / "inputs.safetensors").write_bytes(save({name: arrays[name] for name in program.inputs}))
        (target / "values.safetensors").write_bytes(save({op.output: arrays[op.output] for op in program.ops}))
        program.to("cpu").save(target / "program")
        manifest = {
            "schema": SCHEMA,
            "layout": LAYOUT,
            "batch": _batch(entries),
            "files": {name: _sha256(target / name) for name in _FILES},
            "tensors": [asdict(entry) for entry in entries],
            "statistics": {name: _both_sides(program, arrays, name) for name in program.inputs},
        }
        text = json.dumps(manifest | {"sha256": _seal(manifest)}, indent=1)
        (target / "manifest.json").write_text(text + "\n", encoding="utf-8")


_READ_AS = {"i": np.int64, "u": np.int64, "f": np.float32, "b": np.bool_}


def read_inputs(paths: Sequence[Path]) -> tuple[Tensor, ...]:
    """Inputs of a Program from .npy files, float64 as float32, truth values as they are.

    Raises GoldenError QAT205 for a file that holds neither numbers nor truth values.
    """
    inputs = []
    for path in paths:
        try:
            array: Any = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            seen = f"cannot be read ({' '.join(str(error).split())[:120]})"
            raise GoldenError("QAT205", str(path), seen, "Write it with numpy.save") from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in _READ_AS:
            raise GoldenError("QAT205", str(path), "is not an array of numbers", "Write it with numpy.save")
        inputs.append(torch.from_numpy(array.astype(_READ_AS[array.dtype.kind])))
    return tuple(inputs)


def _entries(program: Program, arrays: Mapping[str, Array]) -> tuple[Entry, ...]:
    ops = {op.output: op for op in program.ops}
    entries = []
    for name in (*program.inputs, *ops):
        value, op = program.values[name], ops.get(name)
        origin = ("input", (), "") if op is None else (op.kind, op.inputs, op.module)
        entries.append(
            Entry(name, origin[0], value.qtype.dtype, arrays[name].shape, value.shape, value.qtype.scale, *origin[1:])
        )
    return tuple(entries)


def _batch(entries: Sequence[Entry]) -> int:
    pairs = ((want, got) for entry in entries for want, got in zip(entry.template, entry.shape, strict=True))
    return next((got // -want for want, got in pairs if want < 0), 1)


def _both_sides(program: Program, arrays: Mapping[str, Array], name: str) -> dict[str, Any]:
    """Statistics of an input as given, and of each tensor of codes that ``quantize`` makes of it."""
    codes = [op.output for op in program.ops if op.kind == "quantize" and op.inputs == (name,)]
    return {
        "given": asdict(statistics(arrays[name])),
        "quantized": {code: asdict(statistics(arrays[code])) for code in codes},
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    """Hash of the manifest without its own field ``sha256``."""
    bare = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


def load_golden(folder: str | Path) -> Golden:
    """Read what :func:`write_golden` wrote.

    Raises GoldenError: QAT200 for a folder that holds no golden vectors, QAT201 for files that were edited or
    truncated or are of another version.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    for name in _FILES:
        if _read(folder / name) != manifest["files"].get(name):
            raise _changed(folder / name, "does not have the checksum that manifest.json names")
    arrays = load((folder / "inputs.safetensors").read_bytes()) | load((folder / "values.safetensors").read_bytes())
    entries = tuple(
        Entry(**(item | {key: tuple(item[key]) for key in ("shape", "template", "inputs")}))
        for item in manifest["tensors"]
    )
    return Golden(folder, manifest["batch"], entries, arrays, Program.load(folder / "program"))


def _read(path: Path) -> str:
    try:
        return _sha256(path)
    except OSError as error:
        raise _changed(path, f"cannot be read ({error.strerror})") from None


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GoldenError(
            "QAT200",
            str(folder),
            f"holds no golden vectors: manifest.json cannot be read ({error.strerror})",
            "Name the folder that convert (params convert.golden.items) or `qatlib golden` wrote",
        ) from None
    except ValueError as error:
        raise _changed(path, f"is not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        seen = manifest.get("schema") if isinstance(manifest, dict) else None
        raise _changed(path, f"has schema {seen!r}; this version reads {SCHEMA}")
    if manifest.get("sha256") != _seal(manifest):
        raise _changed(path, "does not have the checksum that it names: it was edited")
    return manifest


def _changed(path: Path, seen: str) -> GoldenError:
    return GoldenError("QAT201", str(path), seen, "Write the golden vectors again")
