"""The eager way in: QConfigs as attributes of modules, and modules that the user fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qatlib.errors import QConfigError
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx, prepare_chosen
from qatlib.fake.qconfig import QConfig
from qatlib.graph.ir import INPUT, Node


def prepare_qat(
    model: nn.Module,
    hybrid: bool = False,
    hybrid_dict: Mapping[str, Sequence[Any]] | None = None,
    *,
    example_inputs: Sequence[Tensor],
    leaf: Sequence[str] = (),
    wrap: Sequence[Callable[..., Any]] = (),
) -> FakeQuantModel:
    """Fake-quant form of a model whose modules carry their QConfig as the attribute ``qconfig``.

    A module without one has that of the nearest module around it; ``model.qconfig`` is the global one. None keeps a
    module, and what is inside it, in float. A function has the QConfig of the module that calls it; fused operators
    have that of the first. Modules fused by ``torch.ao.quantization.fuse_modules`` are taken as they are, and what the
    user left unfused is fused by the same table as in :func:`qatlib.prepare_qat_fx`. Quantizers are placed at inputs
    and outputs if the model has no stubs.

    ``hybrid`` and ``hybrid_dict`` as in :func:`qatlib.prepare_qat_fx`; float by attribute needs neither. Raises
    GraphError as :func:`qatlib.graph.trace.trace`; QConfigError QAT146 if no module has a QConfig or all are None,
    QAT142 for an attribute that is none of ours.
    """
    given = _given(model)
    graph = fuse_fx(model, example_inputs, leaf, wrap)
    chosen = {node.name: _nearest(node, given) for node in graph.nodes}
    float_by_attribute = any(chosen[node.name] is None for node in graph.nodes if node.op != INPUT)
    return prepare_chosen(graph, chosen, hybrid or float_by_attribute, hybrid_dict, given.get(""))


def _given(model: nn.Module) -> dict[str, QConfig | None]:
    """QConfig attributes by qualified module name; "" is the model."""
    given = {name: module.qconfig for name, module in model.named_modules() if hasattr(module, "qconfig")}
    for name, qconfig in given.items():
        if qconfig is not None and not isinstance(qconfig, QConfig):
            raise QConfigError(
                "QAT142",
                f"{name}.qconfig".removeprefix("."),
                f"is a {type(qconfig).__module__}.{type(qconfig).__qualname__}",
                "Use a qatlib.QConfig, such as qatlib.get_default_qconfig(), or None for float",
            )
    if all(qconfig is None for qconfig in given.values()):
        raise QConfigError(
            "QAT146",
            type(model).__name__,
            "no module has a qconfig attribute, so nothing is quantized",
            "Set model.qconfig = qatlib.get_default_qconfig()",
        )
    return given


def _nearest(node: Node, given: Mapping[str, QConfig | None]) -> QConfig | None:
    """Of the module that is the node, or called the function, or of the nearest module around it."""
    path = (node.module or node.name).split(".")
    for length in range(len(path), -1, -1):
        name = ".".join(path[:length])
        if name in given:
            return given[name]
    return None
