"""The public calls of analysis: compare two adjacent models op by op, and write tables and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qatlib.analysis.call_sites import shared_calls, write_shared
from qatlib.analysis.capture import Inputs, capture
from qatlib.analysis.facts import Facts, input_facts
from qatlib.analysis.findings import Finding, Found
from qatlib.analysis.op_facts import program_facts
from qatlib.analysis.parameters import parameters_of
from qatlib.analysis.records import Capture, Mode
from qatlib.analysis.report import ReportData, write_report
from qatlib.analysis.rules import run_rules
from qatlib.analysis.sides import IntegerSide
from qatlib.analysis.similarity import SimilarityTable, check_measure, similarity_table, write_similarity
from qatlib.analysis.states import emulator_of, neighbours
from qatlib.analysis.statistics import statistics_table, write_statistics
from qatlib.analysis.stats import Measure
from qatlib.analysis.unfused import unfused_operations
from qatlib.fake.formats import format_rows
from qatlib.fake.model import FakeQuantModel


def capture_pair(
    model1: Any, model2: Any, inputs: Inputs | Iterable[Inputs], mode: Mode, measure: Measure | None = None
) -> Capture:
    """Capture two adjacent models over ``inputs`` (one batch, or an iterable of batches, with targets or without).

    FvsQ: the float model (or a FakeQuantModel in CALIBRATION state) and its calibrated FakeQuantModel in VALIDATION
    state. QvsQ: a FakeQuantModel in VALIDATION state and its integer form: a Program, an Emulator or what convert_fx
    returned. CvsQ: likewise, of a calibrated model that was not trained. Batches go to the device of the
    FakeQuantModel, and the Program runs there. Raises StateError (QAT155 to QAT158) for models in the wrong state and
    ConfigError (QAT108) for another mode.
    """
    pair = neighbours(model1, model2, inputs, mode)
    with pair.quantized.held_parameters():
        seen = capture(pair.reference, pair.other, pair.nodes, pair.batches, mode, measure)
    return replace(seen, saturations=pair.other.saturations()) if isinstance(pair.other, IntegerSide) else seen


def featuremap_similarity(
    model1: Any,
    model2: Any,
    inputs: Inputs | Iterable[Inputs],
    similarity: str | Callable[[Tensor, Tensor], float] = "Cosine",
    mode: Mode = "FvsQ",
) -> SimilarityTable:
    """Similarity of every op's output, in forward order; ``.by_op_error()`` gives the table ordered by op error.

    ``similarity`` is Cosine, MSE, L1, KL, SQNR, or a function of (reference, other) whose values are averaged over
    batches.
    """
    name = similarity if isinstance(similarity, str) else "custom"
    check_measure(name)
    measure = None if isinstance(similarity, str) else similarity
    return similarity_table(capture_pair(model1, model2, inputs, mode, measure), name)


def model_profiler(
    model1: Any,
    model2: Any,
    example_inputs: Inputs | Iterable[Inputs],
    mode: Mode = "FvsQ",
    out_dir: str | Path = "reports",
) -> tuple[Finding, ...]:
    """Compare two adjacent models and write ``profiler.html``, ``similarity-<mode>.csv`` and ``…-by-op-error.csv``,
    ``statistics-<mode>.csv`` and ``…-by-range.csv``; in FvsQ also ``shared.csv``.

    Returns the findings, errors first. ``example_inputs`` is one batch or an iterable of batches of real data.
    """
    seen = capture_pair(model1, model2, example_inputs, mode)
    if mode == "FvsQ":
        unfused, formats = unfused_operations(model2.graph), tuple(format_rows(model2))
        shared = shared_calls(seen, model2.graph)
        facts = Facts(
            state="VALIDATION", inputs=input_facts(seen), fvsq=seen, unfused=unfused, formats=formats, shared=shared
        )
        write_shared(shared, Path(out_dir) / "shared.csv")
    else:
        facts = Facts(state="VALIDATION", qvsq=seen, ops=program_facts(emulator_of(model2).program))
    findings = run_rules(facts)
    fake, exact = (model2, model1) if mode == "FvsQ" else (model1, None)
    exact = exact if isinstance(exact, FakeQuantModel) else None
    parameters = parameters_of(fake, quantized=mode != "FvsQ", exact=exact)
    write_similarity(seen, Path(out_dir))
    write_statistics(statistics_table(seen, parameters), mode, Path(out_dir))
    write_report(
        Path(out_dir) / "profiler.html",
        ReportData(found=Found(findings), captures=(seen,), ops=facts.ops, unfused=facts.unfused, calls=facts.shared),
    )
    return findings
