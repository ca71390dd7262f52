"""What a capture hands to everything after it: one record per op, and the list of what could not be measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qatlib.analysis.stats import Comparison, Summary
from qatlib.graph.calls import all_calls, first_call
from qatlib.qtype import QType

Mode = Literal["FvsQ", "QvsQ", "CvsQ"]
"""Float against calibrated, fake-quant against integer, or calibrated against the integers made of it untrained."""

STAGES_OF: dict[str, tuple[str, str]] = {
    "FvsQ": ("float", "fake-quant"),
    "QvsQ": ("fake-quant", "integer"),
    "CvsQ": ("calibrated", "integer"),
}


@dataclass(frozen=True)
class OpRecord:
    """One node of the model, in forward order.

    ``accumulated`` compares the outputs with each model on its own inputs; ``same_input`` compares them when the other
    model's op gets the reference's inputs. Either is None where it could not be measured (see
    :attr:`Capture.unmeasured`). ``call`` counts the calls of a module that is used more than once, from 1; it is 0
    otherwise. ``qtype`` is the output format of the other model. An inner step of a composite has the name of the whole
    call in ``composite``. ``channel_amax`` is the largest magnitude of every output channel of a convolution or linear
    of a float reference. Of ``accumulated`` codes that differ are not counted; ``same_input`` has no histograms.
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
    composite: str = ""
    channel_amax: tuple[float, ...] = ()

    @property
    def match(self) -> str:
        """The name that means this op in params.yaml."""
        return match_name(self.name, self.module, self.call)

    @property
    def type_name(self) -> str:
        """Module or function; of a step inside of a composite the operator."""
        return self.op if self.composite else self.module_type

    @property
    def title(self) -> str:
        """Name for people, with the call number of a shared module."""
        return call_title(self.name, self.module, self.call)

    @property
    def scale(self) -> float | None:
        return self.qtype.scale


def match_name(name: str, module: str, call: int = 0) -> str:
    """The name that means one op in params.yaml: its module, of a module called several times that call, of an inner
    step the step. ``call`` is the call, from 1, and 0 of a module called once.
    """
    step = re.match(rf"{re.escape(module)}(#\d+$|(#\d+)?\.)", name)
    found = name if step or not module else module
    return first_call(found, module) if call == 1 else found


def call_title(name: str, module: str, call: int = 0) -> str:
    """Name for people, with the number of the call where there are several."""
    found = match_name(name, module)
    return f"{all_calls(found, module)} (call {call})" if call else found


@dataclass(frozen=True)
class Saturation:
    """What the int32 accumulator of op ``name`` met on the data.

    ``bound`` is the proven largest magnitude of its sums, ``largest`` the largest that occurred before saturation;
    ``saturated`` of ``elements`` sums lay outside of 32 bits.
    """

    name: str
    bound: int
    largest: int
    saturated: int
    elements: int


@dataclass(frozen=True)
class Unmeasured:
    """``what`` could not be measured at node ``name``, because of ``why``."""

    name: str
    what: str
    why: str


@dataclass(frozen=True)
class Capture:
    """Result of one streaming pass. ``samples`` is the number of rows of the first input over all batches.

    ``saturations`` has an entry for each op of a Program whose accumulator bound is beyond 32 bits.
    """

    mode: Mode
    batches: int
    samples: int
    records: tuple[OpRecord, ...]
    unmeasured: tuple[Unmeasured, ...] = ()
    saturations: tuple[Saturation, ...] = ()

    def find(self, name: str) -> OpRecord | None:
        return next((record for record in self.records if record.name == name), None)
