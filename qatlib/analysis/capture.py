"""One streaming pass over the data for a pair of adjacent models: errors and ranges of every op.

For each op, in forward order: the *accumulated* error (each model on its own inputs) and the *same-input* error (the
other model's op on the reference's inputs), with the statistics of both outputs. Memory does not grow with the number
of batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qatlib.analysis.batches import Batch, samples_at_once
from qatlib.analysis.pieces import OnGrid, pieces, real
from qatlib.analysis.records import Capture, Mode, OpRecord, Unmeasured
from qatlib.analysis.sides import FloatSide, Other, Output, Reference, UnmeasurableError
from qatlib.analysis.stats import Measure, RunningComparison, RunningSummary, check_finite
from qatlib.graph.calls import calls_of_shared
from qatlib.graph.ir import INPUT, Node
from qatlib.ops.base import BY_NAME
from qatlib.ops.dense import Dense
from qatlib.ops.masks import relevant, relevant_pair
from qatlib.qtype import FLOAT

Inputs = Tensor | Sequence[Tensor] | tuple[Sequence[Tensor], Any]
"""One batch: a tensor, one for each input of the model, or inputs and target."""


class _Gauge:
    """Everything measured at one node; before a softmax, of what the softmax can tell from 0."""

    def __init__(self, node: Node, reference: Reference, other: Other, measure: Measure | None) -> None:
        self.node = node
        self.absent = other.absent(node.name)
        self.qtype = FLOAT if self.absent else other.qtype(node.name)
        self.reference, self.other = RunningSummary(), RunningSummary()
        self.accumulated = RunningComparison(self.qtype, measure, steps=False)
        self.same_input = RunningComparison(self.qtype, measure, histograms=False)
        operator = BY_NAME.get(node.op)
        self._channels = operator if isinstance(reference, FloatSide) and isinstance(operator, Dense) else None
        self.channel_amax: Tensor | None = None
        rounded = self.qtype.scale is not None and reference.grid(node.name) == self.qtype
        self._grid = self.qtype.scale if rounded and "below_maximum" not in node.attrs else None
        self.reasons: dict[str, str] = {}
        if self.absent:
            self.reasons["accumulated error"] = self.reasons["same-input error"] = self.absent
        elif self.qtype.scale is None:
            self.reasons["error in LSB and KL"] = f"the output is {self.qtype.dtype} and has no per-tensor scale"

    def see(self, other: Other, inputs: Sequence[Tensor], reference: Tensor, output: Output | None) -> None:
        """One batch: the reference's op, and the other model's output, None where it has none."""
        self._see_channels(reference)
        if output is not None and output.shape != reference.shape:
            self.reasons["accumulated error"] = _shapes(reference, output)
            output = None
        below = self.node.attrs.get("below_maximum")
        shown = relevant(reference, below)
        sides = ((self.same_input, self._same_input(other, inputs, reference)), (self.accumulated, output))
        compared = [(running, _relevant(reference, x, below)) for running, x in sides if x is not None]
        for running, x in compared:
            running.measure(shown, x)
        first = shown if self._grid is None else OnGrid(shown, self._grid)
        for ref, *rest in pieces(self.qtype, first, *(x for _, x in compared)):
            self.reference.add_piece(ref)
            for (running, _), piece in zip(compared, rest, strict=True):
                running.add_pieces(ref, piece)
            if output is not None:
                self.other.add_piece(rest[-1])

    def _same_input(self, other: Other, inputs: Sequence[Tensor], reference: Tensor) -> Output | None:
        if "same-input error" in self.reasons:
            return None
        try:
            same = other.same_input(self.node.name, self.node.inputs, inputs)
        except UnmeasurableError as error:
            self.reasons["same-input error"] = str(error)
            return None
        if same.shape == reference.shape:
            return same
        self.reasons["same-input error"] = _shapes(reference, same)
        return None

    def _see_channels(self, output: Tensor) -> None:
        if self._channels is not None and output.numel():
            seen = _channel_amax(output.detach(), self._channels.channel_axis % output.dim())
            self.channel_amax = seen if self.channel_amax is None else torch.maximum(self.channel_amax, seen)

    def record(self, index: int, call: int) -> OpRecord:
        node = self.node
        return OpRecord(
            index=index,
            name=node.name,
            module=node.module,
            module_type=node.module_type,
            op=node.op,
            inputs=tuple(node.inputs),
            qtype=self.qtype,
            reference=self.reference.result(),
            other=self.other.result(),
            accumulated=None if "accumulated error" in self.reasons else self.accumulated.result(),
            same_input=None if "same-input error" in self.reasons else self.same_input.result(),
            call=call,
            composite=node.composite,
            channel_amax=() if self.channel_amax is None else tuple(self.channel_amax.tolist()),
        )


def _relevant(reference: Tensor, other: Output, below: Sequence[Any] | None) -> Output:
    if below is None:
        return other
    return relevant_pair(reference, real(other), below)[1]


def _channel_amax(x: Tensor, axis: int) -> Tensor:
    """Largest magnitude of every channel."""
    if axis == 1 and x.dim() > 2:  # faster than both axes at once
        positions = x.flatten(2)
        return torch.maximum(positions.amax(2), -positions.amin(2)).amax(0)
    rest = [i for i in range(x.dim()) if i != axis]
    return torch.maximum(x.amax(rest), -x.amin(rest))


def _shapes(reference: Tensor, other: Output) -> str:
    return f"shapes differ: reference {tuple(reference.shape)}, other {tuple(other.shape)}"


def capture(
    reference: Reference,
    other: Other,
    nodes: Sequence[Node],
    batches: Iterable[Inputs],
    mode: Mode,
    measure: Measure | None = None,
) -> Capture:
    """Run both sides over ``batches`` once and return a record per node, in the order of ``nodes``.

    ``measure(reference, other) -> float`` is an extra similarity of the user's, of whole batches. Raises TrainingError
    (QAT165) when an output is NaN or infinite.
    """
    most = 0 if measure else samples_at_once(nodes)
    nodes = [node for node in nodes if node.op != INPUT]
    gauges = {node.name: _Gauge(node, reference, other, measure) for node in nodes}
    count = samples = 0
    with torch.no_grad():
        for batch in batches:
            inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            for part in Batch(inputs).parts(most):
                _one_batch(reference, other, gauges, part.inputs)
            count, samples = count + 1, samples + int(inputs[0].shape[0])
    calls = calls_of_shared(nodes)
    return Capture(
        mode=mode,
        batches=count,
        samples=samples,
        records=tuple(gauge.record(i, calls.get(name, (0, 0))[0]) for i, (name, gauge) in enumerate(gauges.items())),
        unmeasured=tuple(Unmeasured(n, what, why) for n, g in gauges.items() for what, why in g.reasons.items()),
    )


def _one_batch(reference: Reference, other: Other, gauges: dict[str, _Gauge], inputs: tuple[Tensor, ...]) -> None:
    """Both models side by side, so that no more is kept than what the next ops read."""
    theirs, ahead = other.outputs(inputs), dict[str, Output]()

    def output_of(name: str) -> Output | None:
        while name not in ahead:
            found = next(theirs, None)
            if found is None:
                return None
            _check(found[0], found[1])
            if found[0] in gauges:
                ahead[found[0]] = found[1]
        return ahead.pop(name)

    for name, given, output in reference.steps(inputs):
        check_finite(output, name)
        if (gauge := gauges.get(name)) is not None:
            gauge.see(other, given, output, None if gauge.absent else output_of(name))
    for left in theirs:
        _check(*left)


def _check(name: str, output: Output) -> None:
    if isinstance(output, Tensor):  # codes are finite
        check_finite(output, name)
