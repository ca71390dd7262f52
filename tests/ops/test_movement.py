"""Operators that move elements: the codes that leave are what torch makes of the codes that enter."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from qatlib.analysis.agreement import gaps
from qatlib.compiler import compile_model
from qatlib.compiler.target import load_target
from qatlib.conversion import convert_fx, to_program
from qatlib.emulator import Emulator, emulate
from qatlib.errors import GraphError, ProgramError
from qatlib.export import check_onnx, export_onnx
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx, prepare_graph
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.graph.fuse import fuse
from qatlib.graph.ir import Graph
from qatlib.graph.same import evaluate_graph
from qatlib.graph.trace import trace
from qatlib.ops.base import Call, Ref
from qatlib.program import Program
from qatlib.qtype import limits
from tests.models import calibrated, model
from tests.ops.agreement import assert_agree
from tests.oracle.run import run

Body = Callable[[Any], Any]
SCALE = 2.0**-6
"""Exact in float32, so that torch in float and torch on integers move the same numbers."""

PARTS: dict[str, Body] = {
    "one position": lambda x: x[:, 0],
    "one position from the end": lambda x: x[..., -1],
    "ellipsis": lambda x: x[..., 1:],
    "ellipsis in the middle": lambda x: x[:, 1, ..., 2:4],
    "steps": lambda x: x[:, ::2, 1::3],
    "negative bounds": lambda x: x[:, -3:-1, :, :-2],
    "beyond the end": lambda x: x[:, 2:99],
    "new axis": lambda x: x[:, None, :, -1],
    "new axis at the end": lambda x: x[..., None],
    "all": lambda x: x[:][...].flip(1),
    "up to the batch size": lambda x: x[: x.size(0), 1:],
    "list": lambda x: x[:, [2, 1, 0]],
    "negative list": lambda x: x[:, [-1, 0, -1]],
    "list of the last axis": lambda x: x[..., [7, 0]],
    "tensor of two axes": lambda x: x[:, torch.tensor([[0, 1], [-1, 2]])],
    "tensor without axes": lambda x: x[:, torch.tensor(1)],
    "two lists": lambda x: x[:, [0, 1, 3], [1, 2, 5]],
    "two lists that broadcast": lambda x: x[:, torch.tensor([[0], [1]]), torch.tensor([1, 2, 5])],
    "two lists apart": lambda x: x[:, [0, 1], :, [1, -1]],
    "two lists behind a new axis": lambda x: x[:, None, [0, 1], 1:4, [1, -1]],
    "position and list": lambda x: x[:, 0, :, [1, 2]],
    "mask": lambda x: x[:, torch.tensor([True, False, True, True])],
    "mask of two axes": lambda x: x[:, :, torch.eye(6, 8).bool()],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "narrow from the end": lambda x: torch.narrow(x, dim=-1, start=-3, length=2),
    "select": lambda x: x.select(2, -1),
    "torch.select": lambda x: torch.select(x, dim=1, index=2),
    "split": lambda x: x.split(3, dim=2),
    "split, last one short": lambda x: torch.split(x, 3, -1),
    "split by sizes": lambda x: torch.split(x, [1, 3], 1),
    "split_with_sizes": lambda x: x.split_with_sizes([2, 2], 1),
    "chunk": lambda x: x.chunk(3, -1),
    "chunk, unpacked": lambda x: torch.chunk(input=x, chunks=2, dim=1)[::-1],
    "tensor_split": lambda x: torch.tensor_split(x, (1, 3), dim=1),
    "tensor_split in unequal pieces": lambda x: x.tensor_split(3, 3),
    "unbind": lambda x: x.unbind(1),
    "one of unbind": lambda x: torch.unbind(x, dim=2)[-1],
    "index_select": lambda x: torch.index_select(x, 1, torch.tensor([3, 0, 0])),
    "flip": lambda x: x.flip(1, -1),
    "flip, list": lambda x: torch.flip(x, [2]),
    "fliplr": torch.fliplr,
    "roll": lambda x: torch.roll(x, shifts=(1, -2), dims=(1, 3)),
    "roll one axis": lambda x: x.roll(-1, 2),
    "roll an axis twice": lambda x: x.roll((1, 2), (1, 1)),
    "x.unfold": lambda x: x.unfold(2, 3, 2),
    "patches": lambda x: x.unfold(2, 3, 3).unfold(3, 4, 4),
    "take at constant positions": lambda x: torch.take_along_dim(x, torch.tensor([1, 0]).view(1, 1, 2, 1), 2),
}
COPIES: dict[str, Body] = {
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat, new axis": lambda x: x.repeat((2, 1, 1, 1, 1)),
    "tile": lambda x: x.tile(2, 1),
    "torch.tile": lambda x: torch.tile(x, (2,)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "repeat_interleave by position": lambda x: torch.repeat_interleave(x, torch.tensor([1, 0, 2, 1]), 1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "expand to the batch": lambda x: x[:, :1].expand(x.size(0), 5, 6, 8),
    "expand by a new axis": lambda x: x.flatten(1).unsqueeze(1).expand(-1, 3, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x[:, 1:2], x.shape),
    "stack": lambda x: torch.stack([x, x.flip(1)], 1),
    "stack at the end": lambda x: torch.stack((x, x.flip(1)), dim=-1),
    "hstack": lambda x: torch.hstack([x, x[:, :2]]),
    "column_stack": lambda x: torch.column_stack([x, x]),
}
SHAPES: dict[str, Body] = {
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "permute, keyword": lambda x: torch.permute(input=x, dims=(0, -1, 1, 2)),
    "transpose": lambda x: x.transpose(1, -1),
    "swapaxes": lambda x: torch.swapaxes(x, 1, 3),
    "swapdims": lambda x: x.swapdims(2, 3),
    "movedim": lambda x: x.movedim(1, -1),
    "moveaxis": lambda x: torch.moveaxis(x, (1, 2), (3, 1)),
    "mT": lambda x: x.mT,
    "T": lambda x: x.flatten(1).T.unsqueeze(0),
    "t": lambda x: x.flatten(1).t().t(),
    "view_as": lambda x: x.view_as(x.permute(0, 2, 1, 3).flatten(2).unflatten(2, (4, 8)).permute(0, 2, 1, 3)),
    "reshape_as": lambda x: x.flatten(1).reshape_as(x),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "torch.unflatten": lambda x: torch.unflatten(x, -1, (4, 2)),
    "flatten": lambda x: torch.flatten(x, start_dim=1, end_dim=-2),
    "batch into an axis": lambda x: x.flatten(0, 1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: torch.unsqueeze(x, dim=-1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_shuffle, keyword": lambda x: F.pixel_shuffle(input=x, upscale_factor=2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: torch.channel_shuffle(x, 2),
    "channel shuffle by hand": lambda x: x.view(-1, 2, 2, 6, 8).transpose(1, 2).contiguous().view(x.shape),
    "windows": lambda x: x.view(x.size(0), 4, 3, 2, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 8, 4),
    "zero pad": lambda x: F.pad(x, (1, 2, 3, 0)),
    "pad and crop": lambda x: F.pad(x, (1, -2, -1, 0, 0, 1)),
    "crop": lambda x: F.pad(x, (-1, -2)),
}
MOVES = PARTS | COPIES | SHAPES
MODULES: dict[str, nn.Module] = {
    "PixelShuffle": nn.PixelShuffle(2),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "ChannelShuffle": nn.ChannelShuffle(2),
    "Flatten": nn.Flatten(2),
    "Unflatten": nn.Unflatten(1, (2, 2)),
    "ZeroPad2d": nn.ZeroPad2d((1, 0, 2, 1)),
}
FLOAT_MODULES: dict[str, nn.Module] = {
    "Unfold": nn.Unfold((2, 3), dilation=(2, 1), padding=(0, 1), stride=(1, 2)),
    "ReflectionPad2d": nn.ReflectionPad2d((3, 0, 1, 5)),
    "ReplicationPad2d": nn.ReplicationPad2d((3, 1, 0, 9)),
    "CircularPad2d": nn.CircularPad2d((8, 1, 0, 6)),
}


def the_input(dtype: str, shape: tuple[int, ...] = (5, 4, 6, 8), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Integers over the whole range of ``dtype``, and what a model is fed so that these are its codes."""
    low, high = (0, 1) if dtype == "bool" else limits(dtype)
    codes = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))
    if dtype in ("int8", "int16"):
        return codes, codes.float() * SCALE
    return (codes.bool(), codes.bool()) if dtype == "bool" else (codes, codes)


