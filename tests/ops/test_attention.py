"""Attention and transformer layers, from torch's calls to integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib import get_default_qconfig
from qatlib.compiler import compile_model
from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import GraphError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import fuse_fx, prepare_qat_fx
from qatlib.graph.same import evaluate_graph
from tests.onnx_runtime import assert_same_in_onnx
from tests.ops.reductions import assert_exact, converted, sqnr_db

generator = torch.Generator().manual_seed(0)
Q = torch.randn(4, 2, 10, 16, generator=generator)
X = torch.randn(4, 10, 32, generator=generator)
MEMORY = torch.randn(4, 7, 32, generator=generator)
PADDING = torch.zeros(4, 10)
PADDING[1, 7:] = 1
PADDING[3, 4:] = 1
CAUSAL = torch.ones(10, 10).tril().bool()
BIAS = torch.linspace(-2, 0, 100).view(10, 10)
Body = Callable[..., Any]


class Net(nn.Module):
    """``body(net, *inputs)`` with the submodules given."""

    def __init__(self, body: Body, **parts: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            self.add_module(name, part)
        for name, mask in (("causal", CAUSAL), ("bias", BIAS), ("hiding", BIAS.masked_fill(~CAUSAL, -torch.inf))):
            self.register_buffer(name, mask)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


class One(Net):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.body(self, x)


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for part in value for leaf in leaves(part)]


def check(net: nn.Module, *inputs: Tensor, least: tuple[int, int] = (25, 40)) -> None:
    """The trace computes what torch does; integers are exact, in ONNX too, and near the float net."""
    net = net.eval()
    wanted = [x.detach() for x in leaves(net(*inputs))]
    for got, want in zip(evaluate_graph(fuse_fx(net, inputs), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    for dtype, db in zip(("int8", "int16"), least, strict=True):
        _, program = converted(net, *inputs, dtype=dtype)
        assert {"sum", "amax", "matmul"} <= assert_exact(program, *inputs)
        for got, want in zip(emulate(program, inputs), wanted, strict=True):
            assert got.shape == want.shape
            assert sqnr_db(want, got) > db, dtype
        assert_same_in_onnx(program, *inputs)


SDPA = F.scaled_dot_product_attention
DOT_PRODUCTS: dict[str, Body] = {
    "plain": lambda s, x: SDPA(x, x, x),
    "causal": lambda s, x: SDPA(x, x, x, is_causal=True),
    "scale": lambda s, x: SDPA(x, x, x, scale=0.1),
    "boolean mask": lambda s, x: SDPA(x, x, x, attn_mask=s.causal),
    "real mask": lambda s, x: SDPA(x, x, x, s.bias),
    "real mask that hides": lambda s, x: SDPA(x, x, x, attn_mask=s.hiding, dropout_p=0.0),
    "computed boolean mask": lambda s, x: SDPA(x, x, x, attn_mask=(x[:, :1] > -5)[..., :10]),
    "computed real mask": lambda s, x: SDPA(x, x, x, attn_mask=x[..., :10]),
    "other keys": lambda s, x: SDPA(x[:, :, :3], x, x[..., :5]),
    "without heads": lambda s, x: SDPA(x[:, 0], x[:, 1], x[:, 0]),
}


@pytest.mark.parametrize("name", DOT_PRODUCTS)
def test_scaled_dot_product(name: str) -> None:
    check(One(DOT_PRODUCTS[name]), Q)


def test_names_of_the_steps() -> None:
    graph = fuse_fx(One(DOT_PRODUCTS["causal"]).eval(), (Q,))
    call = "scaled_dot_product_attention"
    steps = ["k_t.permute", "qk", "constant", "masked", "softmax.max", "softmax.sub", "softmax.exp", "softmax.sum",
             "softmax.reciprocal", "softmax.mul", "out"]  # fmt: skip
    assert [node.name for node in graph.nodes[1:]] == [f"{call}.{step}" for step in steps]
    assert graph.by_name()[f"{call}.masked"].attrs["below_maximum"] == [-1, 16.0, -5e3]


def heads(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(2)
    made = nn.MultiheadAttention(32, 4, **options)
    if made.in_proj_bias is not None:
        nn.init.normal_(made.in_proj_bias, 0, 0.2)
        nn.init.normal_(made.out_proj.bias, 0, 0.2)
    return made


MULTI_HEAD: dict[str, tuple[dict[str, Any], Body]] = {
    "self": ({"batch_first": True}, lambda s, x: s.a(x, x, x, need_weights=False)[0]),
    "self, weights": ({"batch_first": True}, lambda s, x: s.a(x, x, x)),
    "weights per head": ({"batch_first": True}, lambda s, x: s.a(x, x, x, average_attn_weights=False)),
    "weights not read": ({"batch_first": True, "bias": False}, lambda s, x: s.a(x, x, x)[0]),
    "length first": ({}, lambda s, x: s.a(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1)),
    "boolean mask": ({"batch_first": True}, lambda s, x: s.a(x, x, x, attn_mask=~s.causal)[0]),
    "real mask": ({"batch_first": True}, lambda s, x: s.a(x, x, x, attn_mask=s.bias)[0]),
    "causal hint": ({"batch_first": True}, lambda s, x: s.a(x, x, x, attn_mask=s.hiding, is_causal=True)[0]),
}


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention(name: str) -> None:
    options, body = MULTI_HEAD[name]
    check(One(body, a=heads(**options)), X)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 24, "vdim": 20}])
def test_cross_attention(sizes: dict[str, int]) -> None:
    def body(s: Net, x: Tensor, y: Tensor) -> Tensor:
        k, v = (y[..., : sizes.get(name, 32)] for name in ("kdim", "vdim"))
        return s.a(x, k, v, need_weights=False)[0]

    check(Net(body, a=heads(batch_first=True, **sizes)), X, MEMORY)


@pytest.mark.parametrize("boolean", [True, False])
def test_padding(boolean: bool) -> None:
    """Padded keys count for nothing, whatever they hold."""

    def body(s: Net, x: Tensor, y: Tensor) -> Tensor:
        padding = y > 0.5 if boolean else y * -1e4
        return s.a(x, x, x, key_padding_mask=padding, need_weights=False)[0]

    net = Net(body, a=heads(batch_first=True)).eval()
    check(net, X, PADDING)
    _, program = converted(net, X, PADDING)
    other = torch.where(PADDING[..., None] > 0, X.flip(0), X)
    kept = PADDING < 0.5
    assert torch.equal(emulate(program, (X, PADDING))[0][kept], emulate(program, (other, PADDING))[0][kept])


def test_names_and_shared_weights_of_multi_head_attention() -> None:
    net = One(lambda s, x: s.a(s.a(x, x, x)[0], x, x)[0], a=heads(batch_first=True)).eval()
    fake = prepare_qat_fx(net, example_inputs=(X,))
    names = {name for name, _ in fake.ops()}
    steps = {"a.q", "a.k", "a.v", "a.qk", "a.softmax.exp", "a.heads", "a.out"}
    assert steps | {f"a#1.{step[2:]}" for step in steps} <= names
    assert "a.weights" not in names, "nobody reads them"
    for step in ("q", "k", "v", "out"):
        assert fake.op(f"a.{step}").weight is fake.op(f"a#1.{step}").weight
    assert fake.op("a.q").weight is not fake.op("a.k").weight


# -- transformer layers ------------------------------------------------------------------------------------------------


def layer(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    made = kind(32, 4, 48, **{"batch_first": True, **options})
    for norm in [m for m in made.modules() if isinstance(m, nn.LayerNorm)]:
        nn.init.normal_(norm.weight, 1, 0.2)
        if norm.bias is not None:
            nn.init.normal_(norm.bias, 0, 0.2)
    return made


LAYERS: dict[str, dict[str, Any]] = {
    "post-norm relu": {},
    "pre-norm gelu": {"norm_first": True, "activation": "gelu"},
    "activation module": {"activation": nn.SiLU(), "bias": False},
}


@pytest.mark.parametrize("name", LAYERS)
def test_encoder_layer(name: str) -> None:
    check(One(lambda s, x: s.l(x, src_mask=~s.causal), l=layer(**LAYERS[name])), X)


def test_encoder_layer_with_the_length_first() -> None:
    net = One(lambda s, x: s.l(x.transpose(0, 1)).transpose(0, 1), l=layer(batch_first=False))
    check(net, X)


def test_names_are_those_of_the_submodules() -> None:
    encoder = nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)
    net = One(lambda s, x: s.encoder(x), encoder=encoder).eval()
    names = [node.name for node in fuse_fx(net, (X,)).nodes]
    for part in ("self_attn.q", "self_attn.softmax.exp", "norm1.rsqrt", "linear1", "norm2.shift"):
        assert f"encoder.layers.1.{part}" in names
    assert "encoder.norm.shift" in names
    modules = dict(net.named_modules())
    assert all(name in modules for name in names if name.endswith(("linear1", "linear2")))


def test_encoder_with_padding() -> None:
    encoder = nn.TransformerEncoder(layer(norm_first=True), 2, enable_nested_tensor=False)
    net = Net(lambda s, x, y: s.e(x, src_key_padding_mask=y > 0.5)[:, 0], e=encoder)
    check(net, X, PADDING)


@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False])
def test_decoder(first: bool) -> None:
    decoder = nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, norm_first=first), 2, nn.LayerNorm(32))
    net = Net(lambda s, x, y: s.d(x, y, tgt_mask=~s.causal, tgt_is_causal=True), d=decoder)
    check(net, X, MEMORY, least=(20, 40))


def test_transformer() -> None:
    torch.manual_seed(4)
    whole = nn.Transformer(32, 4, 1, 1, 48, batch_first=True)
    check(Net(lambda s, x, y: s.t(y, x, tgt_mask=~s.causal), t=whole), X, MEMORY, least=(20, 40))


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_a_transformer_end_to_end(dtype: str) -> None:
    """Calibrated on other data: cosine with float above 0.98, and the executable's integers are the emulator's."""
    torch.manual_seed(5)
    stack = nn.TransformerEncoder(layer(activation="gelu"), 3, enable_nested_tensor=False)
    net = One(lambda s, x: s.head(s.e(x).mean(1)), e=stack, head=nn.Linear(32, 5)).eval()
    batches = [torch.randn(8, 10, 32) for _ in range(4)]
    fake = prepare_qat_fx(net, get_default_qconfig(dtype), example_inputs=(batches[0],))
    calibrate(fake, [([x], None) for x in batches])
    program = to_program(fake)
    x = torch.randn(64, 10, 32)
    (got,) = emulate(program, x)
    assert float(F.cosine_similarity(got, net(x).detach(), dim=1).mean()) > 0.98
    assert_exact(program, x)
    executable = compile_model(program, "bayes-like")
    for one, other in zip(executable.run(x), emulate(program, x), strict=True):
        assert int((one != other).sum()) == 0


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "dropout": (One(lambda s, x: SDPA(x, x, x, dropout_p=0.1)), "dropout"),
    "scale": (One(lambda s, x: SDPA(x, x, x, scale=-1.0)), "scale"),
    "groups": (One(lambda s, x: SDPA(x, x[:, :1], x[:, :1], enable_gqa=True)), "share keys"),
    "bias_kv": (One(lambda s, x: s.a(*[x[:, 0, :, :]] * 3)[0], a=nn.MultiheadAttention(16, 2, add_bias_kv=True)), "kv"),
    "nested": (
        One(
            lambda s, x: s.e(x[:, 0], src_key_padding_mask=x[:, 0, :, 0] > 0),
            e=nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 8, batch_first=True), 1),
        ),
        "nested",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variants_that_are_refused(name: str) -> None:
    net, seen = REFUSED[name]
    with pytest.raises(GraphError) as caught:
        fuse_fx(net.eval(), (Q,))
    assert caught.value.code == "QAT134"
    assert seen in caught.value.seen
    assert "test_attention.py:" in caught.value.where or name in ("bias_kv", "nested")


def test_an_unknown_activation_is_named() -> None:
    def own(x: Tensor) -> Tensor:
        return x * 2

    with pytest.raises(GraphError) as caught:
        fuse_fx(One(lambda s, x: s.l(x), l=layer(activation=own)).eval(), (X,))
    assert caught.value.code == "QAT134"
    assert "activation" in caught.value.seen
