"""Ranking ops before anything is measured: what rounding each would do to the output, to first order, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qatlib.analysis.replay import FormedModel
from qatlib.analysis.units import Unit

SAMPLES = 16
"""Samples of the batch that are looked at: the pass keeps every value of the network for its gradient."""


def taylor_scores(
    formed: FormedModel, units: Sequence[Unit], inputs: Sequence[Tensor], seed: int = 0
) -> dict[str, float]:
    """For every unit the noise at the output that its rounding makes, to first order of a Taylor series.

    With e the error of an op on float inputs, J the Jacobian of the outputs (each over its RMS) by what it makes, and
    v random signs: E (v·J e)² = |J e|². One backward pass gives vᵀJ for all ops; each sample has signs of its own.
    Several ops of a unit are added up. The first :data:`SAMPLES` samples decide.
    """
    signs = torch.Generator().manual_seed(seed)
    given = [x[:SAMPLES].detach() for x in inputs]
    given = [x.requires_grad_() if x.is_floating_point() else x for x in given]
    graph = formed.model.graph
    values: dict[str, Tensor] = dict(zip(graph.inputs, given, strict=True))
    float_form = formed.computing({})
    with torch.enable_grad():
        for name, op in formed.model.ops():
            values[name] = float_form(name, tuple(values[i] for i in op.node.inputs))
    wanted = [name for unit in units for name in unit.ops if values[name].requires_grad]
    projected = [_projected(values[name], signs) for name in graph.outputs if values[name].requires_grad]
    if not projected or not wanted:
        return {unit.name: 0.0 for unit in units}
    gradients = torch.autograd.grad(sum(projected[1:], projected[0]), [values[n] for n in wanted], allow_unused=True)
    rounded = formed.computing(formed.full)
    scores: dict[str, float] = {}
    with torch.no_grad():
        for name, gradient in zip(wanted, gradients, strict=True):
            made = values[name]
            error = rounded(name, tuple(values[i].detach() for i in formed.model.op(name).node.inputs)) - made
            part = torch.zeros(()) if gradient is None else (gradient * error).double()
            per_sample = part.flatten(1).sum(1) if part.dim() > 1 else part
            scores[name] = float(per_sample.square().mean())
    return {unit.name: sum(scores.get(name, 0.0) for name in unit.ops) for unit in units}


def _projected(output: Tensor, signs: torch.Generator) -> Tensor:
    """The sum of an output over its norm per sample, each element with a random sign."""
    v = torch.randint(0, 2, output.shape, generator=signs).to(output) * 2 - 1
    norm = output.detach().square().mean().sqrt() * (output[0].numel() ** 0.5 if output.dim() else 1.0)
    return (output * v).sum() / norm.clamp_min(torch.finfo(output.dtype).tiny)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing the mean of theirs; 0 where all are equal."""
    a, b = _ranks(first), _ranks(second)
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[inverse]
