"""Whole dumps: equal ones in every form and of every net, and the op that is named where one part is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qatlib.golden import Golden
from qatlib.golden.codes import SHORTEST
from tests.golden.planting import Array, again, floor, parted, status
from tests.kind_nets import NETS

FORMS: dict[str, Callable[[Array], Any]] = {
    "npy": lambda x: x,
    "raw": lambda x: x.tobytes(),
    "wide npy": lambda x: x.astype(np.int32) if x.dtype == np.int8 else x,
    "flat npy": lambda x: x.ravel(),
    "npy with axes of size 1": lambda x: x[..., None],
}


@pytest.mark.parametrize("store", FORMS.values(), ids=FORMS.keys())
def test_an_equal_dump_in_every_form(golden: Golden, tmp_path: Path, store: Callable[[Array], Any]) -> None:
    comparison = parted(golden, tmp_path, {name: store(x) for name, x in golden.tensors.items()})
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


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("form", ["npy", "raw"])
def test_an_equal_dump_of_every_net(nets: dict[str, Golden], tmp_path: Path, name: str, form: str) -> None:
    golden = nets[name]
    comparison = parted(golden, tmp_path, {key: FORMS[form](x) for key, x in golden.tensors.items()})
    assert comparison.equal
    assert set(status(comparison).values()) == {"equal"}


@pytest.mark.parametrize("name", NETS)
def test_an_equal_dump_of_fewer_samples(nets: dict[str, Golden], tmp_path: Path, name: str) -> None:
    golden = nets[name]
    comparison = parted(golden, tmp_path, {entry.name: golden.samples(entry.name, 2) for entry in golden.entries})
    assert comparison.equal
    assert {r.samples for r in comparison.tensors if golden.by_name[r.name].batch_axis is not None} == {2}


def _noisy(golden: Golden, name: str, rng: np.random.Generator) -> Array:
    """Every other number of a tensor moved, by one unit or by as much as there is."""
    x = golden.tensors[name]
    if golden.by_name[name].is_float:
        return np.asarray(np.where(rng.random(x.shape) < 0.5, x, rng.permutation(x.ravel()).reshape(x.shape) + 0.1))
    if np.isin(x, (0, 1)).all():
        return np.asarray(np.where(rng.random(x.shape) < 0.5, x, 1 - x))
    steps = rng.integers(-1, 2, x.shape)
    return np.clip(x.astype(np.int64) + steps, *golden.program.values[name].qtype.limits)


@pytest.mark.parametrize("name", NETS)
def test_one_fault_in_every_net_is_found_at_its_op_and_called_by_no_other_name(
    nets: dict[str, Golden], tmp_path: Path, name: str
) -> None:
    """Noise on three ops has no cause; rounding down on the first op that rounds has that one."""
    golden, rng = nets[name], np.random.default_rng(0)
    ops = [e for e in golden.entries if e.kind != "input" and e.shape and np.prod(e.shape[1:]) >= 2 * SHORTEST]
    rounding = [
        (entry, codes)
        for entry in ops
        if "multiplier" in golden.ops[entry.name].consts and entry.kind != "grid_sample"
        for codes in [again(golden, entry.name, floor)]
        if (codes != golden.tensors[entry.name]).sum() >= 8
    ]
    faults = [(entry, _noisy(golden, entry.name, rng), "unknown") for entry in (ops[0], ops[len(ops) // 2], ops[-1])]
    faults += [(entry, codes, "rounding") for entry, codes in rounding[:1]]
    for i, (entry, numbers, kind) in enumerate(faults):
        (tmp_path / str(i)).mkdir()
        first = parted(golden, tmp_path / str(i), {entry.name: numbers}).first
        assert first is not None
        assert (first.tensor, first.cause.kind, first.also, first.not_compared) == (entry.name, kind, (), ()), first


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
