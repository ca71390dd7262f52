"""The Program: an integer-only network as data.

A short list of operators in execution order (SSA: each value is written once), the format of each value, and the
constants. It is saved as ``program.json`` and ``constants.safetensors`` and needs no model source to load, verify, run
or compile. What each operator computes is section 4 of ``docs/numerics.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._pytree import tree_unflatten, treespec_loads

from qatlib.atomic import Contents, atomic_folder
from qatlib.errors import ProgramError
from qatlib.qtype import DType, QType

SCHEMA = 4
"""Version of the file format; a Program of another version is refused."""
_CONTENTS = Contents(("program.json",), ("constants.safetensors", "golden"))


@dataclass(frozen=True)
class Value:
    """One tensor of the Program. A size of -k in ``shape`` is k times the batch size."""

    name: str
    shape: tuple[int, ...]
    qtype: QType

    def elements(self, batch: int = 1) -> int:
        """Number of elements for a batch of ``batch``."""
        return math.prod(self.sizes(batch))

    def sizes(self, batch: int = 1) -> tuple[int, ...]:
        """Shape for a batch of ``batch``."""
        return tuple(-size * batch if size < 0 else size for size in self.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether ``shape`` is that of this value at some batch size."""
        pairs = list(zip(self.shape, shape, strict=False))
        return len(self.shape) == len(shape) and all(
            got % -want == 0 if want < 0 else got == want for want, got in pairs
        )

    def bytes(self, batch: int = 1) -> int:
        return self.elements(batch) * self.qtype.bytes


@dataclass(frozen=True)
class Op:
    """One operator: reads ``inputs``, writes ``output``.

    ``attrs`` is plain JSON data. ``consts`` maps a role ("weight", "bias", "multiplier", "shift", …) to the key of a
    constant. ``module`` is the qualified name in the user's model and ``origin`` the types fused into this op, for
    people.
    """

    kind: str
    output: str
    inputs: tuple[str, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    consts: Mapping[str, str] = field(default_factory=dict)
    module: str = ""
    origin: str = ""

    @property
    def name(self) -> str:
        """An op is named after the value it writes."""
        return self.output


@dataclass(frozen=True)
class Program:
    """Integer network. ``inputs`` and ``outputs`` are names of values; ``meta`` is JSON data about where it came
    from.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    values: Mapping[str, Value]
    constants: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the constants are."""
        return next((tensor.device for tensor in self.constants.values()), torch.device("cpu"))

    def to(self, device: str | torch.device) -> Program:
        """The same Program with its constants on ``device``."""
        return replace(self, constants={key: tensor.to(device) for key, tensor in self.constants.items()})

    def constant(self, op: Op, role: str) -> Tensor:
        return self.constants[op.consts[role]]

    def in_values(self, op: Op) -> tuple[Value, ...]:
        return tuple(self.values[name] for name in op.inputs)

    def producer(self, value: str) -> Op | None:
        """The op that writes ``value``, or None for an input of the Program."""
        return next((op for op in self.ops if op.output == value), None)

    def nest(self, outputs: Sequence[Tensor]) -> Any:
        """Outputs in the order of :attr:`outputs`, nested as the model returned them."""
        structure = self.meta.get("output_structure")
        return tuple(outputs) if structure is None else tree_unflatten(list(outputs), treespec_loads(structure))

    def islands(self) -> tuple[Op, ...]:
        """Ops that run in float: what ``hybrid`` and ``preserve`` left behind."""
        return tuple(op for op in self.ops if op.kind == "float_op")

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, without: Collection[str] = ()) -> None:
        """Write ``program.json`` and ``constants.safetensors`` into ``folder``, which appears whole or not at all.

        Constants named in ``without`` are left out: who loads the Program has to bring them.

        A Program that is there is replaced, and golden vectors in it are removed. Raises OutputError: QAT225 for a
        folder that holds anything else, QAT226 for one that cannot be written; ProgramError (QAT174) for a broken
        Program.
        """
        verify(self)
        kept = {key: tensor for key, tensor in sorted(self.constants.items()) if key not in without}
        blob = save({key: tensor.contiguous().cpu() for key, tensor in kept.items()})
        document = {
            "schema": SCHEMA,
            "constants_sha256": hashlib.sha256(blob).hexdigest(),
            "meta": dict(self.meta),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "values": [
                {"name": v.name, "shape": v.shape, "dtype": v.qtype.format, "scale": v.qtype.scale}
                for v in self.values.values()
            ],
            "ops": [vars(op) | {"attrs": dict(op.attrs), "consts": dict(op.consts)} for op in self.ops],
        }
        text = json.dumps(document | {"sha256": _seal(document)}, indent=1)
        with atomic_folder(folder, _CONTENTS) as target:
            (target / "program.json").write_text(text + "\n", encoding="utf-8")
            (target / "constants.safetensors").write_bytes(blob)

    @staticmethod
    def load(folder: str | Path, beside: Mapping[str, Tensor] = MappingProxyType({})) -> Program:
        """Read what :meth:`save` wrote, with the constants ``beside`` that it left out; what the folder has stays.

        Raises ProgramError: QAT172 for a file that is missing, edited, truncated or foreign, QAT173 for another schema,
        QAT174 for a document that :func:`verify` refuses.
        """
        folder = Path(folder)
        document = _document(folder / "program.json")
        path = folder / "constants.safetensors"
        blob = _content(path)
        if hashlib.sha256(blob).hexdigest() != document.constants_sha256:
            seen = "does not have the checksum that program.json names: truncated, edited or of another Program"
            raise _unreadable(path, seen)
        try:
            constants = load(blob)
        except SafetensorError as error:
            raise _unreadable(path, f"is not a safetensors file ({error})") from None
        program = Program(
            inputs=tuple(document.inputs),
            outputs=tuple(document.outputs),
            ops=tuple(
                Op(o.kind, o.output, tuple(o.inputs), o.attrs, o.consts, o.module, o.origin) for o in document.ops
            ),
            values={v.name: v.value() for v in document.values},
            constants={**beside, **constants},
            meta=document.meta,
        )
        return verify(program)


