"""The help of section ``calibrate`` that moves weights: which is switched on, in the order in which it makes sense."""

from __future__ import annotations

from dataclasses import dataclass

from qatlib.fake.calibrate import calibrate
from qatlib.fake.distributed import rank
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.ptq.correct import correct_biases
from qatlib.fake.ptq.layers import float_reference
from qatlib.fake.ptq.re_estimate import re_estimate_batch_norms
from qatlib.fake.ptq.rounding import adaround
from qatlib.pipeline.project import Project


@dataclass(frozen=True)
class Calibrated:
    """A calibrated model, the number of samples it was calibrated on, and what was done after training.

    ``done`` are keys of section ``calibrate``, ``metrics`` what they have to tell.
    """

    model: FakeQuantModel
    samples: int
    done: tuple[str, ...]
    metrics: dict[str, float | int]


def calibrated_model(project: Project) -> Calibrated:
    """Equalize, calibrate, then learn the rounding, re-estimate batch norms, correct biases, as far as switched on.

    Scales come before the rounding that needs them; means come last, as everything before moves them. Of several
    processes only the first does what comes after calibration.
    """
    section = project.config.calibrate
    items = section.batches * section.batch_size
    batches = project.batches("calib", items, section.batch_size)
    model = project.fake_quant_model(equalized=section.equalize)
    samples = calibrate(model, project.calibration_batches(), project.device, histograms=bool(section.compare))
    if rank() > 0:
        return Calibrated(model, samples, (), {})
    done, metrics = [], dict[str, float | int]()
    if section.equalize:
        done, pairs = ["equalize"], project.equalized[1]
        metrics["equalized_pairs"] = len(pairs)
        metrics["widest_channels_before"] = max((pair.before for pair in pairs), default=1.0)
        metrics["widest_channels_after"] = max((pair.after for pair in pairs), default=1.0)
    if section.adaround or section.bn_re_estimation or section.bias_correction:
        reference = float_reference(model)
    if section.adaround:
        done.append("adaround")
        few = project.batches("calib", min(items, section.adaround.images), section.adaround.batch_size)
        rounded = adaround(model, reference, few, section.adaround, project.config.runtime.seed)
        metrics["rounded_layers"] = len(rounded)
        ratios = [one.learned / one.nearest for one in rounded if one.nearest]
        metrics["rounding_error_ratio"] = sum(ratios) / len(ratios) if ratios else 1.0
    if section.bn_re_estimation:
        done.append("bn_re_estimation")
        metrics["re_estimated_batch_norms"] = len(re_estimate_batch_norms(model, reference, batches))
    if section.bias_correction:
        done.append("bias_correction")
        shifts = [one.shift for one in correct_biases(model, reference, batches)]
        metrics["corrected_biases"] = len(shifts)
        metrics["largest_bias_shift"] = max(shifts, default=0.0)
    return Calibrated(model, samples, tuple(done), metrics)
