"""Train the float model: ``python -m examples.fashion_mnist.train`` in the project root.

Reads ``params.yaml`` of this folder, writes ``float.safetensors`` and ``metrics.json`` beside it. On one machine the
same parameters give the same bytes. Both files are written whole after the last epoch, so an interrupted run leaves
those of the run before.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click
import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from examples.fashion_mnist import data, model
from examples.settings import Settings, TrainSettings, load_settings
from qatlib.atomic import write_bytes, write_json
from qatlib.errors import QatError, TrainingError

FOLDER = Path(__file__).parent


@click.command()
def main() -> None:
    """Train the float model of the Fashion-MNIST example."""
    try:
        train(load_settings(FOLDER / "params.yaml"), FOLDER)
    except QatError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(130)


def train(settings: Settings, folder: Path) -> dict[str, float | int]:
    """Train, write the weights and the metrics into ``folder``, return the metrics.

    Sets the threads and the determinism of torch for the whole process. Raises DataError QAT116, QAT117 (no data) or
    TrainingError QAT166 (the loss is not finite).
    """
    torch.set_num_threads(settings.train.threads)
    torch.use_deterministic_algorithms(True)
    # Overwriting fresh memory only serves code that reads it uninitialized, and costs a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(settings.train.seed)
    train_data, val_data = (data.build(split, **settings.data.model_dump()) for split in ("train", "val"))
    # Channels last halves the time of the convolutions on a CPU.
    net = model.build()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with Progress(console=Console(stderr=True)) as progress:
        fit(net, train_data, val_data, settings.train, progress)
    train_accuracy, train_loss = evaluate(net, train_data)
    val_accuracy, val_loss = evaluate(net, val_data)
    metrics: dict[str, float | int] = {
        "epochs": settings.train.epochs,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "train_accuracy": train_accuracy,
        "train_images": len(train_data),
        "train_loss": train_loss,
        "val_accuracy": val_accuracy,
        "val_images": len(val_data),
        "val_loss": val_loss,
    }
    rounded = {key: value if isinstance(value, int) else float(f"{value:.6g}") for key, value in metrics.items()}
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    write_bytes(folder / "float.safetensors", safetensors.torch.save(weights))
    write_json(folder / "metrics.json", {"train_float": rounded})
    return rounded


def fit(
    net: nn.Module, train_data: TensorDataset, val_data: TensorDataset, settings: TrainSettings, progress: Progress
) -> None:
    """SGD with Nesterov momentum under a one-cycle schedule; ``net`` is left in evaluation mode."""
    images, labels = train_data.tensors
    batch_size = min(settings.batch_size, len(images))
    steps = len(images) // batch_size
    # The schedule sets lr and momentum at every step.
    optimizer = torch.optim.SGD(
        net.parameters(), settings.lr, momentum=0.9, weight_decay=settings.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.epochs * steps)
    order = torch.Generator().manual_seed(settings.seed)
    task = progress.add_task("training", total=settings.epochs * steps)
    for epoch in range(settings.epochs):
        net.train()
        batches = torch.split(torch.randperm(len(images), generator=order), batch_size)[:steps]
        for step, batch in enumerate(batches):
            loss = _step(net, images[batch], labels[batch], optimizer)
            _refuse_non_finite(loss, epoch, step)
            schedule.step()
            progress.update(task, advance=1, description=f"epoch {epoch + 1}/{settings.epochs} loss {loss:.3f}")
        accuracy, loss = evaluate(net, val_data)
        progress.console.print(f"epoch {epoch + 1}: val accuracy {accuracy:.4f}, val loss {loss:.4f}", highlight=False)


def evaluate(net: nn.Module, dataset: TensorDataset, batch_size: int = 1000) -> tuple[float, float]:
    """Accuracy (0 to 1) and mean cross-entropy of ``net``, which is left in evaluation mode."""
    net.eval()
    hits, loss = 0, 0.0
    images, labels = dataset.tensors
    with torch.no_grad():
        for pixels, expected in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
            scores = net(pixels.contiguous(memory_format=torch.channels_last))
            hits += int((scores.argmax(1) == expected).sum())
            loss += float(F.cross_entropy(scores, expected, reduction="sum"))
    return hits / len(labels), loss / len(labels)


def _step(net: nn.Module, pixels: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(net(pixels.contiguous(memory_format=torch.channels_last)), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def _refuse_non_finite(loss: float, epoch: int, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            "QAT166", f"float training epoch {epoch + 1} step {step + 1}", f"the loss is {loss}", "Lower train.lr"
        )


if __name__ == "__main__":
    main()
