"""Learned scales: gradients against the papers' formulas and finite differences; checkpoints, kinds, integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import QatError
from qatlib.fake import straight_through
from qatlib.fake.calibrate import calibrate
from qatlib.fake.fake_quant import FakeQuantize, WeightFakeQuantize
from qatlib.fake.learned import RULES, UNSET, LearnedScale, count_all_rows
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.optimizer import make_optimizer
from qatlib.fake.qconfig import FakeQuantSpec, Kind, QConfig
from qatlib.fake.state import FakeQuantState, StateCell
from qatlib.pipeline.config import QatParams
from qatlib.qtype import DEAD_SCALE, check_scale
from tests.fake.training import STEPS, clouds, state, trainer
from tests.models import Tiny, calibrated, everything, images, model
from tests.oracle.run import run as by_the_contract

LEARNED: list[Kind] = ["lsq", "pact", "tqt"]
LIMITS = {"int8": (-128, 127), "int16": (-32768, 32767)}
Array = np.ndarray[Any, Any]


def config(kind: Kind, dtype: Any = "int8") -> QConfig:
    weight: Kind = "moving_average" if kind == "pact" else kind
    return QConfig(FakeQuantSpec(dtype, "min_max", kind=kind), FakeQuantSpec(method="min_max", kind=weight))


def quantizer(kind: Kind, scale: float, dtype: Any = "int8") -> FakeQuantize:
    """One in QAT state, its scale calibrated."""
    cell = StateCell()
    cell.state = FakeQuantState.QAT
    fake = FakeQuantize(FakeQuantSpec(dtype, kind=kind), cell, "x")
    fake.scale.fill_(scale)
    return fake


def tiny(kind: Kind) -> FakeQuantModel:
    torch.manual_seed(3)
    return calibrated(Tiny(), clouds(0)[0], qconfig_dict=config(kind))


def formula(kind: str, x: Array, g: Array, s: float, dtype: str) -> tuple[Array, float]:
    """Gradient to x and to the parameter, element by element: LSQ (3), (5); PACT section 3; TQT (6) to (8)."""
    qmin, qmax = LIMITS[dtype]
    to_x, to_parameter = np.zeros_like(x), 0.0
    for i, (value, upstream) in enumerate(zip(x, g, strict=True)):
        v = value / s
        if kind == "pact":
            alpha = s * (qmax - qmin) / 2
            inside = abs(value) < alpha
            to_parameter += 0.0 if inside else upstream * math.copysign(1.0, value)
        elif kind == "lsq":
            inside = qmin < v < qmax
            slope = np.rint(v) - v if inside else (qmin if v <= qmin else qmax)
            to_parameter += upstream * slope / math.sqrt(len(x) * qmax)
        else:
            inside = qmin <= np.rint(v) <= qmax
            slope = np.rint(v) - v if inside else (qmin if v < 0 else qmax)
            to_parameter += upstream * s * math.log(2) * slope
        to_x[i] = upstream if inside else 0.0
    return to_x, to_parameter


@pytest.mark.parametrize("bounds", [None, [0.0, None], [0.0, 6.0], [-0.5, 1.0]], ids=str)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("kind", LEARNED)
def test_gradients_by_the_formula(kind: Kind, dtype: str, bounds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight_through, "_PIECE", 70)
    scale = {"lsq": 0.03, "pact": 0.03, "tqt": 2.0**-5}[kind] / (1 if dtype == "int8" else 256)
    fake = quantizer(kind, scale, dtype)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 6, 11, generator=generator) * 3).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator)
    out = fake(x, None, bounds)
    out.backward(upstream)
    clamped = x.detach() if bounds is None else x.detach().clamp(*bounds)
    qmin, qmax = LIMITS[dtype]
    s = np.float32(float(fake.scale))
    assert float(s) == pytest.approx(scale, rel=1e-6)
    np.testing.assert_array_equal(out.detach(), np.clip(np.rint(clamped.numpy() / s), qmin, qmax) * s)
    to_x, to_parameter = formula(
        kind, clamped.double().numpy().ravel(), upstream.double().numpy().ravel(), float(fake.scale), dtype
    )
    if bounds is not None:
        low, high = (-math.inf if bounds[0] is None else bounds[0], math.inf if bounds[1] is None else bounds[1])
        to_x *= ((x.detach() > low) & (x.detach() < high)).numpy().ravel()
    assert x.grad is not None
    assert fake.learned.grad is not None
    np.testing.assert_array_equal(x.grad.numpy().ravel(), to_x.astype(np.float32))
    assert float(fake.learned.grad) == pytest.approx(to_parameter, rel=2e-4, abs=1e-5)


def _with_rounding_held(kind: str, x: Array, s: float) -> Callable[[float], Array]:
    """The result as a function of the parameter, its rounding errors held: what a straight-through gradient means."""
    qmin, qmax = LIMITS["int8"]
    if kind == "pact":
        return lambda alpha: np.clip(x, -alpha, alpha)
    clipped = np.clip(x / s, qmin, qmax)
    error = np.rint(clipped) - clipped
    scale_of: Callable[[float], float] = (lambda p: p) if kind == "lsq" else (lambda p: s * 2 ** (p - p0))
    p0 = math.log2(s) + 7

    return lambda p: scale_of(p) * (np.clip(x / scale_of(p), qmin, qmax) + error)


@pytest.mark.parametrize("kind", LEARNED)
def test_gradients_by_finite_differences(kind: Kind) -> None:
    s = 2.0**-5
    fake = quantizer(kind, s)
    rng = np.random.default_rng(0)
    x = rng.normal(size=500) * 3
    x = x[np.abs(np.abs(x / s) - 127.5) > 1.5]  # no step may cross an end
    g = rng.normal(size=len(x))
    fake(torch.tensor(x).float()).backward(torch.tensor(g).float())
    held = _with_rounding_held(kind, x, s)
    p, h = {"lsq": s, "pact": s * 127.5, "tqt": math.log2(s) + 7}[kind], 1e-6
    slope = float(((held(p + h) - held(p - h)) / (2 * h) * g).sum())
    scale = 1 / math.sqrt(len(x) * 127) if kind == "lsq" else 1.0
    assert fake.learned.grad is not None
    assert float(fake.learned.grad) == pytest.approx(slope * scale, rel=1e-3)


@pytest.mark.parametrize("kind", ["lsq", "tqt"])
def test_weights_have_a_gradient_per_channel(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight_through, "_PIECE", 100)
    weight = (torch.randn(7, 4, 3, 3) * torch.logspace(-2, 1, 7).view(-1, 1, 1, 1)).requires_grad_()
    fake = WeightFakeQuantize(FakeQuantSpec(kind=kind), 7)
    fake.start(fake.scales(weight) * 0.7)
    scales, upstream = fake.scales(weight), torch.randn(weight.shape)
    fake.quantized(weight, scales).backward(upstream)
    assert weight.grad is not None
    assert fake.learned.grad is not None
    for c in range(7):
        x, g = (t[c].detach().double().numpy().ravel() for t in (weight, upstream))
        to_x, to_parameter = formula(kind, x, g, float(scales[c]), "int8")
        if kind == "lsq":
            to_parameter /= math.sqrt(7)  # count is that of the whole tensor
        np.testing.assert_array_equal(weight.grad[c].numpy().ravel(), to_x.astype(np.float32))
        assert float(fake.learned.grad[c]) == pytest.approx(to_parameter, rel=1e-4, abs=1e-6)


def test_a_channel_whose_bias_sets_the_scale_learns_nothing() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    fake = WeightFakeQuantize(FakeQuantSpec(kind="lsq"), 3)
    fake.start(fake.scales(weight))
    wide = fake.scales(weight) * torch.tensor([1.0, 9.0, 1.0])
    fake.quantized(weight, wide).sum().backward()
    assert fake.learned.grad is not None
    assert (fake.learned.grad != 0).tolist() == [True, False, True]


# -- legal scales ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_the_first_scale_is_that_of_calibration(kind: Kind, dtype: str) -> None:
    rule = RULES[kind]
    for scale in (0.0371, 2.0**-7, 2.0**-24, 3.0):
        given = torch.tensor(scale)
        got = float(rule.scale(rule.initial(given, dtype), dtype))
        wanted = 2.0 ** math.ceil(math.log2(scale)) if kind == "tqt" else scale
        assert got == pytest.approx(wanted, rel=0 if kind == "tqt" else 1e-6)


@pytest.mark.parametrize("kind", LEARNED)
@pytest.mark.parametrize("wrong", [-5.0, 0.0, 1e-30, -3000.0])
def test_a_step_past_zero_is_put_back(kind: Kind, wrong: float) -> None:
    fake = quantizer(kind, 0.1)
    fake(torch.randn(4))
    with torch.no_grad():
        fake.learned.fill_(wrong)
    fake(torch.randn(4, requires_grad=True)).sum().backward()
    check_scale(float(fake.scale), "x")
    assert float(fake.scale) >= DEAD_SCALE
    assert bool(torch.isfinite(fake.learned.grad).all())  # type: ignore[arg-type]


def test_scales_of_tqt_are_powers_of_two() -> None:
    one = trainer(tiny("tqt"), optimizer="adam", lr=0.02)
    trained = one.run()
    assert trained.best > 0
    scales = [float(q.scale) for _, op in one.model.ops() if (q := op.activation_post_process)]
    weights = [s for _, op in one.model.ops() if op.weight_fake_quant for s in op.weight_scales().tolist()]
    assert {math.frexp(s)[0] for s in (*scales, *weights)} == {0.5}


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED)
def test_training_moves_scales_and_helps(kind: Kind) -> None:
    one = trainer(tiny(kind), optimizer="adam", lr=0.02)
    before = {n: t for n, t in state(one.model).items() if n.endswith("scale")}
    trained = one.run()
    after = state(one.model)
    assert trained.best > 0
    assert trained.history[-1].train_loss < trained.history[1].train_loss
    assert all(not torch.equal(t, after[n]) for n, t in before.items())


@pytest.mark.parametrize("kind", LEARNED)
def test_nothing_is_learned_before_qat(kind: Kind) -> None:
    """Until QAT nothing is learned, so the score of epoch 0 is that of the calibrated model, whatever the kind."""
    x = clouds(2)[0]
    net, plain = tiny(kind), tiny("moving_average")
    assert torch.equal(net(x), plain(x))
    assert all(float(p.detach().max()) == UNSET for n, p in net.named_parameters() if n.endswith("learned"))
    set_fake_quantize(net, FakeQuantState.QAT)
    if kind == "lsq":
        torch.testing.assert_close(net(x), plain(x))


@pytest.mark.parametrize("kind", LEARNED)
def test_resuming_equals_an_uninterrupted_run(tmp_path: Path, kind: Kind) -> None:
    def stop(step: int, total: int, loss: float) -> None:
        if step == STEPS + 2:
            raise KeyboardInterrupt

    whole = trainer(tiny(kind), optimizer="adam", lr=0.02)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny(kind), scratch=tmp_path, on_step=stop, optimizer="adam", lr=0.02).run()
    resumed = trainer(tiny(kind), scratch=tmp_path, optimizer="adam", lr=0.02)
    resumed.run()
    assert all(torch.equal(t, state(resumed.model)[name]) for name, t in state(whole.model).items())


def test_learned_scales_have_a_group_of_their_own() -> None:
    net = tiny("lsq")
    optimizer = make_optimizer(QatParams(fake_quant="lsq", lr=0.5, scale_lr_factor=0.1, weight_decay=0.3), net)
    weights, rest, scales = optimizer.param_groups
    assert [weights["lr"], rest["lr"], scales["lr"]] == pytest.approx([0.5, 0.5, 0.05])
    assert [weights["weight_decay"], rest["weight_decay"], scales["weight_decay"]] == [0.3, 0.0, 0.0]
    assert [tuple(p.shape) for p in scales["params"]] == [(), (8,), (), (3,)]
    assert len(make_optimizer(QatParams(), tiny("moving_average")).param_groups) == 2


# -- what is left alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LEARNED)
def test_a_fixed_scale_stays_fixed(kind: Kind) -> None:
    fake = FakeQuantize(FakeQuantSpec(scale=0.125, kind=kind), StateCell(), "x")
    assert fake.rule is None
    assert dict(fake.named_parameters()) == {}
    fake._cell.state = FakeQuantState.QAT
    x = torch.randn(9, requires_grad=True)
    fake(x).sum().backward()
    assert float(fake.scale) == 0.125


def test_constants_and_steps_of_fixed_format_learn_nothing() -> None:
    x = images(2).flatten(2)
    net = calibrated(model(lambda s, x: (x + s.p).softmax(-1), p=nn.Parameter(torch.randn(256))), x,
                     qconfig_dict=config("lsq"))  # fmt: skip
    learned = {name for name, m in net.named_modules() if isinstance(m, LearnedScale) and m.rule is not None}
    assert not any("exp" in name or "constant" in name for name in learned)
    assert len(learned) >= 3
    set_fake_quantize(net, FakeQuantState.QAT)
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad)) for n, p in net.named_parameters() if "learned" in n)


@pytest.mark.parametrize("kind", LEARNED)
def test_masks_stay_hidden_while_scales_are_learned(kind: Kind) -> None:
    """Scores that hold masks keep the room for them: no step of the optimizer lets a hidden position count."""
    hidden = torch.zeros(8, dtype=torch.bool)
    hidden[5:] = True
    net = calibrated(
        model(lambda s, x: s.c(x).masked_fill(hidden, -1e4).softmax(-1), c=nn.Linear(8, 8)), torch.randn(64, 8),
        qconfig_dict=config(kind),
    )  # fmt: skip
    set_fake_quantize(net, FakeQuantState.QAT)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(64, 8))[:, :5].square().sum().neg().backward()
        optimizer.step()
    set_fake_quantize(net, FakeQuantState.VALIDATION)
    assert float(net(torch.randn(64, 8))[:, hidden].detach().max()) == 0
    scores = [op.activation_post_process for _, op in net.ops() if op.node.attrs.get("below_maximum")]
    assert scores
    assert all(fake.rule is None for fake in scores if fake is not None)


@pytest.mark.parametrize("kind", ["lsq", "tqt"])
def test_learned_scales_follow_weights_that_are_multiplied(kind: Kind) -> None:
    """By a power of two, which no rule rounds, every code stays."""
    weight, factor = torch.randn(3, 40), torch.tensor([0.5, 1.0, 2.0])
    fake = WeightFakeQuantize(FakeQuantSpec(kind=kind), 3)
    fake.rescale(factor)
    assert not fake.started, "nothing is learned yet"
    fake.start(fake.scales(weight) * 0.8)
    before = fake.codes(weight, fake.scales(weight))
    fake.rescale(factor)
    wider = weight * factor[:, None]
    assert torch.equal(fake.codes(wider, fake.scales(wider)), before)


def test_a_new_calibration_starts_anew() -> None:
    net = tiny("lsq")
    set_fake_quantize(net, FakeQuantState.QAT)
    net(clouds(0)[0])
    assert all(m.started for m in net.modules() if isinstance(m, LearnedScale))
    calibrate(net, [clouds(0)[0]])
    assert not any(m.started for m in net.modules() if isinstance(m, LearnedScale))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FakeQuantSpec(kind="lsqplus"), "FakeQuantSpec: kind 'lsqplus'. Use one of moving_average, lsq, pact"),  # type: ignore[arg-type]
        (lambda: QConfig(weight=FakeQuantSpec(kind="pact")), "QConfig: weight has the kind 'pact'"),
    ],
)
def test_what_is_no_kind(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(QatError, match="QAT142") as caught:
        make()
    assert said in str(caught.value)


# -- checkpoints and integers ------------------------------------------------------------------------------------------


KINDS: list[Kind] = ["moving_average", *LEARNED]


def scales_of(net: FakeQuantModel) -> dict[str, Tensor]:
    """Of every activation and of every channel's weights."""
    activations = {n: op.activation_post_process.scale for n, op in net.ops() if op.activation_post_process}
    weights = {f"{n}.weight": fake.scales(op.weight) for n, op in net.ops() if (fake := op.weight_fake_quant)}
    return {name: scale.clone() for name, scale in (activations | weights).items()}


