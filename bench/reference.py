"""Float, every calibration method and QAT of the reference models: ``python -m bench.reference [NAME ...]``.

``reference.yaml`` says which models there are. Each row of ``reference.csv`` is what the stages of the pipeline would
score on the test split after ``dvc exp run --temp -S calibrate.method=…``, or ``-S runtime.seed=…`` for QAT. A row is
written when it is measured; ``--resume`` leaves out those that are there. ``--table`` prints the tables of
``docs/examples.md`` instead. The float checkpoints have to be there: ``make examples`` trains or fetches them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from bench.rows import METHODS, Form, Row, markdown, read_rows, write_rows
from qatlib.conversion import IntegerModel
from qatlib.errors import ConfigError, QatError
from qatlib.fake.calibrate import calibrate
from qatlib.fake.model import FakeQuantModel
from qatlib.pipeline.after_training import help_after_training
from qatlib.pipeline.config import Config, Entry, Many, load_config
from qatlib.pipeline.conversion import program_of
from qatlib.pipeline.metrics import Metric, evaluate, make_metric
from qatlib.pipeline.project import Project
from qatlib.pipeline.reporting import step_bar
from qatlib.pipeline.training import trainer_of

ROOT = Path(__file__).parents[1]
MODELS, ROWS = (Path(__file__).with_suffix(suffix) for suffix in (".yaml", ".csv"))
Params = dict[str, dict[str, Any]]
Echo = Callable[[str], None]


class Reference(BaseModel):
    """A model of ``reference.yaml``, which says what the keys are."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    folder: str
    metrics: Many[Entry] = ()
    params: Params = {}

    def config(self, over: Params) -> Config:
        """``params.yaml`` of the working directory under :attr:`params` and ``over``."""
        sections = {**self.params, **over}
        return load_config("params.yaml", {key: {**self.params.get(key, {}), **over.get(key, {})} for key in sections})


def read_models(path: Path) -> dict[str, Reference]:
    """Models by name; raises ConfigError QAT100 if ``path`` is not YAML, QAT101 with every wrong value."""
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError, ValueError) as error:
        raise ConfigError("QAT100", str(path), f"cannot be read: {error}", "Correct that line") from None
    try:
        return TypeAdapter(dict[str, Reference]).validate_python(document)
    except ValidationError as error:
        wrong = "".join(f"\n  {'.'.join(map(str, e['loc']))}: {e['input']!r}: {e['msg']}" for e in error.errors())
        raise ConfigError(
            "QAT101", str(path), f"{error.error_count()} wrong{wrong}", "\nSee the comments there"
        ) from None


@dataclass(frozen=True)
class Way:
    """How a model comes about: ``float``, ``ptq`` by a method, ``qat`` with a seed."""

    form: Form
    method: str = ""
    seed: int | None = None

    @property
    def over(self) -> Params:
        """What it takes in ``params.yaml``."""
        method = {"calibrate": {"method": self.method}} if self.form == "ptq" else {}
        return method if self.seed is None else {"runtime": {"seed": self.seed}}

    def __str__(self) -> str:
        return " ".join(str(part) for part in (self.form, self.method, self.seed) if part not in ("", None))


def ways(seeds: Iterable[int]) -> list[Way]:
    """All of them, in the order of the table."""
    return [Way("float"), *(Way("ptq", method) for method in METHODS), *(Way("qat", seed=seed) for seed in seeds)]


def measure(
    models: Mapping[str, Reference], path: Path, seeds: Sequence[int], resume: bool, echo: Echo = click.echo
) -> None:
    """Measure ``models`` and write every row to ``path`` as it comes; rows there of other models stay.

    Folders are relative to the root of the project. Models whose params have ``qat.epochs: 0`` get no rows of QAT.
    """
    rows = [row for row in read_rows(path) if resume or row.example not in models]
    for name, reference in models.items():
        with contextlib.chdir(ROOT / reference.folder):
            for way in ways(seeds):
                config = reference.config(way.over)
                start = Row(name, "", 0, way.form, way.method, way.seed)
                if start.model in {row.model for row in rows} or (way.form == "qat" and not config.qat.epochs):
                    continue
                found = list(_rows(start, Project(config), reference.metrics))
                rows += found
                write_rows(path, rows)
                for row in found:
                    scores = [f"{x:.6g}" for x in (row.in_float, row.fake_quant, row.integer) if x is not None]
                    echo(f"{name} {way}: {row.metric} {' '.join(scores)}")