def fixed(dtype: str) -> QConfig:
    return QConfig(activation=FakeQuantSpec("int16" if dtype == "int16" else "int8", "min_max", scale=SCALE))


def quantized(net: nn.Module, dtype: str, *inputs: Tensor) -> FakeQuantModel:
    fake = prepare_graph(fuse(trace(net, inputs)), lambda node: fixed(dtype))
    calibrate(fake, [(list(inputs), None)])
    return fake


def integers(program: Program, *inputs: Tensor) -> list[Tensor]:
    """Outputs of ``program``, each before its ``dequantize``."""
    values = emulate(program, inputs, trace=True)[1]
    ops = [program.producer(name) for name in program.outputs]
    names = [
        op.inputs[0] if op and op.kind == "dequantize" else name for op, name in zip(ops, program.outputs, strict=True)
    ]
    return [values[name] for name in names]


def assert_oracle(program: Program, *inputs: Tensor) -> None:
    """Every value of the Program is what the NumPy oracle of the contract computes."""
    values = emulate(program, inputs, trace=True)[1]
    for name, want in run(program, *(x.numpy() for x in inputs)).items():
        assert (values[name].numpy() == want).all(), name


def assert_exact(net: nn.Module, dtype: str, tmp_path: Path) -> Program:
    """The Program moves codes as ``net`` moves integers, for any batch, in every runtime, without a multiplication."""
    codes, x = the_input(dtype)
    fake = quantized(net, dtype, x)
    program = to_program(fake)
    for at in (slice(None), slice(2, 3)):
        wanted = tree_leaves(net(codes[at]))
        for got, want in zip(integers(program, x[at]), wanted, strict=True):
            assert got.shape == want.shape
            assert torch.equal(got.long(), want.long())
    for got, want in zip(tree_leaves(fake(x)), tree_leaves(net(x)), strict=True):
        assert torch.equal(got, want)
    assert_oracle(program, x)
    moved = [op for op in program if op.kind not in ("quantize", "dequantize")]
    assert all("lo" not in op.attrs or op.kind == "cat" for op in moved)
    assert {program.values[op.output].qtype for op in moved} <= {
        program.values[i].qtype for op in moved for i in op.inputs
    }
    if dtype != "bool":  # the runtime takes no truth values for inputs of int8
        export_onnx(program, tmp_path / "net.onnx")
        assert set(check_onnx(program, tmp_path / "net.onnx", x).values()) == {0}
    return program


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "bool"])
@pytest.mark.parametrize("name", MOVES)
def test_codes_move_as_torch_moves_integers(name: str, dtype: str, tmp_path: Path) -> None:
    assert_exact(model(lambda m, x: MOVES[name](x)), dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "bool"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_move_as_torch_does(name: str, dtype: str, tmp_path: Path) -> None:
    assert_exact(model(lambda m, x: m.part(x), part=MODULES[name]), dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("name", FLOAT_MODULES)
def test_modules_that_torch_has_for_floats(name: str, dtype: str, tmp_path: Path) -> None:
    codes, x = the_input(dtype)
    net = model(lambda m, x: m.part(x), part=FLOAT_MODULES[name])
    program = to_program(quantized(net, dtype, x))
    assert torch.equal(integers(program, x)[0].float(), FLOAT_MODULES[name](codes.float()))
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", x).values()) == {0}


def test_other_numbers_of_axes() -> None:
    for part, shape in {
        nn.ReflectionPad1d((2, 1)): (3, 4, 5),
        nn.CircularPad3d((1, 0, 1, 2, 0, 1)): (2, 2, 3, 4, 5),
        nn.ReplicationPad3d(2): (2, 2, 3, 4, 5),
        nn.ZeroPad3d((0, 1, 2, 0, 0, 3)): (2, 2, 3, 4, 5),
        nn.ConstantPad1d(3, 0.0): (3, 7),
    }.items():
        codes, x = the_input("int8", shape)
        net = model(lambda m, x: m.part(x), part=part)
        assert torch.equal(integers(to_program(quantized(net, "int8", x)), x)[0].float(), part(codes.float()))


@pytest.mark.parametrize("name", MOVES)
def test_steps_do_what_torch_does_in_float(name: str) -> None:
    x = torch.randn(2, 4, 6, 8)
    graph = trace(model(lambda m, x: MOVES[name](x)), (x,))
    for batch in (x, torch.randn(5, 4, 6, 8)):
        for got, want in zip(evaluate_graph(graph, [batch]), tree_leaves(MOVES[name](batch)), strict=True):
            assert torch.equal(got, want)


def names(graph: Graph) -> dict[str, str]:
    return {node.name: node.op for node in graph.nodes}


def test_names_of_steps_and_pieces() -> None:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return first[:, 0] + second.unbind(1)[1]

    graph = trace(model(body), (torch.randn(2, 4, 3),))
    assert names(graph) == {
        "x": "input", "chunk.0": "slice", "chunk.1": "slice", "getitem.slice": "slice", "getitem.reshape": "reshape",
        "unbind.0.slice": "slice", "unbind.0": "reshape", "unbind.1.slice": "slice", "unbind.1": "reshape",
        "add": "add",
    }  # fmt: skip
    assert names(trace(model(lambda m, x: x[:, 1:]), (torch.randn(2, 4),))) == {"x": "input", "getitem": "slice"}


def test_in_place_forms_reach_every_holder() -> None:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        y = x + x
        held = [y]
        y.unsqueeze_(1)
        y.transpose_(2, 3)
        return held[0].flatten(1)

    x = torch.randn(3, 4, 5)
    graph = fuse_fx(model(body), (x,))
    assert [node.op for node in graph.nodes] == ["input", "add", "reshape", "permute", "reshape"]


def test_moves_cost_no_arithmetic() -> None:
    x = torch.randn(2, 4, 6, 8)
    program = to_program(quantized(model(lambda m, x: x[:, :2].permute(0, 2, 3, 1).flatten(1)), "int8", x))
    assert not any(op.consts for op in program)


# -- cat ---------------------------------------------------------------------------------------------------------------


def req(code: int, m: int, n: int, lo: int, hi: int) -> int:
    return min(max(round(Fraction(code * m, 2**n)), lo), hi)


@pytest.mark.parametrize("out", ["int8", "int16"])
@pytest.mark.parametrize("second", ["int8", "int16"])
@pytest.mark.parametrize("first", ["int8", "int16"])
def test_cat_of_every_mix(first: str, second: str, out: str, tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b], dim=-1)

    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(64, 4, 40, generator=generator) * size for size in (1, 3))
    dtypes = {"a.quant": first, "b.quant": second, "cat": out}
    fake = prepare_graph(
        fuse_fx(Two(), (a, b)),
        lambda node: QConfig(activation=FakeQuantSpec(dtypes[node.name], "min_max")),  # type: ignore[arg-type]
    )
    calibrate(fake, [([a, b], None)])
    program = to_program(fake)
    values = emulate(program, (a, b), trace=True)[1]
    op = program.producer("cat")
    assert op is not None
    parts = []
    for i, name in enumerate(op.inputs):
        m, n = int(program.constant(op, "multiplier")[i]), int(program.constant(op, "shift")[i])
        table = {q: req(q, m, n, *limits(out)) for q in set(values[name].flatten().tolist())}
        parts.append(torch.tensor([table[q] for q in values[name].flatten().tolist()]).view(values[name].shape))
    assert torch.equal(values["cat"].long(), torch.cat(parts, -1))
    found = gaps(fake, program, a, b)
    assert found["cat"].largest <= 1
    if "int16" not in (first, second, out):
        assert_agree(fake, program, a, b, elements=10_000)
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", [a, b]).values()) == {0}


