"""What a user can ask of the compiler beside the target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qatlib.compiler.target import Target, schema_errors
from qatlib.errors import CompileError

Level = Literal["O0", "O1", "O2", "O3"]
Objective = Literal["latency", "bandwidth", "balance"]
InputSource = Literal["auto", "ddr", "sram"]
LEVELS: tuple[Level, ...] = get_args(Level)


class CompileOptions(BaseModel):
    """How a Program is compiled; what each key does is in ``docs/targets.md``.

    Args:
        opt: what the plan may use: nothing, maps in the SRAM, staged weights and cascades, a search.
        objective: what it should save: cycles, bytes from and to the DRAM, or both alike.
        seed: of the search.
        time_limit_s: after which the search stops at its next step.
        cores: that run, each on a sample of its own.
        input_source: memory in which the inputs are when an inference starts; "auto": where the plan puts them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    opt: Level = "O2"
    objective: Objective = "latency"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    time_limit_s: Annotated[float, Field(gt=0, le=86400)] = 60.0
    cores: Annotated[int, Field(ge=1, le=1024)] = 1
    input_source: InputSource = "auto"


DEFAULTS = CompileOptions()


def parse_options(options: CompileOptions | Mapping[str, Any] | None, where: str = "options") -> CompileOptions:
    """Options as an object, by keyword, or None for the defaults; CompileError (QAT250) with all that is wrong."""
    if isinstance(options, CompileOptions):
        return options
    try:
        return CompileOptions.model_validate({} if options is None else options)
    except ValidationError as error:
        fix = "Correct these; docs/targets.md describes each option"
        raise CompileError("QAT250", where, schema_errors(error), fix) from None


def check_options(options: CompileOptions, target: Target) -> None:
    """Raise CompileError (QAT250) if ``target`` cannot do what the options ask of it."""
    if options.cores > target.cores:
        seen = f"is {options.cores}, but {target.name} has {target.cores}"
        raise CompileError("QAT250", "options.cores", seen, "Ask for no more, or state the cores of the target")
    if options.input_source == "sram" and not target.sram.holds_boundary:
        seen = f"is sram, but the SRAM of {target.name} may not hold inputs (sram.holds_boundary)"
        raise CompileError("QAT250", "options.input_source", seen, "Use ddr or auto")
