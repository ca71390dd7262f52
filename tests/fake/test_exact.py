"""The exact forward: values of the Program, gradients of the fake-quant model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlib.conversion import convert_fx
from qatlib.emulator import Emulator
from qatlib.fake.exact import ExactForward
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.qconfig import FakeQuantSpec, Kind, QConfig
from qatlib.fake.state import FakeQuantState
from qatlib.graph.ir import Node
from tests.fake import training as fit
from tests.kind_nets import NETS
from tests.models import Tiny, calibrated, everything, images


def training(model: FakeQuantModel) -> FakeQuantModel:
    set_fake_quantize(model.train(), FakeQuantState.QAT)
    return model


def values(forward: ExactForward, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Every node's output in the exact forward."""
    seen: dict[str, Tensor] = {}
    model, substituted = forward.model, forward.model.substituted

    def spy(*given: Tensor, instead: object) -> object:
        def keep(node: Node, computed: Tensor) -> Tensor:
            seen[node.name] = instead(node, computed)  # type: ignore[operator]
            return seen[node.name]

        return substituted(*given, instead=keep)

    model.substituted = spy  # type: ignore[assignment, method-assign]
    try:
        forward(*inputs)
    finally:
        del model.substituted  # type: ignore[method-assign]
    return seen


def differing(model: FakeQuantModel, seen: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """Elements of each value that are not the Program's, of a Program converted anew from ``model``."""
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    program = convert_fx(model).program
    emulator = Emulator(program)
    traced = emulator.trace(*inputs)
    apart = {}
    for name, real in seen.items():
        if name in program.values and real.is_floating_point():
            count = int((emulator.real(name, emulator.widen(name, traced[name])) != real).sum())
            apart |= {name: count} if count else {}
    return apart


@pytest.mark.parametrize("averaging_constant", [0.0, 0.3])
def test_every_value_is_the_programs_also_while_scales_move(averaging_constant: float) -> None:
    x = images(6)
    qconfig = QConfig(FakeQuantSpec(averaging_constant=averaging_constant))
    model = training(calibrated(everything(), x, qconfig_dict=qconfig))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = values(ExactForward(model), (x * 1.5,))
    assert len(seen) == len(list(model.ops()))
    moved = not model.op("stem").activation_post_process.scale.equal(before["stem.activation_post_process.scale"])
    assert moved == (averaging_constant > 0)
    model.load_state_dict(before)
    assert differing(model, seen, (x * 1.5,)) == {}


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_op_is_exact(name: str) -> None:
    net = NETS[name]
    model = net.prepared()
    forward = ExactForward(model)
    seen = values(forward, net.inputs)
    assert len(seen) == len(list(model.ops()))
    assert forward.islands == ()
    assert differing(model, seen, net.inputs) == {}


def test_the_gradient_is_that_of_the_fake_quant_model_where_both_agree() -> None:
    """On the codes of a single linear, fake-quant and integer agree, so loss and gradient have to be equal."""
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    model = training(calibrated(nn.Linear(8, 4), x, qconfig_dict=QConfig(FakeQuantSpec(averaging_constant=0.0))))
    target = torch.randn(32, 4)
    gradients = []
    for forward in (model, ExactForward(model)):
        model.zero_grad()
        F.mse_loss(forward(x), target).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2
    for usual, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(usual, exact, rtol=1e-5, atol=1e-6)


def test_training_on_exact_values_lowers_the_loss_of_the_integers() -> None:
    torch.manual_seed(0)
    x, target = images(16), torch.randn(16, 10)
    model = training(calibrated(everything(), x, qconfig_dict=QConfig(FakeQuantSpec(averaging_constant=0.0))))
    forward = ExactForward(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.mse_loss(forward(x), target)
        set_fake_quantize(model, FakeQuantState.VALIDATION)
        assert float(loss.detach()) == float(F.mse_loss(convert_fx(model)(x), target))
        set_fake_quantize(model, FakeQuantState.QAT)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_what_has_no_integer_form_is_named() -> None:
    x = images(4)
    model = calibrated(everything(), x, hybrid=True, hybrid_dict={"module_name": ["block"]})
    forward = ExactForward(training(model))
    forward(x)
    assert forward.islands == ("block.conv",)


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_the_trainer_trains_on_the_integers(amp: str | None) -> None:
    """The objective of the first step is that of the calibrated Program, and the result converts to its best score."""
    start = fit.start(averaging_constant=0.0)
    (points,), labels = next(iter(fit.batches(1, 0)))
    wanted = float(F.cross_entropy(convert_fx(start)(points), labels))
    shown: list[float] = []
    trained = fit.trainer(start, forward="exact", amp=amp, on_step=lambda step, total, mean: shown.append(mean)).run()
    assert shown[0] == pytest.approx(wanted, rel=1e-6)
    assert trained.integer == fit.score(start).integer > trained.history[0].integer


def test_the_trainer_names_what_stays_float() -> None:
    points, _ = fit.clouds(0)
    model = calibrated(Tiny(), points, hybrid=True, hybrid_dict={"module_name": ["hidden"]})
    notes: list[str] = []
    fit.trainer(model, forward="exact", epochs=1, note=notes.append).run()
    assert any("qat.forward: exact, but hidden " in note for note in notes)


@pytest.mark.parametrize("kind", ["lsq", "pact", "tqt"])
def test_the_first_step_has_the_scales_that_are_learned(kind: Kind) -> None:
    """tqt starts at powers of two, which calibration does not give."""
    points, _ = fit.clouds(0)
    spec = FakeQuantSpec(kind=kind)
    weight = FakeQuantSpec(method="min_max", kind="moving_average" if kind == "pact" else kind)
    model = training(calibrated(Tiny(), points, qconfig_dict=QConfig(spec, weight)))
    forward = ExactForward(model)
    first, second = forward(points), forward(points)
    set_fake_quantize(model, FakeQuantState.VALIDATION)
    assert torch.equal(first, second)
    assert torch.equal(first, convert_fx(model)(points))
