"""How near an integer encoder is to the float encoder, and how well it retrieves; and the loss for QAT.

Targets are the collated :class:`examples.sentence_encoder.data.Target`. Similarity is the cosine of two vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qatlib.errors import DataError

Targets = Mapping[str, Tensor]


class Cosine:
    """Mean similarity of a sentence's vector and the float encoder's."""

    name = "cosine"
    higher_is_better = True

    def __init__(self) -> None:
        self._sum, self._items = 0.0, 0

    def update(self, outputs: Tensor, targets: Targets) -> None:
        self._sum += float(F.cosine_similarity(outputs.double(), targets["float"].to(outputs.device).double()).sum())
        self._items += len(outputs)

    def compute(self) -> float:
        if self._items == 0:
            raise DataError("QAT110", self.name, "has seen no items", "Evaluate at least one batch")
        return self._sum / self._items


class _Retrieval:
    """Keeps every vector: a nearest neighbour is known when all are there."""

    def __init__(self) -> None:
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def update(self, outputs: Tensor, targets: Targets) -> None:
        seen = (outputs, targets["float"], targets["pair"], targets["side"])
        self._seen.append(tuple(part.cpu() for part in seen))  # type: ignore[arg-type]

    def _found(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each question: pair of the nearest answer, of the float encoder's nearest answer, and its own pair.

        Raises DataError QAT110 if there were no questions or no answers.
        """
        columns = [torch.cat(parts) for parts in zip(*self._seen, strict=True)]
        if not columns or not bool((columns[3] == 0).any()) or not bool((columns[3] == 1).any()):
            raise DataError("QAT110", "retrieval", "has seen no questions or no answers", "Evaluate the whole split")
        outputs, vectors, pair, side = columns
        asked, answers = side == 0, pair[side == 1]
        return answers[_nearest(outputs, side)], answers[_nearest(vectors, side)], pair[asked]


class Agreement(_Retrieval):
    """Share of the questions for which the nearest of all answers is the one that the float encoder finds."""

    name = "retrieval_agreement"
    higher_is_better = True

    def compute(self) -> float:
        found, expected, _ = self._found()
        return float((found == expected).double().mean())


class Recall(_Retrieval):
    """Share of the questions for which the nearest of all answers is their own (recall at 1)."""

    name = "recall_at_1"
    higher_is_better = True

    def compute(self) -> float:
        found, _, own = self._found()
        return float((found == own).double().mean())


def _nearest(vectors: Tensor, side: Tensor) -> Tensor:
    """Row of the most similar answer for every question; of equal ones the first."""
    unit = F.normalize(vectors.double(), dim=1)
    return torch.stack([row.argmax() for row in unit[side == 0] @ unit[side == 1].T])


def distillation(outputs: Tensor, targets: Targets) -> Tensor:
    """1 minus the similarity to the float encoder's vector, mean over the batch."""
    return 1 - F.cosine_similarity(outputs, targets["float"].to(outputs.device)).mean()


METRICS = (Cosine, Agreement, Recall)
RELATIVE = (Cosine, Agreement)


def against(targets: Targets, outputs: Tensor) -> Targets:
    """Targets with the encoder that gave ``outputs`` in the place of the float encoder."""
    return {**targets, "float": outputs}
