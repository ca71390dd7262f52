"""What the first process does alone, in two processes that talk to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from qatlib.errors import TrainingError
from qatlib.fake.distributed import rank, share
from qatlib.fake.epochs import Scores
from qatlib.fake.model import FakeQuantModel
from tests.fake.training import batches, score, trainer

Task = Callable[[], str]


def _process(number: int, folder: Path, task: Task) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        (folder / str(number)).write_text(task())
    finally:
        dist.destroy_process_group()


def in_two(folder: Path, task: Task) -> list[str]:
    """What ``task`` says in each of two processes."""
    multiprocessing.spawn(_process, (folder, task), nprocs=2)  # type: ignore[no-untyped-call]
    return [(folder / str(number)).read_text() for number in range(2)]


def _raised(make: Callable[[], Any]) -> str:
    try:
        share(make)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


def _of_qatlib() -> Any:
    raise TrainingError("QAT168", "score", "is NaN", "Lower qat.lr")


def _of_the_user() -> Any:
    raise ZeroDivisionError("metric of nothing")


def _errors_then_a_value() -> str:
    return "|".join([_raised(_of_qatlib), _raised(_of_the_user), str(share(lambda: 3 + rank()))])


def test_what_the_first_raises_is_raised_in_all(tmp_path: Path) -> None:
    first, second = (said.split("|") for said in in_two(tmp_path, _errors_then_a_value))
    assert first[0] == second[0] == "TrainingError QAT168 score: is NaN. Lower qat.lr."
    assert first[1] == "ZeroDivisionError metric of nothing"
    assert second[1].startswith("StageError QAT199 the first process: raised ZeroDivisionError: metric of nothing.")
    assert first[2] == second[2] == "3", "and they go on together"


def _own_rows(epoch: int, first: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    for (points,), labels in batches(epoch, first):
        yield (points[rank() :: 2],), labels[rank() :: 2]


def _rewound() -> str:
    calls: list[int] = []

    def fails_once(model: FakeQuantModel) -> Scores:
        calls.append(1)
        if len(calls) == 2:
            _of_qatlib()
        return score(model)

    notes: list[str] = []
    one = trainer(batches=_own_rows, score=fails_once, on_nan="rewind", note=notes.append)
    done = one.run()
    weights = sum(float(p.detach().double().sum()) for p in one.model.parameters())
    return f"{done.rewinds} {weights!r} {len(done.history)} {notes[0][:14]}"


def test_all_go_back_where_the_first_meets_a_nan(tmp_path: Path) -> None:
    first, second = in_two(tmp_path, _rewound)
    assert first == second
    assert first.startswith("1 ")
    assert " 4 QAT168 score" in first


@pytest.mark.parametrize("make", [_of_qatlib, _of_the_user])
def test_alone_it_is_the_error_itself(make: Callable[[], Any]) -> None:
    with pytest.raises((TrainingError, ZeroDivisionError)):
        share(make)
