"""Make the float model of the pipeline: ``python -m examples.efficientnet_lite0.prepare`` in the project root.

Writes beside this file ``float.safetensors`` (the published weights by the names of ``model.py``),
``reference.safetensors`` (the float logits of every input) and ``metrics.json``.
"""

from __future__ import annotations

import click
import torch
from torch import Tensor, nn

from examples.efficientnet_lite0 import data, model
from examples.efficientnet_lite0.fetch import DOWNLOADS, FOLDER, WEIGHTS, require_downloads
from qatlib.errors import QatError
from qatlib.pipeline.checkpoint import load_into, load_weights, save_tensors
from qatlib.pipeline.metrics import Accuracy, write_metrics

CHECKPOINT = FOLDER / "float.safetensors"
METRICS = FOLDER / "metrics.json"
_BATCH = 16


@click.command()
def main() -> None:
    """Convert the published weights and run the float model over every input."""
    torch.set_num_threads(1)
    try:
        for name, value in prepare().items():
            click.echo(f"{name}: {value:.4g}")
    except QatError as error:
        raise click.ClickException(str(error)) from error


def prepare() -> dict[str, float | int]:
    """Write the three files; return the metrics. Raises DataError QAT116 if the files were not fetched."""
    require_downloads()
    save_tensors(CHECKPOINT, model.from_published(load_weights(DOWNLOADS / WEIGHTS)))
    net = float_model()
    splits = {split: data.inputs(split) for split in data.SPLITS}
    logits: dict[str, Tensor] = {split: run(net, images) for split, (images, _) in splits.items()}
    labels = torch.tensor(splits["test"][1])
    published = len(data.photographs("test"))
    metrics: dict[str, float | int] = {
        "label_accuracy": accuracy(logits["test"], labels),
        "label_accuracy_published_view": accuracy(logits["test"][:published], labels[:published]),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "photographs": published,
        **{f"{split}_images": len(images) for split, (images, _) in splits.items()},
    }
    save_tensors(data.REFERENCE, logits)
    write_metrics(METRICS, "float", metrics)
    return metrics


def float_model() -> nn.Module:
    """The network with its published weights, in evaluation mode; raises CheckpointError QAT120 if there are none."""
    net = model.build()
    load_into(net, CHECKPOINT)
    return net.eval()


def run(net: nn.Module, images: Tensor) -> Tensor:
    """Logits ``[N, 1000]``."""
    with torch.no_grad():
        return torch.cat([net(batch) for batch in torch.split(images, _BATCH)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of ``labels`` with the highest logit."""
    metric = Accuracy()
    metric.update(logits, labels)
    return metric.compute()


if __name__ == "__main__":
    main()
