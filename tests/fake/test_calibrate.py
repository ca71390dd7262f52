"""One pass over the data: settling by any method, held-out ranges, bad batches, named QConfigs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qatlib
from qatlib.conversion import to_program
from qatlib.emulator import emulate
from qatlib.errors import DataError, QatError, QConfigError, StageError, TrainingError
from qatlib.fake.calibrate import calibrate, quantizers, ranges_on, settle
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import FakeQuantSpec, Method, QConfig, get_default_qconfig
from qatlib.fake.ranges import Range, ranges_of, read_ranges, write_ranges
from qatlib.fake.state import FakeQuantState
from qatlib.fake.thresholds import kept_of_channels
from qatlib.qtype import scale_of
from tests.models import everything, images, model
from tests.oracle import run

METHODS: tuple[Method, ...] = ("min_max", "percentile", "mse", "kl", "mix", "auto")
BATCHES = [images(8, seed=0), images(5, seed=1) * 3, images(8, seed=2)]


def prepared(qconfig: Any = None) -> FakeQuantModel:
    return prepare_qat_fx(everything(0), qconfig, example_inputs=(images(2),))


def scales(fake: FakeQuantModel) -> dict[str, float]:
    return {name: float(q.scale) for name, q in quantizers(fake)}


def small() -> FakeQuantModel:
    net = model(lambda s, x: s.d(s.c(x)), c=nn.Conv2d(3, 4, 1), d=nn.Conv2d(4, 2, 1))
    return prepare_qat_fx(net, example_inputs=(images(2),))


class Once:
    """Batches that can be read a single time, and a count of what was read."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.read = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        assert self.read == 0, "a second pass"
        for batch in self.batches:
            self.read += 1
            yield batch


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_one_pass_serves_every_method(dtype: str) -> None:
    data, fake = Once(BATCHES), prepared(get_default_qconfig(dtype, "min_max"))
    assert calibrate(fake, data, histograms=True) == 21
    first = scales(fake)
    for method in METHODS:
        settle(fake, method, 99.0)
        assert fake.state is FakeQuantState.VALIDATION
        spec = FakeQuantSpec(dtype, "min_max" if (dtype, method) == ("int16", "percentile") else method, 99.0)  # type: ignore[arg-type]
        fresh = prepared(QConfig(spec))
        calibrate(fresh, BATCHES)
        assert scales(fake) == scales(fresh), method
    settle(fake)
    assert scales(fake) == first
    assert data.read == len(BATCHES)


def test_methods_differ() -> None:
    fake = prepared()
    calibrate(fake, BATCHES, histograms=True)
    found = {}
    for method in METHODS:
        settle(fake, method, 99.0)
        found[method] = tuple(scales(fake).values())
    assert len(set(found.values())) >= 5
    assert all(a >= b for a, b in zip(found["min_max"], found["percentile"], strict=True))


def test_a_fixed_scale_stays_whatever_the_method() -> None:
    qconfig = {"": QConfig(), "module_name": {"stem": QConfig(FakeQuantSpec(method="fixed_scale", scale=0.25))}}
    fake = prepared(qconfig)
    calibrate(fake, BATCHES, histograms=True)
    for method in METHODS:
        settle(fake, method)
        assert float(dict(quantizers(fake))["stem"].scale) == 0.25
    found = {r.op: r.method for r in ranges_of(fake, {})}
    assert found["stem"] == "fixed_scale"
    assert set(found.values()) == {"fixed_scale", "percentile"}


def test_a_method_without_its_histogram_is_refused() -> None:
    fake = prepared(get_default_qconfig(method="min_max"))
    calibrate(fake, BATCHES)
    before = scales(fake)
    with pytest.raises(TrainingError, match=r"QAT167 calibration: mse needs a histogram.*histograms=True"):
        settle(fake, "mse")
    assert scales(fake) == before


@pytest.mark.parametrize(("method", "percentile"), [("entropy", None), ("fixed_scale", None), ("percentile", 0.0)])
def test_settling_by_no_method_is_refused(method: Any, percentile: float | None) -> None:
    fake = small()
    calibrate(fake, BATCHES)
    with pytest.raises(QConfigError, match="QAT142"):
        settle(fake, method, percentile)


