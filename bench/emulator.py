"""Time and memory of the integer Program against the BN-folded float model, on the same batch in the same run.

``python -m bench.emulator`` times the nets of deployed sizes and the bundled example, beside other integer kernels, and
prints the tables of ``bench/README.md``. Runs are interleaved, medians are compared.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from bench.litert import litert
from bench.rivals import Int64Emulator, fbgemm, onnx_runtime
from bench.timing import interleaved, table
from qatlib.conversion import to_program
from qatlib.emulator import Emulator
from qatlib.fake.calibrate import calibrate
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.pipeline.entry import load_entry
from qatlib.program import Program

FLOAT, OURS, INT64 = "float, BN folded", "integer Program", "unfold and int64 matmul"


@dataclass(frozen=True)
class Case:
    """A net, the shape of one sample, and the batch of the int64 path, which is far slower."""

    factory: str
    shape: tuple[int, ...]
    batch: int = 32
    few: int = 2


CASES = {
    "ResNet-18, 112×112": Case("bench.models:resnet18", (3, 112, 112)),
    "MobileNetV2, 112×112": Case("bench.models:mobilenet_v2", (3, 112, 112)),
    "transformer block, 64 tokens of width 384": Case("bench.models:transformer", (64, 384)),
    "the bundled example, 28×28": Case("examples.fashion_mnist.model:build", (1, 28, 28), batch=256, few=16),
}


@dataclass(frozen=True)
class Made:
    """The float model with its batch norms folded, and its Program."""

    model: nn.Module
    folded: nn.Module
    program: Program
    x: Tensor


def make(case: Case) -> Made:
    torch.manual_seed(0)
    x = torch.randn(case.batch, *case.shape)
    model = load_entry(case.factory)().eval()
    fake = prepare_qat_fx(model, example_inputs=[x[:1]])
    calibrate(fake, [x])
    return Made(model, folded(model), to_program(fake), x)


def folded(model: nn.Module) -> nn.Module:
    """The model with batch norms folded by torch's own pass, which traces; without any, the model itself."""
    has_norms = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    return fuse(model) if has_norms else model


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def timed(case: Case, threads: int, rounds: int) -> dict[str, float]:
    """Ratio to the float model of every side; of int64 that to the Program, on a few samples."""
    torch.set_num_threads(threads)
    made = make(case)
    x, emulator = made.x, Emulator(made.program)
    run_float = torch.inference_mode()(lambda: made.folded(x))
    sides: dict[str, Callable[[], object]] = {FLOAT: run_float, OURS: lambda: emulator(x)}
    if x.dim() == 4:
        last = channels_last(folded(made.model))
        sides["float, channels last"] = torch.inference_mode()(lambda: last(x))
    sides["ONNX Runtime, int8"] = onnx_runtime(made.model, x, threads)
    optional = {"torch fbgemm, int8": fbgemm(made.model, x), "LiteRT, int8": litert(made.program, x, threads)}
    sides |= {name: run for name, run in optional.items() if run is not None}
    times = interleaved(sides, rounds)
    pairs = sorted(i / f for i, f in zip(times[OURS], times[FLOAT], strict=True))
    found = {name: statistics.median(t) / statistics.median(times[FLOAT]) for name, t in times.items()}
    few, plain = x[: case.few], Int64Emulator(made.program)
    assert all(torch.equal(a, b) for a, b in zip(plain(few), emulator(few), strict=True))
    slow = interleaved({FLOAT: lambda: emulator(few), "int64": lambda: plain(few)}, 3)
    found["unfold and int64 matmul, over the Program"] = statistics.median(slow["int64"]) / statistics.median(
        slow[FLOAT]
    )
    found |= {"float ms": statistics.median(times[FLOAT]) * 1e3, "low": pairs[0], "high": pairs[-1]}
    click.echo(f"  routes: {dict(Counter(emulator.routes.values()))}", err=True)
    return found


def peak(name: str, side: str) -> float:
    """MiB that one forward adds to the peak of a fresh process, in which freed tensors go back to the system."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.emulator", "--memory", name, "--side", side], capture_output=True, text=True,
        check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )  # fmt: skip
    return float(done.stdout)


def measure_peak(case: Case, side: str) -> float:
    torch.set_num_threads(1)
    made = make(case)
    few = made.x[:1]
    emulator = Emulator(made.program)
    run = (lambda x: emulator(x)) if side == OURS else torch.inference_mode()(lambda x: made.folded(x))
    run(few)  # kernels loaded
    before = _reset_peak()
    run(made.x)
    return (_peak_kib() - before) / 1024


def _reset_peak() -> int:
    """Set the peak of resident memory to what is resident now, where Linux allows it; KiB."""
    with open("/proc/self/clear_refs", "w") as control:  # noqa: PTH123
        control.write("5")
    return _peak_kib()


def _peak_kib() -> int:
    with open("/proc/self/status") as status:  # noqa: PTH123
        found = next((line for line in status if line.startswith("VmHWM")), None)
    return int(found.split()[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@click.command()
@click.option("--rounds", default=15, help="Interleaved runs of each side.")
@click.option("--threads", default=(1, 2), multiple=True, help="OpenMP threads of torch; several for several tables.")
@click.option("--memory", hidden=True)
@click.option("--side", hidden=True)
def main(rounds: int, threads: tuple[int, ...], memory: str | None, side: str) -> None:
    """Print ratios to the float model as Markdown tables."""
    if memory:
        click.echo(measure_peak(CASES[memory], side))
        return
    for count in threads:
        table(f"{count} thread(s), torch {torch.__version__}", {n: timed(c, count, rounds) for n, c in CASES.items()})
    table("peak memory of one forward, MiB", {n: {s: peak(n, s) for s in (FLOAT, OURS)} for n in CASES})


if __name__ == "__main__":
    main()
