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

from qatlib.analysis.records import Capture, Mode, OpRecord, Unmeasured
from qatlib.analysis.sides import Other, Reference, UnmeasurableError
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

    def __init__(self, node: Node, other: Other, measure: Measure | None) -> None:
        self.node = node
        self.absent = other.absent(node.name)
        self.qtype = FLOAT if self.absent else other.qtype(node.name)
        self.reference, self.other = RunningSummary(), RunningSummary()
        self.accumulated = RunningComparison(self.qtype, measure)
        self.same_input = RunningComparison(self.qtype, measure)
        self.channel_amax: Tensor | None = None
        self.reasons: dict[str, str] = {}
        if self.absent:
            self.reasons["accumulated error"] = self.reasons["same-input error"] = self.absent
        elif self.qtype.scale is None:
            self.reasons["error in LSB and KL"] = f"the output is {self.qtype.dtype} and has no per-tensor scale"

    def see_reference(self, other: Other, inputs: Sequence[Tensor], output: Tensor) -> None:
        below = self.node.attrs.get("below_maximum")
        self.reference.add(relevant(output, below))
        self._see_channels(output)
        if "same-input error" in self.reasons:
            return
        try:
            same = other.same_input(self.node.name, self.node.inputs, inputs)
        except UnmeasurableError as error:
            self.reasons["same-input error"] = str(error)
            return
        if same.shape == output.shape:
            self.same_input.add(*relevant_pair(output, same, below))
        else:
            self.reasons["same-input error"] = _shapes(output, same)

    def _see_channels(self, output: Tensor) -> None:
        operator = BY_NAME.get(self.node.op)
        if isinstance(operator, Dense) and output.numel():
            rows = output.detach().movedim(operator.channel_axis % output.dim(), 0).flatten(1)
            seen = torch.stack(torch.aminmax(rows, dim=1)).abs().amax(0)
            self.channel_amax = seen if self.channel_amax is None else torch.maximum(self.channel_amax, seen)

    def see_other(self, reference: Tensor, output: Tensor) -> None:
        if output.shape != reference.shape:
            self.reasons["accumulated error"] = _shapes(reference, output)
            return
        reference, output = relevant_pair(reference, output, self.node.attrs.get("below_maximum"))
        self.other.add(output)
        self.accumulated.add(reference, output)

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


def _shapes(reference: Tensor, other: Tensor) -> str:
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

    ``measure(reference, other) -> float`` is an extra similarity of the user's. Raises TrainingError (QAT165) when an
    output is NaN or infinite.
    """
    nodes = [node for node in nodes if node.op != INPUT]
    gauges = {node.name: _Gauge(node, other, measure) for node in nodes}
    count = samples = 0
    with torch.no_grad():
        for batch in batches:
            inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            _one_batch(reference, other, gauges, inputs)
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
    outputs: dict[str, Tensor] = {}

    def on_reference(name: str, given: tuple[Tensor, ...], output: Tensor) -> None:
        check_finite(output, name)
        if name in gauges:
            gauges[name].see_reference(other, given, output)
            outputs[name] = output

    def on_other(name: str, output: Tensor) -> None:
        check_finite(output, name)
        if name in gauges and name in outputs:
            gauges[name].see_other(outputs.pop(name), output)

    reference.walk(inputs, on_reference)
    other.outputs(inputs, on_other)