def test_equal_scales_pass_untouched() -> None:
    codes, x = the_input("int8")
    fake = quantized(model(lambda m, x: torch.cat([x, x.flip(1)], 1)), "int8", x)
    program = to_program(fake)
    assert torch.equal(integers(program, x)[0].long(), torch.cat([codes, codes.flip(1)], 1))
    op = next(op for op in program if op.kind == "cat")
    ratios = program.constant(op, "multiplier").double() / 2.0 ** program.constant(op, "shift").double()
    assert ratios.tolist() == [1, 1]


@pytest.mark.parametrize(
    "join",
    [
        lambda m, x: torch.cat([m.token.expand(x.size(0), -1, -1), x], 1),
        lambda m, x: torch.cat([m.token.expand(x.shape[0], 1, 6), x], dim=1),
        lambda m, x: torch.cat((x, m.token.repeat(x.size(0), 1, 1)), 1),
        lambda m, x: torch.cat((x, x.new_zeros(x.size(0), 2, 6)), 1),
        lambda m, x: torch.stack([x, m.same.expand_as(x)], 2),
        lambda m, x: torch.stack([x, m.same.expand(x.shape)], 2),
    ],
)
def test_a_constant_without_the_batch_is_repeated(join: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = model(join, token=nn.Parameter(torch.randn(1, 1, 6)), same=nn.Parameter(torch.randn(1, 4, 6)))
    x = torch.randn(64, 4, 6)
    fake = calibrated(net, x)
    program = to_program(fake)
    assert "constant" in {op.kind for op in program}
    found = gaps(fake, program, x)
    assert all(gap.largest <= 1 for gap in found.values()), found
    want = net(x)
    assert (convert_fx(fake)(x) - want).abs().max() < 0.03 * want.abs().max()
    assert torch.equal(convert_fx(fake)(x[3:5]), convert_fx(fake)(x)[3:5])


# -- pad ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("value", [0.0, 1, -0.5, SCALE / 2, SCALE * 1.5, 1e9])
def test_the_padded_value_is_a_code(value: float, dtype: str, tmp_path: Path) -> None:
    codes, x = the_input(dtype)
    lo, hi = limits(dtype)
    code = min(max(round(Fraction(value) / Fraction(SCALE)), lo), hi)
    net = model(lambda m, x: F.pad(x, [1, 0, -2, 3], value=value))
    fake = quantized(net, dtype, x)
    program = to_program(fake)
    (got,) = integers(program, x)
    assert torch.equal(got.long(), F.pad(codes, [1, 0, -2, 3], value=code))
    assert gaps(fake, program, x)["pad"].differing == 0
    op = next(op for op in program if op.kind == "pad")
    assert Emulator(program)._ranges[op.output] == (lo, hi)
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", x).values()) == {0}


def test_minus_infinity_becomes_the_lowest_code() -> None:
    codes, x = the_input("int8")
    net = model(lambda m, x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), 3, 2))
    (got,) = integers(to_program(quantized(net, "int8", x)), x)
    assert torch.equal(got.float(), F.max_pool2d(codes.float(), 3, 2, 1))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_functional_modes(mode: str) -> None:
    codes, x = the_input("int16", (3, 2, 7, 9))
    net = model(lambda m, x: F.pad(x, (4, 2, 1, 6), mode))
    (got,) = integers(to_program(quantized(net, "int16", x)), x)
    assert torch.equal(got.float(), F.pad(codes.float(), (4, 2, 1, 6), mode))


