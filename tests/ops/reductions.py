"""sum, amax, amin and matmul a second time, in int64, and what is asked of every Program that has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.qconfig import get_default_qconfig
from qatlib.program import Op, Program
from tests.models import calibrated
from tests.oracle import half_even

INT32 = (-(2**31), 2**31 - 1)


def prepared(net: nn.Module, *inputs: Tensor, dtype: str = "int8", **names: str) -> FakeQuantModel:
    """Everything in ``dtype`` with observed ranges; ``names`` (``__`` for a dot) are modules and inputs in another."""
    rules = {name.replace("__", "."): get_default_qconfig(kind, "min_max") for name, kind in names.items()}
    default = {"": get_default_qconfig(dtype, "min_max"), "module_name": rules}
    return calibrated(net.eval(), *inputs, qconfig_dict=default)


def by_the_contract(op: Op, program: Program, values: Mapping[str, Tensor]) -> np.ndarray[Any, Any] | None:
    """Section 4 of docs/numerics.md for the kinds of this file; None for others."""
    x = [values[name].numpy().astype(np.int64) for name in op.inputs]
    if op.kind in ("amax", "amin"):
        function = np.max if op.kind == "amax" else np.min
        return np.asarray(function(x[0], axis=tuple(op.attrs["axes"]), keepdims=op.attrs["keepdim"]))
    if op.kind == "sum":
        acc = np.sum(x[0], axis=tuple(op.attrs["axes"]), keepdims=op.attrs["keepdim"])
    elif op.kind == "matmul":
        a, b = (half_even(term, bits) if bits else term for term, bits in zip(x, op.attrs["drop"], strict=True))
        acc = np.einsum("...ik,...kj->...ij", a, b)
    else:
        return None
    acc = np.clip(acc, *INT32)
    if "multiplier" not in op.consts:
        return acc
    (m,), (n,) = (program.constant(op, role).numpy().astype(np.int64) for role in ("multiplier", "shift"))
    return np.clip(half_even(acc * m, n), op.attrs["lo"], op.attrs["hi"])


def assert_exact(program: Program, *inputs: Tensor) -> set[str]:
    """Every op of these kinds by the contract; batch size and memory layout do not matter. Returns the kinds met."""
    _, values = emulate(program, inputs, trace=True)
    met = set()
    for op in program:
        wanted = by_the_contract(op, program, values)
        if wanted is not None:
            met.add(op.kind)
            assert values[op.output].shape == wanted.shape, op.name
            assert int((values[op.output].numpy() != wanted).sum()) == 0, op.name
    scattered = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    for name, one, other in zip(
        program.outputs, emulate(program, inputs), emulate(program, scattered), strict=True
    ):  # fmt: skip
        assert torch.equal(one, other), name
    first = emulate(program, [x[:1] for x in inputs])
    for one, all_ in zip(first, emulate(program, inputs), strict=True):
        assert torch.equal(one, all_[: len(one)])
    return met


def converted(net: nn.Module, *inputs: Tensor, dtype: str = "int8", **names: str) -> tuple[FakeQuantModel, Program]:
    fake = prepared(net, *inputs, dtype=dtype, **names)
    return fake, to_program(fake)


def sqnr_db(wanted: Tensor, got: Tensor) -> float:
    """Signal over error, in dB."""
    error = (wanted.double() - got.double()).square().mean()
    return float(10 * torch.log10(wanted.double().square().mean() / error))
