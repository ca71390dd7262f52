"""Make the float model of the pipeline: ``python -m examples.sentence_encoder.prepare`` in the project root.

Writes beside this file ``float.safetensors`` (the published weights by the names of ``model.py``),
``sentences.safetensors`` (token ids, masks and the float vectors of every sentence) and ``metrics.json``.
"""

from __future__ import annotations

from collections.abc import Sequence

import click
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from examples.sentence_encoder import data, model
from examples.sentence_encoder.fetch import DOWNLOADS, FOLDER, TEXT, require_downloads
from examples.sentence_encoder.metric import Recall
from examples.sentence_encoder.text import read_pairs
from qatlib.errors import DataError, QatError
from qatlib.pipeline.checkpoint import load_into, load_weights, save_tensors
from qatlib.pipeline.metrics import write_metrics

CHECKPOINT = FOLDER / "float.safetensors"
METRICS = FOLDER / "metrics.json"
_BATCH = 32


@click.command()
def main() -> None:
    """Convert the published weights, tokenize the sentences and run the float model over them."""
    torch.set_num_threads(1)
    try:
        for name, value in prepare().items():
            click.echo(f"{name}: {value:.4g}")
    except QatError as error:
        raise click.ClickException(str(error)) from error


def prepare() -> dict[str, float | int]:
    """Write the three files; return the metrics. Raises DataError QAT116 if the files were not fetched."""
    require_downloads()
    save_tensors(CHECKPOINT, model.from_published(load_weights(DOWNLOADS / "model.safetensors")))
    net = float_model()
    pairs = read_pairs(DOWNLOADS / TEXT.file)
    tensors: dict[str, Tensor] = {}
    for split in data.SPLITS:
        ids, mask = tokenize(data.cut(pairs, split))
        tensors |= data.pack(split, ids, mask, encode(net, ids, mask))
    save_tensors(data.SENTENCES, tensors)
    metrics: dict[str, float | int] = {
        "pairs": len(pairs),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "recall_at_1": recall(data.build("test")),
        **{f"{split}_sentences": len(tensors[f"{split}.ids"]) for split in data.SPLITS},
    }
    write_metrics(METRICS, "float", metrics)
    return metrics


def tokenize(sentences: Sequence[str], length: int = model.LENGTH) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each ``[N, length]`` int64; raises DataError QAT116 if tokenizers is not installed."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError("QAT116", "tokenizers", "is not installed", "Run pip install -e '.[examples]'") from None
    tokenizer = Tokenizer.from_file(str(DOWNLOADS / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(sentences))
    return torch.tensor([item.ids for item in encoded]), torch.tensor([item.attention_mask for item in encoded])


def float_model() -> nn.Module:
    """The encoder with its published weights, in evaluation mode; raises CheckpointError QAT120 if there are none."""
    net = model.build()
    load_into(net, CHECKPOINT)
    return net.eval()


def encode(net: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Vectors ``[N, 384]``."""
    with torch.no_grad():
        batches = zip(torch.split(ids, _BATCH), torch.split(mask, _BATCH), strict=True)
        return torch.cat([net(*batch) for batch in batches])


def recall(sentences: data.Sentences) -> float:
    """Recall at 1 of the float encoder."""
    metric = Recall()
    targets = [sentences[index][1] for index in range(len(sentences))]
    metric.update(sentences.vectors, default_collate(targets))
    return metric.compute()


if __name__ == "__main__":
    main()
