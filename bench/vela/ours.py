"""The same networks compiled by our own compiler, for targets that describe the same machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench.vela.export import NETWORKS
from bench.vela.tables import Layer
from qatlib.compiler import Executable, load_target
from qatlib.compiler.executable import assemble
from qatlib.compiler.job import describe
from qatlib.compiler.memory import plan
from qatlib.compiler.steps import order_steps
from qatlib.conversion import to_program
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.program import Op, Program

TARGETS = {"u55-256": "ethos-u55-256-like", "u85-256": "ethos-u85-256-like", "u85-512": "ethos-u85-512-like"}
"""Shipped target that describes the machine of each of Vela's configurations."""
_VELA_KINDS = ("Conv2D", "DepthwiseConv2D", "FullyConnected")


def program(network: str) -> Program:
    """The network as a Program, calibrated with one random image: a time depends on shapes."""
    build, shape = NETWORKS[network]
    torch.manual_seed(0)
    fake = prepare_qat_fx(build().eval(), example_inputs=[image := torch.randn(*shape)])
    calibrate(fake, [image])
    return to_program(fake)


def compiled(network: Program, config: str) -> Executable:
    """For the target that describes the machine, with the plan that stages what it can, as Vela's does.

    ``compile_model`` at O2 makes it too, and takes another where that is faster.
    """
    target = load_target(TARGETS[config])
    job = describe(network, order_steps(network), target)
    return assemble(target, job, plan(job))


@dataclass(frozen=True)
class Pair:
    """Cycles of the same work: a convolution or linear layer, or two that are added, by the names of our ops."""

    name: str
    ours: int
    vela: int


def pairs(executable: Executable, layers: Sequence[Layer]) -> list[Pair]:
    """Convolutions and linear layers that both have, each with the first of Vela's of the same sizes not yet taken.

    We add a shortcut in the last of the two convolutions, Vela in the other or in a layer of its own: what is added
    together is compared together.
    """
    network, left = executable.program, [layer for layer in layers if layer.kind in _VELA_KINDS]
    cycles = {row.op: row.cycles for row in executable.performance.rows}
    found: dict[str, Pair] = {}
    for op in network:
        if op.kind not in ("conv", "linear"):
            continue
        sizes = _sizes(network, op)
        match = next((layer for layer in left if sizes == (layer.ifm, layer.ofm, layer.kernel)), None)
        if match is None:
            continue
        left.remove(match)
        pair = Pair(op.name, cycles[op.name], match.cycles)
        if len(op.inputs) == 2 and "Add" not in match.fused:
            add = next((x for x in layers if x.kind == "Add" and str(match.place) in x.reads.split()), None)
            other = found.pop(op.inputs[1], None) if add is None else Pair("", 0, add.cycles)
            if other is not None:
                pair = Pair(
                    " + ".join(filter(None, (other.name, op.name))), pair.ours + other.ours, pair.vela + other.vela
                )
        found[op.name] = pair
    return list(found.values())


def _sizes(network: Program, op: Op) -> tuple[str, str, str]:
    """Input, output and kernel as :class:`.tables.Layer` writes them."""
    maps = []
    for name in (op.inputs[0], op.output):
        channels, *image = network.values[name].sizes()[1:]
        maps.append("x".join(map(str, (*(image or (1, 1)), channels))))
    kernel = network.constant(op, "weight").shape[2:] or (1, 1)
    return maps[0], maps[1], "x".join(map(str, kernel))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, equal values sharing their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse])
