"""Batches: reproducible order, resume, and a clear error for each way in which data can be unusable."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from qatlib.errors import ConfigError, DataError
from qatlib.pipeline.config import Config
from qatlib.pipeline.data import check_finite, fingerprint, loader, open_split


class Listed(Dataset[Any]):
    """Items given as a list; ``change`` stands for augmentation."""

    def __init__(self, items: list[Any], change: Callable[[Any], Any] = lambda item: item) -> None:
        self.items, self.change = items, change

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.change(self.items[index])


def tensors(items: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(items * 3, dtype=torch.float32).reshape(items, 3), torch.arange(items))


def listed(items: int = 10, change: Callable[[Any], Any] = lambda item: item) -> Listed:
    return Listed([tensors(items)[index] for index in range(items)], change)


def targets(batches: Any) -> list[list[int]]:
    return [target.tolist() for _, target in batches]


def flat(batches: Any) -> list[int]:
    return [label for batch in targets(batches) for label in batch]


def assert_equal(left: Any, right: Any) -> None:
    for (a, s), (b, t) in zip(left, right, strict=True):
        assert len(a) == len(b)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(s, t)


def test_file_order_without_a_seed() -> None:
    assert targets(loader(tensors(), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_order_depends_on_seed_and_epoch_only() -> None:
    first = targets(loader(tensors(), 4, 1, 0))
    torch.manual_seed(99)
    assert targets(loader(tensors(), 4, 1, 0)) == first
    assert targets(loader(tensors(), 4, 1, 1)) != first != targets(loader(tensors(), 4, 2, 0))
    assert sorted(label for batch in first for label in batch) == list(range(10))


def test_a_loader_repeats_itself() -> None:
    batches = loader(tensors(), 4, 1)
    assert targets(batches) == targets(batches)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 9])
def test_resume_gives_what_would_have_come(start: int) -> None:
    whole = list(loader(tensors(), 4, 5, 2))
    rest = loader(tensors(), 4, 5, 2, start_batch=start)
    assert len(rest) == len(whole[start:])
    assert_equal(list(rest), whole[start:])


def test_limit_counts_batches_of_the_epoch() -> None:
    assert targets(loader(tensors(), 4, limit=2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert targets(loader(tensors(), 4, limit=2, start_batch=1)) == [[4, 5, 6, 7]]


def test_augmentation_resumes_too_and_leaves_global_generators_alone() -> None:
    def augment(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return item[0] + torch.rand(3) + random.random() + float(np.random.rand()), item[1]

    dataset = listed(change=augment)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    whole = list(loader(dataset, 4, 5))
    after = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert after == (torch.rand(1).item(), random.random(), np.random.rand())
    assert_equal(list(loader(dataset, 4, 5, start_batch=1)), whole[1:])
    other_epoch = dict(zip(flat(loader(dataset, 4, 5, 1)), _rows(loader(dataset, 4, 5, 1)), strict=True))
    this_epoch = dict(zip(flat(whole), _rows(whole), strict=True))
    assert all(not torch.equal(this_epoch[label], other_epoch[label]) for label in range(10))


def _rows(batches: Any) -> list[Tensor]:
    return [row for (inputs,), _ in batches for row in inputs]


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(Subset(d, [9, 7, 5, 3, 1]), [4, 0, 2])])
def test_fast_path_equals_collation(wrap: Callable[[Any], Any]) -> None:
    assert_equal(list(loader(wrap(tensors()), 2, 3)), list(loader(wrap(listed()), 2, 3)))


def test_a_subclass_of_tensor_dataset_keeps_its_items() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            inputs, target = super().__getitem__(index)
            return inputs * 2, target

    ((inputs,), _) = next(iter(loader(Doubled(*tensors().tensors), 4)))
    assert torch.equal(inputs, tensors().tensors[0][:4] * 2)


def test_several_inputs_and_numpy() -> None:
    dataset = Listed([((np.zeros((2, 2), np.float32), torch.ones(3)), 1)] * 3)
    inputs, target = next(iter(loader(dataset, 2)))
    assert [list(value.shape) for value in inputs] == [[2, 2, 2], [2, 3]]
    assert target.tolist() == [1, 1]


GOOD = (torch.zeros(2), 0)


@pytest.mark.parametrize(
    ("items", "code", "expected"),
    [
        ([], "QAT110", "train data: is empty"),
        ([torch.zeros(2)], "QAT111", "train data item 0: is a Tensor; expected"),
        ([(torch.zeros(2), 0, 1)], "QAT111", "is a tuple of 3"),
        ([("a.png", 0)], "QAT111", "input 0 is a str"),
        ([(torch.zeros(2, dtype=torch.uint8), 0)], "QAT111", "input 0 is torch.uint8; expected float32 or int64"),
        ([GOOD, (torch.zeros(3), 0)], "QAT111", "item 1: has inputs of shape [3], item 0 of shape [2]"),
        ([GOOD, (torch.zeros(2), torch.zeros(2))], "QAT111", "targets: cannot be stacked"),
        ([GOOD, None], "QAT111", "item 1: is a NoneType"),
        ([GOOD, (torch.tensor([1.0, float("nan")]), 0)], "QAT112", "batch 0 item 1 input 0: 1 of 4 values"),
        ([GOOD, (torch.tensor([1.0, float("inf")]), 0)], "QAT112", "(0 NaN, 1 infinite)"),
    ],
)
def test_unusable_data(items: list[Any], code: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        list(loader(Listed(items), 2, split="train"))
    assert caught.value.code == code
    assert expected in str(caught.value)


def test_reading_an_item_that_raises_names_it() -> None:
    def fail(item: Any) -> Any:
        raise OSError("disk gone")

    with pytest.raises(
        DataError, match=r"QAT111 val data item 0: reading it raised OSError at .*test_data.py:\d+: disk"
    ):
        loader(listed(change=fail), 2, split="val")


def test_nan_names_the_item_of_the_dataset_in_the_fast_path() -> None:
    dataset = tensors()
    dataset.tensors[0][7, 1] = float("nan")
    with pytest.raises(DataError, match=r"QAT112 train data batch . item 7 input 0"):
        list(loader(dataset, 4, 1, split="train"))


def test_check_finite_without_indices() -> None:
    check_finite([torch.zeros(2, 2)], "val", 0)
    with pytest.raises(DataError, match=r"val data batch 3 item 1 input 1: 1 of 2"):
        check_finite([torch.zeros(2), torch.tensor([0.0, float("-inf")])], "val", 3)


def test_fingerprint_is_of_the_inputs() -> None:
    print_ = fingerprint(tensors(), 4)
    values = tensors().tensors[0][:4]
    assert print_.images == 4
    assert (print_.minimum, print_.maximum) == (0.0, 11.0)
    assert print_.mean == pytest.approx(float(values.mean()))
    assert print_.std == pytest.approx(float(values.std(correction=0)))
    assert fingerprint(listed(), 4) == print_
    assert fingerprint(tensors(), 5).sha256 != print_.sha256
    changed = tensors()
    changed.tensors[0][0, 0] = 1e-7
    assert fingerprint(changed, 4).sha256 != print_.sha256
    assert fingerprint(tensors(3), 100).images == 3


def config(factory: str, **kwargs: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"factory": "m:f", "checkpoint": "w", "code": "m.py"},
            "data": {"factory": factory, "kwargs": kwargs, "code": "d.py"},
        }
    )


def test_open_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_data.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset, DataLoader\n"
        "def build(split, size=3):\n"
        "    if split == 'nosuch': raise KeyError(split)\n"
        "    size = 0 if split == 'val' else size\n"
        "    return TensorDataset(torch.zeros(size, 2), torch.zeros(size))\n"
        "def iterable(split): return iter([1])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(open_split(config("user_data:build", size=5), "train")) == 5  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"QAT110 data.factory split 'val': is empty"):
        open_split(config("user_data:build"), "val")
    with pytest.raises(DataError, match=r"QAT111 .*expected a map-style Dataset"):
        open_split(config("user_data:iterable"), "val")
    with pytest.raises(
        ConfigError, match=r"QAT104 data.factory: user_data:build\('nosuch'\) raised KeyError at user_data"
    ):
        open_split(config("user_data:build"), "nosuch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"QAT105 data.kwargs.*did you mean 'size'"):
        open_split(config("user_data:build", sise=5), "train")
    sys.modules.pop("user_data")