def test_min_max_keeps_no_histogram_and_all_of_the_range() -> None:
    fake = prepared(get_default_qconfig(method="min_max"))
    calibrate(fake, BATCHES)
    assert all(q.histogram.counts.numel() == 0 for _, q in quantizers(fake))
    largest = max(float(batch.abs().max()) for batch in BATCHES)
    assert fake.qtype("x.quant").scale == scale_of(largest, "int8")


def test_memory_does_not_grow_with_the_batches() -> None:
    def stored(fake: FakeQuantModel) -> int:
        return sum(v.numel() for _, q in quantizers(fake) for v in vars(q.histogram).values() if isinstance(v, Tensor))

    few, many = prepared(), prepared()
    calibrate(few, BATCHES[:1])
    calibrate(many, BATCHES * 4)
    assert stored(few) == stored(many) == 2048 * len(scales(few))


# -- held-out data -----------------------------------------------------------------------------------------------


def test_held_out_ranges_are_those_of_the_float_model_and_leave_all_as_it_was() -> None:
    fake = small()
    calibrate(fake, BATCHES)
    before, counted = scales(fake), [q.histogram.counts.clone() for _, q in quantizers(fake)]
    held = images(6, seed=9) * 7
    found = ranges_on(fake, [held[:2], held[2:]])
    conv = fake.op("c").float_params()
    inner = np.einsum("oi,nihw->nohw", conv["weight"][:, :, 0, 0].detach().numpy(), held.numpy())
    inner += conv["bias"].detach().numpy()[None, :, None, None]
    assert found["x.quant"] == (float(held.min()), float(held.max()))
    assert found["c"] == pytest.approx((inner.min(), inner.max()), rel=1e-5)
    assert fake.state is FakeQuantState.VALIDATION
    assert scales(fake) == before
    assert all(torch.equal(a, q.histogram.counts) for a, (_, q) in zip(counted, quantizers(fake), strict=True))


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_held_out_data_leaves_every_tensor_of_the_model_alone(dtype: Any) -> None:
    fake = prepared(QConfig(weight=replace(QConfig().weight, dtype=dtype)))
    calibrate(fake, BATCHES)
    before = {name: tensor.clone() for name, tensor in fake.state_dict().items()}
    ranges_on(fake, [images(4, seed=5) * 1000])
    after = fake.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_ranges_say_how_much_of_held_out_data_was_seen(tmp_path: Path) -> None:
    fake = small()
    calibrate(fake, BATCHES)
    held = BATCHES[1] * 2
    ranges = ranges_of(fake, ranges_on(fake, [held]))
    first = ranges[0]
    assert (first.op, first.dtype, first.method) == ("x.quant", "int8", "percentile")
    assert first.covered == pytest.approx(
        float(torch.cat([b.flatten() for b in BATCHES]).abs().max() / held.abs().max())
    )
    assert first.outside
    assert first.scale == scale_of(first.kept, "int8")
    assert not any(r.outside for r in ranges_of(fake, ranges_on(fake, BATCHES)))
    write_ranges(tmp_path / "r.csv", ranges)
    back = read_ranges(tmp_path / "r.csv")
    assert [(r.op, r.method, r.outside) for r in back] == [(r.op, r.method, r.outside) for r in ranges]
    assert back[0].kept == pytest.approx(first.kept, rel=1e-5)


def test_the_sqnr_of_a_range_is_that_of_its_codes() -> None:
    fake = small()
    x = images(64, seed=3)
    calibrate(fake, [x])
    found = ranges_of(fake, {})[0]
    values = x.double().numpy()
    stored = np.clip(np.rint(values / found.scale), -128, 127) * found.scale
    expected = 10 * math.log10(np.square(values).sum() / np.square(values - stored).sum())
    assert found.sqnr_db == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize(("largest", "held", "covered", "outside"), [
    (2.0, 1.0, 1.0, False), (2.0, 2.1, 2 / 2.1, False), (2.0, 4.0, 0.5, True),
    (0.0, 1.0, 0.0, True), (0.0, 0.0, 1.0, False), (2.0, math.nan, 1.0, False),
])  # fmt: skip
def test_what_counts_as_outside(largest: float, held: float, covered: float, outside: bool) -> None:
    found = Range("a", "int8", "mse", 1.0, 0.01, -largest, 0.0, -held, held)
    assert found.covered == pytest.approx(covered)
    assert found.outside is outside


