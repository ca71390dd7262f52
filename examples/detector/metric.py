"""Mean average precision of detections, by the definition of PASCAL VOC 2010 (precision at every recall), and the
agreement of two detectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.detector.boxes import decode, iou, nms
from qatlib.errors import ConfigError, DataError


class MeanAveragePrecision:
    """Area under precision over recall, averaged over the classes that occur in the targets.

    Outputs are scores ``[N, C, A]`` and offsets ``[N, 4, A]`` of the detector, targets ``[N, items, 5]`` rows of
    (class, x1, y1, x2, y2) with class -1 for no item. A detection is a class score of at least ``min_score`` that NMS
    at ``nms_iou`` keeps among the ``candidates`` best of its image. Of all images together, best score first, it is a
    hit if the item of its class and image that it overlaps most has IoU >= ``iou_threshold`` and was not hit before.
    """

    higher_is_better = True

    def __init__(
        self, iou_threshold: float = 0.5, nms_iou: float = 0.5, min_score: float = 0.05, candidates: int = 100
    ) -> None:
        for name, value in (("iou_threshold", iou_threshold), ("nms_iou", nms_iou), ("min_score", min_score)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError("QAT105", f"metric.kwargs.{name}", f"is {value!r}", "Use a number from 0 to 1")
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
            raise ConfigError("QAT105", "metric.kwargs.candidates", f"is {candidates!r}", "Use an integer >= 1")
        self.name = f"map{round(100 * iou_threshold)}"
        self._iou, self._nms_iou, self._min_score, self._candidates = iou_threshold, nms_iou, min_score, candidates
        self._found: list[Tensor] = []  # rows of (score, class, hit)
        self._truths: list[Tensor] = []

    def update(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Add a batch; raises DataError QAT114 for shapes that do not fit, QAT113 for a class out of range."""
        _check(outputs, targets)
        scores, boxes = outputs[0], decode(outputs[1])
        for item in range(len(targets)):
            real = targets[item, targets[item, :, 0] >= 0]
            self._truths.append(real[:, 0].long().cpu())
            self._found.append(self._match(*self._detect(scores[item], boxes[item]), real).cpu())

    def compute(self) -> float:
        truths = torch.cat(self._truths) if self._truths else torch.empty(0)
        if len(truths) == 0:
            raise DataError("QAT110", self.name, "has seen no items", "Evaluate at least one scene with an item")
        score, found_class, hit = torch.cat(self._found).unbind(1)
        order = score.sort(descending=True, stable=True).indices
        found_class, hits = found_class[order], hit[order] > 0
        kinds, counts = torch.unique(truths, return_counts=True)
        values = [
            average_precision(hits[found_class == kind], int(count)) for kind, count in zip(kinds, counts, strict=True)
        ]
        return sum(values) / len(values)

    def _detect(self, scores: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score, class and box of what is found in one image, best first; scores ``[C, A]``, boxes ``[A, 4]``."""
        classes, places = (scores >= self._min_score).nonzero(as_tuple=True)
        found = scores[classes, places]
        best = found.sort(descending=True, stable=True).indices[: self._candidates]
        found, classes, places = found[best], classes[best], places[best]
        kept = nms(boxes[places], found, classes, self._nms_iou)
        return found[kept], classes[kept], boxes[places[kept]]

    def _match(self, scores: Tensor, classes: Tensor, boxes: Tensor, real: Tensor) -> Tensor:
        """Rows of (score, class, 1 for a hit) for the detections of one image, which come best first."""
        overlap = torch.where(classes[:, None] == real[None, :, 0], iou(boxes, real[:, 1:]), -1.0)
        hits = torch.zeros_like(scores)
        taken: set[int] = set()
        for rank, row in enumerate(overlap.tolist()):
            item = max(range(len(row)), key=row.__getitem__, default=None)
            if item is not None and row[item] >= self._iou and row[item] >= 0 and item not in taken:
                taken.add(item)
                hits[rank] = 1
        return torch.stack([scores, classes.to(scores), hits], 1)


class Agreement:
    """Share of the decisions that two detectors have in common; targets are the other's outputs.

    A detector decides at a location whose best class score is 0.5 or more. Locations count where either decides.
    """

    name = "agreement"
    higher_is_better = True

    def __init__(self) -> None:
        self._equal, self._taken = 0, 0

    def update(self, outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> None:
        ours, others = _decisions(outputs[0]), _decisions(targets[0])
        either = (ours >= 0) | (others >= 0)
        self._equal += int((ours == others)[either].sum())
        self._taken += int(either.sum())

    def compute(self) -> float:
        if self._taken == 0:
            raise DataError("QAT110", self.name, "has seen no decision", "Evaluate at least one scene with an item")
        return self._equal / self._taken


def against(targets: Tensor, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Targets of :class:`Agreement` with the detector that gave ``outputs``."""
    return outputs


def _decisions(scores: Tensor) -> Tensor:
    """Class ``[N, A]`` of the best score of each location, -1 where that is below 0.5; scores ``[N, C, A]``."""
    best = scores.max(1)
    return torch.where(best.values >= 0.5, best.indices, -1)


METRICS = (MeanAveragePrecision,)
RELATIVE = (Agreement,)


def average_precision(hits: Tensor, truths: int) -> float:
    """Area under the precision-recall curve of detections, best first, with every point of it.

    ``hits`` ``[n]`` bool says which detections are right, ``truths`` (>= 1) how many there are to find. At each recall
    counts the greatest precision that is reached there or later (PASCAL VOC 2010 development kit, section 3.4.1).
    """
    found = hits.double().cumsum(0)
    precision = found / torch.arange(1, len(hits) + 1, dtype=torch.float64)
    best_later = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    return float(best_later[hits].sum() / truths)


def _check(outputs: tuple[Tensor, Tensor], targets: Tensor) -> None:
    tensors = isinstance(outputs, tuple | list) and all(isinstance(value, Tensor) for value in (*outputs, targets))
    shapes = [list(value.shape) for value in (*outputs, targets)] if tensors else []
    fits = len(shapes) == 3 and all(len(shape) == 3 for shape in shapes)
    if fits:
        scores, offsets, items = shapes
        fits = scores[0] == offsets[0] == items[0] and scores[2] == offsets[2] and offsets[1] == 4 and items[2] == 5
    if not fits:
        raise DataError(
            "QAT114",
            "metric mean average precision",
            f"got shapes {shapes or type(outputs).__name__}; expected scores [N, C, A], offsets [N, 4, A] and targets "
            "[N, items, 5]",
            "Use the model and the data of this example, or another metric",
        )
    classes = targets[..., 0]
    if bool((classes >= outputs[0].shape[1]).any()):
        raise DataError(
            "QAT113",
            "targets",
            f"hold class {int(classes.max())}; the model has {outputs[0].shape[1]} classes",
            "Correct the labels, or the number of classes in model.kwargs",
        )
