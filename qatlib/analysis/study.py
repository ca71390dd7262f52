"""Everything of ``analyze.sensitivity``: what each op costs, step by step, in conversion, and the worst samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qatlib.analysis.bad_case import BadCases, find_bad_case
from qatlib.analysis.conversion_loss import ConversionLoss, bisect_conversion
from qatlib.analysis.distance import Distance
from qatlib.analysis.records import Mode, Unmeasured
from qatlib.analysis.sensitivity import Sensitivity, sensitivity
from qatlib.analysis.steps import Steps, step_quantization
from qatlib.atomic import write_csv
from qatlib.errors import DataError
from qatlib.pipeline.after_training import float_side
from qatlib.program import Program

if TYPE_CHECKING:
    from qatlib.pipeline.config import SensitivityParams
    from qatlib.pipeline.project import Project

ALL, NONE = "(all)", "(none)"
"""Stand for the name of an op where everything, or nothing, is rounded."""
_DISTANCE = ("sqnr_db", "mse", "cosine", "metric")
_HEADERS = {
    "sensitivity": ("op", "type", "kind", "part", *_DISTANCE, "share", "score"),
    "steps": ("k", "op", "type", *(f"{set_}_{key}" for set_ in ("first", "alone") for key in _DISTANCE)),
    "conversion_loss": ("op", "type", *_DISTANCE, "share", "smallest"),
    "bad_cases": ("mode", "index", "sqnr_db", "times_median", "share"),
}

Value = str | int | float | None


@dataclass(frozen=True)
class Study:
    """What was asked for; None where it was not. ``bad_cases`` by mode; ``unmeasured`` has the modes without."""

    sensitivity: Sensitivity
    steps: Steps | None = None
    conversion: ConversionLoss | None = None
    bad_cases: tuple[tuple[str, BadCases], ...] = ()
    unmeasured: tuple[Unmeasured, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out and why, a sentence each."""
        return tuple(f"{one.what} of {one.name} are not measured: {one.why}" for one in self.unmeasured)


def study_of(project: Project, section: SensitivityParams) -> Study:
    """Study the model that ships (``artifacts/qat.safetensors`` and ``artifacts/program``) on validation images.

    Its reference is that model without rounding. Bad cases are those of the calibrated model against float, and of the
    Program against fake-quant; where outputs have no row per sample there are none. Otherwise raises as the calls that
    it makes.
    """
    fake, program = project.load_fake_quant("artifacts/qat.safetensors"), Program.load("artifacts/program")
    data = project.batches("val", section.images, section.batch_size)
    metric = project.metric if section.metric else None
    kinds, groups = section.kinds, section.groups
    seen = sensitivity(fake, data, kinds=kinds, parts=section.parts, groups=groups, top=section.top, metric=metric)
    found: list[tuple[str, BadCases]] = []
    unmeasured: list[Unmeasured] = []
    if section.bad_cases:
        path = "artifacts/calibrated.safetensors"
        pairs: dict[Mode, tuple[Any, Any]] = {
            "FvsQ": (float_side(project, path), project.load_fake_quant(path)),
            "QvsQ": (fake, program),
        }
        for mode, (reference, other) in pairs.items():
            try:
                found.append((mode, find_bad_case(reference, other, data, mode, section.bad_cases)))
            except DataError as error:
                if error.code != "QAT218":
                    raise
                unmeasured.append(Unmeasured(mode, "bad cases", f"{error.where} {error.seen}"))
    return Study(
        sensitivity=seen,
        steps=step_quantization(fake, data, groups=groups, metric=metric) if section.steps else None,
        conversion=bisect_conversion(fake, program, data, groups=groups, metric=metric) if section.conversion else None,
        bad_cases=tuple(found),
        unmeasured=tuple(unmeasured),
    )


def write_study(study: Study | None, folder: Path) -> None:
    """``sensitivity.csv``, ``steps.csv``, ``conversion_loss.csv`` and ``bad_cases.csv``; headers alone if not made."""
    rows: dict[str, Iterable[Sequence[Value]]] = dict.fromkeys(_HEADERS, ())
    if study is not None:
        rows["sensitivity"] = _sensitivity(study.sensitivity)
        rows["steps"] = () if study.steps is None else _steps(study.steps)
        rows["conversion_loss"] = () if study.conversion is None else _conversion(study.conversion)
        rows["bad_cases"] = [row for mode, cases in study.bad_cases for row in _cases(mode, cases)]
    for name, header in _HEADERS.items():
        write_csv(folder / f"{name}.csv", header, rows[name])


def _cells(distance: Distance) -> tuple[Value, ...]:
    return distance.sqnr_db, distance.mse, distance.cosine, distance.metric


def _sensitivity(seen: Sensitivity) -> list[Sequence[Value]]:
    exact = Distance(0.0, 0.0, 1.0, seen.float_metric)
    return [
        (NONE, "", "on", "all", *_cells(exact), 0.0, None),
        (ALL, "", "on", "all", *_cells(seen.whole), 1.0, None),
        *(
            (t.unit.name, t.unit.type, t.kind, t.part, *_cells(t.distance), t.share, seen.scores[t.unit.name])
            for t in seen.trials
        ),
    ]


def _steps(seen: Steps) -> list[Sequence[Value]]:
    start = (0, NONE, "", *_cells(seen.start), *_cells(seen.start))
    rows = ((k, s.unit.name, s.unit.type, *_cells(s.first), *_cells(s.alone)) for k, s in enumerate(seen.steps, 1))
    return [start, *rows]


def _conversion(seen: ConversionLoss) -> list[Sequence[Value]]:
    few = set(seen.smallest)
    return [
        (NONE, "", *_cells(Distance(0.0, 0.0, 1.0, seen.fake_metric)), 0.0, None),
        (ALL, "", *_cells(seen.whole), 1.0, None),
        *((t.unit.name, t.unit.type, *_cells(t.alone), t.share, int(t.unit in few)) for t in seen.trials),
    ]


def _cases(mode: str, seen: BadCases) -> list[Sequence[Value]]:
    return [(mode, case.index, case.sqnr_db, seen.times_median(case), case.share) for case in seen.worst]
