"""The three forms of an example side by side: ``python -m examples.compare warp`` in the project root.

Writes into ``reports/`` of the example, from the artifacts of its pipeline:

* ``scores.json``: float, fake-quant and integer on the test split by all metrics of the example, and how far fake-quant
  and integer agree with each other;
* ``lsb.csv``: fake-quant against the Program, op by op on the same integer inputs, on the first 64 test items.

``metric.py`` of the example lists its ``METRICS``, and in ``RELATIVE`` those that compare two forms, whose targets
``against(targets, outputs)`` makes of the other form's outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from qatlib.analysis.agreement import gap_table, write_gap_table
from qatlib.atomic import write_json
from qatlib.conversion import IntegerModel
from qatlib.errors import QatError
from qatlib.fake.model import FakeQuantModel
from qatlib.pipeline.config import load_config
from qatlib.pipeline.metrics import Metric
from qatlib.pipeline.project import Project
from qatlib.program import Program

ROOT = Path(__file__).parent
ITEMS = 64
"""Test items behind ``lsb.csv``."""
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Made:
    """What the pipeline left in the folder of an example."""

    folder: Path
    project: Project
    model: FakeQuantModel
    program: Program

    def inputs(self, items: int = ITEMS) -> tuple[Tensor, ...]:
        """The first inputs of the test split."""
        inputs, _ = next(iter(self.project.batches("test", items, items)))
        return tuple(inputs)


def load(folder: Path) -> Made:
    """Sets threads, seeds and determinism of torch for the whole process, as ``params.yaml`` says.

    The working directory has to be ``folder``. Raises CheckpointError or ProgramError where an artifact is missing.
    """
    project = Project(load_config("params.yaml"))
    model = project.load_fake_quant("artifacts/qat.safetensors")
    return Made(folder, project, model, Program.load("artifacts/program"))


def score(made: Made) -> Scores:
    """Values by metric on the test split: ``float``, ``fake_quant``, ``integer``, ``integer_against_fake_quant``."""
    project, module = made.project, import_module(f"examples.{made.folder.name}.metric")
    forms: dict[str, Callable[..., Any]] = {
        "float": project.float_model,
        "fake_quant": made.model,
        "integer": IntegerModel(made.program, project.device),
    }
    metrics = {form: _metrics(project, module.METRICS) for form in forms}
    relative = [kind() for kind in module.RELATIVE]
    with torch.no_grad():
        for inputs, targets in project.batches("test"):
            outputs = {form: forward(*(x.to(project.device) for x in inputs)) for form, forward in forms.items()}
            for form, scored in metrics.items():
                _update(scored, outputs[form], targets)
            _update(relative, outputs["integer"], module.against(targets, outputs["fake_quant"]))
    metrics["integer_against_fake_quant"] = relative
    return {form: {m.name: float(f"{m.compute():.6g}") for m in scored} for form, scored in metrics.items()}


def _metrics(project: Project, kinds: Sequence[type[Metric]]) -> list[Metric]:
    """Fresh ones; that of ``params.yaml`` has the arguments given there."""
    fresh = [*(kind() for kind in kinds), project.metric()]
    return list({metric.name: metric for metric in fresh}.values())


def _update(metrics: Sequence[Metric], outputs: Any, targets: Any) -> None:
    for metric in metrics:
        metric.update(outputs, targets)


@click.command(help=__doc__)
@click.argument("name")
def main(name: str) -> None:
    folder = ROOT / name
    try:
        with contextlib.chdir(folder):
            made = load(folder)
            scores, rows = score(made), gap_table(made.model, made.program, *made.inputs())
        write_json(folder / "reports" / "scores.json", scores)
        write_gap_table(rows, folder / "reports" / "lsb.csv")
    except (QatError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for form, values in scores.items():
        click.echo(f"{form}: " + ", ".join(f"{metric} {value:g}" for metric, value in values.items()))
    differing, elements = sum(row.differing for row in rows), sum(row.elements for row in rows)
    click.echo(f"codes that fake-quant and integer do not share: {differing:,} of {elements:,}")


if __name__ == "__main__":
    main()
