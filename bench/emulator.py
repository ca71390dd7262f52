"""Time of the integer Program against the BN-folded float model, on the same batch in the same run.

``python -m bench.emulator`` runs the bundled example; ``--factory module:callable --shape 3,96,96`` another model.
Runs are interleaved, medians are compared. Prints the ratio, its spread, and the route that every op takes.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import click
import torch
from rich.console import Console
from rich.table import Table

from bench.rivals import Int64Emulator, fbgemm, onnx_runtime
from qatlib.conversion import to_program
from qatlib.emulator import Emulator
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import evaluate_graph, fuse_fx, prepare_qat_fx
from qatlib.graph.ir import Graph
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
@click.option("--rivals", is_flag=True, help="Also torch's fbgemm, ONNX Runtime's int8 and plain int64.")
def main(factory: str, shape: str, batch: int, threads: int, rounds: int, rivals: bool) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(batch, *(int(size) for size in shape.split(",")))
    model = load_entry(factory)().eval()
    graph = fuse_fx(model, [x])
    fake = prepare_qat_fx(model, example_inputs=[x])
    calibrate(fake, [x])
    program = to_program(fake)
    emulator = Emulator(program)

    last = channels_last(graph)
    sides: dict[str, Callable[[], object]] = {
        "float, BN folded": torch.inference_mode()(lambda: evaluate_graph(graph, [x])),
        "float, channels last": torch.inference_mode()(lambda: evaluate_graph(last, [x])),
        "integer Program": lambda: emulator(x),
    }
    if rivals:
        sides["ONNX Runtime, int8 (not exact)"] = onnx_runtime(program, x, threads)
        if (converted := fbgemm(model, x)) is not None:
            sides["torch fbgemm, int8 (not exact)"] = converted
        plain = Int64Emulator(program)
        assert all(torch.equal(a, b) for a, b in zip(plain(x), emulator(x), strict=True))
        sides["unfold and int64 matmul"] = lambda: plain(x)
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(seconds(run))
    report(factory, batch, threads, times, emulator)


def channels_last(graph: Graph) -> Graph:
    """The graph with the weights of 2-d convolutions channels last, which their outputs follow."""

    def laid_out(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    nodes = tuple(replace(n, params={role: laid_out(t) for role, t in n.params.items()}) for n in graph.nodes)
    return replace(graph, nodes=nodes)


def report(factory: str, batch: int, threads: int, times: dict[str, list[float]], emulator: Emulator) -> None:
    rival, ours = times["float, BN folded"], times["integer Program"]
    ratios = sorted(i / f for i, f in zip(ours, rival, strict=True))
    console = Console()
    console.print(f"{factory}, batch {batch}, {threads} thread(s), torch {torch.__version__}")
    table = Table("side", "median ms", "ratio to float")
    for name, values in times.items():
        median = statistics.median(values)
        table.add_row(name, f"{median * 1e3:.1f}", f"{median / statistics.median(rival):.2f}")
    console.print(table)
    console.print(
        f"{len(ratios)} interleaved pairs: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}"
    )
    routes = Table("op", "exact route")
    for name, route in emulator.routes.items():
        routes.add_row(name, route)
    console.print(routes)
    console.print(dict(Counter(emulator.routes.values())))


if __name__ == "__main__":
    main()