def _rows(start: Row, project: Project, metrics: Sequence[str]) -> Iterator[Row]:
    """``start`` filled in, once for each metric."""
    if start.form == "float":
        scores, items = _score(project, project.float_model, metrics)
        for metric, value in scores.items():
            yield replace(start, metric=metric, items=items, in_float=value)
        return
    if start.form == "qat":
        model, start = _trained(start, project)
    else:
        model, _ = _calibrated(project)
    fake_quant, items = _score(project, model, metrics)
    integer, _ = _score(project, IntegerModel(program_of(project, model), project.device), metrics)
    for metric, value in fake_quant.items():
        yield replace(start, metric=metric, items=items, fake_quant=value, integer=integer[metric])


def _calibrated(project: Project) -> tuple[FakeQuantModel, tuple[str, ...]]:
    """What the calibrate stage makes, and the help after training that it had."""
    model = project.fake_quant_model(equalized=project.config.calibrate.equalize)
    calibrate(model, project.calibration_batches(), project.device)
    return model, help_after_training(project, model).done


def _trained(start: Row, project: Project) -> tuple[FakeQuantModel, Row]:
    """The epoch that the qat stage ships, and ``start`` with what it ran."""
    with tempfile.TemporaryDirectory() as folder, step_bar(f"{start.example} seed {start.seed}") as shown:
        checkpoint = f"{folder}/calibrated.safetensors"
        calibrated, helped = _calibrated(project)
        project.save_fake_quant(calibrated, checkpoint, helped)
        trainer = trainer_of(project, checkpoint, None, shown)
        trained = trainer.run()
    section = project.config.qat
    ran = replace(
        start,
        method=project.config.calibrate.method,
        epochs=section.epochs,
        best_epoch=trained.best,
        lr=section.lr,
        train_items=len(project.training_data),  # type: ignore[arg-type]
    )
    return trainer.model, ran


class _Together:
    """Several metrics in one pass over the data; the value is that of the first."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics, self.name, self.higher_is_better = metrics, metrics[0].name, metrics[0].higher_is_better

    def update(self, outputs: Any, targets: Any) -> None:
        for metric in self.metrics:
            metric.update(outputs, targets)

    def compute(self) -> float:
        return self.metrics[0].compute()


def _score(project: Project, forward: Callable[..., Any], metrics: Sequence[str]) -> tuple[dict[str, float], int]:
    """Values by metric on the test split, by the project's own if none is named; and the number of items."""
    together = _Together([make_metric(entry, {}) for entry in metrics] or [project.metric()])
    scored = evaluate(forward, project.batches("test"), together, project.device)
    return {metric.name: metric.compute() for metric in together.metrics}, scored.images


def _seeds(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise click.BadParameter(f"{text!r}; give numbers with commas between, such as 0,1,2")
    return tuple(dict.fromkeys(map(int, text.split(","))))


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--seeds", default="0,1,2", show_default=True, callback=_seeds, help="One QAT for each.")
@click.option("--resume", is_flag=True, help="Keep the rows of these models that are there.")
@click.option("--table", is_flag=True, help="Print the tables and measure nothing.")
@click.option(
    "--models", "models_file", default=MODELS, type=click.Path(path_type=Path), help="Another reference.yaml."
)
@click.option("--rows", "path", default=ROWS, type=click.Path(path_type=Path), help="Another reference.csv.")
def main(
    names: tuple[str, ...], seeds: tuple[int, ...], resume: bool, table: bool, models_file: Path, path: Path
) -> None:
    try:
        models = read_models(models_file)
        if unknown := [name for name in names if name not in models]:
            raise click.BadParameter(f"{unknown[0]!r}; there are {', '.join(models)}", param_hint="NAME")
        chosen = {name: models[name] for name in names or models}
        if table:
            click.echo(markdown(read_rows(path), chosen))
        else:
            measure(chosen, path.resolve(), seeds, resume)
    except (QatError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
