"""Time of the analysis against plain forwards of the same models on the same images, in one run.

``python -m bench.analysis`` prints a table in Markdown: MobileNetV2 on 64 images of 96×96, one thread, interleaved
runs, medians of processor time. A capture is every op's accumulated error, same-input error and statistics.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from bench.emulator import interleaved, table
from qatlib.analysis.facts import Facts
from qatlib.analysis.outcome import publish
from qatlib.analysis.profiler import capture_pair
from qatlib.analysis.sensitivity import sensitivity
from qatlib.conversion import convert_fx
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.pipeline.entry import load_entry

IMAGES, PIXELS = 64, 96


def timed(factory: str, rounds: int) -> dict[str, float]:
    """Ratios to what each row's name says, and seconds of the page."""
    torch.manual_seed(0)
    x = torch.randn(IMAGES, 3, PIXELS, PIXELS)
    net = load_entry(factory)().eval()
    fake = prepare_qat_fx(net, example_inputs=[x[:2]])
    calibrate(fake, [x])
    integer = convert_fx(fake)
    sides: dict[str, Callable[[], object]] = {
        "float": torch.no_grad()(lambda: net(x)),
        "fake": torch.no_grad()(lambda: fake(x)),
        "integer": lambda: integer(x),
        "FvsQ": lambda: capture_pair(net, fake, x, "FvsQ"),
        "QvsQ": lambda: capture_pair(fake, integer, x, "QvsQ"),
    }
    seconds = {name: statistics.median(times) for name, times in interleaved(sides, rounds, time.process_time).items()}
    every, first = _sensitivity(fake, x, None), _sensitivity(fake, x, 5)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        publish(Facts(fvsq=capture_pair(net, fake, x[:4], "FvsQ")), Path(folder))
        page = time.perf_counter() - start
    ops = len(list(fake.ops()))
    return {
        "float forward, ms": seconds["float"] * 1e3,
        "FvsQ over float and fake-quant forward": seconds["FvsQ"] / (seconds["float"] + seconds["fake"]),
        "QvsQ over fake-quant and integer forward": seconds["QvsQ"] / (seconds["fake"] + seconds["integer"]),
        "ops": ops,
        "one op rounded at a time, all: fake-quant forwards": every / seconds["fake"],
        "the five ranked first by gradient: fake-quant forwards": first / seconds["fake"],
        "page with 4 images' capture, s": page,
    }


def _sensitivity(fake: object, x: torch.Tensor, top: int | None) -> float:
    start = time.process_time()
    sensitivity(fake, [x], kinds=["on"], parts=False, top=top)  # type: ignore[arg-type]
    return time.process_time() - start


@click.command()
@click.option("--rounds", default=5, help="Interleaved runs of each side.")
def main(rounds: int) -> None:
    """Print ratios as a Markdown table."""
    torch.set_num_threads(1)
    nets = {"MobileNetV2": "bench.models:mobilenet_v2"}
    table(f"1 thread, torch {torch.__version__}", {name: timed(factory, rounds) for name, factory in nets.items()})


if __name__ == "__main__":
    main()
