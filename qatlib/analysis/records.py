"""What a capture hands to everything after it: one record per op, and the list of what could not be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qatlib.analysis.stats import Comparison, Summary
from qatlib.qtype import QType

Mode = Literal["FvsQ", "QvsQ"]
"""Float against fake-quant, or fake-quant against integer."""

STAGES_OF: dict[str, tuple[str, str]] = {"FvsQ": ("float", "fake-quant"), "QvsQ": ("fake-quant", "integer")}


@dataclass(frozen=True)
class OpRecord:
    """One node of the model, in forward order.

    ``accumulated`` compares the outputs with each model on its own inputs; ``same_input`` compares them when the other
    model's op gets the reference's inputs. Either is None where it could not be measured (see
    :attr:`Capture.unmeasured`). ``call`` counts the calls of a module that is used more than once, from 1; it is 0
    otherwise. ``qtype`` is the output format of the other model.
    """

    index: int
    name: str
    module: str
    module_type: str
    op: str
    inputs: tuple[str, ...]
    qtype: QType
    reference: Summary | None = None
    other: Summary | None = None
    accumulated: Comparison | None = None
    same_input: Comparison | None = None
    call: int = 0

    @property
    def title(self) -> str:
        """Module name for people, with the call number of a shared module."""
        shown = self.module or self.name
        return f"{shown} (call {self.call})" if self.call else shown

    @property
    def scale(self) -> float | None:
        return self.qtype.scale


@dataclass(frozen=True)
class Unmeasured:
    """``what`` could not be measured at node ``name``, because of ``why``."""

    name: str
    what: str
    why: str


@dataclass(frozen=True)
class Capture:
    """Result of one streaming pass. ``samples`` is the number of rows of the first input over all batches."""

    mode: Mode
    batches: int
    samples: int
    records: tuple[OpRecord, ...]
    unmeasured: tuple[Unmeasured, ...] = ()

    def find(self, name: str) -> OpRecord | None:
        return next((record for record in self.records if record.name == name), None)
