"""The formats that a search chooses from, unit by unit, and the network with any choice of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlib.analysis.replay import Form, FormedModel, Replay
from qatlib.analysis.units import Unit, units_of
from qatlib.errors import QConfigError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.choose import attributes_of
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.op import FakeOp
from qatlib.fake.prepare import is_high_precision_candidate
from qatlib.fake.state import FakeQuantState
from qatlib.graph.relu6 import relus
from qatlib.pipeline.config import Config
from qatlib.pipeline.conversion import program_of
from qatlib.pipeline.project import Project
from qatlib.program import Program

SHIPS = "artifacts/qat.safetensors"
HIGH = "int32"
"""Output of a convolution or linear that keeps the accumulator (``high_precision``)."""


@dataclass(frozen=True, order=True)
class Option:
    """Format of a unit's output and of its weights; empty where that is not for the search to choose."""

    activation: str = ""
    weight: str = ""

    def __str__(self) -> str:
        output = "high precision" if self.activation == HIGH else self.activation
        return ", ".join(filter(None, (output, "int16 weights" if self.weight == "int16" else "")))


Choice = Mapping[str, Option]
"""Options by the name of their unit; a unit that is not named has its narrowest."""


def key_of(choice: Choice) -> str:
    """The same text for the same choice."""
    return json.dumps({name: [o.activation, o.weight] for name, o in sorted(choice.items())})


def choice_of(key: str) -> dict[str, Option]:
    """What :func:`key_of` was given."""
    return {name: Option(*formats) for name, formats in json.loads(key).items()}


def narrowed(config: Config) -> Config:
    """``config`` with int8 wherever ``qconfig`` says int16 or high precision; fixed scales stay."""
    section = config.qconfig
    overrides = []
    for record in section.overrides:
        change: dict[str, object] = {"weight": record.weight and "int8"}
        if record.scale is None:
            change["activation"] = record.activation and "int8"
        if record.high_precision:
            change["high_precision"] = False
        overrides.append(record.model_copy(update=change))
    inputs = [
        record.model_copy(update={"activation": record.activation and "int8"}) if record.scale is None else record
        for record in section.inputs
    ]
    changed = section.model_copy(
        update={
            "default": section.default.model_copy(update={"activation": "int8", "weight": "int8"}),
            "overrides": tuple(overrides),
            "inputs": tuple(inputs),
            "outputs": section.outputs.model_copy(update={"high_precision": False}),
        }
    )
    return config.model_copy(update={"qconfig": changed})


def narrow_model(project: Project, shipped: FakeQuantModel) -> FakeQuantModel:
    """The model that ships in the formats of :func:`narrowed`: its weights, and its scales where a format is the same.

    All other scales come from the calibration data. Raises as :func:`qatlib.calibrate`.
    """
    other = Project(narrowed(project.config))
    bounded = set(relus(other.graph).values()) - set(relus(shipped.graph).values())
    model = other.fake_quant_model(sorted(bounded))
    with torch.no_grad():
        for name, op in shipped.ops():
            for role in op.node.params:
                model.op(name).get_parameter(role).copy_(op.get_parameter(role))
    widest = [op for _, op in model.ops() if op.weight_fake_quant is not None and not op._sees_sums]
    for op in widest:
        op.register_buffer("largest_sum", torch.zeros(len(op.get_parameter("weight"))))
        op._sees_sums = True
    calibrate(model, other.calibration_batches(), other.device)
    for op in widest:
        op._sees_sums = False
    for name, op in shipped.ops():
        for ours, theirs in (
            (model.op(name).activation_post_process, op.activation_post_process),
            (model.op(name).weight_fake_quant, op.weight_fake_quant),
        ):
            if ours is not None and theirs is not None and ours.spec.dtype == theirs.spec.dtype:
                ours.load_state_dict(theirs.state_dict())
    model.trained_code.copy_(shipped.trained_code)
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    return model.eval()


