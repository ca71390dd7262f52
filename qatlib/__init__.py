"""From a trained float PyTorch model to exact integers.

The names below are the public API. They are imported on first use, so that ``import qatlib`` does not import torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "qatlib.fake.state": ("FakeQuantState",),
    "qatlib.fake.stubs": ("DeQuantStub", "QuantStub"),
    "qatlib.fake.qconfig": (
        "FakeQuantSpec",
        "QConfig",
        "default_calib_16bit_fake_quant_qconfig",
        "default_calib_8bit_fake_quant_qconfig",
        "default_calib_8bit_weight_16bit_act_fake_quant_qconfig",
        "default_calib_8bit_weight_32bit_out_fake_quant_qconfig",
        "default_qat_8bit_fake_quant_qconfig",
        "default_qat_8bit_fixed_act_fake_quant_qconfig",
        "default_qat_8bit_weight_16bit_act_fake_quant_qconfig",
        "default_qat_8bit_weight_32bit_out_fake_quant_qconfig",
        "get_default_qconfig",
    ),
    "qatlib.fake.model": ("FakeQuantModel", "set_fake_quantize", "set_preserve_qat_mode"),
    "qatlib.fake.batch_norm": ("fold_batch_norms", "freeze_batch_norms", "keep_batch_norms"),
    "qatlib.fake.eager": ("prepare_qat",),
    "qatlib.fake.exact": ("ExactForward",),
    "qatlib.fake.prepare": ("fuse_fx", "prepare_qat_fx"),
    "qatlib.fake.calibrate": ("calibrate",),
    "qatlib.fake.coverage": ("mac_coverage",),
    "qatlib.fake.formats": ("check_qconfig",),
    "qatlib.conversion": ("IntegerModel", "convert", "convert_fx", "to_program"),
    "qatlib.program": ("Op", "Program", "Value"),
    "qatlib.emulator": ("Emulator", "emulate"),
    "qatlib.compiler": (
        "Executable",
        "Target",
        "check_model",
        "compile_model",
        "load_target",
        "perf_model",
        "write_trace",
    ),
    "qatlib.analysis": ("featuremap_similarity", "model_profiler"),
    "qatlib.analysis.unfused": ("check_unfused_operations",),
    "qatlib.analysis.agreement": ("gap_table", "write_gap_table"),
    "qatlib.analysis.deploy": ("check_deploy_device",),
    "qatlib.analysis.channels": ("channel_similarity",),
    "qatlib.analysis.features": ("get_raw_features", "profile_featuremap"),
    "qatlib.analysis.weights": ("compare_weights",),
    "qatlib.analysis.report.accelerator_page": ("visualize_model",),
    "qatlib.graph.unshare": ("get_module_called_count", "unshare"),
    "qatlib.analysis.bad_case": ("find_bad_case",),
    "qatlib.analysis.conversion_loss": ("bisect_conversion",),
    "qatlib.analysis.sensitivity": ("sensitivity",),
    "qatlib.analysis.steps": ("step_quantization",),
    "qatlib.export": ("check_onnx", "export_onnx", "measure_distance"),
    "qatlib.ops.grid_sample": ("get_grid_quant_scale", "warp"),
    "qatlib.errors": ("QatError",),
    "qatlib.qtype": ("QType",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'qatlib' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
