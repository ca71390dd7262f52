"""Time of a QAT step, of fake-quant evaluation and of calibration against the float model in the same run.

``python -m bench.training`` prints a table in Markdown: interleaved runs, ratios of medians. The float model takes its
step in train mode with its batch norms, and is evaluated in eval mode; a step is forward, backward and SGD. torch's own
FX QAT stands beside ours.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.timing import interleaved, table
from qatlib.fake.batch_norm import keep_batch_norms
from qatlib.fake.calibrate import calibrate
from qatlib.fake.exact import ExactForward
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.prepare import prepare_qat_fx
from qatlib.fake.qconfig import FakeQuantSpec, QConfig, get_default_qconfig
from qatlib.fake.state import FakeQuantState
from qatlib.pipeline.entry import load_entry

Sides = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """A net and the side of its images."""

    factory: str
    pixels: int = 96
    batch: int = 32


CASES = {
    "MobileNetV2, 96×96": Case("bench.models:mobilenet_v2"),
    "ResNet-18, 96×96": Case("bench.models:resnet18"),
}


def stepping(
    model: nn.Module, x: Tensor, labels: Tensor, forward: Callable[[Tensor], Tensor] | None = None
) -> Callable[[], object]:
    """One training step of a model, which stays in the mode it is in; ``forward`` takes the place of its own."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy((forward or model)(x), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: model(x))


def qat_model(calibrated: FakeQuantModel) -> FakeQuantModel:
    """A copy in train mode and QAT state."""
    model = copy.deepcopy(calibrated).train()
    set_fake_quantize(model, FakeQuantState.QAT)
    return model


def torch_qat(model: nn.Module, x: Tensor) -> nn.Module:
    """torch's own: FX graph mode with the default QConfig of fbgemm, batch norms kept."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx as prepare

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(copy.deepcopy(model).train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))


def training_sides(case: Case) -> tuple[Sides, Sides]:
    """What is compared with a float step, and what with a float forward; the float side comes first."""
    torch.manual_seed(0)
    x, labels = torch.randn(case.batch, 3, case.pixels, case.pixels), torch.randint(0, 1000, (case.batch,))
    net = load_entry(case.factory)().eval()
    calibrated = prepare_qat_fx(net, example_inputs=[x[:2]])
    calibrate(calibrated, [x])
    steps: Sides = {"float step": stepping(copy.deepcopy(net).train(), x, labels)}
    steps["QAT step"] = stepping(qat_model(calibrated), x, labels)
    learned = QConfig(FakeQuantSpec(kind="lsq"), FakeQuantSpec(method="min_max", kind="lsq"))
    lsq = prepare_qat_fx(net, learned, example_inputs=[x[:2]])
    calibrate(lsq, [x])
    steps["QAT step, LSQ"] = stepping(qat_model(lsq), x, labels)
    kept = copy.deepcopy(calibrated)
    keep_batch_norms(kept)
    steps["QAT step, batch norms kept"] = stepping(qat_model(kept), x, labels)
    exact = qat_model(calibrated)
    steps["QAT step, exact forward"] = stepping(exact, x, labels, ExactForward(exact))
    steps["torch.ao FX QAT step"] = stepping(torch_qat(net, x), x, labels)
    forwards: Sides = {"float forward": forward(net, x), "fake-quant forward": forward(calibrated, x)}
    extremes = prepare_qat_fx(net, get_default_qconfig(method="min_max"), example_inputs=[x[:2]])
    for name, observing in {"calibration, min_max": extremes, "calibration": copy.deepcopy(calibrated)}.items():
        set_fake_quantize(observing, FakeQuantState.CALIBRATION)
        forwards[name] = forward(observing, x)
    return steps, forwards


def timed(case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of the float sides; of the others, the median over that of the float side.

    Seconds are those of the processor: the one thread then counts no time in which others had the core.
    """
    found: dict[str, float] = {}
    for sides in training_sides(case):
        times = {
            name: statistics.median(seconds) for name, seconds in interleaved(sides, rounds, time.process_time).items()
        }
        base, *others = times
        found[f"{base}, ms"] = times[base] * 1e3
        found |= {name: times[name] / times[base] for name in others}
    return found


@click.command()
@click.option("--rounds", default=9, help="Interleaved runs of each side.")
@click.option("--only", default="", help="Nets whose name holds this text.")
def main(rounds: int, only: str) -> None:
    """Print ratios to the float model, of one thread, as a Markdown table."""
    torch.set_num_threads(1)
    rows = {name: timed(case, rounds) for name, case in CASES.items() if only in name}
    table(f"1 thread, batch 32, torch {torch.__version__}", rows)


if __name__ == "__main__":
    main()
