"""Float weights against quantized ones, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qatlib.analysis.parameters import Parameter, parameters_of, parameters_of_program
from qatlib.analysis.records import call_title
from qatlib.analysis.states import emulator_of, require_quantized
from qatlib.analysis.stats import RunningComparison
from qatlib.atomic import write_csv
from qatlib.conversion import IntegerModel
from qatlib.emulator import Emulator
from qatlib.errors import StateError
from qatlib.fake.choose import Rules, attributes_of
from qatlib.fake.coverage import zeros_of
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import QConfig
from qatlib.graph.calls import Called, calls_of_shared
from qatlib.graph.ir import OPAQUE, Graph
from qatlib.graph.trace import trace
from qatlib.program import Program
from qatlib.qtype import FLOAT

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class WeightRow:
    """Weights of one convolution or linear: ``channels`` output channels, each with a scale of its own.

    ``cosine``, ``sqnr_db`` and ``max_error`` (in the weights' unit) compare all of them; ``max_error_lsb`` is the
    largest difference in scales of its channel, 0.5 for rounding alone. ``spread`` is the largest magnitude of the
    widest channel over that of the median one; ``worst_channel`` is the one with the least SQNR.
    """

    module: str
    type: str
    channels: int
    dtype: str
    cosine: float
    sqnr_db: float
    max_error: float
    max_error_lsb: float
    spread: float
    worst_channel: int
    worst_sqnr_db: float


def compare_weights(float_model: Any, quantized_model: Any, path: str | Path | None = None) -> pd.DataFrame:
    """A row per layer with weights in forward order, and as CSV in ``path`` if one is given; see :class:`WeightRow`.

    ``quantized_model`` is a calibrated or trained FakeQuantModel in VALIDATION state, or (then ``float_model`` has to
    be one) an integer model or its Program. ``float_model`` is the user's model, whose batch norms are folded as in the
    quantized one, or a FakeQuantModel, which stands for its weights before rounding; after ``calibrate.equalize`` only
    those are in the same units. Of a trained model the difference is training and rounding together. Raises StateError
    QAT155 or QAT156 for a model in another form or state, QAT158 for a layer that ``float_model`` lacks or has in
    another shape.
    """
    import pandas as pd

    rows = _rows(float_model, quantized_model)
    if path is not None:
        write_csv(path, (field.name for field in fields(WeightRow)), map(astuple, rows))
    return pd.DataFrame(rows, columns=[field.name for field in fields(WeightRow)])


def _rows(float_model: Any, quantized_model: Any) -> list[WeightRow]:
    if isinstance(quantized_model, Program | Emulator | IntegerModel):
        program = emulator_of(quantized_model).program
        made: list[Called] = list(program.ops)
        types = {op.name: op.origin or op.kind for op in program.ops}
        reference = _float_weights(float_model, None)
        found = parameters_of_program(program)
    else:
        fake = require_quantized(quantized_model, "quantized_model")
        made = list(fake.graph.nodes)
        types = {node.name: node.module_type.rpartition(".")[2] for node in fake.graph.nodes}
        reference, found = _float_weights(float_model, fake), parameters_of(fake, quantized=True)
    calls, modules = calls_of_shared(made), {one.name: one.module for one in made}
    rows = []
    for name, parameters in found.items():
        weight = next((one for one in parameters if one.role == "weight" and one.dtype != FLOAT.dtype), None)
        if weight is not None:
            title = call_title(name, modules[name], calls.get(name, (0, 0))[0])
            rows.append(_row(title, types[name], _same_shape(name, reference, weight), weight))
    return rows


def _float_weights(model: Any, fake: FakeQuantModel | None) -> Mapping[str, Tensor]:
    """By op; a float model is traced and fused as ``fake`` was."""
    if isinstance(model, FakeQuantModel):
        return {name: op.float_params()["weight"] for name, op in model.ops() if "weight" in op.node.params}
    if fake is None or not isinstance(model, nn.Module):
        seen = f"is a {type(model).__name__}, expected a FakeQuantModel{' or the float model' if fake else ''}"
        raise StateError("QAT155", "float_model", seen, "Pass the FakeQuantModel that it was converted from")
    graph = _traced_like(model, fake.graph)
    return {node.name: node.params["weight"] for node in graph.nodes if "weight" in node.params}


def _traced_like(model: nn.Module, graph: Graph) -> Graph:
    """Weights do not depend on values, so zeros of the shapes that the inputs had will do."""
    opaque = [node for node in graph.nodes if node.op == OPAQUE]
    leaf = [node.module for node in opaque if isinstance(node.callee, nn.Module)]
    wrap = [node.callee for node in opaque if node.callee is not None and not isinstance(node.callee, nn.Module)]
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    nodes = graph.by_name()
    examples = tuple(zeros_of(nodes[name], device) for name in graph.inputs)
    return Rules(QConfig(), attributes=attributes_of(model)).fuse(trace(model, examples, leaf, wrap))


def _same_shape(name: str, reference: Mapping[str, Tensor], weight: Parameter) -> Tensor:
    found = reference.get(name)
    if found is None or found.shape != weight.values.shape:
        seen = "has no weights" if found is None else f"has weights of shape {list(found.shape)}"
        wanted = f"{seen} in float_model and of shape {list(weight.values.shape)} in quantized_model"
        raise StateError("QAT158", name, wanted, "Compare with the float model that it was prepared from")
    return found.detach().to(weight.values.device)


def _row(title: str, kind: str, reference: Tensor, weight: Parameter) -> WeightRow:
    rows, others = reference.flatten(1).double(), weight.values.flatten(1).double()
    whole = RunningComparison(FLOAT)
    whole.add(rows, others)
    seen = whole.result()
    assert seen is not None
    errors = (others - rows).abs()
    scales = torch.tensor(weight.scales, dtype=torch.float64, device=errors.device)
    noise, power = errors.square().sum(1), rows.square().sum(1)
    sqnr = torch.where(noise > 0, 10 * torch.log10(power / noise), torch.inf)
    largest = rows.abs().amax(1)
    middle = median(largest[largest > 0].tolist() or [1.0])
    worst = int(sqnr.argmin())
    return WeightRow(
        module=title,
        type=kind,
        channels=len(rows),
        dtype=weight.dtype,
        cosine=seen.cosine,
        sqnr_db=seen.sqnr_db,
        max_error=seen.max_abs,
        max_error_lsb=float((errors.amax(1) / scales).max()),
        spread=float(largest.max()) / middle,
        worst_channel=worst,
        worst_sqnr_db=float(sqnr[worst]),
    )
