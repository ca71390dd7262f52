"""Float training of the examples that have a folder of their own for the pipeline: warp, detector, recurrent,
hard_case.

An example names its parts once, and has a command by it::

    EXAMPLE = Example(Path(__file__).parent, model.build, data.build, F.cross_entropy, evaluate)
    main = EXAMPLE.command()
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.settings import Settings, TrainSettings, load_settings
from qatlib.errors import QatError, TrainingError
from qatlib.pipeline.checkpoint import save_tensors
from qatlib.pipeline.config import RuntimeParams, load_config
from qatlib.pipeline.metrics import write_metrics
from qatlib.pipeline.runtime import setup

Loss = Callable[[Any, Tensor], Tensor]
Measure = Callable[[nn.Module, TensorDataset], dict[str, float]]
"""Values by name of a network on a dataset; the network is left in evaluation mode."""


@dataclass(frozen=True)
class Example:
    """What one example trains.

    Args:
        folder: has ``train.yaml`` and ``params.yaml``; gets ``float.safetensors`` and ``metrics.json``.
        model: gives the untrained network; called with ``model.kwargs`` of ``params.yaml``.
        data: gives a split; called as ``data(split, **kwargs)`` with ``data`` of ``train.yaml``.
        loss: called as ``loss(outputs, targets)``.
        measure: values for ``metrics.json``.
        finish: changes the trained network before it is measured and written.
    """

    folder: Path
    model: Callable[..., nn.Module]
    data: Callable[..., TensorDataset]
    loss: Loss
    measure: Measure
    finish: Callable[[Any], None] | None = None

    def train(self, settings: Settings, kwargs: dict[str, Any], folder: Path) -> dict[str, float | int]:
        """Train a network, write its weights and metrics into ``folder``, return the metrics.

        On one machine equal arguments give equal bytes. Sets the threads, seeds and determinism of torch for the whole
        process. Raises DataError QAT116, QAT117 (no data) or TrainingError QAT166 (the loss is not finite); nothing is
        written then.
        """
        setup(RuntimeParams(threads=settings.train.threads, seed=settings.train.seed))
        splits = {split: self.data(split, **settings.data.model_dump()) for split in ("train", "val", "test")}
        # Channels last halves the time of the convolutions on a CPU; networks without them are as they were.
        net = self.model(**kwargs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with Progress(console=Console(stderr=True)) as progress:
            self._fit(net, splits["train"], splits["val"], settings.train, progress)
        if self.finish is not None:
            self.finish(net)
        metrics: dict[str, float | int] = {
            "epochs": settings.train.epochs,
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "train_images": len(splits["train"]),
        }
        for split in ("val", "test"):
            values = self.measure(net, splits[split])
            metrics |= {f"{split}_images": len(splits[split])} | {f"{split}_{name}": x for name, x in values.items()}
        save_tensors(folder / "float.safetensors", net.state_dict())
        write_metrics(folder / "metrics.json", "train_float", metrics)
        return metrics

    def command(self) -> click.Command:
        """The training as a command; its errors are one message on stderr and exit code 1."""

        @click.command(help=f"Train the float model of examples/{self.folder.name}.")
        @click.option("--folder", type=click.Path(path_type=Path), default=self.folder, help="Of the yaml files.")
        def main(folder: Path) -> None:
            try:
                kwargs = load_config(folder / "params.yaml").model.kwargs
                self.train(load_settings(folder / "train.yaml"), kwargs, folder)
            except QatError as error:
                raise click.ClickException(str(error)) from error
            except KeyboardInterrupt:
                click.echo("interrupted; nothing was written", err=True)
                sys.exit(130)

        return main

    def _fit(
        self, net: nn.Module, train: TensorDataset, val: TensorDataset, settings: TrainSettings, progress: Progress
    ) -> None:
        """AdamW under a one-cycle schedule."""
        inputs, targets = train.tensors
        batch_size = min(settings.batch_size, len(inputs))
        steps = len(inputs) // batch_size
        optimizer = torch.optim.AdamW(net.parameters(), settings.lr, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.epochs * steps)
        order = torch.Generator().manual_seed(settings.seed)
        task = progress.add_task("training", total=settings.epochs * steps)
        for epoch in range(settings.epochs):
            net.train()
            batches = torch.split(torch.randperm(len(inputs), generator=order), batch_size)[:steps]
            for step, batch in enumerate(batches):
                optimizer.zero_grad()
                loss = self.loss(net(channels_last(inputs[batch])), targets[batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                _refuse_non_finite(float(loss.detach()), epoch, step)
                progress.update(task, advance=1, description=f"epoch {epoch + 1}/{settings.epochs} loss {loss:.3f}")
            values = ", ".join(f"val {name} {value:.4f}" for name, value in self.measure(net, val).items())
            progress.console.print(f"epoch {epoch + 1}: {values}", highlight=False)


def channels_last(images: Tensor) -> Tensor:
    """``images`` ``[N, C, H, W]`` in the memory format of the network."""
    return images.contiguous(memory_format=torch.channels_last)


def _refuse_non_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            "QAT166", f"float training epoch {epoch + 1} step {step + 1}", f"the loss is {loss}", "Lower train.lr"
        )