class Space:
    """``options`` of every unit that has a choice, the narrowest first; ``names`` are those of single ops."""

    def __init__(self, project: Project, groups: Sequence[str] = (), wide_weights: bool = True) -> None:
        """``wide_weights``: weights may have 16 bits, too.

        Raises CheckpointError as :meth:`Project.load_fake_quant`, QConfigError QAT144 or QAT216 for groups, QAT255
        if nothing is left to choose.
        """
        self.project, self.groups, self._wide_weights = project, tuple(groups), wide_weights
        self.shipped = project.load_fake_quant(SHIPS)
        self.model = narrow_model(project, self.shipped)
        self._formed = FormedModel(self.model)
        full = self._formed.full
        self.units = units_of(self.model, full, groups)
        self.names = {op: unit for unit in units_of(self.model, full) for op in unit.ops}
        fixed = [place for place in attributes_of(project.float_model) if place]
        self._fixed = {name for name, op in self.model.ops() if any(op.node.is_under(place) for place in fixed)}
        found = {unit.name: tuple(self._options(unit)) for unit in self.units}
        self.options = {name: options for name, options in found.items() if len(options) > 1}
        if not self.options:
            seen = "leaves no format to choose: all are fixed by scales, by attributes of modules or by qat.hybrid"
            raise QConfigError(
                "QAT255", "qconfig", seen, "Take a scale out of qconfig.overrides, or name fewer modules"
            )

    def _options(self, unit: Unit) -> Iterator[Option]:
        if any(name in self._fixed for name in unit.ops):
            return
        forms = [self._formed.full[name] for name in unit.ops]
        wide = self._wide_weights and any(form.weight == "int8" for form in forms)
        weights = ("int8", "int16") if wide else ("",)
        for weight in weights:
            for activation in self._activations(unit) or [""]:
                yield Option(activation, weight)

    def _activations(self, unit: Unit) -> list[str]:
        """Formats that the output can have, none if it has one only."""
        fakes = [self.model.op(name).activation_post_process for name in unit.ops]
        if any(fake is not None and fake.spec.scale for fake in fakes):
            return []
        found = ["int8"]
        if any(self._formed.widened(name).activation != self._formed.full[name].activation for name in unit.ops):
            found.append("int16")
        graph = self.model.graph
        if len(unit.ops) == 1 and is_high_precision_candidate(graph, self.model.op(unit.ops[0]).node):
            found.append(HIGH)
        return found if len(found) > 1 else []

    def forms(self, choice: Choice) -> dict[str, Form]:
        """The form of every op under ``choice``."""
        forms = dict(self._formed.full)
        for unit in self.units:
            option = choice.get(unit.name)
            for name in unit.ops if option else ():
                assert option is not None
                full, wide = self._formed.full[name], self._formed.widened(name)
                forms[name] = Form(
                    wide.weight if option.weight == "int16" else full.weight,
                    None if option.activation == HIGH else wide.activation if option.activation == "int16" else
                    full.activation,
                )  # fmt: skip
        return forms

    def program(self, choice: Choice) -> Program:
        """The integers of the network under ``choice``; raises QConfigError QAT148 for formats without integer form."""
        forms = self.forms(choice)
        if why := self._formed.refusal(forms):
            raise QConfigError("QAT148", "qconfig", why, "Choose other formats")
        for name, form in forms.items():
            op = self._formed.model.op(name)
            if op.weight_fake_quant is not None:
                op._sees_sums = form.weight == "int16"
        return program_of(self.project, self._formed.model)

    def unrounded(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Leaves of what the network gives without rounding."""
        return Replay(self._formed.model, inputs, self._formed.computing({})).outputs

    def present(self) -> dict[str, Option]:
        """The choice that ``params.yaml`` makes now, as far as it is one: a group of several formats has the widest."""
        found = {}
        for unit in self.units:
            if unit.name in self.options:
                ops = [self.shipped.op(name) for name in unit.ops]
                candidates = [Option(_output(op), op.weight_fake_quant.spec.dtype if op.weight_fake_quant else "")
                              for op in ops]  # fmt: skip
                narrow = self.options[unit.name][0]
                widest = max(candidates, key=lambda o: (len(o.activation), o.activation, o.weight))
                option = Option(widest.activation if narrow.activation else "", widest.weight if narrow.weight else "")
                if option != narrow:
                    found[unit.name] = option
        return found


def _output(op: FakeOp) -> str:
    return HIGH if op.activation_post_process is None else op.activation_post_process.spec.dtype
