"""The eager way in: QConfigs as attributes of modules, and modules that the user fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from qatlib.errors import QConfigError
from qatlib.fake.choose import attributes_of, rules_of
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx, prepare_by
from qatlib.graph.inputs import Inputs
from qatlib.graph.ir import INPUT


def prepare_qat(
    model: nn.Module,
    hybrid: bool = False,
    hybrid_dict: Mapping[str, Sequence[Any]] | None = None,
    *,
    example_inputs: Inputs,
    leaf: Sequence[str] = (),
    wrap: Sequence[Callable[..., Any]] = (),
) -> FakeQuantModel:
    """Fake-quant form of a model whose modules carry their QConfig as the attribute ``qconfig``.

    A module without one has that of the nearest module around it; ``model.qconfig`` is the global one. None keeps a
    module, and what is inside it, in float. A function has the QConfig of the module that calls it. Of fused operators
    the weights go by the first, the output by the last that has one of its own. Modules fused by
    ``torch.ao.quantization.fuse_modules`` are taken as they are, and what the user left unfused is fused by the same
    table as in :func:`qatlib.prepare_qat_fx`. Quantizers are placed at inputs and outputs if the model has no stubs.

    ``hybrid`` and ``hybrid_dict`` as in :func:`qatlib.prepare_qat_fx`; float by attribute needs neither. Raises
    GraphError as :func:`qatlib.graph.trace.trace`; QConfigError QAT146 if no module has a QConfig or all are None,
    QAT142 for an attribute that is none of ours.
    """
    given = attributes_of(model)
    if all(qconfig is None for qconfig in given.values()):
        raise QConfigError(
            "QAT146",
            type(model).__name__,
            "no module has a qconfig attribute, so nothing is quantized",
            "Set model.qconfig = qatlib.get_default_qconfig()",
        )
    rules = rules_of(model, {"": None}, hybrid_dict)
    graph = fuse_fx(model, example_inputs, leaf, wrap, rules)
    rules.check_hit(graph)
    found = [rules.of(node) for node in graph.nodes if node.op != INPUT]
    float_by_attribute = any(one.qconfig is None and not one.hybrid for one in found)
    return prepare_by(rules, graph, hybrid or float_by_attribute)
