"""Fuse check: every batch norm, add and clamp that stayed an op of its own, what it could have joined, and why not.

The reasons are those of the passes themselves (:attr:`qatlib.graph.ir.Graph.apart`); here they get words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from qatlib.atomic import write_text
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx
from qatlib.graph.inputs import Inputs
from qatlib.graph.ir import Apart, Graph, Node, Reason

if TYPE_CHECKING:
    import pandas as pd

KINDS = {"batch_norm": "batch norm", "add": "add", "clamp": "clamp"}
"""Operators that fusion looks for behind a convolution or linear, in the order of the pattern."""


@dataclass(frozen=True)
class Unfused:
    """One op. ``host`` is the operator that it could have joined as ``pattern``, both empty if there is none.

    ``reason`` is a word to count by, ``seen`` a sentence on what is in the way, ``fix`` what to change in the model,
    empty where nothing is to be gained. ``where`` is the line of the user's source.
    """

    op: str
    type: str
    kind: str
    host: str
    pattern: str
    reason: Reason
    seen: str
    fix: str
    where: str


def unfused_operations(graph: Graph) -> tuple[Unfused, ...]:
    """What fusion left alone in a fused graph, in the order of the passes: batch norms, adds, clamps.

    Sums and clamps of integers, and inner steps of composites, are no part of the pattern and left out.
    """
    nodes = graph.by_name()
    apart = (one for one in graph.apart if one.node.content == "float" and not one.node.composite)
    return tuple(_record(nodes, one) for one in apart)


def check_unfused_operations(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    leaf: Sequence[str] = (),
    wrap: Sequence[Callable[..., Any]] = (),
    path: str | Path | None = None,
) -> pd.DataFrame:
    """:func:`unfused_operations` of a float or fake-quant model as a table, and as CSV in ``path`` if one is given.

    A float model is traced with ``example_inputs``; raises GraphError as :func:`qatlib.fuse_fx`.
    """
    if isinstance(model, FakeQuantModel):
        graph = model.graph
    else:
        graph = fuse_fx(model, () if example_inputs is None else example_inputs, leaf, wrap)
    rows = unfused_operations(graph)
    if path is not None:
        write_unfused(rows, path)
    return _table(rows)


def write_unfused(rows: Sequence[Unfused], path: str | Path) -> None:
    """Comma-separated text, one line per op."""
    write_text(path, _table(rows).to_csv(index=False, lineterminator="\n"))


def _table(rows: Sequence[Unfused]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(Unfused)])


def _record(nodes: dict[str, Node], apart: Apart) -> Unfused:
    part, host = apart.node, nodes.get(apart.host)
    words = _WORDS[apart.reason]
    given = {
        "part": part.name,
        "kind": KINDS[part.op],
        "host": apart.host,
        "between": " and ".join(apart.between),
    }
    fix = words[1] if isinstance(words[1], str) else words[1][part.op]
    return Unfused(
        op=part.name,
        type=_short(part),
        kind=KINDS[part.op],
        host=apart.host,
        pattern=_pattern(host, part) if host is not None else "",
        reason=apart.reason,
        seen=words[0].format(**given),
        fix=fix.format(**given),
        where=part.where,
    )


def _pattern(host: Node, part: Node) -> str:
    order = list(KINDS)
    before = [other for other in host.fused if order.index(other.op) < order.index(part.op)]
    return " + ".join(_short(node) for node in (host, *before, part))


def _short(node: Node) -> str:
    return node.module_type.rpartition(".")[2]


_WORDS: dict[Reason, tuple[str, str | dict[str, str]]] = {
    "readers": (
        "{between} also reads {host}, which therefore stays as it is",
        "Let {between} read what {part} makes, or give it a layer of its own",
    ),
    "output": (
        "{host} is also an output of the network, which therefore stays as it is",
        "Return what {part} makes, or compute the output by a layer of its own",
    ),
    "order": (
        "{between} lies between {host} and {part}",
        {
            "batch_norm": "Put {part} directly behind {host} and train the float model so",
            "add": "Add directly behind {host}, before {between}, and train the float model so",
            "clamp": "Put {part} directly behind {host}, before {between}",
        },
    ),
    "shape": (
        "the shapes of {host} and {part} do not fit: an addend has the shape of the sum, a batch norm normalizes the"
        " outputs of a linear over [batch, features]",
        {
            "batch_norm": "Flatten to [batch, features] before {host}, or take a convolution with a kernel of 1",
            "add": "Give both addends the shape of the sum, or put a constant one into the bias of {host}",
            "clamp": "",
        },
    ),
    "taken": ("the accumulator of {host} takes one addend, and {between} is that", ""),
    "itself": ("both addends are {host}", "Double the weights of {host} instead"),
    "integers": ("{host} makes integers", ""),
    "clamped": ("{host} ends in {between} already", "Make one clamp of both"),
    "float": (
        "of {host} and {part} one is to stay float and the other is not",
        "Give both the same qconfig: None, or formats",
    ),
    "kept whole": (
        "{between} is kept whole (model.leaf or model.wrap), and fusion does not look inside",
        "Move the boundary of what is kept whole, so that {part} and the layer before it are on one side",
    ),
    "nothing": ("{between} before it is no convolution or linear", ""),
}
