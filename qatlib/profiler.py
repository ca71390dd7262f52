"""The analysis calls under the name that scripts know; all of them are in :mod:`qatlib`, too."""

from qatlib.analysis.bad_case import find_bad_case
from qatlib.analysis.conversion_loss import bisect_conversion
from qatlib.analysis.profiler import featuremap_similarity, model_profiler
from qatlib.analysis.sensitivity import sensitivity
from qatlib.analysis.steps import step_quantization
from qatlib.fake.formats import check_qconfig
from qatlib.fake.model import set_preserve_qat_mode

__all__ = [
    "bisect_conversion",
    "check_qconfig",
    "featuremap_similarity",
    "find_bad_case",
    "model_profiler",
    "sensitivity",
    "set_preserve_qat_mode",
    "step_quantization",
]
