"""One stage in several processes: torchrun's launcher on this machine, and what each process does at its start.

Over several machines torchrun is called by hand, on each of them::

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m stages.qat

with ``runtime.processes: 8`` and the working copy on a disk that all of them see.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from qatlib.errors import StageError
from qatlib.pipeline.config import RuntimeParams

MESSAGES = "QATLIB_MESSAGES"
"""Environment variable: folder into which a process that :func:`launch` started writes why it failed."""
_PATIENCE = timedelta(days=1)
"""How long a process waits for another, which may be scoring the model."""


def is_worker() -> bool:
    """Whether torchrun, or :func:`launch`, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leads() -> bool:
    """Whether this process takes the lock of the stage: alone, or the first under a torchrun called by hand."""
    return not is_worker() or (int(os.environ["RANK"]) == 0 and MESSAGES not in os.environ)


def launch(module: str, processes: int, arguments: Sequence[str]) -> None:
    """Run ``python -m module arguments`` in that many processes here; ends this process as the first that failed."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL + 1)
    launcher = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()), max_restarts=0, monitor_interval=0.2, local_addr="localhost",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qatlib-") as folder:
        os.environ[MESSAGES] = folder
        try:
            elastic_launch(launcher, sys.executable)("-m", module, *arguments)
        except ChildFailedError as error:
            _end_as(folder, error.get_first_failure()[1].exitcode)
        except SignalException:
            sys.exit(143)
        finally:
            del os.environ[MESSAGES]


def report(message: str, exit_code: int) -> bool:
    """Leave the reason of a failure for :func:`launch`; False if it did not start this process."""
    folder = os.environ.get(MESSAGES)
    if folder is None or not is_worker() or not Path(folder).is_dir():
        return False
    (Path(folder) / f"{os.environ['RANK']}.{exit_code}").write_text(message, encoding="utf-8")
    return True


def _end_as(folder: str, exit_code: int) -> None:
    """End with the message of the process that failed first: what the others say is that they lost it."""
    said = sorted(Path(folder).iterdir(), key=lambda file: file.stat().st_mtime_ns)
    if not said:
        raise StageError(
            "QAT199", "runtime.processes", f"a process ended with exit code {exit_code}", "Look at what it printed"
        )
    sys.stderr.write(said[0].read_text(encoding="utf-8") + "\n")
    sys.exit(int(said[0].suffix[1:]))


@contextmanager
def joined(runtime: RuntimeParams) -> Iterator[None]:
    """Inside, this process belongs to the group of all; only the first prints.

    Raises StageError (QAT198) if torchrun started another number of processes than ``runtime.processes``.
    """
    import torch.distributed as dist

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world != runtime.processes:
        raise StageError(
            "QAT198",
            "runtime.processes",
            f"is {runtime.processes}, but torchrun started {world} processes",
            f"Set runtime.processes to {world}: results depend on it within float rounding",
        )
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    dist.init_process_group("gloo" if runtime.device == "cpu" else "cpu:gloo,cuda:nccl", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