@pytest.fixture(scope="module")
def trained() -> dict[str, FakeQuantModel]:
    """Of every kind one whose scales have moved, in VALIDATION."""
    made = {}
    for kind in KINDS:
        one = trainer(tiny(kind), optimizer="adam", lr=0.02, averaging_constant=0.1)
        one.run()
        set_fake_quantize(one.model.train(), FakeQuantState.QAT)
        F.cross_entropy(one.model(clouds(1)[0]), clouds(1)[1]).backward()
        torch.optim.SGD(one.model.parameters(), lr=0.3).step()
        made[kind] = one.model.eval()
    return made


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_from_one_kind_to_another(trained: dict[str, FakeQuantModel], kind: Kind, other: Kind) -> None:
    """Loaded between two steps: outputs and scales are the same, and training starts there."""
    x, net = clouds(2)[0], tiny(other)
    saved = state(trained[kind])
    moved = {name: t.clone() for name, t in saved.items()}
    net.load_state_dict(saved)
    assert saved.keys() == moved.keys()
    assert all(torch.equal(saved[name], moved[name]) for name in saved), "the state is left alone"
    for one in (net, trained[kind]):
        set_fake_quantize(one, FakeQuantState.VALIDATION)
    assert torch.equal(net(x), trained[kind](x))
    before = scales_of(net)
    for name, scale in scales_of(trained[kind]).items():
        assert torch.equal(before[name], scale), name
    assert to_program(net).constants.keys() == to_program(trained[kind]).constants.keys()
    for _, op in net.ops():
        op.start_learning()
    for name, scale in scales_of(net).items():
        wanted = torch.exp2(before[name].log2().sub(1e-6).ceil()) if other == "tqt" else before[name]
        torch.testing.assert_close(scale, wanted, rtol=1e-6, atol=0)