# -- the document ------------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ValueRecord(_Strict):
    name: str
    shape: list[int]
    dtype: DType | Literal["bool"]
    scale: float | None

    def value(self) -> Value:
        qtype = QType("int8", self.scale, truth=True) if self.dtype == "bool" else QType(self.dtype, self.scale)
        return Value(self.name, tuple(self.shape), qtype)


class _OpRecord(_Strict):
    kind: str
    output: str
    inputs: list[str]
    attrs: dict[str, Any]
    consts: dict[str, str]
    module: str
    origin: str


class _Document(_Strict):
    version: int = Field(alias="schema")
    sha256: str
    constants_sha256: str
    meta: dict[str, Any]
    inputs: list[str]
    outputs: list[str]
    values: list[_ValueRecord]
    ops: list[_OpRecord]


def _document(path: Path) -> _Document:
    """``program.json`` at ``path``, if it is as it was written."""
    content = _content(path)
    try:
        raw = json.loads(content)
        seal = _seal(raw) if isinstance(raw, dict) else None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number too long, lists too deep
        raise _unreadable(path, f"is not JSON ({error})") from None
    schema = None if seal is None else raw.get("schema")
    if schema != SCHEMA:
        seen = f"has schema {schema!r}; this version reads {SCHEMA}"
        raise ProgramError("QAT173", str(path), seen, "Convert the model again")
    if raw.get("sha256") != seal:
        raise _unreadable(path, "does not have the checksum that it names: it was edited")
    try:
        return _Document.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise _unreadable(path, f"{at}: {first['msg']}") from None


def _seal(document: Mapping[str, Any]) -> str:
    """Hash of the document without its own field ``sha256``, in JSON with sorted keys."""
    bare = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror})") from None


def _unreadable(path: Path, seen: str) -> ProgramError:
    return ProgramError("QAT172", str(path), seen, "Run the convert stage again")


# -- the check ---------------------------------------------------------------------------------------------------------


def verify(program: Program) -> Program:
    """Return ``program`` if it is well formed, else raise ProgramError at the first broken op."""

    def broken(where: str, seen: str) -> ProgramError:
        return ProgramError("QAT174", where, seen, "The Program was built or edited wrongly; convert it again")

    written = set(program.inputs)
    for name in written:
        if name not in program.values:
            raise broken(name, "input has no value record")
    for op in program.ops:
        for name in op.inputs:
            if name not in written:
                raise broken(op.name, f"reads {name!r} before anything writes it")
        if op.output in written:
            raise broken(op.name, "writes a value that is already written")
        if op.output not in program.values:
            raise broken(op.name, "output has no value record")
        for role, key in op.consts.items():
            if key not in program.constants:
                raise broken(op.name, f"constant {role!r} ({key!r}) is missing")
            constant = program.constants[key]
            if constant.is_floating_point() and not bool(constant.isfinite().all()):
                raise broken(op.name, f"constant {role!r} is not finite")
        written.add(op.output)
    for name in program.outputs:
        if name not in written:
            raise broken(name, "is an output that nothing writes")
    for name, value in program.values.items():
        if name != value.name or name not in written:
            raise broken(name, "is a value that nothing writes, or has two names")
    return program
