"""Places of the ops in the graph of the page."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlib.analysis.report.layout import HIGH, NODE, Layout, layout, nearest

NETS = st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=14).map(
    lambda reads: {f"n{i}": [f"n{k % i}" for k in read] if i else [] for i, read in enumerate(reads)}
)


def crossings(seen: Layout) -> int:
    """Pairs of pieces between the same ranks that change sides."""
    pieces = [piece for line in seen.lines.values() for piece in line]
    return sum(
        a.y0 == b.y0 and (a.x0 - b.x0) * (a.x1 - b.x1) < -1e-6 for a, b in combinations(pieces, 2)
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(NETS)
def test_every_op_stands_below_what_it_reads_and_nothing_overlaps(net: dict[str, list[str]]) -> None:
    seen = layout(net)
    assert set(seen.places) == set(net)
    for name, read in net.items():
        for source in read:
            assert seen.places[source][1] + HIGH < seen.places[name][1]
    for (x0, y0), (x1, y1) in combinations(seen.places.values(), 2):
        assert y0 != y1 or abs(x0 - x1) >= NODE
    assert all(NODE / 2 - 1e-6 <= x <= seen.width - NODE / 2 + 1e-6 and 0 <= y <= seen.height - HIGH
               for x, y in seen.places.values())  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(NETS)
def test_lines_lead_from_each_op_to_all_its_readers_and_through_none(net: dict[str, list[str]]) -> None:
    seen = layout(net)
    for name, line in seen.lines.items():
        x, y = seen.places[name]
        reached = {(x, y + HIGH)}
        for piece in line:
            assert (piece.x0, piece.y0) in reached, "a piece goes on where another ends"
            reached |= {(piece.x1, piece.y1), (piece.x1, piece.y1 + HIGH)} if piece.through else {(piece.x1, piece.y1)}
            if piece.through:
                for other, top in seen.places.values():
                    assert top != piece.y1 or abs(other - piece.x1) > NODE / 2
        for reader, read in net.items():
            assert name not in read or seen.places[reader] in reached


def test_a_plain_network_is_a_straight_line() -> None:
    net = {f"n{i}": [f"n{i - 1}"] if i else [] for i in range(30)}
    assert len({x for x, _ in layout(net).places.values()}) == 1


def test_a_residual_network_has_no_crossings_and_short_detours() -> None:
    net = dict[str, list[str]]()
    for i in range(0, 40, 4):
        net |= {f"n{i}": [f"n{i - 1}"] if i else [], f"n{i + 1}": [f"n{i}"], f"n{i + 2}": [f"n{i + 1}"]}
        net[f"n{i + 3}"] = [f"n{i + 2}", f"n{i}"]
    seen = layout(net)
    assert crossings(seen) == 0
    assert seen.width < 1.5 * NODE


def test_branches_that_are_named_crosswise_are_put_in_order() -> None:
    net = {
        "x": [],
        "a": ["x"],
        "b": ["x"],
        "c": ["x"],
        "c1": ["c"],
        "b1": ["b"],
        "a1": ["a"],
        "end": ["a1", "b1", "c1"],
    }
    assert crossings(layout(net)) == 0


def test_readers_of_an_op_share_its_line() -> None:
    net = {"a": [], "b": ["a"], "c": ["b", "a"], "d": ["c", "a"], "e": ["d", "a"]}
    assert sum(piece.through for piece in layout(net).lines["a"]) == 3, "bends beside b, c and d"


def test_an_op_that_reads_nothing_stands_right_above_its_reader() -> None:
    seen = layout({"x": [], "a": ["x"], "b": ["a"], "scale": [], "c": ["b", "scale"]})
    assert seen.places["scale"][1] == seen.places["b"][1]
    assert seen.places["x"][1] == 0


def test_names_that_are_no_ops_yet_and_no_ops_at_all() -> None:
    assert layout({"a": ["later", "a", "other"], "later": ["a"]}).lines.keys() == {"a"}
    assert layout({}).places == {}


@settings(max_examples=60, deadline=None)
@given(NETS)
def test_the_same_network_has_the_same_places(net: dict[str, list[str]]) -> None:
    assert layout(net) == layout(net)


@pytest.mark.parametrize("seed", range(20))
def test_nearest_places_are_the_least_squares_solution(seed: int) -> None:
    """Against cyclic projections onto the gaps (Dykstra), which converge to the nearest point that has them."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 7))
    wanted, weights, gaps = rng.normal(size=count) * 3, rng.uniform(0.2, 5, count), rng.uniform(0, 2, count - 1)
    x, kept = wanted.copy(), np.zeros((count - 1, count))
    for _ in range(5000):
        for i, gap in enumerate(gaps):
            y = x + kept[i]
            x = y.copy()
            short = gap - (y[i + 1] - y[i])
            if short > 0:
                share = weights[i + 1] / (weights[i] + weights[i + 1])
                x[i] -= short * share
                x[i + 1] += short * (1 - share)
            kept[i] = y - x
    found = nearest(wanted.tolist(), weights.tolist(), gaps.tolist())
    assert found == pytest.approx(x, abs=1e-4)
    assert all(b - a >= gap - 1e-9 for (a, b), gap in zip(pairwise(found), gaps, strict=True))
