"""The training of the qat stage, put together from ``params.yaml``, and the metrics of what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from qatlib.fake.distill import Distillation
from qatlib.fake.distributed import rank, size
from qatlib.fake.epochs import Epoch, Scores
from qatlib.fake.float_form import float_form
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.train import Trained, Trainer, scorable
from qatlib.pipeline.data import batch_order, dealt
from qatlib.pipeline.entry import load_entry
from qatlib.pipeline.metrics import Evaluation
from qatlib.pipeline.project import Project
from qatlib.pipeline.reporting import Shown


def trainer_of(project: Project, calibrated: str, scratch: Path | None, shown: Shown) -> Trainer:
    """The trainer of section ``qat``, from the checkpoint ``calibrated``. Without epochs it opens no training data."""
    section, seed = project.config.qat, project.config.runtime.seed
    items = _count(project) if section.epochs else 0
    teaches = section.distill is not None and section.distill.weight > 0 and section.epochs > 0
    return Trainer(
        model=project.load_fake_quant(calibrated, project.resolve_relu6()),
        params=section,
        loss=partial(load_entry(section.loss, "qat.loss"), **section.loss_kwargs),
        batches=project.training_batches,
        steps=-(-items // section.batch_size),
        score=partial(_scores, project),
        full_score=partial(_integer, project, None) if _sampled(project) else None,
        higher_is_better=project.metric().higher_is_better,
        device=project.device,
        distillation=Distillation.of(section.distill, project.float_model) if teaches and section.distill else None,
        items=partial(_items, items, section.batch_size, seed, (rank(), size())),
        seed=seed,
        scratch=scratch,
        on_step=shown.on_step,
        note=shown.note,
    )


def qat_metrics(project: Project, trained: Trained, scored: Evaluation) -> dict[str, float | int]:
    """``scored`` is the fake-quant model on the test split; ``val_integer`` what decided among the epochs.

    ``last_epoch_gain`` is by how much the last epoch's integers beat all earlier ones, in the metric's unit, on the
    sample. The losses are those of the first batch: fake-quant, calibrated and float.
    """
    metric, epochs = project.metric(), project.config.qat.epochs
    values: dict[str, float | int] = {
        metric.name: scored.value,
        "images": scored.images,
        "train_images": _count(project) if epochs else 0,
        "epochs": epochs,
        "best_epoch": trained.best,
        "val_integer": trained.integer,
        "val_images": len(project.split("val")),  # type: ignore[arg-type]
        "nan_rewinds": trained.rewinds,
    }
    if epochs:
        values["last_epoch_gain"] = last_epoch_gain(trained.history, metric.higher_is_better)
    if trained.first_loss is not None:
        values["first_loss"] = trained.first_loss.fake_quant
        values["first_loss_calibrated"] = trained.first_loss.calibrated
        values["first_loss_float"] = trained.first_loss.in_float
    return {name: value for name, value in values.items() if math.isfinite(value)}


def last_epoch_gain(history: Sequence[Epoch], higher_is_better: bool) -> float:
    """How much better the integers of the last epoch score than those of the best epoch before it."""
    *earlier, last = ((epoch.integer if higher_is_better else -epoch.integer) for epoch in history)
    return last - max(earlier)


def _scores(project: Project, model: FakeQuantModel) -> Scores:
    sample = project.config.qat.integer_eval_images
    return Scores(
        fake_quant=project.evaluate(model, "val", sample).value,
        integer=_integer(project, sample, model),
        in_float=project.evaluate(partial(float_form, model), "val", sample).value,
    )


def _integer(project: Project, images: int | None, model: FakeQuantModel) -> float:
    return project.evaluate(scorable(model).to(project.device), "val", images).value


def _sampled(project: Project) -> bool:
    images = project.config.qat.integer_eval_images
    return images is not None and images < len(project.split("val"))  # type: ignore[arg-type]


def _count(project: Project) -> int:
    return len(project.training_data)  # type: ignore[arg-type]


def _items(items: int, size: int, seed: int, part: tuple[int, int], epoch: int, batch: int) -> list[int]:
    """Dataset indices of what this process sees of a batch."""
    found: list[int] = dealt(_order(items, seed, epoch)[batch * size : (batch + 1) * size], part).tolist()
    return found


@lru_cache(maxsize=1)
def _order(items: int, seed: int, epoch: int) -> Tensor:
    return batch_order(items, seed, epoch)
