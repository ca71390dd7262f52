"""Quantization-aware training: fine-tune a calibrated model; keep the epoch whose *integers* score best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qatlib.conversion import IntegerModel, convert_fx
from qatlib.errors import ProgramError, TrainingError
from qatlib.fake.batch_norm import fold_batch_norms, freeze_batch_norms, keep_batch_norms
from qatlib.fake.distill import Distillation
from qatlib.fake.distributed import gather, rank, share
from qatlib.fake.epochs import Epoch, Scores, better, worth_keeping
from qatlib.fake.exact import ExactForward
from qatlib.fake.first_loss import FirstLoss, check_calibrated
from qatlib.fake.guards import Items, Place, check_batch_of_one, check_weights
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.optimizer import Schedule, check_owned, make_optimizer, set_rate
from qatlib.fake.resume import Packed, Progress, load, pack, save, unpack
from qatlib.fake.state import FakeQuantState
from qatlib.fake.step import Loss, Step, drawing
from qatlib.pipeline.config import QatParams
from qatlib.pipeline.data import mix

Batches = Callable[[int, int], Iterable[tuple[tuple[Tensor, ...], Any]]]
"""``(epoch, first batch) -> batches``; the order has to depend on the epoch alone."""


@dataclass(frozen=True)
class Trained:
    """What came out: all epochs, the one whose weights the model now has, and the score of its integers.

    ``rewinds`` counts how often the training went back after a NaN.
    """

    history: tuple[Epoch, ...]
    best: int
    integer: float
    first_loss: FirstLoss | None = None
    rewinds: int = 0


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
    """Everything one training needs. Under torch.distributed all processes build and run the same one.

    Args:
        model: calibrated; its weights are trained in place.
        batches: training batches of an epoch, from a given batch on; of several processes each gives some rows of the
            same batches.
        steps: batches per epoch.
        score: called in VALIDATION state after every epoch, on a sample of the validation data; of several processes
            by the first alone.
        full_score: of the integers on all of it; decides among the kept epochs at the end. None: ``score`` sees all.
        higher_is_better: direction of the scores.
        optimizer: over parameters of ``model``, instead of the one that ``params`` describe; its rates are kept, and
            scheduled. One that was built before the model was prepared is refused (QAT193).
        distillation: the float model as a teacher.
        items: dataset indices of a batch (epoch, batch), for messages.
        seed: what is drawn at random in a step (dropout in a module kept whole) depends on it and the step alone.
        scratch: folder for the resume checkpoint; None switches resuming off.
        on_step: told (step, total steps, loss) after every step.
        note: told, in one line, what a person should know at once.
    """

    model: FakeQuantModel
    params: QatParams
    loss: Loss
    batches: Batches
    steps: int
    score: Callable[[FakeQuantModel], Scores]
    full_score: Callable[[FakeQuantModel], float] | None = None
    higher_is_better: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    optimizer: torch.optim.Optimizer | None = None
    distillation: Distillation | None = None
    items: Items = lambda epoch, batch: ()
    seed: int = 0
    scratch: Path | None = None
    checkpoint_steps: int = 100
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None
    note: Callable[[str], None] = lambda text: warnings.warn(text, stacklevel=2)

    def run(self) -> Trained:
        """Train, and leave the model with the best epoch's weights in VALIDATION state.

        Raises TrainingError QAT162 at the first loss, gradient or activation that is not finite, with step, items and
        tensor, unless ``params.on_nan`` says to go back; QAT196 for scales of no calibration. Without epochs nothing is
        trained, and no optimizer is built.
        """
        progress = Progress()
        if self.params.epochs:
            with self._layout():
                progress = self._train()
        else:
            self._finish_epoch(progress, 0.0)
        best, integer = self._choose(progress)
        fold_batch_norms(self.model)
        first = FirstLoss(**progress.first_loss) if progress.first_loss else None
        return Trained(tuple(Epoch(**row) for row in progress.history), best, integer, first, progress.rewinds)

    # -- the loop ------------------------------------------------------------------------------------------------

    def _train(self) -> Progress:
        check_calibrated(self.model)
        if self.params.batch_norm == "keep":
            keep_batch_norms(self.model)
            self._set_batch_norms(1)
        self._check_last_batch()
        step = self._step()
        saved = share(lambda: load(self._file) if self._file else None)
        if saved is None:
            run = _Run(step, Progress())
            self._finish_epoch(run.progress, 0.0)
        else:
            run = _Run(step, unpack(saved, self.model, step.optimizer))
        run.good = pack(run.progress, self.model, step.optimizer) if self._goes_back else None
        while run.progress.epoch <= self.params.epochs:
            try:
                self._train_epoch(run)
                self._finish_epoch(run.progress, step.optimizer.param_groups[0]["lr"])
                self._checkpoint(run)
            except TrainingError as error:
                self._rewind(run, error)
        return run.progress

    def _train_epoch(self, run: _Run) -> None:
        self.model.train()
        set_fake_quantize(self.model, FakeQuantState.QAT)
        self.model.mark_trained()
        self._set_batch_norms(run.progress.epoch)
        progress, schedule = run.progress, Schedule(self.params, self.total_steps)
        done = progress.step - (progress.epoch - 1) * self.steps
        for number, (inputs, targets) in enumerate(self.batches(progress.epoch, done), start=done):
            lr = set_rate(run.step.optimizer, schedule.factor(progress.step) * progress.rate)
            place = Place(progress.epoch, progress.step, number, lr, self.items)
            with drawing(mix(self.seed, progress.step, *[rank()] * (rank() > 0)), self.device):
                progress.loss_sum += self._step_on(run, self._moved(inputs), self._moved(targets), place)
            progress.step += 1
            self.on_step(progress.step, self.total_steps, progress.loss_sum / (number + 1))
            if progress.step % self.checkpoint_steps == 0:
                self._checkpoint(run)
        check_weights(self.model, f"epoch {progress.epoch} step {progress.step - 1}")

    def _step_on(self, run: _Run, inputs: tuple[Tensor, ...], targets: Any, place: Place) -> float:
        if place.step > 0:
            return run.step(inputs, targets, place)
        before = run.step.before_training(inputs, targets, place)
        first = FirstLoss(run.step(inputs, targets, place), *before)
        run.progress.first_loss = asdict(first)
        if first.abnormal(self.params.max_loss_ratio):
            self.note(first.warning(self.params.max_loss_ratio))
        return first.fake_quant

    def _finish_epoch(self, progress: Progress, lr: float) -> None:
        """Score the model, keep its weights if its integers are among the best so far, go to the next epoch."""
        self.model.eval()
        set_fake_quantize(self.model, FakeQuantState.VALIDATION)
        scores = share(lambda: self.score(self.model))
        mean = progress.loss_sum / self.steps if progress.epoch else math.nan
        progress.history.append(asdict(Epoch(progress.epoch, lr, mean, **asdict(scores))))
        kept = worth_keeping(progress.history, self.params.keep_epochs, self.higher_is_better)
        if progress.epoch in kept:
            progress.kept[progress.epoch] = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        progress.kept = {epoch: weights for epoch, weights in progress.kept.items() if epoch in kept}
        progress.epoch += 1
        progress.loss_sum = 0.0

    # -- the best epoch ------------------------------------------------------------------------------------------

    def _choose(self, progress: Progress) -> tuple[int, float]:
        """The kept epoch whose integers score best on all validation data, and that score; sets its weights."""
        best, most = 0, math.nan
        for epoch, weights in sorted(progress.kept.items()):
            self.model.load_state_dict(weights)
            self.model.eval()
            score = progress.history[epoch]["integer"]
            if self.full_score is not None:
                score = share(partial(self.full_score, self.model))
            if better(score, most, self.higher_is_better):
                best, most = epoch, score
        self.model.load_state_dict(progress.kept[best])
        return best, most

    # -- going on, going back ------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path | None:
        return self.scratch / "resume.safetensors" if self.scratch else None

    @property
    def _goes_back(self) -> bool:
        return self.params.on_nan == "rewind"

    def _checkpoint(self, run: _Run) -> None:
        """Where to go on after the process ends, and where to go back to after a NaN: the same moments for both."""
        if not self._file and not self._goes_back:
            return
        check_weights(self.model, f"epoch {run.progress.epoch} step {run.progress.step - 1}")
        packed = pack(run.progress, self.model, run.step.optimizer)
        if self._file and rank() == 0:
            save(self._file, packed)
        if self._goes_back:
            run.good = packed

    def _rewind(self, run: _Run, error: TrainingError) -> None:
        """Back to the last good weights with half the learning rate; raises ``error`` where that is not asked for."""
        if run.good is None:
            raise error
        rewinds = run.progress.rewinds + 1
        if rewinds > self.params.max_rewinds:
            seen = f"{error.seen}, again after {self.params.max_rewinds} rewinds (qat.max_rewinds)"
            raise TrainingError(error.code, error.where, seen, error.fix) from error
        run.progress = unpack(run.good, self.model, run.step.optimizer)
        run.progress.rewinds = rewinds
        self.note(
            f"{error.code} {error.where}: {error.seen}. Back to step {run.progress.step} with the learning rate times"
            f" {run.progress.rate:g} (rewind {rewinds} of {self.params.max_rewinds})"
        )
        self._checkpoint(run)

    # -- parts ---------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return self.steps * self.params.epochs

    def _step(self) -> Step:
        if self.optimizer is not None:
            check_owned(self.optimizer, self.model)
        optimizer = make_optimizer(self.params, self.model) if self.optimizer is None else self.optimizer
        exact = self._exact_forward() if self.params.forward == "exact" else None
        amp = torch.bfloat16 if self.params.amp == "bf16" else None
        return Step(self.model, optimizer, self.loss, self.params.clip_grad_norm, self.distillation, exact, amp)

    def _set_batch_norms(self, epoch: int) -> None:
        freeze_batch_norms(self.model, epoch >= (self.params.freeze_batch_norm or math.inf))

    def _exact_forward(self) -> ExactForward:
        forward = ExactForward(self.model, scorable)
        if islands := [op.name for op in scorable(self.model).program.islands()]:
            self.note(f"qat.forward: exact, but {', '.join(islands)} stay float in the Program: fake-quant there")
        return forward

    def _check_last_batch(self) -> None:
        if 1 in gather(len(self.items(1, self.steps - 1))):  # all of them try: the forward may speak to the others
            inputs, _ = next(iter(self.batches(1, self.steps - 1)))
            check_batch_of_one(self.model, self._moved(inputs), "the last batch of an epoch")

    def _moved(self, values: Any) -> Any:
        """On the device, and images in the layout of the training."""
        layout = torch.channels_last if self.params.channels_last else torch.preserve_format

        def move(x: Tensor) -> Tensor:
            return x.to(self.device, memory_format=layout if x.dim() == 4 else torch.preserve_format)

        return tree_map_only(Tensor, move, values)

    @contextmanager
    def _layout(self) -> Iterator[None]:
        """Weights ``[O, I, kH, kW]`` lie in memory as ``qat.channels_last`` says while a block trains."""
        if self.params.channels_last:
            self._lay_out(torch.channels_last)
        try:
            yield
        finally:
            self._lay_out(torch.contiguous_format)

    def _lay_out(self, layout: torch.memory_format) -> None:
        for tensor in chain(self.model.parameters(), self.model.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=layout)


@dataclass
class _Run:
    """What changes while a training runs. ``good`` is where a NaN goes back to."""

    step: Step
    progress: Progress
    good: Packed | None = None