@pytest.mark.parametrize("text", ["op,dtype\na,int8\n", "op,dtype,method,kept\na,int8,mse,x\n"])
def test_a_damaged_table_of_ranges_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(StageError, match="QAT195"):
        read_ranges(tmp_path / "r.csv")
    with pytest.raises(StageError, match="QAT192"):
        read_ranges(tmp_path / "none.csv")


# -- bad input ---------------------------------------------------------------------------------------------------


def spoiled(value: float) -> Tensor:
    x = images(2)
    x[1, 0, 0, :2] = value
    return x


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ([], DataError, "QAT110 calibration: the loader gave no batch"),
        ([images(0)], DataError, "QAT110 calibration: the loader gave no batch"),
        ([images(2), spoiled(math.nan)], DataError, "QAT112 calibration batch 1 input x: holds 2 NaN of"),
        ([images(2), spoiled(math.inf)], TrainingError, "QAT160 x.quant: output holds 2 non-finite .*, in batch 1"),
        ([{"image": images(2)}], DataError, "QAT111 batch: has image but not x"),
        ([3.0], DataError, "QAT111 batch: is a float"),
        ([()], DataError, "QAT111 batch: is a tuple of nothing"),
        ([(np.zeros((2, 3, 8, 8)), 1)], DataError, "QAT111 calibration batch 0 input x: is a ndarray, not a tensor"),
    ],
)
def test_bad_data_gets_one_message(batches: list[Any], error: type[QatError], text: str) -> None:
    with pytest.raises(error, match=text):
        calibrate(small(), batches)


# -- QConfigs ----------------------------------------------------------------------------------------------------


def test_a_fixed_scale_needs_its_scale() -> None:
    with pytest.raises(QConfigError, match="QAT142 FakeQuantSpec: method 'fixed_scale' without a scale"):
        FakeQuantSpec(method="fixed_scale")


def test_inner_steps_do_not_inherit_a_fixed_scale() -> None:
    net = model(lambda s, x: s.act(s.c(x)), c=nn.Conv2d(3, 4, 1), act=nn.Softmax(1))
    spec = FakeQuantSpec(method="fixed_scale", scale=0.5)
    fake = prepare_qat_fx(net, QConfig(spec), example_inputs=(images(2),))
    calibrate(fake, [images(2)])
    inner = {name: q.spec for name, q in quantizers(fake) if name.startswith("act.")}
    assert inner
    assert all(s.method != "fixed_scale" or s.scale == 0.5 for s in inner.values())
    assert any(s.method in ("min_max", "percentile") for s in inner.values())


NAMED = {
    "calib_8bit_fake_quant": ("int8", "int8"),
    "qat_8bit_fake_quant": ("int8", "int8"),
    "qat_8bit_fixed_act_fake_quant": ("int8", "int8"),
    "calib_8bit_weight_16bit_act_fake_quant": ("int16", "int8"),
    "qat_8bit_weight_16bit_act_fake_quant": ("int16", "int8"),
    "calib_8bit_weight_32bit_out_fake_quant": (None, "int8"),
    "qat_8bit_weight_32bit_out_fake_quant": (None, "int8"),
    "calib_16bit_fake_quant": ("int16", "int16"),
}


@pytest.mark.parametrize(("name", "formats"), NAMED.items())
def test_named_qconfigs(name: str, formats: tuple[str | None, str]) -> None:
    qconfig = getattr(qatlib, f"default_{name}_qconfig")
    assert (qconfig.activation and qconfig.activation.dtype, qconfig.weight.dtype) == formats
    assert qconfig.weight.method == "min_max"
    if qconfig.activation is not None:
        assert (qconfig.activation.averaging_constant == 0) == ("fixed_act" in name)
        calibrate(prepared(qconfig), BATCHES[:1])


def test_get_default_qconfig_takes_formats_and_method() -> None:
    qconfig = qatlib.get_default_qconfig("int16", "kl", weight="int16")
    assert qconfig == QConfig(FakeQuantSpec("int16", "kl"), replace(QConfig().weight, dtype="int16"))
    with pytest.raises(QConfigError, match="QAT142 FakeQuantSpec: method 'entropy'"):
        qatlib.get_default_qconfig(method="entropy")


