"""Where every op of a quantized model runs: in integers on the device, or in float beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qatlib.analysis.records import call_title
from qatlib.analysis.states import emulator_of
from qatlib.atomic import write_csv
from qatlib.compiler import check_model, load_target
from qatlib.compiler.target import Target
from qatlib.fake.model import FakeQuantModel
from qatlib.graph.calls import calls_of_shared
from qatlib.graph.ir import OPAQUE

if TYPE_CHECKING:
    import pandas as pd

Device = Literal["integer", "float", "refused"]


@dataclass(frozen=True)
class DeployRow:
    """One op. ``device`` is where it runs: integer; float, outside of the accelerator; or refused, where the target
    cannot run its integers. ``why`` says what makes it so, empty for integer.
    """

    op: str
    module: str
    type: str
    device: Device
    why: str


def check_deploy_device(
    model: Any, target: Target | str | Path | None = None, path: str | Path | None = None
) -> pd.DataFrame:
    """A row per op in forward order, and as CSV in ``path`` if one is given; see :class:`DeployRow`.

    ``model`` is a FakeQuantModel, or an integer model or its Program; only these two know what a ``target`` refuses.
    All ops run in integers if ``(table.device == "integer").all()``. Raises StateError (QAT155) for anything else,
    CompileError as :func:`qatlib.load_target`.
    """
    import pandas as pd

    if isinstance(model, FakeQuantModel):
        rows = list(_of_fake(model))
    else:
        rows = list(_of_program(model, target))
    if path is not None:
        write_csv(path, _COLUMNS, (asdict(row).values() for row in rows))
    return pd.DataFrame([asdict(row) for row in rows], columns=_COLUMNS)


_COLUMNS = [field.name for field in fields(DeployRow)]


def _of_fake(model: FakeQuantModel) -> Iterator[DeployRow]:
    calls = calls_of_shared(model.graph.nodes)
    for name, op in model.ops():
        node, why = op.node, ""
        if node.op == OPAQUE:
            why = "kept whole (model.leaf or model.wrap)"
        elif op.hybrid and node.op not in ("quantize", "dequantize"):
            why = f"stays float by {model.origins.get(name, ('', ''))[0] or 'its QConfig'}"
        elif op.preserve_qat_mode:
            why = "keeps its fake-quant form (preserve)"
        title = call_title(name, node.module, calls.get(name, (0, 0))[0])
        yield DeployRow(name, title, node.module_type.rpartition(".")[2], "float" if why else "integer", why)


def _of_program(model: Any, target: Target | str | Path | None) -> Iterator[DeployRow]:
    program = emulator_of(model).program
    machine = load_target(target) if isinstance(target, str | Path) else target
    refused: dict[str, list[str]] = {}
    for one in check_model(program, machine) if machine else ():
        refused.setdefault(one.op.partition(" (")[0], []).append(one.seen)
    calls = calls_of_shared(program.ops)
    for op in program.ops:
        title = call_title(op.name, op.module, calls.get(op.name, (0, 0))[0])
        kind = op.origin or op.kind
        if op.kind == "float_op":
            yield DeployRow(op.name, title, kind, "float", "was left in float, or keeps its fake-quant form")
        elif op.name in refused:
            yield DeployRow(op.name, title, kind, "refused", "; ".join(refused[op.name]))
        else:
            yield DeployRow(op.name, title, kind, "integer", "")