def test_a_pad_of_nothing_is_no_step() -> None:
    assert names(trace(model(lambda m, x: F.relu(F.pad(x, (0, 0)))), (torch.randn(2, 3),))) == {
        "x": "input",
        "relu": "clamp",
    }


def test_integers_and_truth_values_are_padded_with_the_value_itself() -> None:
    for dtype, value in (("int32", -7), ("bool", True)):
        codes, x = the_input(dtype)
        net = model(lambda m, x, value=value: F.pad(x, (2, 1), value=value))
        (got,) = integers(to_program(quantized(net, dtype, x)), x)
        assert torch.equal(got.long(), F.pad(codes, (2, 1), value=value).long())


# -- gather and embedding ----------------------------------------------------------------------------------------------


class Looked(nn.Module):
    """Rows of a table, then a layer that computes with them."""

    def __init__(self, rows: int = 50, look: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 16, padding_idx=0)
        self.position = nn.Embedding(12, 16)
        self.head = nn.Linear(16, 5)
        self.look = look or (lambda m, ids: m.table(ids))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.look(self, ids) + self.position(torch.arange(ids.size(1)))
        out: Tensor = self.head(rows)
        return out


LOOKS: dict[str, Callable[..., Tensor]] = {
    "module": lambda m, ids: m.table(ids),
    "functional": lambda m, ids: F.embedding(ids, m.table.weight),
    "functional, keywords": lambda m, ids: F.embedding(input=ids, weight=m.table.weight, padding_idx=0),
    "indexed": lambda m, ids: m.table.weight[ids],
    "index_select": lambda m, ids: torch.index_select(m.table.weight, 0, ids.flatten()).view(ids.size(0), 12, 16),
}


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("look", LOOKS)
def test_embedding(look: str, dtype: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = Looked(look=LOOKS[look]).eval()
    ids = torch.randint(0, 50, (64, 12))
    fake = calibrated(net, ids, qconfig_dict={"": QConfig(activation=FakeQuantSpec(dtype, "min_max"))})  # type: ignore[arg-type]
    program = to_program(fake)
    op = next(op for op in program if op.kind == "embedding")
    values = emulate(program, ids, trace=True)[1]
    table = program.values[op.inputs[0]]
    assert table.qtype == program.values[op.output].qtype
    assert table.qtype.dtype == dtype
    assert table.qtype.scale is not None
    codes = values[op.inputs[0]].long()
    assert torch.equal(values[op.output].long(), F.embedding(ids, codes).view(values[op.output].shape))
    assert torch.equal(codes, (net.table.weight / table.qtype.scale).round().clamp(*limits(dtype)).long())
    assert_oracle(program, ids)
    looked = fake.compute(op.name, codes * table.qtype.scale, ids.view(values[op.inputs[1]].shape))
    assert torch.equal(looked, values[op.output] * table.qtype.scale)
    want = net(ids)
    assert (convert_fx(fake)(ids) - want).abs().max() < 0.05 * want.abs().max()
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", ids).values()) == {0}


@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1])
def test_an_id_outside_the_table_is_named(bad: int) -> None:
    ids = torch.randint(0, 50, (4, 12))
    integer = convert_fx(calibrated(Looked().eval(), ids))
    ids[2, 7] = bad
    with pytest.raises(ProgramError, match=rf"QAT207 ids: holds {bad} at \[2, 7\].*'table.weight'.*Give 0 to 49"):
        integer(ids)


