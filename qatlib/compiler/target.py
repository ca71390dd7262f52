"""Description of an accelerator: a strict schema, and reading it from a YAML file.

The quantities and the cost model that they feed are explained in ``docs/targets.md``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from qatlib.compiler.hardware import (
    Buffers,
    Cycles,
    Dram,
    Extent,
    InFlight,
    MacArray,
    Rate,
    Sram,
    Strict,
    TableUnit,
    Unit,
    VectorUnit,
    Weights,
    fill,
)
from qatlib.compiler.yaml_file import read_yaml
from qatlib.errors import CompileError

IntDType = Literal["int8", "int16", "int32"]
DTypes = Annotated[tuple[IntDType, ...], Field(min_length=1, strict=False)]

SHIPPED = Path(__file__).parent.parent / "targets"


class OpRule(Strict):
    """What the target takes of one kind of op: dtypes of activations and weights, the largest sizes (absent = any)."""

    inputs: DTypes
    outputs: DTypes
    weights: DTypes = ("int8",)
    max_kernel: PositiveInt | None = None
    max_stride: PositiveInt | None = None
    max_dilation: PositiveInt | None = None
    max_channels: PositiveInt | None = None
    max_spatial_axes: Annotated[int, Field(ge=1, le=3)] | None = None


class Target(Strict):
    """An accelerator. ``source`` says where the numbers come from; every estimate repeats it.

    Maps inside the network are stored in pieces of ``brick_channels`` channels of a row; its inputs and results with
    the channels of a position side by side, as are all where ``brick_channels`` is 1.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    source: Annotated[str, Field(min_length=1, max_length=500)]
    clock_hz: Rate
    cores: Extent = 1
    mac_array: MacArray
    vector_unit: VectorUnit
    resize_unit: Unit | None = None
    warp_unit: Unit | None = None
    table_unit: TableUnit | None = None
    buffers: Buffers
    weights: Weights = Weights()
    sram: Sram
    dram: Dram
    in_flight: InFlight | None = None
    brick_channels: PositiveInt = 1
    launch_cycles: Cycles
    multiplier_bits: Annotated[int, Field(ge=8, le=21)]
    ops: Annotated[dict[str, OpRule], Field(min_length=1)]

    @field_validator("ops")
    @classmethod
    def _known_kinds(cls, ops: dict[str, OpRule]) -> dict[str, OpRule]:
        import qatlib.ops  # noqa: F401  (fills the registry)
        from qatlib.ops.base import BY_KIND, Operator

        runnable = {kind for kind, operator in BY_KIND.items() if type(operator).kernel is not Operator.kernel}
        known = sorted(runnable - {"quantize", "dequantize", "float_op"})
        unknown = [f"{kind!r}{_did_you_mean(kind, known)}" for kind in ops if kind not in known]
        if unknown:
            raise ValueError(f"unknown kinds {', '.join(unknown)}; known are {', '.join(known)}")
        return ops

    @model_validator(mode="after")
    def _vector_rates(self) -> Self:
        used = {dtype for rule in self.ops.values() for dtype in (*rule.inputs, *rule.outputs)}
        missing = sorted(dtype for dtype in used if self.vector_unit.elements_per_cycle.of(dtype) is None)
        if missing:
            raise ValueError(f"ops use {', '.join(missing)}, for which vector_unit.elements_per_cycle has no rate")
        return self

    @model_validator(mode="after")
    def _table_rates(self) -> Self:
        if self.table_unit is not None and "table" in self.ops:
            missing = sorted(dtype for dtype in self.ops["table"].inputs if self.table_unit.rate(dtype) is None)
            if missing:
                raise ValueError(f"ops.table reads {', '.join(missing)}, for which table_unit has no rate")
        return self

    @model_validator(mode="after")
    def _room_for_a_tile(self) -> Self:
        array, buffers = self.mac_array, self.buffers
        most = "x".join(map(str, buffers.max_block))
        tiles = [*array.tiles, *(array.own_channel_tiles or ()), *((array.row_tile,) if array.row_tile else ())]
        steps = [step for step in (array.depth_first, array.kernel_first) if step]
        inputs = min(step.pass_channels or step.channels for step in steps)
        for tile in tiles:
            shown, outputs = "x".join(map(str, tile)), math.prod(tile)
            if any(size > limit for size, limit in zip(tile, buffers.max_block, strict=True)):
                raise ValueError(f"buffers.max_block {most} holds no whole tile {shown} of mac_array")
            read = tile[0] * tile[1] * fill(inputs, buffers.input_channels)
            if not buffers.hold(read, outputs * 4):
                needed = f"{2 * read} bytes of inputs and {8 * outputs} of sums"
                raise ValueError(f"buffers do not hold two tiles {shown} of mac_array: {needed}")
            if outputs > self.sram.bytes:
                raise ValueError(f"sram.bytes is {self.sram.bytes}; one tile {shown} of mac_array has {outputs} bytes")
        return self

    def share(self, cores: int) -> Target:
        """The target as each of ``cores`` sees it while all of them run: they share the bandwidth of the DRAM."""
        dram = self.dram.model_copy(update={"bytes_per_s": self.dram.bytes_per_s / cores})
        return self if cores == 1 else self.model_copy(update={"dram": dram})

    @property
    def dram_bytes_per_cycle(self) -> float:
        return self.dram.bytes_per_s / self.clock_hz


def load_target(name_or_path: str | Path) -> Target:
    """Read a target: the name of a shipped one ("bayes-like") or the path of a YAML file.

    Raises CompileError (QAT183) for a file that is missing, too large, not plain YAML, or not of this schema; all
    schema errors are in the one message.
    """
    path = _find(name_or_path)
    return parse_target(read_yaml(path), str(path))


def parse_target(document: Any, where: str) -> Target:
    """Validate the content of a target file; ``where`` names it in errors (QAT183)."""
    try:
        return Target.model_validate(document)
    except ValidationError as error:
        fix = "Correct these keys; docs/targets.md describes each"
        raise CompileError("QAT183", where, schema_errors(error), fix) from None


def shipped_targets() -> tuple[str, ...]:
    """Names of the targets that come with the package."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def _find(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, str) and name_or_path in shipped_targets():
        return SHIPPED / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if not _is_file(path):
        names = shipped_targets()
        hint = _did_you_mean(str(name_or_path), names)
        fix = f"Give the path of a YAML file or one of {', '.join(names)}"
        raise CompileError("QAT183", str(name_or_path), f"is neither a file nor a shipped target{hint}", fix)
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no file can have that name
        return False


def schema_errors(error: ValidationError) -> str:
    """All of them in one line: key, what was seen, what is legal."""
    return "; ".join(_lines(error.errors(include_url=False)))


def _lines(errors: list[ErrorDetails]) -> Iterator[str]:
    for error in errors:
        key = ".".join(str(part) for part in error["loc"]) or "file"
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "unknown key"
        elif error["type"] not in ("missing", "value_error"):
            message = f"{message}, not {_short(error['input'])}"
        yield " ".join(f"{key}: {message}".split())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _did_you_mean(word: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
