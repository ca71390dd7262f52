"""What surrounds the work of every stage: config, lock, scratch folder, one clear last line, no orphans.

A stage is a function of the config::

    @stage("calibrate")
    def main(config: Config) -> None: ...

    if __name__ == "__main__":
        main()

This module imports no torch.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import click
from filelock import FileLock, Timeout
from pydantic import BaseModel

from qatlib.errors import QatError, StageError
from qatlib.pipeline.config import load_config
from qatlib.pipeline.entry import describe
from qatlib.pipeline.launch import MESSAGES, is_worker, joined, launch, leads, report

STATE_FOLDER = ".qatlib"
"""Git-ignored folder of locks (in the working copy) and scratch files (in the main repository)."""
_SCRATCH_DAYS = 14
_WATCH_SECONDS = 0.3
_INIT_COMMAND = Path("/proc/1/cmdline")
_scratch: dict[str, tuple[Path, FileLock]] = {}


def stage(name: str, parallel: bool = False) -> Callable[[Callable[..., None]], click.Command]:
    """Decorator that makes a click command of ``function(config, **options)``.

    The command reads ``params.yaml``, takes the lock of the stage, and turns every failure into one message on stderr:
    exit code 1 for errors, 130 for Ctrl-C, 143 for SIGTERM. ``-v`` or ``QATLIB_VERBOSE=1`` shows the traceback.
    click options of ``function`` are kept. A ``parallel`` stage runs in ``runtime.processes`` processes, each of which
    calls ``function``.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(verbose: bool, **options: Any) -> None:
            with reported(name, verbose), dies_with_dvc():
                config = load_config()
                with lock(name) if leads() else nullcontext():
                    if parallel and is_worker():
                        with joined(config.runtime):
                            function(config, **options)
                    elif parallel and config.runtime.processes > 1:
                        launch(f"stages.{name}", config.runtime.processes, sys.argv[1:])
                    else:
                        function(config, **options)

        flag = click.option(
            "-v", "--verbose", is_flag=True, envvar="QATLIB_VERBOSE", help="Show the traceback of an error."
        )
        return click.command(name=name, help=function.__doc__)(flag(run))

    return decorate


@contextmanager
def reported(name: str, verbose: bool = False) -> Iterator[None]:
    """End the process with one message on stderr if the block fails."""
    try:
        yield
    except QatError as error:
        _end(str(error), 1, error, verbose)
    except KeyboardInterrupt as error:
        _end(f"stage {name} was interrupted; run it again to go on", 130, error, verbose)
    except _Terminated as error:
        _end(f"stage {name} was terminated, or the process that started it ended", 143, error, verbose)
    except Exception as error:
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        fix = "Lower the batch_size of this stage. " if out_of_memory else ""
        how = f"For the traceback run python -m stages.{name} -v, or set QATLIB_VERBOSE=1"
        _end(str(StageError("QAT199", f"stage {name}", describe(error), fix + how)), 1, error, verbose)


def _end(message: str, exit_code: int, error: BaseException, verbose: bool) -> NoReturn:
    sys.stdout.flush()
    if verbose:
        traceback.print_exception(error)
    if not report(message, exit_code):
        click.echo(message, err=True)
    sys.exit(exit_code)


# -- no orphans ------------------------------------------------------------------------------------------------


class _Terminated(SystemExit):
    """SIGTERM arrived; unwinds the stack so that temporary files are removed."""


def _terminate(signum: int, frame: object) -> NoReturn:
    raise _Terminated(143)


