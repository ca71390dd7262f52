"""What a search found so far, in a file: a search that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qatlib.atomic import write_text
from qatlib.errors import StageError

FILE = "state.json"


class _Found(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Cost(_Found):
    """What the target takes for a choice; all None where it, or the network, has no such form, ``refused`` says why."""

    latency_us: float | None = None
    dram_bytes: int | None = None
    sram_peak_bytes: int | None = None
    refused: str = ""


class Score(_Found):
    """Of the integers: error power at the outputs over that of the outputs, and the user's metric."""

    noise: float
    metric: float


class Trial(_Found):
    """Of one unit rounded alone: power of the error and of the reference for each output, over so many ``batches``."""

    batches: int = 0
    powers: list[tuple[float, float]] = []
    complete: bool = False

    def add(self, powers: Sequence[tuple[float, float]], last: bool) -> None:
        """One batch more."""
        before = self.powers or [(0.0, 0.0)] * len(powers)
        self.powers = [(a + c, b + d) for (a, b), (c, d) in zip(before, powers, strict=True)]
        self.batches, self.complete = self.batches + 1, last


class State(_Found):
    """``costs`` and ``scores`` are by :func:`qatlib.tune.space.key_of`; ``predicted`` says that no trial is missing."""

    schema_version: Literal[2] = 2
    fingerprint: str
    float_metric: float | None = None
    trials: dict[str, Trial] = {}
    predicted: bool = False
    costs: dict[str, Cost] = {}
    scores: dict[str, Score] = {}

    def save(self, folder: Path) -> None:
        """Whole or not at all."""
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")


def load_state(folder: Path, fingerprint: str) -> tuple[State, bool]:
    """The state in ``folder``, and whether it is of the same ``fingerprint``; a new one if it is not, or not there.

    Raises StageError QAT257 for a file that is no state.
    """
    path = folder / FILE
    if not path.exists():
        return State(fingerprint=fingerprint), True
    try:
        state = State.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise StageError(
            "QAT257", str(path), f"is no state of a search ({first})", "Remove it; the search starts anew"
        ) from None
    return (state, True) if state.fingerprint == fingerprint else (State(fingerprint=fingerprint), False)
