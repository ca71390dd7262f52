"""A QAT that takes a fraction of a second: :class:`tests.models.Tiny` on three clouds of points.

``python -m tests.fake.training SCRATCH OUT [STEP]`` runs it and writes the final state; with STEP it is killed there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.fake.epochs import Scores
from qatlib.fake.float_form import float_form
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.fake.train import Trainer
from qatlib.pipeline.checkpoint import save_tensors
from qatlib.pipeline.config import QatParams
from tests.models import Tiny, calibrated

BATCH, STEPS = 16, 6
PARAMS: dict[str, Any] = {"epochs": 3, "lr": 0.05, "batch_size": BATCH, "weight_decay": 1e-3, "warmup_steps": 2}


def clouds(seed: int) -> tuple[Tensor, Tensor]:
    """96 points ``[96, 2]`` and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(96) % 3
    angle = labels * 2.1
    centers = torch.stack([angle.cos(), angle.sin()], 1)
    return centers + 0.6 * torch.randn(96, 2, generator=generator), labels


def start(averaging_constant: float = 0.1) -> FakeQuantModel:
    """A calibrated model, the same every time."""
    torch.manual_seed(3)
    spec = FakeQuantSpec(averaging_constant=averaging_constant)
    return calibrated(Tiny(), clouds(0)[0], qconfig_dict=QConfig(spec))


def batches(epoch: int, first: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    points, labels = clouds(1)
    for k in range(first, STEPS):
        rows = torch.tensor(items(epoch, k))
        yield (points[rows],), labels[rows]


def score(model: FakeQuantModel) -> Scores:
    """Share of right answers on the second cloud: fake-quant, integer, float."""
    points, labels = clouds(2)

    def right(forward: Callable[[Tensor], Tensor]) -> float:
        return float((forward(points).argmax(1) == labels).float().mean())

    with torch.no_grad():
        return Scores(right(model), right(convert_fx(model)), right(lambda x: float_form(model, x)))


def trainer(model: FakeQuantModel | None = None, scratch: Path | None = None, **changes: Any) -> Trainer:
    """``changes`` go to :class:`QatParams`, or to the Trainer where it has a field of that name."""
    named = [k for k in changes if k in Trainer.__dataclass_fields__ and not isinstance(changes[k], str)]
    own = {k: changes.pop(k) for k in named}
    options: dict[str, Any] = {"loss": F.cross_entropy, "batches": batches, "score": score, "checkpoint_steps": 4}
    params = QatParams(**(PARAMS | changes))
    return Trainer(model=model or start(), params=params, steps=STEPS, scratch=scratch, **(options | own))


def items(epoch: int, batch: int) -> list[int]:
    """Dataset indices of a batch of :func:`batches`."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(epoch))
    return order[batch * BATCH : (batch + 1) * BATCH].tolist()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def main(scratch: str, out: str, stop: str = "0") -> None:
    torch.set_num_threads(1)

    def on_step(step: int, total: int, loss: float) -> None:
        if step == int(stop):
            os.kill(os.getpid(), signal.SIGKILL)

    one = trainer(scratch=Path(scratch), on_step=on_step)
    one.run()
    save_tensors(out, state(one.model))


if __name__ == "__main__":
    main(*sys.argv[1:])
