"""The three forms of an example with published weights, scored by all of its metrics: ``reports/scores.json``.

    python -m examples.scores efficientnet_lite0

The example's ``metric.py`` lists them in ``METRICS``; their targets hold the float network's outputs under ``float``.
Needs the artifacts of ``dvc repro``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from qatlib.atomic import write_json
from qatlib.conversion import IntegerModel
from qatlib.errors import QatError
from qatlib.pipeline.config import load_config
from qatlib.pipeline.metrics import Metric
from qatlib.pipeline.project import Project
from qatlib.program import Program

ROOT = Path(__file__).parent
Targets = Mapping[str, Tensor]
Scores = dict[str, dict[str, float]]


def measure(project: Project, fake_quant: nn.Module, program: Program) -> Scores:
    """Values by metric on the test split: ``float``, ``fake_quant``, ``integer`` and ``integer_against_fake_quant``.

    The last takes the fake-quant model for the float network, so that an agreement is that of these two.
    """
    module = import_module(project.config.metric.factory.partition(":")[0])
    forms = {"float": project.float_model, "fake_quant": fake_quant, "integer": IntegerModel(program, project.device)}
    scores: Scores = {}
    outputs: dict[str, list[Tensor]] = {}
    for form, forward in forms.items():
        outputs[form] = []
        with torch.no_grad():
            for inputs, _ in project.batches("test"):
                outputs[form].append(forward(*(x.to(project.device) for x in inputs)))
        scores[form] = _score(module.METRICS, zip(outputs[form], _targets(project), strict=True))
    against = (
        {**targets, "float": fake} for targets, fake in zip(_targets(project), outputs["fake_quant"], strict=True)
    )
    relative = [metric for metric in module.METRICS if metric not in module.OF_LABELS]
    scores["integer_against_fake_quant"] = _score(relative, zip(outputs["integer"], against, strict=True))
    return scores


def _targets(project: Project) -> Iterator[Targets]:
    return (targets for _, targets in project.batches("test"))


def _score(metrics: list[type[Metric]], batches: Iterator[tuple[Tensor, Targets]]) -> dict[str, float]:
    fresh = [metric() for metric in metrics]
    for outputs, targets in batches:
        for metric in fresh:
            metric.update(outputs, targets)
    return {metric.name: float(f"{metric.compute():.6g}") for metric in fresh}


@click.command(help=__doc__)
@click.argument("name")
def main(name: str) -> None:
    folder = ROOT / name
    try:
        with contextlib.chdir(folder):
            project = Project(load_config("params.yaml"))
            model, program = project.load_fake_quant("artifacts/qat.safetensors"), Program.load("artifacts/program")
            scores = measure(project, model, program)
        write_json(folder / "reports" / "scores.json", scores)
    except (QatError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for form, values in scores.items():
        click.echo(f"{form}: " + ", ".join(f"{metric} {value:g}" for metric, value in values.items()))


if __name__ == "__main__":
    main()
