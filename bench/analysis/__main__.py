"""The command: see :mod:`bench.analysis`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import click
import torch
from torch import Tensor, nn

from bench.analysis.ours import Made, make
from bench.analysis.rivals import ALONE, EACH, Side, available
from bench.models import mobilenet_v2
from bench.timing import interleaved, table
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.taylor import rank_correlation

IMAGES, PIXELS = 64, 96
SHORTER = ("ranked", "scored")
"""Our sides that answer ALONE with less."""
T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """``forwards`` is the time over that of a float forward right before and after, ``order`` the rank correlation of
    what is said of the layers with what ours says, None where another question was asked.
    """

    side: Side
    forwards: float
    measured: int
    order: float | None = None


def captures(made: Made, rounds: int) -> dict[str, float]:
    """Seconds of the plain forwards and of both captures, interleaved; medians of processor time."""
    sides: dict[str, Callable[[], object]] = {
        **made.forwards(),
        "FvsQ": lambda: capture_pair(made.net, made.fake, made.x, "FvsQ"),
        "QvsQ": lambda: capture_pair(made.fake, made.integer, made.x, "QvsQ"),
    }
    return {name: statistics.median(times) for name, times in interleaved(sides, rounds, time.process_time).items()}


def compare(made: Made, sides: Sequence[Side]) -> list[Timed]:
    """Every side once, with float forwards before and after it."""
    found = []
    alone, forward = made.sides()[ALONE].run(), made.forwards()["float"]
    exact = {name: alone[name] for name in made.layers()}
    for side in sides:
        before = _seconds(forward)[0]
        spent, said = _seconds(side.run)
        mean = (before + _seconds(forward)[0]) / 2
        order = same_order(exact, said) if side.question == ALONE else None
        found.append(Timed(side, spent / mean, len(said), order))
    return found


def _seconds(run: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def same_order(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float | None:
    """Spearman's correlation over the layers named in both, or one by one where the tool has names of its own."""
    pairs = [(value, theirs[name]) for name, value in ours.items() if name in theirs]
    if not pairs and len(ours) == len(theirs):
        pairs = list(zip(ours.values(), theirs.values(), strict=True))
    return rank_correlation(*zip(*pairs, strict=True)) if len(pairs) > 2 else None


def first_table(made: Made, seconds: Mapping[str, float], ours: Mapping[str, Timed]) -> dict[str, float]:
    """What we ask of ourselves: ratios to plain forwards of the same models."""
    fake = seconds["fake-quant"] / seconds["float"]
    return {
        "float forward, ms": seconds["float"] * 1e3,
        "FvsQ over float and fake-quant forward": seconds["FvsQ"] / (seconds["float"] + seconds["fake-quant"]),
        "QvsQ over fake-quant and integer forward": seconds["QvsQ"] / (seconds["fake-quant"] + seconds["integer"]),
        "ops": ours[ALONE].measured,
        "one op rounded at a time, all: fake-quant forwards": ours[ALONE].forwards / fake,
        "the five ranked first by gradient: fake-quant forwards": ours["ranked"].forwards / fake,
        "page with 4 images' capture, s": made.page(),
    }


def second_table(ours: Mapping[str, Timed], theirs: Sequence[Timed], missing: Mapping[str, str]) -> str:
    """Every analysis by question, ours first; what a tool takes over what ours does."""
    lines = [
        "| question | tool | layers | float forwards | over ours | over ranked | over scores | order as ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for question in (ALONE, EACH):
        for each in (*ours.values(), *theirs):
            if each.side.question == question:
                shorter = [each.forwards / ours[key].forwards if question == ALONE else None for key in SHORTER]
                cells = (each.forwards, each.forwards / ours[question].forwards, *shorter, each.order)
                shown = " | ".join("" if cell is None else f"{cell:.3g}" for cell in cells)
                lines.append(f"| {question} | {each.side.name} | {each.measured} | {shown} |")
    lines += [f"| | {name}: {why} | | | | | | |" for name, why in missing.items()]
    return "\n".join(lines)


def measure(net: nn.Module, x: Tensor, rounds: int) -> tuple[dict[str, float], str]:
    """Both tables; the second in Markdown."""
    made = make(net, x)
    sides, missing = available(net, x)
    own = made.sides()
    seconds = captures(made, rounds)
    ours = dict(zip(own, compare(made, list(own.values())), strict=True))
    return first_table(made, seconds, ours), second_table(ours, compare(made, sides), missing)


@click.command()
@click.option("--rounds", default=5, help="Interleaved runs of the forwards and captures.")
@click.option("--images", default=IMAGES, help="Images in the batch.")
def main(rounds: int, images: int) -> None:
    """Print two tables in Markdown: MobileNetV2 on images of 96×96, one thread, processor time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(images, 3, PIXELS, PIXELS)
    ratios, text = measure(mobilenet_v2(), x, rounds)
    table(f"1 thread, {images} images, torch {torch.__version__}", {"MobileNetV2": ratios})
    click.echo(f"\n{text}")


if __name__ == "__main__":
    main()