@contextmanager
def dies_with_dvc() -> Iterator[None]:
    """Inside, SIGTERM unwinds the stack; and where DVC started the process, it gets SIGTERM when DVC ends.

    DVC starts a stage through a shell, which may stay between them and outlive DVC; so a thread watches the whole line
    of ancestors up to DVC (own parent only where there is no ``/proc``). A stage started by hand
    (``nohup python -m stages.qat &``) outlives its shell; one of several processes does not outlive what started it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    done = threading.Event()
    try:
        if "DVC_STAGE" in os.environ or MESSAGES in os.environ:
            lineage = _lineage()
            if _adopted(lineage[-1]):
                raise _Terminated(143)
            threading.Thread(target=_watch, args=(lineage, done), daemon=True).start()
        yield
    finally:
        done.set()
        signal.signal(signal.SIGTERM, before)


def _watch(lineage: tuple[int, ...], done: threading.Event) -> None:
    while not done.wait(_WATCH_SECONDS):
        if _lineage() != lineage:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _lineage() -> tuple[int, ...]:
    """Process ids from the parent up to DVC, which is the first without DVC_STAGE in its environment."""
    line = [os.getppid()]
    while above := _parent_inside_stage(line[-1]):
        line.append(above)
    return tuple(line)


def _parent_inside_stage(pid: int) -> int:
    """Parent of ``pid`` if DVC started that too, else 0."""
    process = Path("/proc") / str(pid)
    try:
        environment = (process / "environ").read_bytes().split(b"\0")
        stat = (process / "stat").read_text()
    except OSError:
        return 0
    inside = any(item.startswith(b"DVC_STAGE=") for item in environment)
    return int(stat.rpartition(")")[2].split()[1]) if inside else 0


def _adopted(ancestor: int) -> bool:
    """Whether DVC ended before the watch began: init adopted what it left, and init does not run DVC."""
    try:
        command = _INIT_COMMAND.read_bytes()
    except OSError:
        return False
    return ancestor == 1 and b"dvc" not in command and b"python" not in command


# -- one run at a time -----------------------------------------------------------------------------------------


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the lock of stage ``name`` in this working copy; raise StageError QAT190 if another process has it."""
    folder = _state_folder(Path.cwd()) / "locks"
    folder.mkdir(exist_ok=True)
    guard, holder = FileLock(folder / f"{name}.lock"), folder / f"{name}.pid"
    try:
        guard.acquire(timeout=0)
    except Timeout:
        pid = holder.read_text() if holder.exists() else "unknown"
        raise StageError(
            "QAT190",
            f"stage {name}",
            f"is already running here as process {pid}",
            f"Wait for it, or end it: kill {pid}",
        ) from None
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        guard.release()


# -- going on where a run stopped ------------------------------------------------------------------------------


def fingerprint(**parts: Any) -> str:
    """Hash of everything that a resumed run must share with the one that stopped, and of the torch version.

    A ``Path`` stands for the bytes of a file or folder, a pydantic model for its values, a list or tuple for its
    items, anything else for its JSON. Raises StageError QAT192 for a missing file, TypeError for what is not JSON.
    """
    digest = hashlib.sha256(f"torch {version('torch')}".encode())
    for name in sorted(parts):
        digest.update(f"\0{name}\0".encode())
        _digest(digest, parts[name])
    return digest.hexdigest()[:32]


def _digest(digest: Any, part: Any) -> None:
    if isinstance(part, Path):
        for file in _files(part):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            inside = file.relative_to(part).as_posix() if file != part else ""
            digest.update(f"file {inside} {content}\n".encode())
    elif isinstance(part, BaseModel):
        digest.update(part.model_dump_json().encode())
    elif isinstance(part, list | tuple):
        for item in part:
            digest.update(b"item ")
            _digest(digest, item)
    else:
        digest.update(json.dumps(part, sort_keys=True).encode())


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise StageError("QAT192", str(path), "does not exist", "Run dvc repro, or correct the path in params.yaml")
    return sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def scratch_dir(fingerprint: str) -> Path:
    """Folder for checkpoints of a run that may be cut off; a later run with the same ``fingerprint`` finds them.

    It lies in the main repository, so ``dvc exp run --temp`` goes on too. If another process is using it, a private
    empty folder comes back, removed at exit. Folders untouched for 14 days are removed.
    """
    if fingerprint in _scratch:
        return _scratch[fingerprint][0]
    root = _state_folder(anchor()) / "scratch"
    root.mkdir(exist_ok=True)
    guard = FileLock(root / f"{fingerprint}.lock")
    try:
        guard.acquire(timeout=0)
        path = root / fingerprint
        path.mkdir(exist_ok=True)
    except Timeout:
        path = Path(tempfile.mkdtemp(prefix=f"{fingerprint}.", dir=root))
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    _scratch[fingerprint] = path, guard
    _prune(root, path)
    return path


def discard_scratch(fingerprint: str) -> None:
    """Remove the folder of :func:`scratch_dir` once the stage's outputs are written."""
    path, guard = _scratch.pop(fingerprint, (None, None))
    if path is not None and guard is not None:
        shutil.rmtree(path, ignore_errors=True)
        guard.release()


def anchor() -> Path:
    """Root of the repository that outlives this run: for a copy under ``.dvc/tmp/exps``, the repository around it."""
    here = Path.cwd().resolve()
    for parent in here.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    root = os.environ.get("DVC_ROOT")
    if root and here.is_relative_to(Path(root).resolve()):
        return Path(root).resolve()
    return here


def _prune(root: Path, keep: Path) -> None:
    oldest = time.time() - _SCRATCH_DAYS * 86400
    for folder in root.iterdir():
        if folder != keep and folder.is_dir() and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)


def _state_folder(base: Path) -> Path:
    folder = base / STATE_FOLDER
    folder.mkdir(exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    return folder
