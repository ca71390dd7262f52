"""Time of the integer Program against the BN-folded float model, on the same batch in the same run.

``python -m bench.emulator`` runs the bundled example; ``--factory module:callable --shape 3,96,96`` another model.
Runs are interleaved, medians are compared. Prints the ratio, its spread, and the route that every op takes.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import click
import torch
from rich.console import Console
from rich.table import Table

from qatlib.conversion import to_program
from qatlib.emulator import Emulator
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import evaluate_graph, fuse_fx, prepare_qat_fx
from qatlib.pipeline.entry import load_entry


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@click.command()
@click.option("--factory", default="examples.fashion_mnist.model:build", help="Entry point of the float model.")
@click.option("--shape", default="1,28,28", help="Shape of one sample.")
@click.option("--batch", default=256, help="Samples per run.")
@click.option("--threads", default=1, help="OpenMP threads of torch.")
@click.option("--rounds", default=30, help="Interleaved runs of each side.")
def main(factory: str, shape: str, batch: int, threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(batch, *(int(size) for size in shape.split(",")))
    model = load_entry(factory)().eval()
    graph = fuse_fx(model, [x])
    fake = prepare_qat_fx(model, example_inputs=[x])
    calibrate(fake, [x])
    emulator = Emulator(to_program(fake))

    @torch.inference_mode()
    def float_run() -> object:
        return evaluate_graph(graph, [x])

    sides: dict[str, Callable[[], object]] = {"float": float_run, "integer": lambda: emulator(x)}
    for run in sides.values():
        run()
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(seconds(run))
    report(factory, batch, threads, times, emulator)


def report(factory: str, batch: int, threads: int, times: dict[str, list[float]], emulator: Emulator) -> None:
    ratios = sorted(i / f for i, f in zip(times["integer"], times["float"], strict=True))
    median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    console = Console()
    console.print(
        f"{factory}, batch {batch}, {threads} thread(s), {len(ratios)} interleaved runs, torch {torch.__version__}"
    )
    table = Table("side", "median ms", "ratio to float")
    table.add_row("float, BN folded", f"{median['float']:.1f}", "1.00")
    table.add_row("integer Program", f"{median['integer']:.1f}", f"{median['integer'] / median['float']:.2f}")
    console.print(table)
    console.print(f"ratio of pairs: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}")
    routes = Table("op", "exact route")
    for name, route in emulator.routes.items():
        routes.add_row(name, route)
    console.print(routes)
    console.print(dict(Counter(emulator.routes.values())))


if __name__ == "__main__":
    main()
