"""The loss guard of QAT: does the training start from calibrated parameters?"""

from __future__ import annotations

from dataclasses import dataclass

from qatlib.errors import TrainingError
from qatlib.fake.fake_quant import ConstantFakeQuantize, FakeQuantize
from qatlib.fake.model import FakeQuantModel
from qatlib.qtype import scale_of

SMALL = 0.1
"""A loss this far above the float one is no reason to worry, however small the float one is."""


@dataclass(frozen=True)
class FirstLoss:
    """Loss of the first batch: in QAT state before the first step, of the calibrated model, and of its float form."""

    fake_quant: float
    calibrated: float
    in_float: float

    def abnormal(self, ratio: float) -> bool:
        """Whether quantization alone multiplies the loss by more than ``ratio``."""
        return self.fake_quant > ratio * self.in_float + SMALL

    def warning(self, ratio: float) -> str:
        """What a person reads before an hour is lost."""
        scales = (
            "qat.averaging_constant moves the scales too fast; 0 keeps the calibrated ones"
            if self.calibrated <= ratio * self.in_float + SMALL
            else "were the calibrated parameters loaded, and does the calibrated model score well? If not, calibrate"
            " better first"
        )
        return (
            f"QAT029 the first loss is {self.fake_quant:.4g} with fake-quant on and {self.in_float:.4g} in float"
            f" (calibrated: {self.calibrated:.4g}), more than qat.max_loss_ratio = {ratio:g} times: {scales}"
        )


def check_calibrated(model: FakeQuantModel) -> None:
    """Raise TrainingError (QAT196) for activation scales that no calibration gives.

    They are all the same number, and beyond what the ranges seen in calibration allow: left at an initial value, or
    those of a checkpoint that was not loaded. (A model without scales is refused by its state, QAT150.)
    """
    fakes = [f for m in model.modules() if (f := _calibrated_by_data(m)) is not None]
    scales = {float(fake.scale) for fake in fakes}
    if len(fakes) < 2 or len(scales) > 1 or all(_within_range(fake) for fake in fakes):
        return
    raise TrainingError(
        "QAT196",
        "activation scales",
        f"all {len(fakes)} are {scales.pop():g}, which is not what calibration gives",
        "Calibrate the model, or load the calibrated parameters, before training it",
    )


def _calibrated_by_data(module: object) -> FakeQuantize | None:
    if not isinstance(module, FakeQuantize) or isinstance(module, ConstantFakeQuantize):
        return None
    return module if module.spec.scale is None else None


def _within_range(fake: FakeQuantize) -> bool:
    """Whether the scale is at most that of the largest value seen, rounded up to a power of two."""
    largest = max(-float(fake.low), float(fake.high), 0.0)
    return float(fake.scale) <= 2 * scale_of(largest, fake.spec.dtype, fake.where)
