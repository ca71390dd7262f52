"""Batches are run in parts whose values are small: the same numbers as of the whole batch."""

from __future__ import annotations

import pytest
import torch

from qatlib.analysis import batches as module
from qatlib.analysis import capture_pair
from qatlib.analysis.batches import Batch, samples_at_once
from qatlib.analysis.sensitivity import sensitivity
from qatlib.graph.ir import Node
from qatlib.pipeline.metrics import Accuracy
from tests.analysis.analysis_nets import Trio

WIDE = Node("a", "conv", shape=(-1, 8, 4, 4))
INPUT = Node("x", "input", shape=(-1, 3, 4, 4))


def test_parts_are_of_equal_size_and_lose_no_sample() -> None:
    x, y = torch.arange(20).view(10, 2), torch.arange(10)
    parts = list(Batch((x, -x), y).parts(4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.inputs[1] for part in parts]), -x)
    assert torch.equal(torch.cat([part.targets for part in parts]), y)


@pytest.mark.parametrize("targets", [[1, 2], torch.zeros(3)], ids=["a list", "another length"])
def test_targets_that_cannot_be_cut_keep_the_batch_whole(targets: object) -> None:
    batch = Batch((torch.zeros(10, 2),), targets)
    assert list(batch.parts(4)) == [batch]


def test_the_largest_value_decides() -> None:
    assert samples_at_once([INPUT, WIDE]) == module.VALUE_BYTES // (4 * 8 * 4 * 4)
    assert samples_at_once([INPUT, Node("a", "conv", shape=(-1, module.VALUE_BYTES))]) == 1
    assert samples_at_once([INPUT, Node("a", "reshape", shape=(-2, 8))]) > 0


@pytest.mark.parametrize(
    "nodes",
    [
        [Node("x", "input", shape=(5, -1, 3)), WIDE],
        [INPUT, Node("a", "permute", shape=(5, -1))],
        [INPUT, Node("b", "opaque", shape=(-1, 3)), WIDE],
        [INPUT, Node("a", "reshape", shape=(-2, 8))],
    ],
    ids=["input", "output", "never looked into", "several rows a sample"],
)
def test_a_batch_that_is_not_known_to_be_made_of_rows_stays_whole(nodes: list[Node]) -> None:
    assert samples_at_once(nodes, ["a"]) == 0


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VALUE_BYTES", 1)


def test_a_capture_in_parts_has_the_numbers_of_the_whole(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = capture_pair(trio.float_model, trio.fake, trio.batches[0], "FvsQ")
    monkeypatch.setattr(module, "VALUE_BYTES", 1)
    parts = capture_pair(trio.float_model, trio.fake, trio.batches[0], "FvsQ")
    assert (parts.batches, parts.samples) == (whole.batches, whole.samples)
    for a, b in zip(whole.records, parts.records, strict=True):
        assert b.reference is not None
        assert a.reference is not None
        assert b.reference.max == pytest.approx(a.reference.max, rel=1e-5)
        assert b.reference.var == pytest.approx(a.reference.var, rel=1e-4)
        assert b.accumulated is not None
        assert a.accumulated is not None
        assert b.accumulated.count == a.accumulated.count
        assert b.accumulated.mse == pytest.approx(a.accumulated.mse, rel=0.05)  # few codes on the edge may turn


def test_a_measure_of_the_users_is_of_whole_batches(trio: Trio, one_by_one: None) -> None:
    seen = []
    capture_pair(trio.float_model, trio.fake, trio.batches[0], "FvsQ", lambda a, b: seen.append(len(a)) or 0.0)
    assert set(seen) == {len(trio.batches[0])}


def test_sensitivity_in_parts(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat(trio.batches)
    data = [(x, trio.float_model.eval()(x).argmax(1))]
    whole = sensitivity(trio.fake, data, kinds=["on"], metric=Accuracy)
    monkeypatch.setattr(module, "VALUE_BYTES", 1)
    parts = sensitivity(trio.fake, data, kinds=["on"], metric=Accuracy)
    assert parts.samples == whole.samples == len(x)
    assert parts.forwards == pytest.approx(whole.forwards)
    assert parts.whole.noise == pytest.approx(whole.whole.noise, rel=0.05)
    assert parts.whole.metric == pytest.approx(whole.whole.metric, abs=0.05)
    for a, b in zip(whole.trials, parts.trials, strict=True):
        assert b.distance.noise == pytest.approx(a.distance.noise, rel=0.05)
