"""Quantization-aware training: fine-tune a calibrated model; keep the epoch whose *integers* score best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatlib.conversion import IntegerModel, convert_fx
from qatlib.errors import DataError, ProgramError, TrainingError
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.resume import Progress, load_progress, save_progress
from qatlib.fake.state import FakeQuantState
from qatlib.pipeline.config import QatParams

Loss = Callable[[Any, Any], Tensor]
Batches = Callable[[int, int], Iterable[tuple[tuple[Tensor, ...], Any]]]
"""``(epoch, first batch) -> batches``; the order has to depend on the epoch alone."""


@dataclass(frozen=True)
class Scores:
    """Metric on validation data of the fake-quant model and of its integers."""

    fake_quant: float
    integer: float


@dataclass(frozen=True)
class Epoch:
    """One line of the history; epoch 0 is the calibrated model."""

    epoch: int
    lr: float
    train_loss: float
    fake_quant: float
    integer: float


@dataclass(frozen=True)
class Trained:
    """What came out: all epochs, and the one whose weights the model now has."""

    history: tuple[Epoch, ...]
    best: int


def scorable(model: FakeQuantModel) -> IntegerModel:
    """The integers of ``model`` for the score of an epoch, with default tables.

    ``convert.tables`` is none of QAT's parameters: changing a table must not train again. An op whose default table is
    impossible (QAT210: it needs a ``range`` by hand) therefore keeps its fake-quant form here.
    """
    kept: list[str] = []
    while True:
        try:
            return convert_fx(model, kept)
        except ProgramError as error:
            if error.code != "QAT210" or error.where in kept:
                raise
            kept.append(error.where)


@dataclass
class Trainer:
    """Everything one training needs.

    Args:
        model: calibrated; its weights are trained in place.
        batches: training batches of an epoch, from a given batch on.
        steps: batches per epoch.
        score: called in VALIDATION state after every epoch.
        higher_is_better: direction of the scores.
        scratch: folder for the resume checkpoint; None switches resuming off.
        on_step: told (step, total steps, loss) after every step.
    """

    model: FakeQuantModel
    params: QatParams
    loss: Loss
    batches: Batches
    steps: int
    score: Callable[[FakeQuantModel], Scores]
    higher_is_better: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    scratch: Path | None = None
    checkpoint_steps: int = 100
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None

    def run(self) -> Trained:
        """Train, and leave the model with the best epoch's weights in VALIDATION state.

        Raises TrainingError QAT162 at the first loss, gradient or activation that is not finite, with step and module.
        """
        optimizer = self._optimizer()
        progress = load_progress(self._file, self.model, optimizer) if self._file else None
        if progress is None:
            progress = Progress()
            self._finish_epoch(progress, 0.0)
        while progress.epoch <= self.params.epochs:
            self._train_epoch(progress, optimizer)
            self._finish_epoch(progress, self.learning_rate(progress.step - 1))
            self._save(progress, optimizer)
        self.model.load_state_dict(progress.best_weights)
        self.model.eval()
        return Trained(tuple(Epoch(**row) for row in progress.history), progress.best)

    @property
    def _file(self) -> Path | None:
        return self.scratch / "resume.safetensors" if self.scratch else None

    @property
    def total_steps(self) -> int:
        return self.steps * self.params.epochs

    # -- one epoch -----------------------------------------------------------------------------------------------

    def _train_epoch(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        self.model.train()
        set_fake_quantize(self.model, FakeQuantState.QAT)
        self.model.mark_trained()
        done = progress.step - (progress.epoch - 1) * self.steps
        for number, (inputs, targets) in enumerate(self.batches(progress.epoch, done), start=done):
            progress.loss_sum += self._step(progress, number, inputs, targets, optimizer)
            progress.step += 1
            self.on_step(progress.step, self.total_steps, progress.loss_sum / (number + 1))
            if progress.step % self.checkpoint_steps == 0:
                self._save(progress, optimizer)

    def _step(
        self, progress: Progress, batch: int, inputs: tuple[Tensor, ...], targets: Any, optimizer: torch.optim.Optimizer
    ) -> float:
        lr = self.learning_rate(progress.step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs = tuple(x.to(self.device) for x in inputs)
        targets = targets.to(self.device) if isinstance(targets, Tensor) else targets
        where = f"epoch {progress.epoch} step {progress.step} batch {batch} (lr {lr:.3g})"
        try:
            loss = self.loss(self.model(*inputs), targets)
        except TrainingError as error:
            raise TrainingError("QAT162", f"{where} {error.where}", error.seen, _CURES) from None
        except IndexError as error:
            fix = "Correct the labels of the train split, or the number of classes in model.kwargs"
            raise DataError("QAT113", where, f"the loss refuses the targets: {error}", fix) from None
        if not bool(torch.isfinite(loss)):
            raise TrainingError("QAT162", where, f"loss is {float(loss.detach())}; {self._first_bad(inputs)}", _CURES)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        limit = self.params.clip_grad_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                "QAT162", where, f"gradient norm is {float(norm)} at a loss of {float(loss.detach()):.4g}", _CURES
            )
        optimizer.step()
        return float(loss.detach())

    def _first_bad(self, inputs: tuple[Tensor, ...]) -> str:
        """The first module whose output is not finite."""
        found: list[str] = []

        def visit(node: Any, _: tuple[Tensor, ...], out: Tensor) -> None:
            if not found and not bool(torch.isfinite(out).all()):
                found.append(node.described())

        with torch.no_grad():
            self.model.walk(*inputs, visit=visit)
        return (
            f"first non-finite output: {found[0]}"
            if found
            else "all activations are finite, so look at loss and labels"
        )

    def _finish_epoch(self, progress: Progress, lr: float) -> None:
        """Score the model, remember it if its integers are the best so far, go to the next epoch."""
        self.model.eval()
        set_fake_quantize(self.model, FakeQuantState.VALIDATION)
        scores = self.score(self.model)
        mean = progress.loss_sum / self.steps if progress.epoch else math.nan
        row = Epoch(progress.epoch, lr, mean, scores.fake_quant, scores.integer)
        best = progress.history[progress.best]["integer"] if progress.history else None
        if best is None or (row.integer > best if self.higher_is_better else row.integer < best):
            progress.best = progress.epoch
            progress.best_weights = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        progress.history.append(asdict(row))
        progress.epoch += 1
        progress.loss_sum = 0.0

    def _save(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        if self._file:
            save_progress(self._file, progress, self.model, optimizer)

    # -- optimizer -----------------------------------------------------------------------------------------------

    def _optimizer(self) -> torch.optim.Optimizer:
        """SGD or AdamW; weight decay acts on weights, not on biases."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.params.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if self.params.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.params.lr, momentum=self.params.momentum)
        return torch.optim.AdamW(groups, lr=self.params.lr)

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then constant, cosine to 0, or a factor gamma at each milestone."""
        p, total = self.params, max(1, self.total_steps)
        if step < p.warmup_steps:
            return p.lr * (step + 1) / (p.warmup_steps + 1)
        if p.schedule == "cosine":
            done = (step - p.warmup_steps) / max(1, total - p.warmup_steps)
            return p.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if p.schedule == "step":
            return p.lr * p.gamma ** sum(step >= fraction * total for fraction in p.milestones)
        return p.lr


_CURES = (
    "In this order: check that the float model is sound, look for NaN or infinity in data and labels, lower qat.lr or"
    " set qat.warmup_steps, set qat.clip_grad_norm"
)
