"""The streaming pass: what is compared with what, on fakes whose errors are known and on a real network."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qatlib.analysis.bad_case import find_bad_case
from qatlib.analysis.capture import capture
from qatlib.analysis.profiler import capture_pair, model_profiler
from qatlib.analysis.records import Capture, OpRecord
from qatlib.analysis.sides import FakeSide, Step, UnmeasurableError
from qatlib.errors import ConfigError, DataError, StateError, TrainingError
from qatlib.fake.model import set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.graph.ir import Node
from qatlib.qtype import FLOAT, QType
from tests.analysis.analysis_nets import Trio
from tests.models import calibrated, model

NODES = (Node("a", "double", ("x",), module="m"), Node("b", "double", ("a",), module="m"))


class Doubler:
    """a = 2 x, b = 2 a, plus an offset at each op; both outputs have scale 0.5."""

    def __init__(self, offset: float = 0.0, missing: str = "") -> None:
        self.offset, self.missing = offset, missing

    def steps(self, inputs: Sequence[Tensor]) -> Iterator[Step]:
        a = 2 * inputs[0] + self.offset
        yield "a", (inputs[0],), a
        yield "b", (a,), 2 * a + self.offset

    def outputs(self, inputs: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        return ((name, output) for name, _, output in self.steps(inputs))

    def same_input(self, name: str, sources: Sequence[str], inputs: Sequence[Tensor]) -> Tensor:
        if name == self.missing:
            raise UnmeasurableError("it is hidden")
        return 2 * inputs[0] + self.offset

    def qtype(self, name: str) -> QType:
        return QType("int8", 0.5)

    def grid(self, name: str) -> QType:
        return FLOAT

    def absent(self, name: str) -> str:
        return ""


def find(seen: Capture, name: str) -> OpRecord:
    record = seen.find(name)
    assert record is not None
    return record


def test_accumulated_error_grows_and_same_input_error_does_not() -> None:
    seen = capture(Doubler(), Doubler(0.5), NODES, [torch.arange(4.0)], "FvsQ")
    a, b = find(seen, "a"), find(seen, "b")
    assert a.accumulated is not None
    assert a.accumulated.max_lsb == 1.0
    assert b.accumulated is not None
    assert b.accumulated.max_lsb == 3.0
    assert b.same_input is not None
    assert b.same_input.max_lsb == 1.0
    assert (a.call, b.call) == (1, 2), "both nodes call module m"
    assert [a.title, b.title] == ["m (call 1)", "m (call 2)"]


def test_what_cannot_be_measured_is_listed_with_its_reason() -> None:
    seen = capture(Doubler(), Doubler(missing="b"), NODES, [torch.ones(1)], "FvsQ")
    assert find(seen, "b").same_input is None
    assert [(u.name, u.what, u.why) for u in seen.unmeasured] == [("b", "same-input error", "it is hidden")]


def test_no_batch_outlives_its_turn() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Any:
        for _ in range(4):
            assert sum(ref() is not None for ref in alive) <= 1
            batch = torch.ones(2, 2)
            alive.append(weakref.ref(batch))
            yield batch

    seen = capture(Doubler(), Doubler(), NODES, batches(), "FvsQ")
    assert (seen.batches, seen.samples) == (4, 8)


def test_nan_stops_the_capture_at_its_op() -> None:
    with pytest.raises(TrainingError, match="QAT165 a:"):
        capture(Doubler(), Doubler(), NODES, [torch.tensor([torch.nan])], "FvsQ")


# -- a real network ----------------------------------------------------------------------------------------------------


def test_fvsq_equals_numpy_on_collected_outputs(trio: Trio) -> None:
    seen = capture_pair(trio.float_model, trio.fake, list(trio.batches), "FvsQ")
    view = copy.deepcopy(trio.fake)
    set_fake_quantize(view, FakeQuantState.CALIBRATION)
    outputs: dict[str, list[list[np.ndarray]]] = {}
    with torch.no_grad():
        for i, model in enumerate((view, trio.fake)):
            for batch in trio.batches:
                keep = lambda node, _, out, i=i: outputs.setdefault(node.name, [[], []])[i].append(out.double().numpy())  # noqa: E731
                model.walk(batch, visit=keep)
    assert [r.name for r in seen.records] == list(outputs)
    for record in seen.records:
        a, b = (np.concatenate(side).ravel() for side in outputs[record.name])
        assert record.accumulated is not None
        assert record.accumulated.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-9)
        assert record.accumulated.max_abs == np.abs(a - b).max()
        assert record.reference is not None
        assert record.reference.max == a.max()


def test_fvsq_same_input_error_of_a_conv_equals_its_own_computation(trio: Trio) -> None:
    batch = trio.batches[0]
    seen = find(capture_pair(trio.float_model, trio.fake, batch, "FvsQ"), "side")
    view = copy.deepcopy(trio.fake)
    set_fake_quantize(view, FakeQuantState.CALIBRATION)
    given: dict[str, tuple[Tensor, ...]] = {}
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        view.walk(batch, visit=lambda n, i, o: (given.update({n.name: i}), wanted.update({n.name: o})))
        scale = trio.fake.qtype("block").scale
        assert scale is not None
        quantized = torch.clamp(torch.round(given["side"][0] / scale), -128, 127) * scale
        got = trio.fake.compute("side", quantized)
    assert seen.same_input is not None
    assert seen.same_input.max_abs == float((got.double() - wanted["side"].double()).abs().max())


def test_qvsq_finds_rounding_only(trio: Trio) -> None:
    seen = capture_pair(trio.fake, trio.integer, list(trio.batches), "QvsQ")
    assert len(seen.records) == 8
    for record in seen.records:
        assert record.same_input is not None, record.name
        if record.scale is not None:
            assert record.same_input.above_1_lsb == 0, record.name
    fc = find(seen, "fc")
    assert fc.same_input is not None
    assert fc.same_input.max_lsb is None
    assert [(u.name, u.what) for u in seen.unmeasured] == [("fc", "error in LSB and KL")]
    assert find(seen, "x.quant").accumulated.sqnr_db == float("inf")  # type: ignore[union-attr]


def test_cvsq_compares_the_calibrated_model_with_its_own_integers(trio: Trio) -> None:
    seen = capture_pair(trio.fake, trio.integer, list(trio.batches), "CvsQ")
    with torch.no_grad():
        a, b = (torch.cat([m(batch) for batch in trio.batches]).double().numpy() for m in (trio.fake, trio.integer))
    head = find(seen, "fc").accumulated
    assert head is not None
    assert (seen.mode, head.max_abs) == ("CvsQ", np.abs(a - b).max())
    assert head.se == pytest.approx(np.sum((a - b) ** 2), rel=1e-9)
    assert seen.records == capture_pair(trio.fake, trio.integer, list(trio.batches), "QvsQ").records
    same = (find_bad_case(trio.fake, trio.integer, list(trio.batches), mode) for mode in ("CvsQ", "QvsQ"))
    first, second = ([(case.index, case.noise) for case in cases.worst] for cases in same)
    assert first == second


def test_the_page_and_tables_of_cvsq(trio: Trio, tmp_path: Path) -> None:
    model_profiler(trio.fake, trio.integer, list(trio.batches), "CvsQ", tmp_path)
    assert "Calibrated against integer" in (tmp_path / "profiler.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "profiler.html",
        "similarity-CvsQ.csv",
        "similarity-CvsQ-by-op-error.csv",
        "statistics-CvsQ.csv",
        "statistics-CvsQ-by-range.csv",
    }


def test_batches_may_carry_targets(trio: Trio) -> None:
    plain = capture_pair(trio.fake, trio.integer, list(trio.batches), "QvsQ")
    loaded = [(batch, torch.zeros(4)) for batch in trio.batches]
    assert capture_pair(trio.fake, trio.integer, loaded, "QvsQ") == plain


def test_capture_leaves_the_models_alone(trio: Trio) -> None:
    before = {key: value.clone() for key, value in trio.fake.state_dict().items()}
    capture_pair(trio.float_model, trio.fake, trio.batches[0], "FvsQ")
    after = trio.fake.state_dict()
    assert trio.fake.state is FakeQuantState.VALIDATION
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_float_reference_may_be_the_model_in_calibration_state(trio: Trio) -> None:
    view = copy.deepcopy(trio.fake)
    set_fake_quantize(view, FakeQuantState.CALIBRATION)
    assert capture_pair(view, trio.fake, trio.batches[0], "FvsQ") == capture_pair(
        trio.float_model, trio.fake, trio.batches[0], "FvsQ"
    )


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [FakeQuantState.CALIBRATION, FakeQuantState.QAT])
@pytest.mark.parametrize("mode", ["FvsQ", "QvsQ", "CvsQ"])
def test_a_model_that_does_not_only_quantize_is_refused(trio: Trio, state: FakeQuantState, mode: Any) -> None:
    wrong = copy.deepcopy(trio.fake)
    set_fake_quantize(wrong, state)
    pair = (trio.float_model, wrong) if mode == "FvsQ" else (wrong, trio.integer)
    with pytest.raises(StateError, match=rf"QAT156 .*{state.name}.*FakeQuantState\.VALIDATION"):
        capture_pair(*pair, trio.batches[0], mode)


def test_train_mode_is_refused(trio: Trio) -> None:
    wrong = copy.deepcopy(trio.fake).train()
    with pytest.raises(StateError, match=r"QAT156 model2: is in train\(\) mode"):
        capture_pair(trio.float_model, wrong, trio.batches[0], "FvsQ")


def test_float_against_trained_is_refused_with_the_reason(trio: Trio) -> None:
    trained = copy.deepcopy(trio.fake)
    trained.mark_trained()
    with pytest.raises(StateError, match=r"QAT157 model2: was trained \(QAT\), so its weights"):
        capture_pair(trio.float_model, trained, trio.batches[0], "FvsQ")
    assert capture_pair(trained, trio.integer, trio.batches[0], "QvsQ").samples == 4
    for compare in (capture_pair, find_bad_case):
        with pytest.raises(StateError, match=r"QAT157 model1: was trained \(QAT\)"):
            compare(trained, trio.integer, trio.batches[0], "CvsQ")


@pytest.mark.parametrize("compare", [capture_pair, find_bad_case])
def test_an_unknown_mode_names_those_that_there_are(trio: Trio, compare: Any) -> None:
    with pytest.raises(ConfigError, match=r"QAT108 .*FvsQ .*QvsQ .*CvsQ"):
        compare(trio.float_model, trio.integer, trio.batches[0], "FvsI")


def test_another_float_model_is_refused(trio: Trio) -> None:
    other = copy.deepcopy(trio.float_model)
    torch.nn.init.ones_(other.fc.weight)
    with pytest.raises(StateError, match="QAT158"):
        capture_pair(other, trio.fake, trio.batches[0], "FvsQ")


def test_a_float_model_with_another_output_is_refused(trio: Trio) -> None:
    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trio.float_model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.net(x)
            return out, out

    with pytest.raises(StateError, match="QAT158 model1: returns 2 tensors and model2 1"):
        capture_pair(Doubled(), trio.fake, trio.batches[0], "FvsQ")
    assert not trio.float_model.training, "each module is left in its own mode"


def test_wrong_kinds_are_refused(trio: Trio) -> None:
    with pytest.raises(StateError, match="QAT155 model2: is a Net"):
        capture_pair(trio.fake, trio.float_model, trio.batches[0], "QvsQ")
    with pytest.raises(StateError, match="QAT155 model2: is a Net"):
        capture_pair(trio.float_model, trio.float_model, trio.batches[0], "FvsQ")
    with pytest.raises(ConfigError, match="QAT108"):
        capture_pair(trio.fake, trio.integer, trio.batches[0], "FvsF")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="QAT118"):
        capture_pair(trio.fake, trio.integer, [], "QvsQ")


def test_fake_side_quantizes_inputs_only_where_they_have_a_scale() -> None:
    model = SimpleNamespace(
        graph=SimpleNamespace(nodes=NODES),
        compute=lambda name, *x: x[0],
        qtype=lambda name: QType("int8", 0.5) if name == "a" else FLOAT,
    )
    side = FakeSide(model)  # type: ignore[arg-type]
    x = torch.tensor([0.3, 1000.0])
    assert side.same_input("b", ("a",), (x,)).tolist() == [0.5, 63.5]
    assert torch.equal(side.same_input("a", ("x",), (x,)), x)


def test_what_a_softmax_takes_for_nothing_is_no_error() -> None:
    torch.manual_seed(0)
    keep = torch.rand(1, 1, 8) > 0.4

    def body(s: nn.Module, x: Tensor) -> Tensor:
        return (s.scores(x) + (1 - keep.float()) * -1e4).softmax(-1)

    net, x = model(body, scores=nn.Linear(6, 8)), torch.randn(16, 5, 6)
    masked = find(capture_pair(net, calibrated(net, x), (x,), "FvsQ"), "add")
    assert masked.same_input is not None
    assert masked.reference is not None
    assert masked.same_input.sqnr_db > 20
    assert masked.reference.min > -100


def test_the_largest_magnitude_of_every_channel_over_all_batches() -> None:
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(2), nn.Linear(36, 7)).eval()
    x = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    quantized = calibrated(net, x)
    seen = capture_pair(net, quantized, [(x[:4],), (x[4:],)], "FvsQ")
    with torch.no_grad():
        conv, linear = net[0](x).numpy(), net(x).numpy()
    np.testing.assert_allclose(find(seen, "0").channel_amax, np.abs(conv).max((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(find(seen, "2").channel_amax, np.abs(linear).max((0, 1)), rtol=1e-5)
    assert find(seen, "flatten" if seen.find("flatten") else "1").channel_amax == ()
