"""Running a fake-quant model with each op in a form of its own, and again only from where a form changed.

One batch is run once and its values are kept. A variant computes the ops whose form it changes and what depends on
them; all else is read from the values kept. The ops computed see the tensors that a full run would give them, in the
same shapes, so the result is that of a full run, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from qatlib.errors import QConfigError
from qatlib.fake.fake_quant import ConstantFakeQuantize, FakeQuantize, WeightFakeQuantize
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.op import FakeOp
from qatlib.fake.qconfig import FakeQuantSpec
from qatlib.ops.base import BY_NAME
from qatlib.qtype import scale_of

Compute = Callable[[str, tuple[Tensor, ...]], Tensor]
"""``(name of a node, its inputs) -> its output``."""


@dataclass(frozen=True)
class Form:
    """What is rounded of one op: dtype of its weights and of its output. None stays float, or has nothing to round."""

    weight: str | None = None
    activation: str | None = None


FLOAT = Form()


class FormedModel:
    """A copy of a calibrated model, on the same parameters, whose ops can be float, int8 or int16 one by one.

    ``full`` is the form of every op that rounds anything; with all ops in it, the copy computes what the model does.
    With all in :data:`FLOAT` it computes what the model does without quantization.
    """

    def __init__(self, model: FakeQuantModel) -> None:
        self.model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        self._switches = {name: switch for name, op in self.model.ops() if (switch := _Switch(op)).full != FLOAT}
        self.full = {name: switch.full for name, switch in self._switches.items()}

    def widened(self, name: str) -> Form:
        """The full form of an op with 16 bits wherever it has 8, as far as it has a form with 16 bits."""
        return self._switches[name].widened

    def refuses(self, name: str, form: Form) -> str:
        """Why the op, or one that reads it, has no integer form with ``form``; empty if all have."""
        return self.refusal(self.full | {name: form})

    def refusal(self, forms: Mapping[str, Form]) -> str:
        """Why an op has no integer form with ``forms``; empty if all have."""
        self.computing(forms)
        for _, op in self.model.ops():
            if op.hybrid:
                continue
            dtypes = [self.model.dtype(i) for i in op.node.inputs]
            try:
                BY_NAME[op.node.op].check_formats(op.node.described(), dtypes, self.model.dtype(op.node.name))
            except QConfigError as error:
                return f"{error.where} {error.seen}"
        return ""

    def computing(self, forms: Mapping[str, Form]) -> Compute:
        """How ops compute with ``forms``; those not named are float. Valid until the next call."""
        for name, switch in self._switches.items():
            switch.set(forms.get(name, FLOAT))
        return self._compute

    def _compute(self, name: str, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.model.compute(name, *inputs)


class _Switch:
    """Sets what one op rounds."""

    def __init__(self, op: FakeOp) -> None:
        self._op = op
        self._inputs = op._input_quantizer
        self._rounds = bool(self._inputs) and BY_NAME[op.node.op].rounds(op.node.attrs)
        self._weights: dict[str | None, WeightFakeQuantize | None] = {None: None}
        self._fake = op.activation_post_process
        self._fake_dtype = self._fake.spec.dtype if self._fake else ""
        self._formats = {} if self._fake is None else _formats(self._fake)
        weight = activation = None
        if (weights := op.weight_fake_quant) is not None:
            weight = weights.spec.dtype
            self._weights |= {"int16": _wide(weights), weight: weights}
        if self._fake is not None:
            activation = self._fake.spec.dtype
        elif self._rounds:
            activation = self._inputs[0].spec.dtype
        self.full = self.form = Form(weight, activation)

    @property
    def widened(self) -> Form:
        wide = "int16" in self._formats
        return Form(self.full.weight and "int16", "int16" if wide else self.full.activation)

    def set(self, form: Form) -> None:
        if form == self.form:
            return
        op = self._op
        op.weight_fake_quant = self._weights[form.weight]
        op.activation_post_process = self._fake if form.activation else None
        if self._rounds:
            op._input_quantizer = self._inputs if form.activation else ()
        if self._fake is not None:  # float ones, too: readers round their biases to the unit of its scale
            self._fake.spec, scale = self._formats[form.activation or self._fake_dtype]
            self._fake.scale.fill_(scale)
        self.form = form


def _formats(fake: FakeQuantize) -> dict[str, tuple[FakeQuantSpec, float]]:
    """Settings and scale by dtype: the present ones, and 16 bits over the whole range that calibration saw."""
    present, scale = fake.spec, float(fake.scale)
    found: dict[str, tuple[FakeQuantSpec, float]] = {present.dtype: (present, scale)}
    if present.dtype == "int8" and not (isinstance(fake, ConstantFakeQuantize) and fake.low == fake.high):
        spec = replace(present, dtype="int16", scale=present.scale and present.scale / 256)
        reach = max(abs(float(fake.low)), abs(float(fake.high)), float(fake.room), scale * 255 / 2)
        found["int16"] = spec, spec.scale or scale_of(reach, "int16", fake.where)
    return found


def _wide(weights: WeightFakeQuantize) -> WeightFakeQuantize:
    wide = WeightFakeQuantize(replace(weights.spec, dtype="int16", kind="moving_average"), len(weights.kept))
    return wide.to(weights.kept.device)


class Replay:
    """The values of one batch in a base form, and variants of it.

    ``computed`` counts the ops computed so far, the base included.
    """

    def __init__(self, model: FakeQuantModel, inputs: Sequence[Tensor], compute: Compute) -> None:
        graph = model.graph
        self._nodes = [(name, op.node.inputs) for name, op in model.ops()]
        self._outputs, self._structure = graph.outputs, graph.structure
        last = {source: name for name, sources in self._nodes for source in sources}
        kept = set(graph.outputs)
        self._dying: dict[str, list[str]] = {}
        for source, reader in last.items():
            if source not in kept:
                self._dying.setdefault(reader, []).append(source)
        self.computed = 0
        self.values: dict[str, Tensor] = dict(zip(graph.inputs, inputs, strict=True))
        with torch.no_grad():
            for name, sources in self._nodes:
                self.values[name] = compute(name, tuple(self.values[i] for i in sources))
        self.computed += len(self._nodes)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Leaves of the base's result."""
        return tuple(self.values[name] for name in self._outputs)

    def nested(self, leaves: Sequence[Tensor]) -> Any:
        """Leaves nested as the model's result."""
        return tree_unflatten(list(leaves), self._structure)

    def variant(self, changed: Collection[str], compute: Compute, keep: bool = False) -> tuple[Tensor, ...]:
        """Leaves of the result with the ops ``changed``, and what depends on them, computed by ``compute``.

        With ``keep`` the variant is the base from now on.
        """
        fresh: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, sources in self._nodes:
                if name in changed or any(i in fresh for i in sources):
                    fresh[name] = compute(name, tuple(fresh.get(i, self.values[i]) for i in sources))
                    self.computed += 1
                if not keep:
                    for dead in self._dying.get(name, ()):
                        fresh.pop(dead, None)
        if keep:
            self.values |= fresh
        return tuple(fresh.get(name, self.values[name]) for name in self._outputs)
