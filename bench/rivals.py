"""What the emulator is timed against besides float: integers in int64, and int8 kernels that are fast and not exact."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.emulator import Emulator
from qatlib.program import Op, Program

Array = np.ndarray[Any, Any]
Run = Callable[[], Sequence[Tensor]]


class Int64Emulator(Emulator):
    """Products by unfolding and int64 matrix multiplication, requantized in int64: what one writes first."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        for op in program:
            if op.kind in ("conv", "linear", "matmul") and "multiplier" in op.consts:
                self._kernels[op.name] = self._plain(op)

    def _plain(self, op: Op) -> Callable[..., Tensor]:
        consts = {role: self.program.constant(op, role).long() for role in op.consts}
        shape = (-1, *[1] * (len(self.program.values[op.output].shape) - 2)) if op.kind == "conv" else (-1,)

        def run(x: Tensor, *more: Tensor) -> Tensor:
            if op.kind == "conv":
                acc = _conv(op, x.long(), consts["weight"]) + consts["bias"].view(shape)
            elif op.kind == "linear":
                acc = x.long() @ consts["weight"].T + consts["bias"]
            else:
                acc = x.long() @ more[0].long()
            total = acc.clamp(-(2**31), 2**31 - 1) * consts["multiplier"].view(shape)
            if "addend_multiplier" in consts:
                total += more[0].long() * consts["addend_multiplier"].view(shape)
            shift = consts["shift"].view(shape)
            floor = total >> shift
            twice, whole = (total - (floor << shift)) * 2, torch.ones_like(shift) << shift
            up = (twice > whole) | ((twice == whole) & (floor % 2 == 1))
            return (floor + up).clamp(op.attrs["lo"], op.attrs["hi"]).float()

        return run


def _conv(op: Op, x: Tensor, weight: Tensor) -> Tensor:
    """2-d convolution of int64 tensors by unfolding."""
    (top, bottom), (left, right) = op.attrs["padding"]
    x = F.pad(x, (left, right, top, bottom))
    for axis, step in enumerate(op.attrs["stride"], start=2):
        x = x.unfold(axis, weight.shape[axis], step)
    batch, _, rows, columns = x.shape[:4]
    groups = op.attrs["groups"]
    patches = x.permute(0, 2, 3, 1, 4, 5).reshape(batch, rows * columns, groups, -1).transpose(1, 2)
    out = patches @ weight.view(groups, len(weight) // groups, -1).transpose(1, 2)
    return out.permute(0, 1, 3, 2).reshape(batch, len(weight), rows, columns)


class OneBatch(CalibrationDataReader):  # type: ignore[misc]
    """Inputs by name, once."""

    def __init__(self, feed: dict[str, Array]) -> None:
        self._rest = iter([feed])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._rest, None)


def onnx_files(model: nn.Module, x: Tensor, folder: Path) -> Path:
    """Write ``float.onnx``, ``ready.onnx`` (optimized) and ``int8.onnx`` into ``folder``, which comes back.

    The last is ONNX Runtime's own static quantization: QDQ, signed, per channel, calibrated on ``x``.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), folder / "float.onnx", dynamo=False, input_names=["x"], opset_version=17)
        quant_pre_process(folder / "float.onnx", folder / "ready.onnx")
        quantize_static(
            folder / "ready.onnx", folder / "int8.onnx", OneBatch({"x": x.numpy()}), per_channel=True,
            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return folder


def onnx_runtime(model: nn.Module, x: Tensor, threads: int) -> Run:
    """The int8 kernels of ONNX Runtime, all optimizations on."""
    import onnxruntime

    folder = onnx_files(model, x, Path(tempfile.mkdtemp(prefix="qatlib-bench-")))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "int8.onnx", options, providers=["CPUExecutionProvider"])
    return lambda: [torch.from_numpy(np.asarray(out)) for out in session.run(None, {"x": x.numpy()})]


def fbgemm(model: nn.Module, x: Tensor) -> Run | None:
    """torch's own int8 form of a network that its FX quantization takes; None of one that it does not."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            prepared = prepare_fx(model, get_default_qconfig_mapping("fbgemm"), (x,))
            prepared(x)
            converted = convert_fx(prepared)
            converted(x)
        except Exception:  # whatever its tracer or kernels refuse
            return None
    return torch.inference_mode()(lambda: [converted(x)])
