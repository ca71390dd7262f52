"""Unary functions and leaky relus, from torch's spelling to integers: sections 4 and "Tables" of docs/numerics.md."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.analysis.agreement import gaps
from qatlib.conversion import convert_fx, table_ops, to_program
from qatlib.emulator import emulate
from qatlib.errors import ConfigError, GraphError, ProgramError, QConfigError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel, set_preserve_qat_mode
from qatlib.fake.prepare import fuse_fx, prepare_graph
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.ops.base import BY_FUNCTION, Call, Ref
from qatlib.ops.unary import FUNCTIONS, NAMES, evaluate
from qatlib.pipeline.config import TableParams
from qatlib.pipeline.match import first_match
from qatlib.program import Op, Program
from qatlib.qtype import limits
from qatlib.tables import TableSpec
from tests.models import calibrated, model
from tests.ops.agreement import assert_agree

Body = Callable[[Any], Any]


def normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


SELU = (1.0507009873554805, 1.6732632423543772)
POSITIVE = (0.2, 3.0)
CASES: dict[str, tuple[Body, Callable[[float], float], tuple[float, float]]] = {
    # name: (as models write it, Python's math, range of x)
    "sigmoid": (torch.sigmoid, sigmoid, (-6, 6)),
    "expit": (torch.special.expit, sigmoid, (-6, 6)),
    "sigmoid_": (lambda x: x.sigmoid_(), sigmoid, (-6, 6)),
    "tanh": (torch.tanh, math.tanh, (-4, 4)),
    "silu": (F.silu, lambda x: x * sigmoid(x), (-6, 6)),
    "gelu": (F.gelu, lambda x: x * normal(x), (-5, 5)),
    "gelu tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        (-5, 5),
    ),
    "mish": (F.mish, lambda x: x * math.tanh(math.log1p(math.exp(x))), (-5, 5)),
    "elu": (lambda x: F.elu(x, 0.7), lambda x: x if x > 0 else 0.7 * math.expm1(x), (-4, 4)),
    "selu": (F.selu, lambda x: SELU[0] * (x if x > 0 else SELU[1] * math.expm1(x)), (-4, 4)),
    "celu": (lambda x: F.celu(x, alpha=1.5), lambda x: x if x > 0 else 1.5 * math.expm1(x / 1.5), (-4, 4)),
    "softplus": (lambda x: F.softplus(x, beta=2), lambda x: math.log1p(math.exp(2 * x)) / 2, (-4, 4)),
    "logsigmoid": (F.logsigmoid, lambda x: math.log(sigmoid(x)), (-5, 5)),
    "softsign": (F.softsign, lambda x: x / (1 + abs(x)), (-5, 5)),
    "hardswish": (F.hardswish, lambda x: x * min(max(x + 3, 0), 6) / 6, (-5, 4.7)),
    "hardsigmoid": (F.hardsigmoid, lambda x: min(max(x + 3, 0), 6) / 6, (-5, 4.7)),
    "hardshrink": (lambda x: F.hardshrink(x, 0.61), lambda x: x if abs(x) > 0.61 else 0.0, (-2, 2)),
    "softshrink": (F.softshrink, lambda x: math.copysign(max(abs(x) - 0.5, 0.0), x), (-2, 2)),
    "tanhshrink": (F.tanhshrink, lambda x: x - math.tanh(x), (-2, 2)),
    "threshold": (lambda x: F.threshold(x, 0.21, -1.0), lambda x: x if x > 0.21 else -1.0, (-2, 2)),
    "exp": (torch.exp, math.exp, (-5, 2)),
    "expm1": (lambda x: x.expm1(), math.expm1, (-5, 2)),
    "log": (torch.log, math.log, POSITIVE),
    "log2": (torch.log2, math.log2, POSITIVE),
    "log10": (lambda x: x.log10(), math.log10, POSITIVE),
    "log1p": (torch.log1p, math.log1p, POSITIVE),
    "sqrt": (torch.sqrt, math.sqrt, POSITIVE),
    "rsqrt": (torch.rsqrt, lambda x: x**-0.5, POSITIVE),
    "reciprocal": (lambda x: x.reciprocal(), lambda x: 1 / x, POSITIVE),
    "square": (torch.square, lambda x: x * x, (-3, 3)),
    "pow 2": (lambda x: x**2, lambda x: x * x, (-3, 3)),
    "pow 3": (lambda x: x.pow(3), lambda x: x**3, (-2, 2)),
    "pow -1.5": (lambda x: torch.pow(x, -1.5), lambda x: x**-1.5, POSITIVE),
    "2 ** x": (lambda x: 2**x, lambda x: 2**x, (-4, 3)),
    "pow(0.5, x)": (lambda x: torch.pow(0.5, x), lambda x: 0.5**x, (-3, 3)),
    "exp2": (torch.exp2, lambda x: 2**x, (-4, 3)),
    "sin": (torch.sin, math.sin, (-7, 7)),
    "cos": (torch.cos, math.cos, (-7, 7)),
    "tan": (torch.tan, math.tan, (-1.2, 1.2)),
    "atan": (torch.arctan, math.atan, (-6, 6)),
    "erf": (torch.erf, math.erf, (-3, 3)),
}
DTYPES = [("int8", "int8"), ("int8", "int16"), ("int16", "int8"), ("int16", "int16")]


def spread(low: float, high: float) -> Tensor:
    """``[64, 3, 8, 16]`` evenly over the range, shuffled, so that every batch sees all of it."""
    order = torch.randperm(64 * 384, generator=torch.Generator().manual_seed(0))
    return torch.linspace(low, high, 64 * 384)[order].view(64, 3, 8, 16)


def prepared(body: Body, x: Tensor, dtypes: tuple[str, str] = ("int8", "int8")) -> FakeQuantModel:
    """``body`` of an input of the first dtype; whatever it computes has the second."""
    return quantized(model(lambda m, x: body(x)), x, dtypes)


def quantized(net: nn.Module, x: Tensor, dtypes: tuple[str, str] = ("int8", "int8")) -> FakeQuantModel:
    source, out = (QConfig(activation=FakeQuantSpec(dtype, "min_max")) for dtype in dtypes)  # type: ignore[arg-type]
    fake = prepare_graph(fuse_fx(net, (x,)), lambda node: source if node.op == "quantize" else out)
    calibrate(fake, [([x], None)])
    return fake


def the_op(program: Program, kind: str = "table") -> Op:
    (op,) = (op for op in program if op.kind == kind)
    return op


def scale(program: Program, name: str) -> float:
    found = program.values[name].qtype.scale
    assert found is not None
    return found


# -- exactness against Python's math -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("name", CASES)
def test_integers_are_the_function_within_the_stored_error(name: str, dtypes: tuple[str, str]) -> None:
    body, f, (low, high) = CASES[name]
    x = spread(low, high)
    integer = convert_fx(prepared(body, x, dtypes))
    op = the_op(integer.program)
    s_x, s_y = scale(integer.program, "x.quant"), scale(integer.program, op.output)
    lo, hi = limits(dtypes[1])
    span = op.attrs["table"]["range"] or (-math.inf, math.inf)
    codes = np.arange(limits(dtypes[0])[0], limits(dtypes[0])[1] + 1)
    want = np.array([min(max(f(min(max(q * s_x, span[0]), span[1])) / s_y, lo), hi) for q in codes.tolist()])
    got = integer._emulator.compute(op, torch.from_numpy(codes).float().view(-1, 1, 1, 1)).flatten().numpy()
    error = np.abs(got - want)
    record = op.attrs["table"]
    assert error.max() == pytest.approx(record["worst_lsb"], abs=1e-6)
    assert error.mean() == pytest.approx(record["mean_lsb"], abs=1e-6)
    assert (got.min(), got.max()) == (op.attrs["lo"], op.attrs["hi"])
    if dtypes[0] == "int8":
        assert (got == np.rint(want)).all()
        assert record["division"] == "exact"
    assert record["worst_lsb"] < (5 if dtypes[1] == "int16" else 0.52)
    assert json.loads(json.dumps(op.attrs)) == op.attrs


@pytest.mark.parametrize("out", ["int8", "int16"])
@pytest.mark.parametrize("name", CASES)
def test_fake_quant_agrees_with_an_eight_bit_table(name: str, out: str) -> None:
    """An int16 output resolves the float32 error of the fake-quant forward itself, up to 2^-9 of a code (section 5): it
    turns the rounding of one or two of the 256 values of f, and of each together with its mirror image where f is odd.
    """
    body, _, (low, high) = CASES[name]
    x = spread(low, high)
    fake = prepared(body, x, ("int8", out))
    program = convert_fx(fake).program
    if out == "int8":
        assert_agree(fake, program, x)
    else:
        assert all(gap.largest <= 1 and gap.share < 4 / 256 for gap in gaps(fake, program, x).values())


def test_fake_quant_is_within_the_stored_error_of_a_sixteen_bit_table() -> None:
    for name in ("gelu", "exp", "rsqrt", "sin"):
        body, _, (low, high) = CASES[name]
        x = spread(low, high)
        fake = prepared(body, x, ("int16", "int16"))
        program = convert_fx(fake).program
        op = the_op(program)
        assert gaps(fake, program, x)[op.name].largest <= op.attrs["table"]["worst_lsb"] + 1


# -- how models write them ---------------------------------------------------------------------------------------------

MODULES = {
    nn.GELU: [(), ("tanh",)],
    nn.ELU: [(0.3,)],
    nn.CELU: [(2.0,)],
    nn.Softplus: [(), (3.0, 5.0)],
    nn.Hardshrink: [(0.9,)],
    nn.Softshrink: [(0.4,)],
    nn.Threshold: [(0.1, 7.0)],
}


@pytest.mark.parametrize("kind", sorted((k for k in NAMES if isinstance(k, type)), key=str))
def test_modules(kind: type[nn.Module]) -> None:
    for arguments in MODULES.get(kind, [()]):
        x = torch.randn(4, 3, 5, 5)
        graph = fuse_fx(model(lambda m, x: m.act(x), act=kind(*arguments)), (x,))  # compares with the module itself
        (node,) = (n for n in graph.nodes if n.op == "unary")
        assert node.name == "act"
        assert node.attrs["function"] == NAMES[kind]


def _named(spelling: Any) -> str:
    return spelling if isinstance(spelling, str) else f"function {spelling.__name__}"


@pytest.mark.parametrize("spelling", [k for k in NAMES if not isinstance(k, type)], ids=_named)
def test_every_spelling_that_torch_has(spelling: Any) -> None:
    name = NAMES[spelling]
    more = {"threshold": (0.3, 0.1), "pow": (3,)}.get(name, ())

    def body(_: Any, x: Tensor) -> Tensor:
        x = x + x  # in-place forms change a tensor of the model's own
        return getattr(x, spelling)(*more) if isinstance(spelling, str) else spelling(x, *more)

    graph = fuse_fx(model(body), (torch.rand(4, 3, 5, 5) + 0.1,))
    assert [n.attrs["function"] for n in graph.nodes if n.op == "unary"] == [name]


def test_a_subclass_of_a_module_is_known() -> None:
    class Swish(nn.SiLU):
        pass

    graph = fuse_fx(model(lambda m, x: m.act(x), act=Swish()), (torch.randn(2, 3),))
    assert graph.nodes[-1].attrs == {"function": "silu"}


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (lambda m, x: x**x, "exponent is a Ref"),
        (lambda m, x: x**m.p, "exponent is a Parameter"),
        (lambda m, x: x ** float("inf"), "exponent is a float, not a finite number"),
    ],
)
def test_variants_that_are_refused(body: Any, seen: str) -> None:
    with pytest.raises(GraphError) as raised:
        fuse_fx(model(body, p=nn.Parameter(torch.ones(3))), (torch.rand(2, 3),))
    assert raised.value.code == "QAT134"
    assert seen in raised.value.seen


def test_a_constant_is_refused() -> None:
    for name, spelling in (("sigmoid", torch.sigmoid), ("a power", torch.pow)):
        with pytest.raises(GraphError, match=f"QAT134 op: {name} of"):
            BY_FUNCTION[spelling].trace(Call("op", (3.0, 2.0), {}, function=spelling))


@pytest.mark.parametrize(
    ("attrs", "want"),
    [
        ({"function": "reciprocal", "numerator": 3.0, "eps": 0.5}, lambda x: 3 / (x + 0.5)),
        ({"function": "reciprocal"}, lambda x: 1 / x),
        ({"function": "rsqrt", "eps": 1e-5}, lambda x: 1 / np.sqrt(x + 1e-5)),
        ({"function": "exp", "offset": -1.0}, lambda x: np.exp(x - 1)),
        ({"function": "gelu"}, lambda x: x * np.vectorize(normal)(x)),
        ({"function": "rpow", "base": 3.0}, lambda x: 3**x),
    ],
)
def test_what_composites_emit(attrs: dict[str, Any], want: Any) -> None:
    x = np.linspace(0.1, 4, 50)
    np.testing.assert_allclose(evaluate(attrs, torch.from_numpy(x)).numpy(), want(x), rtol=1e-14)
    assert evaluate(attrs, torch.ones(2, device="meta")).shape == (2,)


@pytest.mark.parametrize("name", [n for n, f in FUNCTIONS.items() if None not in f.parameters.values()])
def test_gradients_flow(name: str) -> None:
    x = torch.rand(100) + 0.6
    x.requires_grad_()
    evaluate({"function": name}, x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


# -- through conversion ------------------------------------------------------------------------------------------------


def test_a_function_that_is_not_finite_names_op_and_cure() -> None:
    with pytest.raises(ProgramError) as raised:
        convert_fx(prepared(torch.reciprocal, spread(-1, 2) + 1e-4))
    error = raised.value
    assert (error.code, error.where) == ("QAT210", "reciprocal")
    assert "match: reciprocal" in error.fix


def test_a_relu_before_a_square_root_leaves_only_codes_where_it_is_finite() -> None:
    integer = convert_fx(prepared(lambda x: torch.sqrt(F.relu(x)), spread(-1, 2), ("int16", "int16")))
    record = the_op(integer.program).attrs["table"]
    assert record["range"] is None
    assert record["codes"][0] == 0


def test_table_settings_reach_the_op_that_they_name() -> None:
    fake = prepared(lambda x: torch.sin(torch.tanh(x)), spread(-4, 4), ("int16", "int16"))
    assert table_ops(fake) == ("tanh", "sin")
    spec = TableSpec(division="uniform", entries=64, range=(-1.0, 1.0), symmetry="none")
    ops = {op.name: op for op in to_program(fake, tables={"tanh": spec})}
    assert ops["tanh"].attrs["table"]["entries"] == 65
    assert ops["tanh"].attrs["table"]["range"] == [-1.0, 1.0]
    assert ops["tanh"].attrs["table"]["symmetry"] == "none"
    assert ops["sin"].attrs["table"]["entries"] > 257
    with pytest.raises(ProgramError, match=r"QAT170 tables 'x.quant'"):
        to_program(fake, tables={"x.quant": spec})


def test_records_of_params_yaml_are_matched_to_tables() -> None:
    fake = prepared(lambda x: torch.sin(torch.tanh(x)), spread(-4, 4))
    records = [TableParams(match="s*", entries=64), TableParams(match="*", segments=4)]
    found = first_match(records, table_ops(fake), "convert.tables")
    assert {name: record.match for name, record in found.items()} == {"tanh": "*", "sin": "s*"}
    with pytest.raises(ConfigError, match=r"QAT102 convert.tables\[0\].match: 'x.quant' matches nothing"):
        first_match([TableParams(match="x.quant")], table_ops(fake), "convert.tables")


def test_a_preserved_op_has_no_table() -> None:
    fake = prepared(lambda x: torch.sin(torch.tanh(x)), spread(-4, 4))
    assert table_ops(fake, ["sin"]) == ("tanh",)
    set_preserve_qat_mode(fake, prefixes=("tanh",))
    assert table_ops(fake) == ("sin",)


def test_a_program_with_tables_survives_saving(tmp_path: Any) -> None:
    x = spread(-4, 4)
    program = convert_fx(prepared(lambda x: torch.sin(torch.tanh(x)), x, ("int16", "int16"))).program
    program.save(tmp_path / "program")
    again = Program.load(tmp_path / "program")
    assert torch.equal(emulate(program, x)[0], emulate(again, x)[0])
    assert [dict(op.attrs) for op in again] == [dict(op.attrs) for op in program]
    stored = sum(tensor.nbytes for tensor in program.constants.values())
    assert stored < 4000


def test_layout_and_batch_do_not_matter() -> None:
    x = spread(-4, 4)
    integer = convert_fx(prepared(torch.tanh, x, ("int16", "int16")))
    op, codes = the_op(integer.program), torch.randint(-32768, 32768, (4, 6, 5, 7)).float()
    want = integer._emulator.compute(op, codes)
    assert torch.equal(integer._emulator.compute(op, codes.contiguous(memory_format=torch.channels_last)), want)
    assert torch.equal(integer._emulator.compute(op, codes.mT.contiguous().mT), want)
    wide = codes[:1].expand(4, 6, 5, 7)
    assert torch.equal(integer._emulator.compute(op, wide), want[:1].expand(4, 6, 5, 7))
    assert torch.equal(integer._emulator.compute(op, codes[2:]), want[2:])


def test_a_high_precision_output_is_refused_at_prepare() -> None:
    with pytest.raises(QConfigError):
        calibrated(model(lambda m, x: torch.tanh(x)), spread(-1, 1), qconfig_dict={"": QConfig(activation=None)})


# -- leaky relu and PReLU ----------------------------------------------------------------------------------------------

SLOPES = [0.01, 0.25, 1.0, 3.0, 0.0, -0.5, -40.0]


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("slope", SLOPES)
def test_leaky_relu_is_exact(slope: float, dtypes: tuple[str, str]) -> None:
    x = spread(-4, 4)
    integer = convert_fx(prepared(lambda x: F.leaky_relu(x, slope), x, dtypes))
    check_prelu(integer, dtypes, [slope])


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("slopes", [[0.3], [0.25, -1.5, 0.0]])
def test_prelu_is_exact(slopes: list[float], dtypes: tuple[str, str]) -> None:
    act = nn.PReLU(len(slopes))
    act.weight = nn.Parameter(torch.tensor(slopes))
    fake = quantized(model(lambda m, x: m.act(x), act=act), spread(-4, 4), dtypes)
    check_prelu(convert_fx(fake), dtypes, act.weight.tolist())


def check_prelu(integer: Any, dtypes: tuple[str, str], slopes: list[float], bits: int = 20) -> None:
    """Every code of every channel, against exact fractions; the factors against their definition."""
    program: Program = integer.program
    op = the_op(program, "prelu")
    s_x, s_y = scale(program, "x.quant"), scale(program, op.output)
    multiplier, negative, shift = (
        program.constant(op, role).tolist() for role in ("multiplier", "negative_multiplier", "shift")
    )
    for m1, m2, n, slope in zip(multiplier, negative, shift, slopes, strict=True):
        assert m1 == round(Fraction(s_x / s_y) * 2**n)
        assert m2 == round(Fraction(slope * s_x / s_y) * 2**n)
        assert max(m1, abs(m2)).bit_length() == bits
    lo, hi = limits(dtypes[1])
    first, last = limits(dtypes[0])
    codes = sorted({first, last, -1, 0, 1, *range(first, last, max(1, (last - first) // 500))})
    x = torch.tensor(codes).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    got = integer._emulator.compute(op, x)[:, :, 0, 0].long()
    for channel in range(3):
        k = channel % len(slopes)
        want = [
            min(max(round(Fraction(q * (negative[k] if q < 0 else multiplier[k]), 2 ** shift[k])), lo), hi)
            for q in codes
        ]
        assert got[:, channel].tolist() == want


def test_prelu_fake_quant_agrees_and_trains() -> None:
    act = nn.PReLU(3)
    x = spread(-4, 4)
    fake = quantized(model(lambda m, x: m.act(x), act=act), x)
    assert_agree(fake, convert_fx(fake).program, x)
    fake(x).sum().backward()
    gradient = dict(fake.named_parameters())["act.slope"].grad
    assert gradient is not None
    assert (gradient != 0).all()


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.leaky(x),
        lambda m, x: F.leaky_relu(x, 0.3, inplace=True),
        lambda m, x: F.leaky_relu(x, negative_slope=0.3),
        lambda m, x: F.leaky_relu_(x + x),
        lambda m, x: F.prelu(x, m.p),
        lambda m, x: F.prelu(x, weight=m.p),
        lambda m, x: x.prelu(m.p),
    ],
)
def test_spellings_of_leaky_relu(body: Any) -> None:
    parts: dict[str, Any] = {"leaky": nn.LeakyReLU(0.4), "p": nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))}
    graph = fuse_fx(model(body, **parts), (torch.randn(2, 3, 4, 4),))
    assert graph.nodes[-1].op == "prelu"


def test_slopes_computed_in_the_model_are_refused() -> None:
    with pytest.raises(GraphError, match=r"QAT134.*slopes computed"):
        BY_FUNCTION[F.prelu].trace(Call("op", (Ref("x", (-1, 3)), Ref("w", (3,))), {}, function=F.prelu))


def test_operator_pow_is_the_python_operator() -> None:
    assert NAMES[operator.pow] == "pow"


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_onnx_gives_the_same_integers(dtypes: tuple[str, str], tmp_path: Any) -> None:
    export = pytest.importorskip("qatlib.export")
    x, act = spread(-4, 4)[:16], nn.PReLU(3)
    act.weight = nn.Parameter(torch.tensor([0.25, -1.5, 0.0]))
    net = model(lambda m, x: torch.tanh(x) + F.gelu(x) + x**2 + m.act(x) + F.leaky_relu(x, 0.3), act=act)
    program = convert_fx(quantized(net, x, dtypes)).program
    path = tmp_path / "net.onnx"
    export.export_onnx(program, path)
    assert set(export.check_onnx(program, path, x).values()) == {0}


@pytest.mark.parametrize("name", CASES)
def test_the_float_onnx_form_is_the_function(name: str, tmp_path: Any) -> None:
    """The QDQ flavour rounds the same function; where float32 meets a half, by one code."""
    export = pytest.importorskip("qatlib.export")
    body, _, (low, high) = CASES[name]
    x = spread(low, high)[:16]
    program = convert_fx(prepared(body, x)).program
    path = tmp_path / "net.onnx"
    export.export_onnx(program, path, flavour="qdq")
    found = export.measure_distance(program, path, x, optimize=False)[the_op(program).output]
    assert found.largest_lsb <= 1
    assert found.equal > 0.98


def test_the_float_onnx_form_of_prelu(tmp_path: Any) -> None:
    export = pytest.importorskip("qatlib.export")
    x, act = spread(-4, 4)[:16], nn.PReLU(3)
    act.weight = nn.Parameter(torch.tensor([0.25, -1.5, 0.0]))
    fake = quantized(model(lambda m, x: F.leaky_relu(m.act(x), 0.3), act=act), x)
    for preserve in ((), ("act",), ("leaky_relu",)):
        program = convert_fx(fake, preserve).program
        path = tmp_path / "net.onnx"
        export.export_onnx(program, path, flavour="qdq")
        found = export.measure_distance(program, path, x, optimize=False)
        assert all(distance.largest_lsb <= 1 and distance.equal > 0.98 for distance in found.values())