def test_an_embedding_runs_compiled() -> None:
    ids = torch.randint(0, 50, (7, 12))
    program = to_program(calibrated(Looked().eval(), ids))
    target = load_target("bayes-like")
    rule = target.ops["reshape"].model_copy(update={"inputs": ("int8", "int32")})
    target = target.model_copy(update={"ops": {**target.ops, "embedding": rule, "constant": rule}})
    executable = compile_model(program, target)
    assert torch.equal(executable.run(ids)[0], emulate(program, ids)[0])


def test_indices_reach_a_compiled_program() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return x.gather(1, at)

    _, x = the_input("int8", (7, 4, 5))
    at = torch.randint(0, 4, (7, 3, 5), dtype=torch.int32)
    program = to_program(quantized(Given(), "int8", x, at.long()))
    target = load_target("bayes-like")
    rule = target.ops["reshape"].model_copy(update={"inputs": ("int8", "int32")})
    executable = compile_model(program, target.model_copy(update={"ops": {**target.ops, "gather": rule}}))
    assert torch.equal(executable.run(x, at)[0], emulate(program, (x, at))[0])


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_gather_at_given_positions(dtype: str, tmp_path: Path) -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, ...]:
            return (
                x.gather(1, at),
                torch.take_along_dim(x, at[:, :1, :1], dim=2),
                torch.gather(at, -1, index=at[:, :, :2]),
            )

    codes, x = the_input(dtype, (6, 4, 5))
    at = torch.randint(0, 4, (6, 3, 5), generator=torch.Generator().manual_seed(1))
    program = to_program(quantized(Given(), dtype, x, at))
    assert_oracle(program, x, at)
    for got, want in zip(integers(program, x, at), Given()(codes, at), strict=True):
        assert torch.equal(got.long(), want)
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", [x, at]).values()) == {0}
    at[1, 2, 3] = 4
    with pytest.raises(ProgramError, match=r"QAT207 at: holds 4 at \[1, 2, 3\].*axis 1 of 'x.quant'"):
        emulate(program, (x, at))