def test_learned_weight_scales_survive_being_loaded_with_a_kind_that_learns_none(
    trained: dict[str, FakeQuantModel],
) -> None:
    plain = tiny("moving_average")
    plain.load_state_dict(trained["lsq"].state_dict())
    again, back = tiny("moving_average"), tiny("lsq")
    for net in (again, back):
        net.load_state_dict(plain.state_dict())
        for name, scale in scales_of(plain).items():
            assert torch.equal(scales_of(net)[name], scale)
    plain.load_state_dict(trained["moving_average"].state_dict())
    assert all(op.weight_fake_quant.fixed is None for _, op in plain.ops() if op.weight_fake_quant)


def test_what_is_learned_without_its_rule_is_no_state() -> None:
    saved = {name: t for name, t in tiny("lsq").state_dict().items() if not name.endswith("learned_by")}
    with pytest.raises(RuntimeError, match="learned"):
        tiny("lsq").load_state_dict(saved)


@pytest.mark.parametrize("kind", LEARNED)
def test_integers_after_training_are_those_of_the_learned_scales(kind: Kind) -> None:
    """The Program takes the scales learned, and the oracle computes of it what the emulator does."""
    x = images(8)
    net = calibrated(everything(), x, qconfig_dict=config(kind))
    set_fake_quantize(net.train(), FakeQuantState.QAT)
    optimizer = make_optimizer(QatParams(fake_quant=kind, lr=1e-3, optimizer="adam"), net)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(8) % 10).backward()
        optimizer.step()
    set_fake_quantize(net.eval(), FakeQuantState.VALIDATION)
    program = to_program(net)
    consts = {op.output: op.consts for op in program}
    learned = [(n, op) for n, op in net.ops() if op.activation_post_process and op.activation_post_process.started]
    assert learned
    for name, op in learned:
        fake = op.activation_post_process
        assert fake is not None
        assert program.values[name].qtype.scale == float(fake.scale) == float(fake.current())
        if op.weight_fake_quant and kind != "pact":
            codes = program.constants[consts[name]["weight"]]
            s = op.weight_scales().view(-1, *[1] * (codes.dim() - 1)).numpy()
            wanted = np.clip(np.rint(op.weight.detach().numpy() / s), -128, 127)
            np.testing.assert_array_equal(codes.numpy(), wanted)
    wanted = by_the_contract(program, x.numpy())
    (got,) = emulate(program, x)
    np.testing.assert_array_equal(got.numpy(), wanted[program.outputs[0]])
    with torch.no_grad():
        assert float((net(x) - got).abs().max()) < 0.1 * float(got.std())


