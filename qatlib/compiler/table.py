"""One Program on several targets, a row each: what it costs there, or why it does not run there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qatlib.compiler.executable import try_compile
from qatlib.compiler.legalize import Violation
from qatlib.compiler.target import Target, load_target
from qatlib.program import Program


@dataclass(frozen=True)
class TargetRow:
    """Estimates of one inference of batch 1; None, all of them, where the target refuses the Program.

    ``dram_bytes`` are moved per inference, ``sram_peak_bytes`` the most in use at any time of the plan.
    """

    target: str
    latency_us: float | None = None
    fps: float | None = None
    utilization: float | None = None
    dram_bytes: int | None = None
    sram_peak_bytes: int | None = None
    refusals: tuple[Violation, ...] = ()

    @property
    def refused(self) -> str:
        """The refusals by code, as in ``"QAT185 (3 ops)"``; empty where there are none."""
        ops: dict[str, set[str]] = {}
        for violation in self.refusals:
            ops.setdefault(violation.code, set()).add(violation.op)
        return ", ".join(f"{code} ({len(names)} op{'s' * (len(names) > 1)})" for code, names in sorted(ops.items()))

    def document(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def on_targets(
    program: Program, targets: Iterable[Target | str | Path], options: Mapping[str, Any] | None = None
) -> tuple[TargetRow, ...]:
    """A row per target, in their order; ``options`` are those of :func:`qatlib.compiler.compile_model`.

    Raises CompileError: QAT183 for a target that cannot be read, QAT250 for options that it cannot take.
    """
    loaded = [target if isinstance(target, Target) else load_target(target) for target in targets]
    return tuple(_row(program, target, options) for target in loaded)


def _row(program: Program, target: Target, options: Mapping[str, Any] | None) -> TargetRow:
    executable, refusals = try_compile(program, target, options)
    if executable is None:
        return TargetRow(target.name, refusals=refusals)
    seen = executable.performance
    return TargetRow(
        target.name, seen.latency_us, seen.fps, seen.utilization, seen.dram_bytes, executable.memory.sram.peak_bytes
    )


HEADINGS = ("target", "latency, µs", "frames/s", "MAC use", "DRAM, KiB", "SRAM peak, KiB", "refused")


def cells(row: TargetRow) -> tuple[str, ...]:
    """``row`` as text, under :data:`HEADINGS`."""
    kib = [_number(None if size is None else size / 1024, ".1f") for size in (row.dram_bytes, row.sram_peak_bytes)]
    return (
        row.target, _number(row.latency_us, ".1f"), _number(row.fps, ".0f"), _number(row.utilization, ".1%"), *kib,
        row.refused or "–",
    )  # fmt: skip


def markdown(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> str:
    """A table of text, numbers to the right."""
    numbers = {"latency, µs", "frames/s", "MAC use", "DRAM, KiB", "SRAM peak, KiB", "accuracy ratio"}
    rule = ["---:" if heading in numbers else "---" for heading in headings]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows)) + "\n"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
