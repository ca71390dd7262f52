"""The analysis calls under the name that scripts know; all of them are in :mod:`qatlib`, too."""

from qatlib.analysis.bad_case import find_bad_case
from qatlib.analysis.channels import channel_similarity
from qatlib.analysis.conversion_loss import bisect_conversion
from qatlib.analysis.deploy import check_deploy_device
from qatlib.analysis.features import get_raw_features, profile_featuremap
from qatlib.analysis.profiler import featuremap_similarity, model_profiler
from qatlib.analysis.sensitivity import sensitivity
from qatlib.analysis.steps import step_quantization
from qatlib.analysis.unfused import check_unfused_operations
from qatlib.analysis.weights import compare_weights
from qatlib.fake.formats import check_qconfig
from qatlib.fake.model import set_preserve_qat_mode
from qatlib.graph.unshare import get_module_called_count

__all__ = [
    "bisect_conversion",
    "channel_similarity",
    "check_deploy_device",
    "check_qconfig",
    "check_unfused_operations",
    "compare_weights",
    "featuremap_similarity",
    "find_bad_case",
    "get_module_called_count",
    "get_raw_features",
    "model_profiler",
    "profile_featuremap",
    "sensitivity",
    "set_preserve_qat_mode",
    "step_quantization",
]
