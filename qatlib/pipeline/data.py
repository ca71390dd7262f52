"""The user's data: opening a split, batches in a reproducible order, checks of what comes out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from qatlib.errors import ConfigError, DataError, QatError
from qatlib.pipeline.config import Config
from qatlib.pipeline.entry import call_entry, describe

Split = Literal["train", "calib", "val", "test"]
Batch = tuple[tuple[Tensor, ...], Any]
"""Inputs of the model, each ``[N, …]`` float32, and the collated target."""


def open_split(config: Config, split: Split, extra: Mapping[str, Any] = MappingProxyType({})) -> Dataset[Any]:
    """The user's dataset for ``split``, its length and first item checked; ``extra`` goes over ``data.kwargs``.

    Raises DataError QAT110 if it is empty, QAT111 if its items are not (input or tuple of inputs, target).
    """
    try:
        dataset = call_entry(config.data.factory, {**config.data.kwargs, **extra}, split, key="data")
    except ConfigError as error:
        if not extra or error.code not in ("QAT104", "QAT105"):
            raise
        raise ConfigError(error.code, f"qat.data_kwargs over {error.where}", error.seen, error.fix) from error
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            "QAT111",
            f"data.factory split {split!r}",
            f"returned a {type(dataset).__name__}; expected a map-style Dataset with __len__ and __getitem__",
            "Return a torch.utils.data.Dataset, not a DataLoader or an iterable",
        )
    if len(dataset) == 0:
        raise DataError("QAT110", f"data.factory split {split!r}", "is empty", "Check data.kwargs and the files read")
    _check_first(dataset, split)
    return dataset  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Loader:
    """Batches of a dataset; iterating it again gives the same batches again. Made by :func:`loader`.

    ``stride`` takes every so manieth batch, ``part`` (k, n) the rows k, k + n, … of each, all of a batch that has fewer
    than n: what one of several processes sees.
    """

    dataset: Dataset[Any]
    batch_size: int
    shuffle_seed: int | None
    epoch: int
    start_batch: int
    limit: int | None
    split: str
    stride: int = 1
    part: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        """Number of batches that iterating gives, those before ``start_batch`` not counted."""
        return len(self._numbers())

    def _numbers(self) -> range:
        total = -(-len(self.dataset) // self.batch_size)  # type: ignore[arg-type]
        return range(self.start_batch, total if self.limit is None else min(total, self.limit), self.stride)

    def __iter__(self) -> Iterator[Batch]:
        order = batch_order(len(self.dataset), self.shuffle_seed, self.epoch)  # type: ignore[arg-type]
        tensors = _tensors(self.dataset)
        for number in self._numbers():
            indices = order[number * self.batch_size : (number + 1) * self.batch_size]
            indices = dealt(indices, self.part)
            if tensors is not None:
                batch = _index(tensors, indices)
            else:
                with seeded(0):
                    batch = _collate(self.dataset, indices.tolist(), self.split, (self.shuffle_seed or 0, self.epoch))
            check_finite(batch[0], self.split, number, indices.tolist())
            yield batch


def loader(
    dataset: Dataset[Any],
    batch_size: int,
    shuffle_seed: int | None = None,
    epoch: int = 0,
    *,
    start_batch: int = 0,
    limit: int | None = None,
    split: str = "data",
    stride: int = 1,
    part: tuple[int, int] = (0, 1),
) -> Loader:
    """Batches of ``dataset`` in an order that depends on (``shuffle_seed``, ``epoch``) alone; None keeps file order.

    So a run that stopped goes on at ``start_batch`` with what would have come: random augmentation is seeded per item
    too (torch, numpy, random). The last batch may be smaller. ``limit`` ends after that many batches of the epoch.
    Iterating raises DataError QAT110 (empty), QAT111 (shapes and types) or QAT112 (NaN or infinity in the inputs).
    """
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise DataError("QAT110", f"{split} data", "is empty", "Check data.kwargs and the files read")
    _check_first(dataset, split)
    return Loader(dataset, batch_size, shuffle_seed, epoch, start_batch, limit, split, stride, part)


def dealt(indices: Tensor, part: tuple[int, int]) -> Tensor:
    """Of the indices of a batch those of process k of n, ``part``; all of them if there are fewer than n."""
    first, step = part
    return indices[first::step] if len(indices) >= step else indices


def batch_order(items: int, shuffle_seed: int | None, epoch: int) -> Tensor:
    """Indices of all items in the order in which they are visited: int64 ``[items]``."""
    if shuffle_seed is None:
        return torch.arange(items)
    return torch.randperm(items, generator=torch.Generator().manual_seed(mix(shuffle_seed, epoch)))


def check_finite(inputs: Sequence[Tensor], split: str, batch: int, indices: Sequence[int] | None = None) -> None:
    """Raise DataError QAT112 if an input holds NaN or infinity; ``indices`` are the items of the batch."""
    for position, tensor in enumerate(inputs):
        finite = torch.isfinite(tensor)
        if bool(finite.all()):
            continue
        row = int((~finite).flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else int((~finite).nonzero()[0])
        item = indices[row] if indices is not None else row
        nans, bad = int(torch.isnan(tensor).sum()), int((~finite).sum())
        raise DataError(
            "QAT112",
            f"{split} data batch {batch} item {item} input {position}",
            f"{bad} of {tensor.numel()} values of the batch are not finite ({nans} NaN, {bad - nans} infinite)",
            "Correct or drop those items; a division by a standard deviation of 0 is the usual cause",
        )


@dataclass(frozen=True)
class DataFingerprint:
    """What two runs must agree on to have seen the same inputs.

    Statistics are over all values of the floating-point inputs; 0 if there are none.
    """

    images: int
    sha256: str
    mean: float
    std: float
    minimum: float
    maximum: float


def fingerprint(dataset: Dataset[Any], images: int, split: str = "data") -> DataFingerprint:
    """Hash and statistics of the inputs of the first ``images`` items (fewer if there are fewer)."""
    digest, batch_size = hashlib.sha256(), 256
    items = min(images, len(dataset))  # type: ignore[arg-type]
    count, total, squares = 0, 0.0, 0.0
    low, high = float("inf"), float("-inf")
    for inputs, _ in loader(Subset(dataset, range(items)), batch_size, split=split):
        for tensor in inputs:
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
            if not tensor.is_floating_point():
                continue
            wide = tensor.double()
            count += tensor.numel()
            total += float(wide.sum())
            squares += float((wide * wide).sum())
            low, high = min(low, float(tensor.min())), max(high, float(tensor.max()))
    if not count:
        low = high = 0.0
    count = max(1, count)
    mean = total / count
    return DataFingerprint(items, digest.hexdigest(), mean, max(0.0, squares / count - mean * mean) ** 0.5, low, high)


def mix(*numbers: int) -> int:
    """A 63-bit seed that differs for each tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random generators of the CPU seeded inside, restored after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _tensors(dataset: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(inputs, targets, rows) of a plain TensorDataset or nested Subset of one; None if items must be fetched."""
    rows: Tensor | None = None
    while type(dataset) is Subset:
        own = torch.as_tensor(list(dataset.indices), dtype=torch.int64)
        rows = own if rows is None else own[rows]
        dataset = dataset.dataset
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return dataset.tensors[0], dataset.tensors[1], rows
    return None


def _index(tensors: tuple[Tensor, Tensor, Tensor | None], indices: Tensor) -> Batch:
    inputs, targets, rows = tensors
    picked = indices if rows is None else rows[indices]
    return (inputs[picked],), targets[picked]


def _item(dataset: Any, index: int, split: str) -> Any:
    try:
        return dataset[index]
    except QatError:
        raise
    except Exception as error:
        raise DataError(
            "QAT111", f"{split} data item {index}", f"reading it raised {describe(error)}", "Correct the dataset"
        ) from error


_INPUT_DTYPES = ("float32", "int64", "int32", "bool")


def _check_first(dataset: Any, split: str) -> None:
    with seeded(0):
        _split_item(_item(dataset, 0, split), split, 0)


def _split_item(item: Any, split: str, index: int) -> tuple[tuple[Any, ...], Any]:
    """(inputs, target) of one item, its structure checked."""

    def wrong(seen: str, fix: str) -> DataError:
        return DataError("QAT111", f"{split} data item {index}", seen, fix)

    if not isinstance(item, tuple | list) or len(item) != 2:
        seen = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, tuple | list | dict) else "")
        raise wrong(f"is {seen}; expected (input or tuple of inputs, target)", "Return a pair from __getitem__")
    inputs = tuple(item[0]) if isinstance(item[0], tuple | list) else (item[0],)
    for position, value in enumerate(inputs):
        if not isinstance(value, Tensor | np.ndarray):
            raise wrong(f"input {position} is a {type(value).__name__}; expected a tensor", "Add ToTensor or similar")
        if str(value.dtype).removeprefix("torch.") not in _INPUT_DTYPES:
            raise wrong(
                f"input {position} is {value.dtype}; expected {' or '.join(_INPUT_DTYPES)}",
                "Convert and normalize it in the dataset; integers are for indices such as tokens",
            )
    return inputs, item[1]


def _collate(dataset: Any, indices: list[int], split: str, seeds: tuple[int, int]) -> Batch:
    items = []
    for index in indices:
        _seed(mix(*seeds, index))
        items.append(_split_item(_item(dataset, index, split), split, index))
    first = [tuple(value.shape) for value in items[0][0]]
    for index, (inputs, _) in zip(indices, items, strict=True):
        shapes = [tuple(value.shape) for value in inputs]
        if shapes != first:
            raise DataError(
                "QAT111",
                f"{split} data item {index}",
                f"has inputs of shape {_shapes(shapes)}, item {indices[0]} of shape {_shapes(first)}",
                "Resize or crop all items to one shape",
            )
    columns = zip(*(inputs for inputs, _ in items), strict=True)
    inputs = tuple(default_collate(list(values)) for values in columns)
    try:
        return inputs, default_collate([target for _, target in items])
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            "QAT111", f"{split} data targets", f"cannot be stacked: {error}", "Return targets of one type and shape"
        ) from None


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)
