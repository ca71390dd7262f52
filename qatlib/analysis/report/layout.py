"""Places for the ops of a network: each below what it reads, few crossings, no line through an op.

Sugiyama's layers: ranks by the longest path, bends where a line passes a rank, order by barycentres, places by least
squares. The same inputs give the same places.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

NODE, BEND, APART = 184, 10, 22
"""Widths of an op and of a line that passes by, and the space between."""
HIGH, BETWEEN = 38, 30
"""Height of an op, and of the space between ranks, where all lines bend."""
PULL, ASIDE = (4.0, 1.0, 24.0), 0.25
"""How much it counts that a line is straight: between two ops, into or out of a bend, along a line that passes by; and
from an op that reads nothing, such as a constant."""
SWEEPS, VISITS = 12, 40_000
"""Sweeps over all points, and fewer where that were more visits than this: a dense network has 100 bends an op."""

Point = tuple[str, int]
"""What stands on a rank: the op of that name on its own, its line on one below."""


@dataclass(frozen=True)
class Layout:
    """``places`` are centre and top of the ops; ``lines`` the pieces of the line that leaves an op, from the bottom of
    one point to the top of the next, which is a bend where ``through``.
    """

    places: Mapping[str, tuple[float, float]]
    lines: Mapping[str, tuple[Piece, ...]]
    width: float
    height: float


@dataclass(frozen=True)
class Piece:
    x0: float
    y0: float
    x1: float
    y1: float
    through: bool


def layout(inputs: Mapping[str, Sequence[str]]) -> Layout:
    """Lay out ops in forward order with the names that each reads; a name that is not an op yet is no line."""
    sources = dict[str, list[str]]()
    for name, read in inputs.items():
        sources[name] = [source for source in dict.fromkeys(read) if source in sources]
    ranks = _ranks(sources)
    links = _links(sources, ranks)
    layers = _ordered(_layers(sources, ranks, links), links)
    xs = _placed(layers, links, ranks)
    left = min((xs[p] - _width(p, ranks) / 2 for layer in layers for p in layer), default=0.0)
    right = max((xs[p] + _width(p, ranks) / 2 for layer in layers for p in layer), default=0.0)

    def top(rank: int) -> float:
        return float(rank * (HIGH + BETWEEN))

    lines = dict[str, tuple[Piece, ...]]()
    for (name, rank), (reader, below) in links:
        x0, x1 = xs[name, rank] - left, xs[reader, below] - left
        piece = Piece(x0, top(rank) + HIGH, x1, top(below), reader == name)
        lines[name] = (*lines.get(name, ()), piece)
    places = {name: (xs[name, rank] - left, top(rank)) for name, rank in ranks.items()}
    return Layout(places, lines, right - left, top(max(ranks.values(), default=0)) + HIGH)


def _ranks(sources: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """One below the lowest that it reads; what reads nothing stands right above its first reader."""
    ranks, first = dict[str, int](), dict[str, int]()
    for name, read in sources.items():
        ranks[name] = 1 + max((ranks[source] for source in read), default=-1)
        for source in read:
            first[source] = min(first.get(source, ranks[name]), ranks[name])
    return {name: rank if sources[name] else first.get(name, 1) - 1 for name, rank in ranks.items()}


_Link = tuple[Point, Point]


def _links(sources: Mapping[str, Sequence[str]], ranks: Mapping[str, int]) -> list[_Link]:
    """Pairs of points one rank apart. All readers of an op share its line as far down as it goes."""
    links = list[_Link]()
    reached = dict(ranks)
    for name, read in sources.items():
        for source in read:
            above = ranks[name] - 1
            links += [((source, r), (source, r + 1)) for r in range(reached[source], above)]
            reached[source] = max(reached[source], above)
            links.append(((source, above), (name, ranks[name])))
    return links


def _layers(
    sources: Mapping[str, Sequence[str]], ranks: Mapping[str, int], links: Sequence[_Link]
) -> list[list[Point]]:
    layers: list[list[Point]] = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
    points = [*((name, ranks[name]) for name in sources), *(p for link in links for p in link)]
    for point in dict.fromkeys(points):
        layers[point[1]].append(point)
    return layers


class _Near:
    """The points that a point is linked to, above and below."""

    def __init__(self, links: Sequence[_Link]) -> None:
        self.above, self.below = dict[Point, list[Point]](), dict[Point, list[Point]]()
        for top, bottom in links:
            self.above.setdefault(bottom, []).append(top)
            self.below.setdefault(top, []).append(bottom)


def _ordered(layers: list[list[Point]], links: Sequence[_Link]) -> list[list[Point]]:
    """The order with the fewest crossings that sweeps down and up by barycentres come by."""
    near = _Near(links)
    best, fewest, found_at = layers, _crossings(layers, near), 0
    for sweep in range(_sweeps(layers)):
        if not fewest or sweep - found_at >= 4:
            break
        down = sweep % 2 == 0
        layers = list(layers)
        for i in range(1, len(layers)) if down else range(len(layers) - 2, -1, -1):
            at = {point: k for k, point in enumerate(layers[i - 1 if down else i + 1])}
            layers[i] = _by_barycentre(layers[i], near.above if down else near.below, at)
        found = _crossings(layers, near)
        if found < fewest:
            best, fewest, found_at = layers, found, sweep
    return best


def _sweeps(layers: Sequence[Sequence[Point]]) -> int:
    return max(2, min(SWEEPS, VISITS // (1 + sum(map(len, layers)))))


def _by_barycentre(layer: list[Point], near: Mapping[Point, list[Point]], at: Mapping[Point, int]) -> list[Point]:
    def key(item: tuple[int, Point]) -> float:
        linked = near.get(item[1], ())
        return sum(at[point] for point in linked) / len(linked) if linked else float(item[0])

    return [point for _, point in sorted(enumerate(layer), key=key)]


def _crossings(layers: Sequence[Sequence[Point]], near: _Near) -> int:
    count = 0
    for upper, lower in pairwise(layers):
        at = {point: k for k, point in enumerate(lower)}
        seen = list[int]()
        for point in upper:
            ends = sorted(at[p] for p in near.below.get(point, ()))
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _width(point: Point, ranks: Mapping[str, int]) -> float:
    return NODE if ranks[point[0]] == point[1] else BEND


def _placed(layers: Sequence[Sequence[Point]], links: Sequence[_Link], ranks: Mapping[str, int]) -> dict[Point, float]:
    """Centres: points of a rank keep their order and distance, and stand as near as they can to what they are linked
    to.
    """
    near = _Near(links)

    def pull(upper: Point, lower: Point) -> float:
        beside = upper[1] > 0 and upper not in near.above
        return ASIDE if beside else PULL[sum(ranks[name] != rank for name, rank in (upper, lower))]

    gaps = [[(_width(a, ranks) + _width(b, ranks)) / 2 + APART for a, b in pairwise(layer)] for layer in layers]
    xs = dict[Point, float]()
    for layer, apart in zip(layers, gaps, strict=True):
        along = list(accumulate(apart, initial=0.0))
        xs.update({point: x - along[-1] / 2 for point, x in zip(layer, along, strict=True)})
    sweeps = _sweeps(layers)
    for sweep in range(sweeps):
        down = sweep % 2 == 0
        last = sweep >= sweeps - 2
        for i in range(len(layers)) if down else reversed(range(len(layers))):
            wanted, weights = list[float](), list[float]()
            for point in layers[i]:
                linked = [(xs[p], pull(p, point)) for p in near.above.get(point, ())] if down or last else []
                linked += [(xs[p], pull(point, p)) for p in near.below.get(point, ())] if not down or last else []
                total = sum(weight for _, weight in linked)
                wanted.append(sum(x * weight for x, weight in linked) / total if total else xs[point])
                weights.append(total or 0.1)
            xs.update(zip(layers[i], nearest(wanted, weights, gaps[i]), strict=True))
    return xs


def nearest(wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Places nearest to ``wanted`` in the least squares sense, each at least the gap to the right of the one before.

    Without the gaps a regression of rising values, by pooling adjacent violators.
    """
    along = list(accumulate(gaps, initial=0.0))
    pools = list[tuple[float, float, int]]()
    for place, weight, offset in zip(wanted, weights, along, strict=False):
        mean, total, count = place - offset, weight, 1
        while pools and pools[-1][0] >= mean:
            before, other, more = pools.pop()
            mean = (mean * total + before * other) / (total + other)
            total, count = total + other, count + more
        pools.append((mean, total, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, along, strict=False)]
