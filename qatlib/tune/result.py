"""What a search found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qatlib.errors import ConfigError
from qatlib.tune.front import Point
from qatlib.tune.space import Choice, key_of
from qatlib.tune.state import Cost, Score


@dataclass(frozen=True)
class Attempt:
    """A choice, with what was predicted (None for what was not out of the front) and what came of it, if measured."""

    choice: Choice
    predicted: Point | None
    cost: Cost | None = None
    score: Score | None = None
    ratio: float | None = None


@dataclass
class Result:
    """``attempts`` are the points of the front, fastest first, and ``present`` is what ships now.

    ``best`` is the fastest of those measured that keep ``min_ratio`` of the float metric; where none does, the most
    accurate. ``left`` says what there was no time for, empty if nothing, and ``unpredicted`` what of it is of the
    prediction.
    """

    target: str
    metric: str
    higher_is_better: bool
    float_metric: float | None
    min_ratio: float
    present: Attempt | None = None
    attempts: list[Attempt] = field(default_factory=list)
    left: str = ""
    unpredicted: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> list[Attempt]:
        """Front and present, fastest first."""
        found = {key_of(a.choice): a for a in ([self.present] if self.present else [])}
        found |= {key_of(a.choice): a for a in self.attempts}
        return sorted((a for a in found.values() if a.score and a.cost), key=_latency)

    @property
    def best(self) -> Attempt | None:
        good = [attempt for attempt in self.measured if (attempt.ratio or 0.0) >= self.min_ratio]
        if good:
            return good[0]
        return max(self.measured, key=self._worth, default=None)

    @property
    def pareto(self) -> list[Attempt]:
        """Measured, and beaten by no other in latency and metric, fastest first."""
        kept: list[Attempt] = []
        for attempt in self.measured:
            if not kept or self._worth(attempt) > self._worth(kept[-1]):
                kept.append(attempt)
        return kept

    def point(self, number: int) -> Attempt:
        """A point of the front, from 1; raises ConfigError QAT259 if there is none."""
        if number > len(self.attempts):
            seen = f"is {number}; the front has {len(self.attempts)} points"
            raise ConfigError("QAT259", "--point", seen, "Give a number of the table")
        return self.attempts[number - 1]

    def _worth(self, attempt: Attempt) -> float:
        assert attempt.score is not None
        return attempt.score.metric if self.higher_is_better else -attempt.score.metric


def _latency(attempt: Attempt) -> tuple[float, float]:
    assert attempt.cost is not None
    assert attempt.cost.latency_us is not None
    assert attempt.score is not None
    return attempt.cost.latency_us, attempt.score.noise
