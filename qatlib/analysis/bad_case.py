"""The samples of a data set on which two adjacent models differ most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qatlib.analysis.batches import Batch, peek
from qatlib.analysis.records import Mode
from qatlib.analysis.states import emulator_of, float_view, require_mode, require_quantized, require_untrained
from qatlib.errors import ConfigError, DataError
from qatlib.fake.float_form import float_form

SampleError = Callable[[list[Tensor], list[Tensor]], float]
"""``(reference leaves, other leaves) -> error`` of one sample, batch first; larger is worse."""


@dataclass(frozen=True)
class BadCase:
    """Sample ``index`` of the data, in their order. ``noise`` is the error power over the reference's, the mean of all
    outputs, or what a function of the user's gave. ``share`` is the sample's part of the error power of all samples,
    the mean of all outputs: small where only the reference is small.
    """

    index: int
    noise: float
    inputs: tuple[Tensor, ...]
    share: float = math.nan

    @property
    def sqnr_db(self) -> float:
        """``-10 log10 noise``; inf for identical outputs."""
        return math.inf if self.noise <= 0.0 else -10.0 * math.log10(self.noise)


@dataclass(frozen=True)
class BadCases:
    """``worst`` first; ``median`` is the noise of the median of all ``samples``."""

    worst: tuple[BadCase, ...]
    median: float
    samples: int

    def times_median(self, case: BadCase) -> float:
        """Noise of a sample over that of the median sample; inf where the latter has none."""
        if self.median:
            return case.noise / self.median
        return math.inf if case.noise else 1.0


def find_bad_case(
    model1: Any,
    model2: Any,
    batches: Any,
    mode: Mode = "FvsQ",
    count: int = 5,
    error: SampleError | None = None,
) -> BadCases:
    """Search ``batches`` for the ``count`` samples on which the outputs of two adjacent models differ most.

    The models are those of :func:`qatlib.model_profiler`. ``error`` takes the place of the noise of the outputs; it is
    called with leaves of batch size 1. Only the inputs found are kept. Raises as ``model_profiler``; ConfigError QAT217
    for a count below 1; DataError QAT214 for outputs without real numbers, QAT218 for one without a row per sample.
    """
    if count < 1:
        raise ConfigError("QAT217", "count", f"is {count}", "Ask for at least one sample")
    reference, other, data = _sides(model1, model2, mode, batches)
    noises: list[float] = []
    powers: list[Tensor] = []  # a row per sample, a column per output
    heap: list[tuple[float, int, tuple[Tensor, ...]]] = []
    for batch in data:
        with torch.no_grad():
            a, b = (tree_leaves(run(*batch.inputs)) for run in (reference, other))
        seen = [(x, y) for x, y in zip(a, b, strict=True) if x.is_floating_point()]
        _check(seen, len(batch))
        powers.append(torch.stack([_power(y.double() - x.double(), len(batch)) for x, y in seen], 1).cpu())
        for row, noise in enumerate(_noises(seen, len(batch), error)):
            item = (noise, -len(noises), tuple(x[row : row + 1] for x in batch.inputs))
            noises.append(noise)
            if len(heap) < count:
                heapq.heappush(heap, item)
            elif item[:2] > heap[0][:2]:
                heapq.heapreplace(heap, item)
    worst = sorted(heap, key=lambda item: (-item[0], -item[1]))
    errors = torch.cat(powers)
    shares = (errors / errors.sum(0).clamp_min(torch.finfo(errors.dtype).tiny)).mean(1).tolist()
    cases = tuple(
        BadCase(-place, noise, tuple(x.clone() for x in inputs), shares[-place]) for noise, place, inputs in worst
    )
    return BadCases(cases, median(noises), len(noises))


_Run = Callable[..., Any]


def _sides(model1: Any, model2: Any, mode: Mode, batches: Any) -> tuple[_Run, _Run, Iterator[Batch]]:
    """Both models as calls that return the same leaves, and the batches on their device."""
    require_mode(mode)
    where = "model2" if mode == "FvsQ" else "model1"
    fake = require_quantized(model2 if mode == "FvsQ" else model1, where)
    device = fake.state_code.device
    data, first = peek(batches, fake.graph.inputs)
    moved = (batch.to(device) for batch in data)
    if mode != "QvsQ":
        require_untrained(fake, where)
    if mode != "FvsQ":
        return fake, emulator_of(model2, device), moved
    return partial(float_form, float_view(model1, fake, first.to(device).inputs)), fake, moved


def _check(seen: list[tuple[Tensor, Tensor]], size: int) -> None:
    if not seen:
        fix = "Analyse the model without its last step, so that scores or coordinates come out"
        raise DataError("QAT214", "outputs", "hold integers or truth values alone, which have no distance", fix)
    for x, _ in seen:
        if x.dim() == 0 or x.shape[0] != size:
            shown = f"has shape {list(x.shape)} for {size} samples"
            raise DataError("QAT218", "outputs", shown, "Return one row per sample, or pass batches of one sample")


def _noises(seen: list[tuple[Tensor, Tensor]], size: int, error: SampleError | None) -> list[float]:
    if error is not None:
        rows = ([[x[i : i + 1] for x in side] for side in zip(*seen, strict=True)] for i in range(size))
        return [float(error(a, b)) for a, b in rows]
    total = torch.zeros(size, dtype=torch.float64)
    for x, y in seen:
        power, off = _power(x.double(), size), _power(y.double() - x.double(), size)
        total += torch.where(power > 0, off / power, torch.where(off > 0, torch.inf, 0.0)).cpu()
    return (total / len(seen)).tolist()


def _power(values: Tensor, size: int) -> Tensor:
    return values.reshape(size, -1).square().sum(1)
