"""A Program as an ONNX document: ``integer``, the same integers everywhere, or ``qdq``, for fused int8 kernels."""

from qatlib.errors import ProgramError

try:
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
except ImportError as error:
    raise ProgramError(
        "QAT222", "export", f"needs a package that is not installed ({error.name})", "pip install 'qatlib[onnx]'"
    ) from None

from qatlib.export.document import export_onnx
from qatlib.export.runtime import Distance, check_onnx, measure_distance

__all__ = ["Distance", "check_onnx", "export_onnx", "measure_distance"]