# -- weights -----------------------------------------------------------------------------------------------------


def best_share(row: Any, qmax: int) -> float:
    """The k/100 of the largest magnitude with the least squared error, value by value."""
    errors = {}
    for k in range(100, 0, -1):
        scale = np.float32(float(np.abs(row).max()) * float(np.float32(k / 100)) * 2 / (2 * qmax + 1))
        codes = np.clip(np.rint(row / scale), -qmax - 1, qmax)
        errors[k] = float(np.square(codes.astype(np.float64) * scale - row).sum())
    return min(errors, key=errors.__getitem__) / 100


def outlying() -> nn.Conv2d:
    """A convolution with an outlier among the weights of channel 1, and a dead channel."""
    conv = nn.Conv2d(3, 4, 15)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(0)))
        conv.weight[1, 0, 0, 0] = 9.0
        conv.weight[3] = 0.0
    return conv


def by_weight_method(method: Method, dtype: Any = "int8") -> FakeQuantModel:
    qconfig = QConfig(weight=replace(QConfig().weight, method=method, dtype=dtype))
    fake = prepare_qat_fx(model(lambda s, x: s.c(x), c=outlying()), qconfig, example_inputs=(images(2, size=20),))
    calibrate(fake, [images(4, size=20)])
    return fake


@pytest.mark.parametrize(("dtype", "qmax"), [("int8", 127), ("int16", 32767)])
def test_mse_weights_keep_the_share_with_the_least_error(dtype: str, qmax: int) -> None:
    fake = by_weight_method("mse", dtype)
    op = fake.op("c")
    assert op.weight_fake_quant is not None
    rows = op.float_params()["weight"].detach().flatten(1).numpy()
    wanted = [best_share(row, qmax) for row in rows[:3]]
    assert op.weight_fake_quant.kept.tolist() == pytest.approx([*wanted, 1.0])
    assert min(wanted) < 1 or dtype == "int16"


def test_mse_cuts_off_an_outlier_of_many_weights() -> None:
    weight = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    weight[1, 7] = 6.0
    kept = kept_of_channels(weight, "int8")
    assert kept.tolist() == pytest.approx([best_share(row, 127) for row in weight.numpy()])
    assert kept[1] < 0.9


def test_min_max_weights_keep_all() -> None:
    op = by_weight_method("min_max").op("c")
    assert op.weight_fake_quant is not None
    assert op.weight_fake_quant.kept.tolist() == [1.0] * 4


def test_mse_weights_convert_exactly_and_stay_in_the_checkpoint() -> None:
    fake = by_weight_method("mse")
    program = to_program(fake)
    x = images(3, size=20, seed=5)
    _, traced = emulate(program, x, trace=True)
    for name, expected in run(program, x.numpy()).items():
        np.testing.assert_array_equal(traced[name].numpy(), expected, err_msg=name)
    unit = fake.op("c").weight_scales() * fake.qtype("x.quant").scale
    with torch.no_grad():
        gap = (emulate(program, x)[0] - fake(x)).abs().amax((0, 2, 3)) / unit
    assert float(gap.max()) < 1
    other = prepare_qat_fx(model(lambda s, x: s.c(x), c=outlying()), example_inputs=(images(2, size=20),))
    other.load_state_dict(fake.state_dict())
    assert torch.equal(other.op("c").weight_scales(), fake.op("c").weight_scales())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) + self.right(b)


def test_a_batch_may_be_a_dict_by_the_names_of_the_inputs() -> None:
    torch.manual_seed(0)
    net, a, b = Two(), torch.randn(6, 3), torch.randn(6, 3) * 5
    found = []
    for batch in ((a, b), {"b": b, "a": a, "label": torch.zeros(6)}):
        fake = prepare_qat_fx(net, example_inputs=(a, b))
        assert calibrate(fake, [batch]) == 6
        found.append(scales(fake))
    assert found[0] == found[1]
    with pytest.raises(DataError, match="QAT111 batch: has a, c but not b"):
        calibrate(prepare_qat_fx(net, example_inputs=(a, b)), [{"a": a, "c": b}])