# -- positions ---------------------------------------------------------------------------------------------------------

FINDS: dict[str, Body] = {
    "argmax": lambda x: x.argmax(1),
    "argmax, keepdim": lambda x: torch.argmax(x, dim=-1, keepdim=True),
    "argmin": lambda x: torch.argmin(x, 2),
    "argmin, axis": lambda x: x.argmin(axis=-2, keepdims=True),
    "max": lambda x: torch.max(x, 1),
    "max, first": lambda x: x.max(dim=-1, keepdim=True)[0],
    "min, named": lambda x: (lambda found: (found.indices, found.values))(torch.min(x, dim=2)),
    "sort": lambda x: torch.sort(x, dim=1, stable=True),
    "sort, descending": lambda x: x.sort(dim=2, descending=True, stable=True),
    "argsort": lambda x: x.argsort(dim=-1, stable=True),
    "argsort, descending": lambda x: torch.argsort(x, dim=1, descending=True, stable=True),
}


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
@pytest.mark.parametrize("name", FINDS)
def test_positions_with_many_ties(name: str, dtype: str, tmp_path: Path) -> None:
    codes, _ = the_input("int8", (7, 6, 5, 9))
    codes = codes // 32
    codes = codes * 2**23 + (codes % 2) if dtype == "int32" else codes
    x = codes if dtype == "int32" else codes.float() * SCALE
    fake = quantized(model(lambda m, x: FINDS[name](x)), dtype, x)
    program = to_program(fake)
    assert_oracle(program, x)
    for got, fq, want in zip(integers(program, x), tree_leaves(fake(x)), tree_leaves(FINDS[name](codes)), strict=True):
        assert torch.equal(got.long(), want)
        assert torch.equal((fq / SCALE).long() if fq.is_floating_point() else fq, want)
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", x).values()) == {0}


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_topk_takes_the_lower_of_equal_positions(dtype: str, largest: bool, tmp_path: Path) -> None:
    codes = torch.randint(-3, 4, (8, 5, 11), generator=torch.Generator().manual_seed(2))
    x = codes.float() * SCALE
    net = model(lambda m, x: torch.topk(x, 4, 1, largest) if dtype == "int8" else x.topk(k=4, dim=-2, largest=largest))
    program = to_program(quantized(net, dtype, x))
    values, indices = integers(program, x)
    for n in range(8):
        for c in range(11):
            column = codes[n, :, c].tolist()
            order = sorted(range(5), key=lambda i: (-column[i] if largest else column[i], i))[:4]
            assert indices[n, :, c].tolist() == order
            assert values[n, :, c].tolist() == [column[i] for i in order]
    assert indices.dtype == torch.int32
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", x).values()) == {0}