def test_a_gradient_is_taken_once_only() -> None:
    fake = quantizer("lsq", 0.1)
    x = torch.randn(5, requires_grad=True)
    (first,) = torch.autograd.grad(fake(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_every_entry_of_a_batch_and_layout_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(straight_through, "_PIECE", 30)
    fake = quantizer("lsq", 0.02)
    x, g = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    found: list[Tensor] = []
    for form in (torch.contiguous_format, torch.channels_last):
        fake.learned.grad = None
        fake(x.to(memory_format=form)).backward(g)
        assert fake.learned.grad is not None
        found.append(fake.learned.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", LEARNED)
def test_gradients_of_parts_of_a_batch_add_up_to_those_of_the_batch(kind: Kind) -> None:
    x, labels = clouds(1)

    def gradients(rows: slice, share: float) -> dict[str, Tensor]:
        net = tiny(kind)
        set_fake_quantize(net, FakeQuantState.QAT)
        F.cross_entropy(net(x[rows]), labels[rows]).backward()
        count_all_rows(net, share)
        return {name: share * p.grad for name, p in net.named_parameters() if p.grad is not None}

    whole = gradients(slice(96), 1.0)
    parts = gradients(slice(64), 2 / 3), gradients(slice(64, 96), 1 / 3)
    assert any(name.endswith("learned") for name in whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
