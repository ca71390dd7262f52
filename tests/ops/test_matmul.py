"""Products of matrices, from torch's spelling to integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlib.analysis.agreement import gaps
from qatlib.emulator import Emulator, emulate
from qatlib.errors import GraphError, QConfigError
from qatlib.export import export_onnx
from qatlib.export.runtime import measure_distance
from qatlib.fake.prepare import fuse_fx
from qatlib.graph.same import evaluate_graph
from qatlib.ops.matmul import MatMul, dropped, exact_product
from tests.models import model
from tests.onnx_runtime import assert_same_in_onnx
from tests.ops.reductions import assert_exact, converted, prepared, sqnr_db

Body = Callable[..., Any]
generator = torch.Generator().manual_seed(0)
X = torch.randn(5, 3, 6, 8, generator=generator)
Y = torch.randn(5, 3, 8, 4, generator=generator) + 0.2
W = nn.Parameter(torch.randn(8, 7, generator=generator))
V = nn.Parameter(torch.randn(7, generator=generator))


class Two(nn.Module):
    """``body(net, x, y)`` with a matrix ``w`` [8, 7], a vector ``v`` [7] and a stack ``b`` [3, 8, 5]."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body, self.w, self.v = body, W, V
        self.register_buffer("b", torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


SPELLINGS: dict[str, tuple[Body, list[str]]] = {
    "@": (lambda s, x, y: x @ y, ["matmul"]),
    "torch.matmul": (lambda s, x, y: torch.matmul(x, other=y), ["matmul"]),
    "method": (lambda s, x, y: x.matmul(y), ["matmul"]),
    "bmm": (lambda s, x, y: torch.bmm(x[:, 0], mat2=y[:, 1]), ["matmul"]),
    "bmm method": (lambda s, x, y: x.flatten(1, 2).bmm(x.flatten(1, 2).transpose(1, 2)), ["matmul"]),
    "broadcast": (lambda s, x, y: x[:, :1] @ y, ["matmul"]),
    "fewer axes": (lambda s, x, y: x @ s.b, ["constant", "matmul"]),
    "x @ parameter": (lambda s, x, y: x @ s.w, ["linear"]),
    "parameter @ x": (lambda s, x, y: s.w.t() @ y, ["constant", "matmul"]),
    "x @ vector": (lambda s, x, y: x @ s.w[:, 0], ["linear", "reshape"]),
    "vector @ x": (lambda s, x, y: s.w[:, 0] @ y, ["constant", "matmul", "reshape"]),
    "mm": (lambda s, x, y: torch.mm(x[:, 0, 0], s.w), ["linear"]),
    "addmm": (lambda s, x, y: torch.addmm(s.v, x[:, 0, 0], s.w), ["linear"]),
    "addmm, beta": (lambda s, x, y: torch.addmm(s.v, x[:, 0, 0], s.w, beta=2), ["linear", "constant", "sub"]),
    "baddbmm": (lambda s, x, y: torch.baddbmm(x[:, 0, :, :4], x[:, 0], y[:, 0], alpha=0.5), ["matmul", "add"]),
    "baddbmm, scaled": (
        lambda s, x, y: torch.baddbmm(torch.empty(1, 6, 4), x[:, 0], y[:, 0], beta=0, alpha=0.25),
        ["matmul"],
    ),
    "scores": (lambda s, x, y: torch.einsum("bhid,bhjd->bhij", x, x), ["permute", "matmul"]),
    "values": (lambda s, x, y: torch.einsum("b h i j, b h j d -> b h i d", x, y), ["matmul"]),
    "heads last": (lambda s, x, y: torch.einsum("bhij,bhjd->bihd", x, y), ["matmul", "permute"]),
    "ellipsis": (lambda s, x, y: torch.einsum("...ij,...jk->...ik", [x, y]), ["matmul"]),
    "einsum with weights": (lambda s, x, y: torch.einsum("bhid,de->bhie", x, s.w), ["linear"]),
    "weights first": (lambda s, x, y: torch.einsum("de,bhid->behi", s.w, x), ["linear", "permute"]),
    "two axes summed": (
        lambda s, x, y: torch.einsum("bhid,bhjd->bij", x, x),
        ["permute", "reshape", "permute", "reshape", "matmul"],
    ),
    "outer product": (
        lambda s, x, y: torch.einsum("bi,bj->bij", x[:, 0, 0], y[:, 0, 0]),
        ["reshape", "reshape", "matmul"],
    ),
    "implicit result": (lambda s, x, y: torch.einsum("bhij,jk", x, s.w), ["linear"]),
    "weights per head": (
        lambda s, x, y: torch.einsum("bhid,hde->bhie", x, s.b),
        ["constant", "matmul"],
    ),
    "own axes": (lambda s, x, y: torch.einsum("bhid,bgdk->bhigk", x, y), ["matmul", "reshape", "permute"]),
    "permutation": (lambda s, x, y: torch.einsum("bhij->bjhi", x), ["permute"]),
}
PRODUCTS = {"matmul", "linear", "constant", "add", "sub"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    body, ops = SPELLINGS[name]
    net = Two(body).eval()
    wanted = net(X, Y).detach()
    graph = fuse_fx(net, (X, Y))
    assert [n.op for n in graph.nodes if n.op in (*PRODUCTS, "permute", "reshape")][-len(ops) :] == ops
    torch.testing.assert_close(evaluate_graph(graph, [X, Y])[0], wanted, rtol=1e-4, atol=1e-5)
    for dtype, least in (("int8", 30), ("int16", 40)):
        _, program = converted(net, X, Y, dtype=dtype)
        assert_exact(program, X, Y)
        assert sqnr_db(wanted, emulate(program, (X, Y))[0]) > least
    assert_same_in_onnx(program, X, Y)


MIXES = [(a, b, c) for a in ("int8", "int16") for b in ("int8", "int16") for c in ("int8", "int16")]


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_every_mix_of_formats(mix: tuple[str, str, str]) -> None:
    a, b, out = mix
    fake, program = converted(Two(lambda s, x, y: x @ y), X, Y, dtype=out, x=a, y=b)
    assert [program.values[name].qtype.dtype for name in ("x.quant", "y.quant", "matmul")] == list(mix)
    (op,) = (op for op in program if op.kind == "matmul")
    assert op.attrs["acc_bound"] < 2**31
    assert assert_exact(program, X, Y) == {"matmul"}
    assert_same_in_onnx(program, X, Y)
    gap = gaps(fake, program, X, Y)["matmul"]
    assert gap.largest <= (1 if out == "int8" or "int8" in mix[:2] else 8), "two int16 operands drop bits"


def test_fake_quant_agrees_on_many_elements() -> None:
    x, y = torch.randn(8, 3, 40, 16), torch.randn(8, 3, 16, 30)
    fake, program = converted(Two(lambda s, x, y: x @ y), x, y)
    gap = gaps(fake, program, x, y)["matmul"]
    assert gap.elements >= 20_000
    assert gap.largest <= 1
    assert gap.share < 1e-3


@pytest.mark.parametrize(
    ("terms", "a", "b", "route"),
    [
        (1000, 128, 128, "float32"),
        (1023, 128, 128, "float32"),
        (1024, 128, 128, "float32-split"),
        (8000, 128, 128, "float32-split"),
        (9000, 128, 128, "float64"),
        (16, 32768, 128, "float32-split"),
        (64, 32768, 128, "float64"),
        (4, 32768, 32768, "float64"),
    ],
)
def test_routes_are_exact_at_their_limits(terms: int, a: int, b: int, route: str) -> None:
    product, bound, chosen = exact_product(terms, a, b)
    assert chosen == route
    assert bound == terms * a * b
    x, y = torch.full((2, 3, terms), -float(a)), torch.full((terms, 2), -float(b))
    x[0, 0, ::2], x[1, 1, 0] = a - 1, 1.0
    wanted = (x.long() @ y.long()).clamp(-(2**31), 2**31 - 1)
    assert torch.equal(product(x, y).long(), wanted)


def test_the_emulator_takes_the_route_that_is_proven() -> None:
    x, y = torch.randn(2, 3, 2000), torch.randn(2, 2000, 3)
    _, program = converted(Two(lambda s, x, y: x @ y), x, y)
    assert Emulator(program).routes["matmul"] == "float32-split"
    assert assert_exact(program, x, y) == {"matmul"}


@pytest.mark.parametrize(
    ("terms", "largest", "wide", "wanted"),
    [
        (64, (128, 128), (False, False), [0, 0]),
        (2**17, (128, 128), (False, False), [0, 0]),
        (511, (32768, 128), (True, False), [0, 0]),
        (513, (32768, 128), (True, False), [1, 0]),
        (1, (32768, 32768), (True, True), [0, 0]),
        (2, (32768, 32768), (True, True), [1, 0]),
        (4, (32768, 32768), (True, True), [1, 1]),
        (64, (32768, 32768), (True, True), [3, 3]),
        (64, (32767, 128), (True, True), [0, 0]),
        (1 << 20, (32768, 128), (False, True), [0, 7]),
    ],
)
def test_bits_dropped(terms: int, largest: tuple[int, int], wide: tuple[bool, bool], wanted: list[int]) -> None:
    found = dropped(terms, largest, wide)
    rounded = [round(size / 2**bits) for size, bits in zip(largest, found, strict=True)]
    if any(wide) and terms < 1 << 17:
        assert terms * rounded[0] * rounded[1] < 2**31
    if wanted[1] != 7:
        assert found == wanted
    else:
        assert found[0] == 0
        assert found[1] <= 8


def test_int16_products_do_not_overflow() -> None:
    """All codes at their limits: 64 products of 2^30 each pass 2^31, were no bits dropped."""
    x = torch.ones(2, 4, 64)
    _, program = converted(model(lambda s, x: x @ x.transpose(1, 2)), x, dtype="int16")
    (got,) = emulate(program, x)
    assert sqnr_db(torch.full((2, 4, 4), 64.0), got) > 60
    assert assert_exact(program, x) == {"matmul"}


def test_weights_are_per_output_channel_and_train() -> None:
    fake = prepared(Two(lambda s, x, y: x @ s.w), X, Y)
    op = fake.op("matmul")
    assert op.weight_fake_quant is not None
    assert op.weight_fake_quant.scales(op.weight).shape == (7,)
    fake(X, Y).sum().backward()
    assert op.weight.grad is not None
    assert float(op.weight.grad.abs().sum()) > 0


def test_one_matrix_used_twice_is_one_parameter() -> None:
    fake = prepared(Two(lambda s, x, y: torch.matmul(x, s.w) + torch.matmul(x * 2, s.w)), X, Y)
    linears = [op for _, op in fake.ops() if op.node.op == "linear"]
    assert len(linears) == 2
    assert linears[0].weight is linears[1].weight


def test_qdq(tmp_path: Path) -> None:
    """ONNX Runtime's own arithmetic stays within 1 LSB of the product."""
    _, program = converted(Two(lambda s, x, y: x @ y), X, Y)
    export_onnx(program, tmp_path / "qdq.onnx", flavour="qdq")
    distance = measure_distance(program, tmp_path / "qdq.onnx", (X, Y), optimize=False)["matmul"]
    assert distance.largest_lsb <= 1
    assert distance.equal > 0.99


REFUSED: dict[str, tuple[Body, str]] = {
    "over the batch": (lambda s, x, y: x.flatten(1).t() @ y.flatten(1), "batch"),
    "negative alpha": (lambda s, x, y: torch.baddbmm(x[:, 0, :, :4], x[:, 0], y[:, 0], alpha=-1), "alpha"),
    "diagonal": (lambda s, x, y: torch.einsum("bhii->bhi", x[..., :6]), "einsum"),
    "three operands": (lambda s, x, y: torch.einsum("bhij,bhjk,kl->bhil", x, y, s.w[:4]), "einsum"),
    "lone sum": (lambda s, x, y: torch.einsum("bhij,bhkl->bhjkl", x, y), "sums an axis"),
    "truth values": (lambda s, x, y: torch.bmm((x > 0)[:, 0].long(), (y > 0)[:, 0].long()), "int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variants_that_are_refused(name: str) -> None:
    body, seen = REFUSED[name]
    with pytest.raises(GraphError) as caught:
        fuse_fx(Two(body), (X, Y))
    assert caught.value.code == "QAT134"
    assert seen in caught.value.seen
    assert "test_matmul.py:" in caught.value.where


def test_a_bilinear_layer_has_no_integer_form() -> None:
    with pytest.raises(GraphError) as caught:
        fuse_fx(model(lambda s, x: s.b(x, x), b=nn.Bilinear(4, 4, 2)), (torch.randn(2, 4),))
    assert caught.value.code == "QAT132"


def test_a_float_operand_is_an_error_at_prepare() -> None:
    with pytest.raises(QConfigError) as caught:
        MatMul().check_formats("head.matmul", ["int8", "float32"], "int8")
    assert caught.value.code == "QAT148"
    assert "head.matmul" in caught.value.where
