"""Golden vectors, and the comparison of a device dump with them: every cause is planted and has to be found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from qatlib.cli import main
from qatlib.conversion import convert_fx
from qatlib.emulator import emulate
from qatlib.errors import ProgramError
from qatlib.fake.qconfig import FakeQuantSpec, QConfig
from qatlib.fake.stubs import QuantStub
from qatlib.golden import Comparison, Golden, GoldenError, compare_dump, load_golden, write_golden
from qatlib.golden.dump import load_map, match_names
from qatlib.golden.rounding import requantization
from qatlib.program import Program
from tests.models import calibrated, everything, images, model

BATCH = 5
Array = NDArray[Any]


@pytest.fixture(scope="module")
def program() -> Program:
    return convert_fx(calibrated(everything(), images(8))).program


@pytest.fixture(scope="module")
def golden(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    folder = tmp_path_factory.mktemp("golden") / "vectors"
    write_golden(program, images(BATCH, seed=3), folder)
    return load_golden(folder)


@pytest.fixture(scope="module")
def ties(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """A pool and a sum whose exact results lie between two codes in a quarter or more of the elements."""

    def at(scale: float) -> QConfig:
        return QConfig(activation=FakeQuantSpec(scale=scale))

    net = model(
        lambda s, x: (lambda y: s.act(s.pool(y) + F.max_pool2d(y, 2)))(s.q(x)),
        q=QuantStub(1 / 16), pool=nn.AvgPool2d(2), act=nn.ReLU(),
    )  # fmt: skip
    names = {"pool": at(1 / 16), "add": at(1 / 8)}
    one = calibrated(net, images(2), qconfig_dict={"": at(1 / 16), "module_name": names})
    folder = tmp_path_factory.mktemp("golden") / "ties"
    write_golden(convert_fx(one).program, images(2, seed=3), folder)
    return load_golden(folder)


def dump(golden: Golden, folder: Path, changed: dict[str, Any] | None = None, only: list[str] | None = None) -> Path:
    """The golden tensors as a device would write them; ``changed`` holds arrays (.npy), bytes (.bin) or None."""
    folder.mkdir()
    for entry in golden.entries:
        content = (changed or {}).get(entry.name, golden.tensors[entry.name])
        if content is None or (only is not None and entry.name not in only):
            continue
        if isinstance(content, bytes):
            (folder / f"{entry.name}.bin").write_bytes(content)
        else:
            np.save(folder / f"{entry.name}.npy", content)
    return folder


def parted(golden: Golden, tmp_path: Path, changed: dict[str, Any], only: list[str] | None = None) -> Comparison:
    return compare_dump(golden.folder, dump(golden, tmp_path / "dump", changed, only))


def status(comparison: Comparison) -> dict[str, str]:
    return {result.name: result.status for result in comparison.tensors}


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_what_is_written_is_what_the_emulator_computes(program: Program, golden: Golden) -> None:
    x = images(BATCH, seed=3)
    _, values = emulate(program, x, trace=True)
    assert golden.batch == BATCH
    assert [entry.name for entry in golden.entries] == ["x", *(op.output for op in program.ops)]
    for name, value in values.items():
        entry, array = golden.by_name[name], golden.tensors[name]
        assert np.array_equal(array, value.numpy())
        assert (str(array.dtype), array.shape) == (entry.dtype, entry.shape)
        assert entry.scale == program.values[name].qtype.scale
    manifest = json.loads((golden.folder / "manifest.json").read_text())
    given = manifest["statistics"]["x"]["given"]
    assert given["mean"] == pytest.approx(float(x.double().mean()))
    assert given["std"] == pytest.approx(float(x.double().std(correction=0)))
    codes = manifest["statistics"]["x"]["quantized"]["x.quant"]
    assert (codes["min"], codes["max"]) == (float(values["x.quant"].min()), float(values["x.quant"].max()))


def test_writing_twice_gives_the_same_bytes(program: Program, golden: Golden, tmp_path: Path) -> None:
    write_golden(program, images(BATCH, seed=3), tmp_path / "again")
    for path in golden.folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(golden.folder)).read_bytes()


def test_nothing_is_left_of_a_refused_write(program: Program, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="QAT181"):
        write_golden(program, torch.full((1, 3, 16, 16), torch.nan), tmp_path / "golden")
    with pytest.raises(GoldenError, match="QAT205"):
        write_golden(program, images(0), tmp_path / "golden")
    assert list(tmp_path.iterdir()) == []


def _edit(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"stem"', '"stam"'))


def _version(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"schema": 1', '"schema": 7'))


def _flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        blob = bytearray((folder / name).read_bytes())
        blob[-3] ^= 1
        (folder / name).write_bytes(blob)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "QAT200"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "QAT200"),
    "manifest cut": (lambda folder: (folder / "manifest.json").write_text("{"), "QAT201"),
    "manifest edited": (_edit, "QAT201.*edited"),
    "other version": (_version, "QAT201.*schema 7"),
    "values changed": (_flip("values.safetensors"), "QAT201.*values"),
    "inputs changed": (_flip("inputs.safetensors"), "QAT201.*inputs"),
    "program changed": (_flip("program/constants.safetensors"), "QAT201.*constants"),
    "values missing": (lambda folder: (folder / "values.safetensors").unlink(), "QAT201.*cannot be read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_golden_vectors_are_refused(
    golden: Golden, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(golden.folder, tmp_path / "golden")
    damage(tmp_path / "golden")
    with pytest.raises(GoldenError, match=message):
        load_golden(tmp_path / "golden")


def test_a_program_folder_is_no_golden_folder(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="QAT200"):
        compare_dump(golden.folder / "program", dump(golden, tmp_path / "dump"))


# -- equal dumps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npy", "bin", "wide npy", "flat npy"])
def test_an_equal_dump_in_every_form(golden: Golden, tmp_path: Path, form: str) -> None:
    def stored(x: Array) -> Any:
        if form == "bin":
            return x.tobytes()
        if form == "flat npy":
            return x.ravel()
        return x.astype(np.int32) if form == "wide npy" and x.dtype == np.int8 else x

    comparison = parted(golden, tmp_path, {name: stored(x) for name, x in golden.tensors.items()})
    assert comparison.equal
    assert set(status(comparison).values()) == {"equal"}
    sides = comparison.statistics
    assert set(sides) == {"x", "x.quant"}
    assert all(side["golden"] == side["device"] for side in sides.values())


def test_what_is_missing_is_listed_and_no_difference(golden: Golden, tmp_path: Path) -> None:
    comparison = parted(golden, tmp_path, {}, only=["stem", "head"])
    assert comparison.equal
    missing = [name for name, state in status(comparison).items() if state == "missing"]
    assert missing == [entry.name for entry in golden.entries if entry.name not in ("stem", "head")]


def test_a_dump_of_fewer_samples(golden: Golden, tmp_path: Path) -> None:
    comparison = parted(golden, tmp_path, {name: x[:2].tobytes() for name, x in golden.tensors.items()})
    assert comparison.equal
    assert {result.samples for result in comparison.tensors} == {2}


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_match_exactly_by_map_or_without_case_and_punctuation(golden: Golden, tmp_path: Path) -> None:
    folder = dump(golden, tmp_path / "dump")
    (folder / "layers").mkdir()
    for old, new in {"block.conv": "Block_CONV", "head.dequant": "out0", "x.quant": "layers/odd", "add": "add"}.items():
        (folder / f"{old}.npy").rename(folder / f"{new}.npy")
    comparison = compare_dump(golden.folder, folder, {"out0.npy": "head.dequant"})
    files = {result.name: result.file for result in comparison.tensors}
    assert (files["block.conv"], files["head.dequant"], files["x.quant"]) == ("Block_CONV.npy", "out0.npy", "")
    assert comparison.unknown_files == ("layers/odd",)
    assert comparison.equal


def test_a_plain_name_of_two_tensors_matches_neither() -> None:
    with pytest.raises(GoldenError, match="QAT204"):
        match_names({"a_b": Path("a_b.npy")}, ["a.b", "a/b"])
    assert match_names({"a_b": Path("a_b.npy")}, ["a.b", "a/b"], {"a_b": "a/b"}) == {"a/b": Path("a_b.npy")}


@pytest.mark.parametrize(
    ("names", "name_map", "code"),
    [
        (["stem.npy"], {"stem": "stam"}, "QAT203.*stam"),
        (["stem.npy", "STEM.npy"], None, "QAT203.*claimed by"),
        (["stem.npy", "stem.bin"], None, "QAT203.*same name"),
        (["conv_17.npy"], None, "QAT204"),
        (["stem.txt"], None, "QAT202"),
    ],
)
def test_names_that_cannot_be_used(
    golden: Golden, tmp_path: Path, names: list[str], name_map: dict[str, str] | None, code: str
) -> None:
    for name in names:
        np.save(tmp_path / "x.npy", golden.tensors["stem"])
        (tmp_path / "x.npy").rename(tmp_path / name)
    with pytest.raises(GoldenError, match=code):
        compare_dump(golden.folder, tmp_path, name_map)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "a: 1", None])
def test_a_map_that_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(GoldenError, match="QAT203"):
        load_map(tmp_path / "map.yaml")


# -- storage -----------------------------------------------------------------------------------------------------------


def channels_last(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim > 2 else x


def padded(x: Array) -> Array:
    width = [(0, 0)] * x.ndim
    width[1] = (0, -x.shape[1] % 32)
    return np.pad(x, width)


def blocks(x: Array) -> Array:
    batch, channels, *space = x.shape
    return np.ascontiguousarray(np.moveaxis(x.reshape(batch, channels // 4, 4, *space), 2, -1))


STORED: dict[str, tuple[str, Callable[[Array], Any], str, str]] = {
    "channels last": ("stem", channels_last, "layout", "NHWC"),
    "channels last, raw": ("stem", lambda x: channels_last(x).tobytes(), "layout", "NHWC"),
    "transposed": ("hidden", lambda x: x.T, "layout", "CN"),
    "any order of axes": ("cat", lambda x: x.transpose(3, 0, 2, 1), "layout", "WNHC"),
    "padded channels": ("stem", padded, "padding", "axis C is padded"),
    "padded channels last, raw": ("stem", lambda x: channels_last(padded(x)).tobytes(), "layout", "axis C is padded"),
    "channel blocks": ("cat", lambda x: blocks(x).tobytes(), "layout", "blocks of 4"),
    "zero point 128": ("stem", lambda x: (x.astype(np.int16) + 128).astype(np.uint8), "zero_point", "zero point 128"),
    "zero point, raw": ("block.conv", lambda x: (x.astype(int) + 128).astype(np.uint8).tobytes(), "zero_point", "128"),
    "read as unsigned": ("depthwise", lambda x: x.view(np.uint8), "dtype", "unsigned"),
    "read as int16": ("stem", lambda x: x.reshape(-1).view(np.int16), "dtype", "those of int8"),
    "raw int16": ("stem", lambda x: x.astype(np.int16).tobytes(), "dtype", "stored as int16"),
    "big endian": ("head", lambda x: x.astype(">i4").tobytes(), "byte_order", "big endian"),
    "big endian floats": ("head.dequant", lambda x: x.astype(">f4").tobytes(), "byte_order", "big endian"),
    "real numbers": ("hidden", lambda x: x * np.float32(0.04257572442293167), "dequantized", "codes times the scale"),
}


@pytest.mark.parametrize(("name", "store", "kind", "said"), STORED.values(), ids=STORED.keys())
def test_storage_is_told_from_other_numbers(
    golden: Golden, tmp_path: Path, name: str, store: Callable[[Array], Any], kind: str, said: str
) -> None:
    comparison = parted(golden, tmp_path, {name: store(golden.tensors[name])})
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == (name, kind)
    assert said in comparison.first.cause.text
    assert comparison.first_numbers is None
    assert {n for n, state in status(comparison).items() if state != "equal"} == {name}
    assert status(comparison)[name] == "stored otherwise"


def test_a_fault_behind_another_layout_is_found_as_what_it_is(golden: Golden, tmp_path: Path) -> None:
    """Two causes at once: all of the dump is channels last, and one op rounds down."""
    step = requantization(golden, golden.by_name["smooth"], BATCH)
    assert step is not None
    numbers = dict(golden.tensors) | {"smooth": np.clip(step.numerator >> step.shift, step.lo, step.hi).astype(np.int8)}
    comparison = parted(golden, tmp_path, {name: channels_last(x).tobytes() for name, x in numbers.items()})
    assert comparison.first is not None
    assert comparison.first_numbers is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("x", "layout")
    assert (comparison.first_numbers.tensor, comparison.first_numbers.cause.kind) == ("smooth", "rounding")


# -- numbers -----------------------------------------------------------------------------------------------------------


def exact(golden: Golden, name: str) -> tuple[Any, Array, Array]:
    """Independent of the rules under test: the value before rounding as (step, numerator, denominator), exact ints."""
    step = requantization(golden, golden.by_name[name], golden.batch)
    assert step is not None
    return step, step.numerator, np.int64(1) << step.shift


@pytest.mark.parametrize("name", ["stem", "block.conv", "depthwise", "smooth", "add", "cat", "pool", "hidden"])
def test_recomputed_ops_equal_the_emulator(golden: Golden, name: str) -> None:
    step, numerator, denominator = exact(golden, name)
    assert np.array_equal(step.codes(), golden.tensors[name])
    nearest = np.clip(np.rint(numerator / denominator), step.lo, step.hi)
    assert np.array_equal(nearest, golden.tensors[name])


def test_transposed_convolutions_and_int16_are_recomputed(tmp_path: Path) -> None:
    net = model(lambda s, x: s.up(s.c(x)).flatten(1), c=nn.Conv2d(3, 4, 3), up=nn.ConvTranspose2d(4, 6, 3, 2, groups=2))
    wide = QConfig(activation=FakeQuantSpec(dtype="int16"))
    one = calibrated(net, images(4), qconfig_dict={"": QConfig(), "module_name": {"c": wide, "up": wide}})
    write_golden(convert_fx(one).program, images(2, seed=3), tmp_path / "golden")
    golden = load_golden(tmp_path / "golden")
    step, numerator, denominator = exact(golden, "c")
    assert np.array_equal(step.codes(), golden.tensors["c"])
    floored = np.clip(np.floor(numerator / denominator), step.lo, step.hi).astype(np.int16)
    comparison = parted(golden, tmp_path, {"c": floored.tobytes()})
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("c", "rounding")
    big = dump(golden, tmp_path / "big", {"c": golden.tensors["c"].astype(">i2").tobytes()})
    comparison = compare_dump(golden.folder, big)
    assert comparison.first is not None
    assert comparison.first.cause.kind == "byte_order"


def test_products_of_activations_and_transposed_convolutions_are_recomputed(tmp_path: Path) -> None:
    net = model(lambda s, x: F.relu((s.up(s.c(x)) @ s.d(x)) * s.d(x)).flatten(1), c=nn.Conv2d(3, 4, 1, 2),
                up=nn.ConvTranspose2d(4, 2, 2, 2, groups=2), d=nn.Conv2d(3, 2, 1))  # fmt: skip
    write_golden(convert_fx(calibrated(net, images(4))).program, images(2, seed=3), tmp_path / "golden")
    golden = load_golden(tmp_path / "golden")
    names = [entry.name for entry in golden.entries if entry.kind in ("conv_transpose", "matmul", "mul")]
    assert len(names) == 3
    for name in names:
        step, numerator, denominator = exact(golden, name)
        floored = np.clip(np.floor(numerator / denominator), step.lo, step.hi).astype(np.int8)
        comparison = parted(golden, tmp_path, {name: floored})
        assert comparison.first is not None
        assert (comparison.first.tensor, comparison.first.cause.kind) == (name, "rounding")
        shutil.rmtree(tmp_path / "dump")


def c_round(x: Array) -> Array:
    return np.trunc(x + np.copysign(0.5, x))


ROUNDINGS: dict[str, tuple[Callable[[Array], Array], str]] = {
    "floor": (np.floor, "floor"),
    "truncation": (np.trunc, "towards zero (truncation)"),
    "half away": (c_round, "half away from zero"),
    "half up": (lambda x: np.floor(x + 0.5), "half up"),
}


@pytest.mark.parametrize("name", ["stem", "depthwise", "add", "cat", "smooth", "pool"])
@pytest.mark.parametrize("rule", ["floor", "truncation"])
def test_shifts_without_rounding(golden: Golden, tmp_path: Path, name: str, rule: str) -> None:
    step, numerator, denominator = exact(golden, name)
    codes = np.clip(ROUNDINGS[rule][0](numerator / denominator), step.lo, step.hi).astype(np.int8)
    comparison = parted(golden, tmp_path, {name: codes})
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == (name, "rounding")
    assert ROUNDINGS[rule][1] in str(comparison.first.cause.evidence["rule"])
    result = next(r for r in comparison.tensors if r.name == name)
    assert result.max_distance == 1
    assert result.differing == (codes != golden.tensors[name]).sum()


@pytest.mark.parametrize("rule", ["half away", "half up"])
def test_ties_tell_the_rules_apart(ties: Golden, tmp_path: Path, rule: str) -> None:
    _, numerator, denominator = exact(ties, "pool")
    real = numerator / denominator
    assert (real % 1 == 0.5).mean() > 0.1
    codes = ROUNDINGS[rule][0](real).astype(np.int8)
    comparison = parted(ties, tmp_path, {"pool": codes})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "rounding"
    assert comparison.first.cause.evidence["rule"] == ROUNDINGS[rule][1]
    assert comparison.first.cause.evidence["differing_at_ties"] == (codes != ties.tensors["pool"]).sum()


def test_where_two_rules_explain_a_dump_both_are_named(ties: Golden, tmp_path: Path) -> None:
    """The fused relu leaves no negative numbers, for which the two rules differ."""
    step, numerator, denominator = exact(ties, "add")
    codes = np.clip(c_round(numerator / denominator), step.lo, step.hi).astype(np.int8)
    comparison = parted(ties, tmp_path, {"add": codes})
    assert comparison.first is not None
    assert comparison.first.cause.evidence["rule"] == "half away from zero or half up"


@pytest.mark.parametrize(("rule", "said"), [("truncation", "towards zero"), ("floor", "floor")])
def test_rounding_of_the_input(golden: Golden, tmp_path: Path, rule: str, said: str) -> None:
    ratio = golden.tensors["x"] / np.float32(golden.by_name["x.quant"].scale)
    codes = np.clip(ROUNDINGS[rule][0](ratio), -128, 127).astype(np.int8)
    comparison = parted(golden, tmp_path, {"x.quant": codes})
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("x.quant", "rounding")
    assert said in str(comparison.first.cause.evidence["rule"])


def test_an_input_that_wraps(tmp_path: Path) -> None:
    net = model(lambda s, x: s.c(s.q(x)).flatten(1), q=QuantStub(0.01), c=nn.Conv2d(3, 4, 3))
    write_golden(convert_fx(calibrated(net, images(4))).program, images(4), tmp_path / "golden")
    golden = load_golden(tmp_path / "golden")
    codes = np.rint(golden.tensors["x"] / np.float32(0.01)).astype(np.int64)
    assert np.array_equal(np.clip(codes, -128, 127), golden.tensors["q"])
    comparison = parted(golden, tmp_path, {"q": codes.astype(np.int8)})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "saturation"
    assert comparison.first.cause.evidence["differing_at_limits"] == (np.abs(codes + 0.5) > 128).sum()


def test_wrapping_where_the_golden_codes_saturate(tmp_path: Path) -> None:
    net = model(lambda s, x: s.c(x).flatten(1), c=nn.Conv2d(3, 4, 3))
    narrow = {"": QConfig(), "module_name": {"c": QConfig(activation=FakeQuantSpec(scale=0.004))}}
    write_golden(convert_fx(calibrated(net, images(4), qconfig_dict=narrow)).program, images(4), tmp_path / "golden")
    golden = load_golden(tmp_path / "golden")
    _, numerator, denominator = exact(golden, "c")
    raw = np.rint(numerator / denominator).astype(np.int64)
    assert (raw > 127).any()
    comparison = parted(golden, tmp_path, {"c": raw.astype(np.int8)})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "saturation"
    assert comparison.first.cause.evidence["modulo"] == 256
    shutil.rmtree(tmp_path / "dump")
    symmetric = np.clip(golden.tensors["c"], -127, 127)
    comparison = parted(golden, tmp_path, {"c": symmetric})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "saturation"
    assert "[-127, 127]" in comparison.first.cause.text


def test_a_relu_that_is_not_applied(golden: Golden, tmp_path: Path) -> None:
    step, numerator, denominator = exact(golden, "stem")
    codes = np.clip(np.rint(numerator / denominator), -128, 127).astype(np.int8)
    assert step.lo == 0
    comparison = parted(golden, tmp_path, {"stem": codes})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "saturation"
    assert "fused activation" in comparison.first.cause.text


@pytest.mark.parametrize("missing", ["bias", "addend"])
def test_a_missing_operand(golden: Golden, tmp_path: Path, missing: str) -> None:
    step, _, _ = exact(golden, "block.conv")
    acc, addend = step.terms
    total = (acc - step.bias) * step.multipliers[0] + addend * step.multipliers[1]
    if missing == "addend":
        total = acc * step.multipliers[0]
    codes = np.clip(np.rint(total / 2.0**step.shift), step.lo, step.hi).astype(np.int8)
    comparison = parted(golden, tmp_path, {"block.conv": codes})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "operand"
    assert missing in comparison.first.cause.text


@pytest.mark.parametrize(("factor", "said"), [(0.5, "2^-1"), (1.07, "1.07")])
def test_another_scale(golden: Golden, tmp_path: Path, factor: float, said: str) -> None:
    """1.07 moves small codes by no more than one: only the sums tell it from a rounding."""
    step, numerator, denominator = exact(golden, "depthwise")
    codes = np.clip(np.rint(factor * (numerator / denominator)), step.lo, step.hi).astype(np.int8)
    comparison = parted(golden, tmp_path, {"depthwise": codes})
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("depthwise", "scale")
    assert said in comparison.first.cause.text
    evidence = comparison.first.cause.evidence
    assert float(evidence["factor_min"]) <= factor <= float(evidence["factor_max"])


def test_another_scale_of_an_accumulator_and_of_a_float_output(golden: Golden, tmp_path: Path) -> None:
    for name in ("head", "head.dequant"):
        wanted = golden.tensors[name]
        changed = {name: wanted * np.array(2, wanted.dtype), "head": None if name != "head" else wanted * 2}
        comparison = parted(golden, tmp_path, changed)
        assert comparison.first is not None
        assert (comparison.first.tensor, comparison.first.cause.kind) == (name, "scale")
        assert comparison.first.cause.evidence["factor"] == 2
        shutil.rmtree(tmp_path / "dump")


def test_an_offset(golden: Golden, tmp_path: Path) -> None:
    comparison = parted(golden, tmp_path, {"cat": np.clip(golden.tensors["cat"].astype(int) + 3, -128, 127)})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "zero_point"
    assert comparison.first.cause.evidence["offset"] == 3


def test_float_numbers_that_were_never_rounded(golden: Golden, tmp_path: Path) -> None:
    step, numerator, denominator = exact(golden, "depthwise")
    real = np.clip(numerator / denominator, step.lo, step.hi) * golden.by_name["depthwise"].scale
    comparison = parted(golden, tmp_path, {"depthwise": real.astype(np.float32)})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "dequantized"
    assert "never rounded" in comparison.first.cause.text


def test_the_last_bits_of_a_float_output(golden: Golden, tmp_path: Path) -> None:
    wanted = golden.tensors["head.dequant"]
    comparison = parted(golden, tmp_path, {"head.dequant": np.nextafter(wanted, np.float32(np.inf))})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "float_rounding"
    result = comparison.tensors[-1]
    assert (result.unit, result.differing) == ("lsb", wanted.size)
    assert 0 < result.max_distance < 0.01


def test_what_nothing_explains_is_unknown_and_says_where(golden: Golden, tmp_path: Path) -> None:
    wrong = golden.tensors["cat"].copy()
    wrong[:, 5] = np.random.default_rng(0).integers(-128, 128, wrong[:, 5].shape)
    comparison = parted(golden, tmp_path, {"cat": wrong})
    assert comparison.first is not None
    cause = comparison.first.cause
    assert (comparison.first.tensor, cause.kind) == ("cat", "unknown")
    assert cause.evidence["channels_differing"] == "1 of 16, first 5"
    assert comparison.first.also == ()
    result = next(r for r in comparison.tensors if r.name == "cat")
    distance = np.abs(wrong.astype(int) - golden.tensors["cat"])
    assert (result.max_distance, result.mean_distance) == (distance.max(), pytest.approx(distance.mean()))


def test_the_first_op_in_execution_order_is_named_with_inputs_that_are_not_known(
    golden: Golden, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0)
    names = ["add", "hidden"]
    changed: dict[str, Any] = {n: noise.integers(-128, 128, golden.tensors[n].shape).astype(np.int8) for n in names}
    comparison = parted(golden, tmp_path, changed | {"smooth": None})
    assert comparison.first is not None
    assert comparison.first.tensor == "add"
    assert comparison.first.not_compared == ("smooth",)
    assert [n for n, state in status(comparison).items() if state == "differs"] == names


# -- inputs ------------------------------------------------------------------------------------------------------------


def as_codes(golden: Golden, x: Array) -> Array:
    scale = np.float32(golden.by_name["x.quant"].scale)
    return np.clip(np.rint(x.astype(np.float32) / scale), -128, 127).astype(np.int8)


def normalized_per_channel(x: Array) -> Array:
    mean, std = np.array([0.1, -0.2, 0.3]), np.array([0.7, 0.8, 0.6])
    return (x * std[:, None, None] + mean[:, None, None]).astype(np.float32)


FRONT: dict[str, tuple[Callable[[Array], Array], str, str]] = {
    "0..255": (lambda x: x * np.float32(255), "pre-processing", "0..255"),
    "one normalization": (lambda x: x * np.float32(0.5) + np.float32(0.45), "pre-processing", "normalization"),
    "normalization per channel": (normalized_per_channel, "pre-processing", "[0.7, 0.8, 0.6]"),
    "BGR": (lambda x: x[:, ::-1], "channel_order", "RGB for BGR"),
    "BGR and channels last": (lambda x: channels_last(x[:, ::-1]), "channel_order", "stored channels last"),
    "BGR and normalization": (lambda x: x[:, ::-1] * np.float32(0.5) + 1, "pre-processing", "order [2, 1, 0]"),
    "mirrored": (lambda x: x[..., ::-1], "geometry", "left to right"),
    "shifted": (lambda x: np.roll(x, (1, -2), (2, 3)), "geometry", "shifted by 1 rows and -2 columns"),
    "cropped": (lambda x: x[:, :, 2:-2, 1:-3], "geometry", "cropped"),
    "padded": (lambda x: np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2))), "geometry", "not cropped, or padded"),
    "another sample": (lambda x: x[[1, 1, 1, 1, 1]], "wrong_input", "samples 1, 1, 1, 1, 1"),
    "another order": (lambda x: x[[2, 0, 1, 4, 3]], "batch_order", "another order"),
    "another image": (lambda x: images(BATCH, seed=99).numpy(), "wrong_input", "no sample is like"),
}


@pytest.mark.parametrize(("spoil", "kind", "said"), FRONT.values(), ids=FRONT.keys())
def test_inputs(golden: Golden, tmp_path: Path, spoil: Callable[[Array], Array], kind: str, said: str) -> None:
    x = np.ascontiguousarray(spoil(golden.tensors["x"])).astype(np.float32)
    comparison = parted(golden, tmp_path, {"x": x}, only=["x", "head"])
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("x", kind)
    assert said in str(comparison.first.cause)
    if x.shape == golden.tensors["x"].shape:
        seen = comparison.statistics["x"]
        assert seen["golden"].sha256 != seen["device"].sha256
        assert seen["device"].mean == pytest.approx(float(x.astype(np.float64).mean()))


@pytest.mark.parametrize(
    "which", ["one normalization", "normalization per channel", "BGR", "mirrored", "another order"]
)
def test_inputs_of_which_only_the_codes_were_dumped(golden: Golden, tmp_path: Path, which: str) -> None:
    spoil, kind, _ = FRONT[which]
    codes = as_codes(golden, spoil(golden.tensors["x"]))
    comparison = parted(golden, tmp_path, {"x.quant": codes}, only=["x.quant"])
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("x.quant", kind)


def test_a_range_that_overdrives_the_codes(golden: Golden, tmp_path: Path) -> None:
    codes = as_codes(golden, golden.tensors["x"] * 255)
    comparison = parted(golden, tmp_path, {"x.quant": codes}, only=["x.quant"])
    assert comparison.first is not None
    assert comparison.first.cause.kind == "pre-processing"
    assert "larger range" in comparison.first.cause.text


def test_a_factor_is_the_scale_if_the_float_input_is_right_and_open_if_it_is_unseen(
    golden: Golden, tmp_path: Path
) -> None:
    changed = {"x.quant": as_codes(golden, golden.tensors["x"] * np.float32(0.5))}
    seen = parted(golden, tmp_path, changed)
    assert seen.first is not None
    assert (seen.first.cause.kind, seen.first.also) == ("scale", ())
    shutil.rmtree(tmp_path / "dump")
    unseen = parted(golden, tmp_path, changed, only=["x.quant"])
    assert unseen.first is not None
    assert [unseen.first.cause.kind, *(cause.kind for cause in unseen.first.also)] == ["pre-processing", "scale"]


def test_a_resized_image(tmp_path: Path) -> None:
    net = model(lambda s, x: s.c(x).flatten(1), c=nn.Conv2d(3, 4, 3))
    smooth = F.interpolate(images(2, size=4), 16, mode="bicubic")
    write_golden(convert_fx(calibrated(net, smooth)).program, smooth, tmp_path / "golden")
    larger = F.interpolate(smooth, 24, mode="bilinear").numpy()
    comparison = parted(load_golden(tmp_path / "golden"), tmp_path, {"x": larger})
    assert comparison.first is not None
    assert comparison.first.cause.kind == "geometry"
    assert "24×24 for 16×16" in comparison.first.cause.text


# -- malformed dumps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0" * 1000, "has 1000 bytes, truncated; int8 [5, 8, 16, 16] has 10240"),
        (b"", "has 0 bytes, truncated"),
        (np.zeros((5, 7, 16, 16), np.int8), "has shape [5, 7, 16, 16], golden is [5, 8, 16, 16]"),
        (np.array(["a"]), "is not an array of numbers"),
        (np.zeros((5, 8, 16, 16), np.complex64), "is not an array of numbers"),
    ],
)
def test_a_file_without_a_usable_tensor(golden: Golden, tmp_path: Path, content: Any, reason: str) -> None:
    comparison = parted(golden, tmp_path, {"stem": content})
    result = next(r for r in comparison.tensors if r.name == "stem")
    assert (result.status, comparison.equal) == ("unusable", False)
    assert reason in result.note
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == ("stem", "file")
    assert status(comparison)["block.conv"] == "equal"


def test_files_that_cannot_be_read(golden: Golden, tmp_path: Path) -> None:
    folder = dump(golden, tmp_path / "dump")
    (folder / "stem.npy").write_bytes((folder / "stem.npy").read_bytes()[:-100])
    np.save(folder / "add.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "cat.npy").write_bytes(b"")
    states = status(compare_dump(golden.folder, folder))
    assert {name for name, state in states.items() if state == "unusable"} == {"stem", "add", "cat"}


def test_numbers_that_are_not_finite(golden: Golden, tmp_path: Path) -> None:
    for name in ("x", "cat", "head.dequant"):
        spoiled = golden.tensors[name].astype(np.float32)
        spoiled[0, 0] = np.nan
        comparison = parted(golden, tmp_path, {name: spoiled})
        assert comparison.first is not None
        assert comparison.first.tensor == name
        assert comparison.first.cause.kind == "unknown"
        json.dumps(comparison.document())
        shutil.rmtree(tmp_path / "dump")


# -- command line ------------------------------------------------------------------------------------------------------


def test_the_commands_from_program_to_verdict(program: Program, golden: Golden, tmp_path: Path) -> None:
    program.save(tmp_path / "program")
    np.save(tmp_path / "x.npy", images(BATCH, seed=3).double().numpy())
    run = CliRunner().invoke
    made = run(main, ["golden", str(tmp_path / "program"), "--inputs", str(tmp_path / "x.npy"),
                      "--out", str(tmp_path / "golden")])  # fmt: skip
    assert made.exit_code == 0, made.output
    for name in ("values.safetensors", "manifest.json"):
        assert (tmp_path / "golden" / name).read_bytes() == (golden.folder / name).read_bytes()
    good = dump(golden, tmp_path / "good")
    bad = dump(golden, tmp_path / "bad", {"stem": channels_last(golden.tensors["stem"])})
    (good / "stem.npy").rename(good / "conv0.npy")
    (tmp_path / "map.yaml").write_text("conv0: stem\n")
    asked = ["--golden", str(tmp_path / "golden")]
    equal = run(main, ["compare-dump", str(good), *asked, "--map", str(tmp_path / "map.yaml")])
    assert (equal.exit_code, "equal: 15 of 15" in equal.output) == (0, True), equal.output
    differs = run(main, ["compare-dump", str(bad), *asked, "--json"])
    assert differs.exit_code == 1
    document = json.loads(differs.output)
    assert document["first"]["tensor"] == "stem"
    assert document["first"]["cause"]["kind"] == "layout"
    table = run(main, ["compare-dump", str(bad), *asked])
    assert (table.exit_code, "likely cause: layout" in table.output) == (1, True)
    error = run(main, ["compare-dump", str(tmp_path / "nowhere"), *asked])
    assert (error.exit_code, "QAT202" in error.output) == (2, True)
    refused = run(main, ["golden", str(tmp_path / "program"), "--inputs", str(tmp_path / "map.yaml"), "--out", "o"])
    assert (refused.exit_code, "QAT205" in refused.output) == (2, True)
