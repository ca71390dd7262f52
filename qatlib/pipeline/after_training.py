"""The help of section ``calibrate`` that moves weights: which is switched on, in the order in which it makes sense."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qatlib.fake.model import FakeQuantModel
from qatlib.fake.ptq.correct import correct_biases
from qatlib.fake.ptq.layers import float_reference
from qatlib.fake.ptq.re_estimate import re_estimate_batch_norms
from qatlib.fake.ptq.rounding import adaround
from qatlib.pipeline.checkpoint import read_metadata
from qatlib.pipeline.project import Project


@dataclass(frozen=True)
class Helped:
    """What was done: keys of section ``calibrate``, and what they have to tell."""

    done: tuple[str, ...]
    metrics: dict[str, float | int]


def help_after_training(project: Project, model: FakeQuantModel) -> Helped:
    """Learn the rounding, re-estimate batch norms and correct biases of a calibrated model, as far as switched on.

    Scales come before the rounding that needs them; means come last, as everything before moves them. ``model`` is
    :meth:`Project.fake_quant_model`, equalized if ``calibrate.equalize`` says so.
    """
    section = project.config.calibrate
    items = section.batches * section.batch_size
    batches = project.batches("calib", items, section.batch_size)
    done, metrics = list[str](), dict[str, float | int]()
    if section.equalize:
        done.append("equalize")
        pairs = project.equalized[1]
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
    return Helped(tuple(done), metrics)


def float_side(project: Project, path: str | Path) -> nn.Module:
    """What to compare the calibrated model of a checkpoint with: the float model.

    Where its weights were rounded or corrected after training, that is the float model op by op, in the units of the
    equalized one if the checkpoint has those.
    """
    done = json.loads(read_metadata(path).get("after_training", "[]"))
    if set(done) <= {"equalize"}:
        return project.float_model
    return project.fake_quant_model(equalized="equalize" in done).eval()
