"""The rules every graph obeys; run after each pass so that a bad pass fails at the node it broke."""

from __future__ import annotations

from qatlib import ops as _ops  # noqa: F401 registers the operators
from qatlib.errors import GraphError
from qatlib.graph.ir import CONSTANT, INPUT, OPAQUE, Graph
from qatlib.ops.base import BY_NAME


def verify(graph: Graph, after: str) -> Graph:
    """Return ``graph`` if it is well formed, else raise GraphError naming the pass ``after`` and the node."""

    def broken(where: str, seen: str) -> GraphError:
        return GraphError("QAT139", where, f"{seen} (after {after})", "This is a defect of the pass; please report it")

    known: set[str] = set()
    for node in graph.nodes:
        if node.name in known:
            raise broken(node.name, "two nodes have this name")
        if node.op not in BY_NAME and node.op not in (INPUT, OPAQUE):
            raise broken(node.name, f"operator {node.op!r} is not registered")
        for name in node.inputs:
            if name not in known:
                raise broken(node.name, f"reads {name!r} before it is made")
        if not node.shape and node.op != CONSTANT:
            raise broken(node.name, "has no shape")
        if sum(size < 0 for size in node.shape) > 1:
            if after == "trace":  # as the model is written
                seen = f"has the batch on two axes of {list(node.shape)}, so one sample depends on the others"
                fix = "Keep the batch first; before layers with batch_first=False, put x.transpose(0, 1)"
                raise GraphError("QAT136", node.described(), seen, fix)
            raise broken(node.name, f"has two batch axes in {node.shape}")
        known.add(node.name)
    for name in graph.outputs:
        if name not in known:
            raise broken(name, "is an output that no node makes")
    if not graph.inputs:
        raise broken("graph", "has no input")
    return graph
