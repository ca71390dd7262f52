"""Small Programs and targets written by hand for the compiler's tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qatlib.compiler import Target
from qatlib.compiler.target import parse_target
from qatlib.program import Op, Program, Value, verify
from qatlib.qtype import FLOAT, INT32, QType, limits

KINDS = ("conv", "linear", "add", "cat", "clamp", "max_pool", "avg_pool", "adaptive_avg_pool", "reshape", "permute")
TINY: dict[str, Any] = {
    "name": "tiny",
    "source": "test",
    "clock_hz": 1.0e6,
    "mac_array": {"tiles": [[1, 1, 16]], "depth_first": {"channels": 16, "cycles": 4}, "int16": 4.0},
    "vector_unit": {"elements_per_cycle": {"int8": 8, "int16": 4, "int32": 2}},
    "buffers": {"input_bytes": 8192, "accumulator_bytes": 8192, "max_block": [8, 8, 64], "block_channels": 16},
    "sram": {"bytes": 65536, "bytes_per_cycle": 32, "alignment": 16},
    "dram": {"bytes_per_s": 4.0e6, "read_latency_cycles": 10},
    "launch_cycles": 5,
    "multiplier_bits": 20,
    "ops": {kind: {"inputs": ["int8", "int16", "int32"], "outputs": ["int8", "int16", "int32"]} for kind in KINDS},
}


def tiny(changes: dict[str, Any] | None = None) -> Target:
    """TINY with dotted keys replaced; None removes a key."""
    return parse_target(tiny_document(changes), "test")


def tiny_document(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    document = copy.deepcopy(TINY)
    for key, value in (changes or {}).items():
        at = document
        *parents, last = key.split(".")
        for parent in parents:
            at = at[parent]
        if value is None:
            del at[last]
        else:
            at[last] = value
    return document


class Net:
    """Appends ops with random constants; a value's name is its kind and number."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = torch.Generator().manual_seed(seed)
        self.values: dict[str, Value] = {}
        self.ops: list[Op] = []
        self.constants: dict[str, Tensor] = {}
        self.inputs: list[str] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values[name].shape

    def input(self, shape: Sequence[int], dtype: str = "int8") -> str:
        name = f"in{len(self.inputs)}"
        self.inputs.append(name)
        self.values[name] = Value(name, (-1, *shape), _qtype(dtype))
        return name

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        dtype: str = "int8",
        attrs: dict[str, Any] | None = None,
        **consts: Tensor,
    ) -> str:
        name = f"{kind}{len(self.ops)}"
        self.values[name] = Value(name, tuple(shape), _qtype(dtype))
        self.constants |= {f"{name}.{role}": tensor for role, tensor in consts.items()}
        self.ops.append(Op(kind, name, tuple(inputs), attrs or {}, {role: f"{name}.{role}" for role in consts}))
        return name

    def quantize(self, x: str, dtype: str = "int8") -> str:
        return self.op("quantize", [x], self.shape(x), dtype)

    def dequantize(self, x: str) -> str:
        scale = {"scale": torch.tensor([0.5])} if self.values[x].qtype.dtype == "int32" else {}
        return self.op("dequantize", [x], self.shape(x), "float32", **scale)

    def conv(
        self,
        x: str,
        outs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        dtype: str = "int8",
        addend: str | None = None,
        bits: int = 20,
    ) -> str:
        _, ins, *size = self.shape(x)
        before = kernel // 2
        out = [(n + 2 * before - kernel) // stride + 1 for n in size]
        axes = len(size)
        attrs = {
            "stride": [stride] * axes,
            "padding": [[before, before]] * axes,
            "dilation": [1] * axes,
            "groups": groups,
        }
        weight = (outs, ins // groups, *[kernel] * axes)
        return self._dense("conv", x, weight, (-1, outs, *out), dtype, attrs, addend, bits)

    def linear(self, x: str, outs: int, dtype: str = "int8") -> str:
        *lead, ins = self.shape(x)
        return self._dense("linear", x, (outs, ins), (*lead, outs), dtype, {}, None, 20)

    def _dense(
        self,
        kind: str,
        x: str,
        weight: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: str,
        attrs: dict[str, Any],
        addend: str | None,
        bits: int,
    ) -> str:
        outs = weight[0]
        consts = {
            "weight": self._random(-128, 128, weight).to(torch.int8),
            "bias": self._random(-999, 999, (outs,)).int(),
        }
        if dtype != "int32":
            consts |= {"multiplier": self._multiplier(outs, bits), "shift": torch.full((outs,), bits + 6).int()}
            if addend:
                consts["addend_multiplier"] = self._multiplier(outs, bits)
            attrs = attrs | dict(zip(("lo", "hi"), limits(dtype), strict=True))
        inputs = [x, addend] if addend else [x]
        return self.op(kind, inputs, shape, dtype, attrs | {"acc_bound": 0}, **consts)

    def add(self, a: str, b: str, dtype: str = "int8") -> str:
        return self._rescaled("add", [a, b], self.shape(a), dtype, {}, 2, 1)

    def cat(self, *xs: str) -> str:
        shape = list(self.shape(xs[0]))
        shape[1] = sum(self.shape(x)[1] for x in xs)
        dtype = self.values[xs[0]].qtype.dtype
        return self._rescaled("cat", xs, shape, dtype, {"axis": 1}, len(xs), len(xs))

    def _rescaled(
        self, kind: str, xs: Sequence[str], shape: Sequence[int], dtype: str, attrs: dict[str, Any], ms: int, ns: int
    ) -> str:
        clamp = dict(zip(("lo", "hi"), limits(dtype), strict=True))
        shift = torch.full((ns,), 20).int()
        return self.op(kind, xs, shape, dtype, attrs | clamp, multiplier=self._multiplier(ms, 20), shift=shift)

    def clamp(self, x: str) -> str:
        return self.op("clamp", [x], self.shape(x), self.values[x].qtype.dtype, {"lo": 0, "hi": 100})

    def pool(self, kind: str, x: str, kernel: int = 2) -> str:
        n, c, *size = self.shape(x)
        axes = len(size)
        attrs: dict[str, Any] = {"kernel": [kernel] * axes, "stride": [kernel] * axes, "padding": [[0, 0]] * axes}
        shape = (n, c, *(s // kernel for s in size))
        dtype = self.values[x].qtype.dtype
        if kind == "max_pool":
            return self.op(kind, [x], shape, dtype, attrs | {"dilation": [1] * axes})
        return self._rescaled(kind, [x], shape, dtype, attrs, 1, 1)

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("reshape", [x], (-1, *shape), self.values[x].qtype.dtype, {"shape": [-1, *shape]})

    def permute(self, x: str, *dims: int) -> str:
        shape = tuple(self.shape(x)[d] for d in dims)
        return self.op("permute", [x], shape, self.values[x].qtype.dtype, {"dims": list(dims)})

    def program(self, *outputs: str) -> Program:
        return verify(Program(tuple(self.inputs), outputs, tuple(self.ops), self.values, self.constants))

    def feed(self, batch: int) -> list[Tensor]:
        """Random inputs for the Program."""
        feeds = []
        for name in self.inputs:
            value = self.values[name]
            shape = tuple(batch if size == -1 else size for size in value.shape)
            if value.qtype.is_float:
                feeds.append(torch.randn(shape, generator=self._rng) * 30)
            else:
                low, high = limits(value.qtype.dtype)
                feeds.append(self._random(low, high + 1, shape).to(getattr(torch, value.qtype.dtype)))
        return feeds

    def _random(self, low: int, high: int, shape: Sequence[int]) -> Tensor:
        return torch.randint(low, high, tuple(shape), generator=self._rng)

    def _multiplier(self, count: int, bits: int) -> Tensor:
        return self._random(2 ** (bits - 1), 2**bits, (count,)).int()


def _qtype(dtype: str) -> QType:
    return {"float32": FLOAT, "int32": INT32}.get(dtype) or QType(dtype, 0.25)  # type: ignore[arg-type]


def residual(seed: int = 0) -> tuple[Net, Program]:
    """quantize → conv → (conv + skip) → pool → reshape → linear int32 → dequantize."""
    net = Net(seed)
    x = net.quantize(net.input((3, 8, 8), "float32"))
    skip = net.conv(x, 8)
    y = net.conv(net.conv(skip, 8), 8, addend=skip)
    flat = net.reshape(net.pool("avg_pool", y, 4), 32)
    return net, net.program(net.dequantize(net.linear(flat, 5, "int32")))


def random_net(seed: int, length: int) -> tuple[Net, Program]:
    """A Program with skips, cats, views, several outputs and mixed formats."""
    net = Net(seed)
    rng = net._rng
    names = [net.quantize(net.input((4, 8, 8), "float32")), net.input((4, 8, 8), "int16")]

    def below(n: int) -> int:
        return int(torch.randint(0, n, (), generator=rng))

    for _ in range(length):
        x = names[below(len(names))]
        mates = [n for n in names if net.shape(n) == net.shape(x)]
        mate = mates[below(len(mates))]
        dtype = ("int8", "int16")[below(2)]
        names.append(_grow(net, below(9), x, mate, dtype))
    last = names[-1]
    flat = net.reshape(net.pool("avg_pool", last, 8), net.shape(last)[1])
    return net, net.program(net.dequantize(net.linear(flat, 3, "int32")), flat, names[len(names) // 2])


def _grow(net: Net, choice: int, x: str, mate: str, dtype: str) -> str:
    """Append one op on ``x``; ``mate`` has its shape."""
    channels = net.shape(x)[1]
    makers = (
        lambda: net.conv(x, 4, dtype=dtype),
        lambda: net.conv(x, channels, 1, groups=channels, dtype=dtype),
        lambda: net.conv(x, channels, addend=mate, dtype=dtype),
        lambda: net.add(x, mate, dtype),
        lambda: net.cat(x, x),
        lambda: net.clamp(x),
        lambda: net.pool("max_pool", x, 1),
        lambda: net.permute(x, 0, 1, 3, 2),
        lambda: net.reshape(x, channels, 8, 8),
    )
    return makers[choice]()
