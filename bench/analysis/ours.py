"""Our analyses of a network on one batch, against plain forwards of the same models."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.analysis.rivals import ALONE, EACH, Side
from qatlib.analysis.facts import Facts
from qatlib.analysis.outcome import publish
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.replay import FormedModel
from qatlib.analysis.sensitivity import sensitivity
from qatlib.analysis.taylor import taylor_scores
from qatlib.analysis.units import units_of
from qatlib.conversion import IntegerModel, convert_fx
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import prepare_qat_fx

TOP = 5
"""Ops that are measured where gradients rank them first."""


@dataclass(frozen=True)
class Made:
    """A float network, its calibrated fake-quant form and its integers, with a batch of images."""

    net: nn.Module
    fake: FakeQuantModel
    integer: IntegerModel
    x: Tensor

    def forwards(self) -> dict[str, Callable[[], object]]:
        """One plain run of each form."""
        return {
            "float": torch.no_grad()(lambda: self.net(self.x)),
            "fake-quant": torch.no_grad()(lambda: self.fake(self.x)),
            "integer": lambda: self.integer(self.x),
        }

    def layers(self) -> tuple[str, ...]:
        """Names of the ops with weights, in forward order."""
        return tuple(op.node.module for _, op in self.fake.ops() if op.weight_fake_quant is not None)

    def sides(self) -> dict[str, Side]:
        """What other tools are compared with, by question.

        ALONE is asked again with ranking beforehand, and of the ranking alone.
        """
        return {
            ALONE: Side("qatlib, sensitivity of every op", ALONE, functools.partial(self._alone, None)),
            "ranked": Side(
                f"qatlib, sensitivity of the {TOP} ranked first", ALONE, functools.partial(self._alone, TOP)
            ),
            "scored": Side("qatlib, gradient scores alone", ALONE, self._scored),
            EACH: Side("qatlib, capture: both errors and statistics", EACH, self._each),
        }

    def _alone(self, top: int | None) -> dict[str, float]:
        seen = sensitivity(self.fake, [self.x], kinds=["on"], parts=False, top=top)
        return {trial.unit.name: trial.distance.noise for trial in seen.trials}

    def _scored(self) -> dict[str, float]:
        formed = FormedModel(self.fake)
        return taylor_scores(formed, units_of(self.fake, formed.full), [self.x])

    def _each(self) -> dict[str, float]:
        records = capture_pair(self.net, self.fake, self.x, "FvsQ").records
        return {record.name: record.accumulated.sqnr_db for record in records if record.accumulated}

    def page(self, images: int = 4) -> float:
        """Seconds of writing the page from a capture of ``images``, which is within them."""
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            publish(Facts(fvsq=capture_pair(self.net, self.fake, self.x[:images], "FvsQ")), Path(folder))
            return time.perf_counter() - start


def make(net: nn.Module, x: Tensor) -> Made:
    fake = prepare_qat_fx(net, example_inputs=[x[:2]])
    calibrate(fake, [x])
    return Made(net, fake, convert_fx(fake), x)