def test_positions_leave_the_network_as_integers() -> None:
    x = torch.randn(4, 10)
    integer = convert_fx(calibrated(model(lambda m, x: {"class": x.argmax(1), "best": x.topk(2)}), x))
    out = integer(x)
    assert out["class"].dtype == out["best"][1].dtype == torch.int32
    assert out["best"][0].dtype == torch.float32
    assert torch.equal(out["class"].long(), x.argmax(1))


def test_elements_at_computed_positions() -> None:
    codes, x = the_input("int8", (9, 6, 5))
    net = model(lambda m, x: x.gather(1, x.argmax(1, keepdim=True)))
    (got,) = integers(to_program(quantized(net, "int8", x)), x)
    assert torch.equal(got.long(), codes.amax(1, keepdim=True))


# -- adaptive max pooling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("out", [(3, 5), (6, 4), (7, 1), (13, None)])
def test_adaptive_max_pool(out: tuple[int, int | None], dtype: str, tmp_path: Path) -> None:
    codes, x = the_input(dtype, (3, 2, 6, 8))
    program = to_program(quantized(model(lambda m, x: m.pool(x), pool=nn.AdaptiveMaxPool2d(out)), dtype, x))
    (got,) = integers(program, x)
    sizes = got.shape[2:]
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            rows = slice(i * 6 // sizes[0], -(-(i + 1) * 6 // sizes[0]))
            columns = slice(j * 8 // sizes[1], -(-(j + 1) * 8 // sizes[1]))
            assert torch.equal(got[:, :, i, j].long(), codes[:, :, rows, columns].amax((2, 3)))
    assert "max_pool" in {op.kind for op in program} or any(n % m for n, m in zip((6, 8), sizes, strict=True))
    export_onnx(program, tmp_path / "net.onnx")
    assert set(check_onnx(program, tmp_path / "net.onnx", x).values()) == {0}


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Body, str]] = {
    "one sample": (lambda x: x[0], "batch axis"),
    "list of samples": (lambda x: x[[0, 1]], "batch axis"),
    "samples narrowed": (lambda x: x.narrow(0, 0, 1), "batch axis"),
    "samples turned": (lambda x: x.flip(0), "batch axis"),
    "samples repeated": (lambda x: x.repeat(2, 1, 1), "batch axis"),
    "samples sorted": (lambda x: x.sort(0)[0], "batch axis"),
    "samples joined": (lambda x: torch.cat([x, x]), "batch axis"),
    "samples stacked": (lambda x: torch.vstack([x, x]), "batch axis"),
    "samples padded": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), "batch axis"),
    "samples gathered": (lambda x: x.gather(0, x.argmin(1, keepdim=True) * 0), "batch axis"),
    "all axes": (lambda x: x.argmax(), "all axes"),
    "largest of all": (lambda x: x.max(), "all axes"),
    "rolled over all": (lambda x: x.roll(1), "all axes"),
    "empty": (lambda x: x[:, 4:2].sum(1), "empty"),
    "computed positions": (lambda x: x[:, x.argmax(1)], "computed"),
    "mixed": (lambda x: torch.cat([x, x.argmax(1, keepdim=True)], 1), "integers"),
    "bits": (lambda x: x.view(torch.int32), "dtype"),
    "True": (lambda x: x[:, True], "True"),
    "rescaled table": (lambda x: F.embedding(x.argmax(1), torch.randn(5, 2), max_norm=1.0), "embedding changes"),
    "indices of a pool": (lambda x: nn.AdaptiveMaxPool1d(2, True)(x)[0], ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, seen = REFUSED[name]
    parts = {"pool": nn.AdaptiveMaxPool1d(2, True)} if "pool" in name else {}
    net = model((lambda m, x: m.pool(x)[0]) if parts else (lambda m, x: body(x)), **parts)
    with pytest.raises(GraphError) as caught:
        trace(net, (torch.randn(2, 4, 6),))
    assert caught.value.code in ("QAT134", "QAT136", "QAT137")
    assert seen in str(caught.value)


def test_pad_steps_for_composites() -> None:
    """What a convolution with ``padding_mode`` calls: a step behind the name of the call, or none."""
    from qatlib.ops.pad import pad_steps

    emitted: list[tuple[str, dict[str, Any], str]] = []

    class Steps:
        def emit(self, op: str, inputs: Any, attrs: Any, params: Any, suffix: str, format: Any) -> Ref:
            emitted.append((op, attrs, suffix))
            return Ref("conv.pad", (-1, 3, 10, 9))

    call, x = Call("here", (), {}, steps=Steps()), Ref("x", (-1, 3, 8, 8))  # type: ignore[arg-type]
    assert pad_steps(call, x, [(0, 0), (0, 0)], "reflect") is x
    assert pad_steps(call, x, [(1, 1), (1, 0)], "reflect").shape == (-1, 3, 10, 9)
    assert emitted == [("pad", {"padding": [[0, 0], [0, 0], [1, 1], [1, 0]], "mode": "reflect", "value": 0}, ".pad")]
