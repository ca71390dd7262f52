"""Sentences as token ids, and the vectors that the float encoder gives them."""

from __future__ import annotations

from typing import Literal, TypedDict, get_args

from torch import Tensor
from torch.utils.data import Dataset

from examples.sentence_encoder.fetch import FOLDER
from qatlib.errors import DataError
from qatlib.pipeline.checkpoint import load_weights

Split = Literal["train", "calib", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SENTENCES = FOLDER / "sentences.safetensors"


class Target(TypedDict):
    """What the metrics need to know of a sentence.

    ``pair`` is the number of its pair within the split, ``side`` is 0 for the question and 1 for the answer, and
    ``float`` is the float encoder's vector ``[384]``.
    """

    pair: int
    side: int
    float: Tensor


class Sentences(Dataset[tuple[tuple[Tensor, Tensor], Target]]):
    """Items are ((token ids ``[32]`` int64, mask ``[32]`` int64), :class:`Target`): all questions, then all answers."""

    def __init__(self, ids: Tensor, mask: Tensor, vectors: Tensor) -> None:
        self.ids, self.mask, self.vectors = ids, mask, vectors

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Target]:
        side, pair = divmod(index, len(self.ids) // 2)
        return (self.ids[index], self.mask[index]), {"pair": pair, "side": side, "float": self.vectors[index]}


def build(split: Split) -> Sentences:
    """The sentences of ``train`` (38 pairs), ``calib`` (64), ``val`` (32) or ``test`` (96); none is in two splits.

    Raises CheckpointError QAT120 if they were not prepared, DataError QAT117 if the file is of another version, QAT119
    for another split.
    """
    if split not in SPLITS:
        raise DataError("QAT119", "split", f"is {split!r}", f"Use {', '.join(SPLITS)}")
    tensors = load_weights(SENTENCES)
    try:
        return Sentences(*(tensors[f"{split}.{part}"] for part in ("ids", "mask", "vectors")))
    except KeyError as error:
        raise DataError(
            "QAT117", str(SENTENCES), f"has no {error}", "Run python -m examples.sentence_encoder.prepare"
        ) from None


def pack(split: Split, ids: Tensor, mask: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """One split by the names that :func:`build` reads."""
    return {f"{split}.ids": ids, f"{split}.mask": mask, f"{split}.vectors": vectors}


_SLICES = {"test": slice(0, 96), "calib": slice(96, 160), "val": slice(160, 192), "train": slice(192, None)}


def cut(pairs: list[tuple[str, str]], split: Split) -> list[str]:
    """The sentences of one split: its questions, then its answers in the same order."""
    questions, answers = zip(*pairs[_SLICES[split]], strict=True)
    return [*questions, *answers]
