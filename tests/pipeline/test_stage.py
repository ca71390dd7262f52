"""What surrounds a stage: exit codes and last lines, orphans, locks, fingerprints, scratch folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from qatlib.errors import DataError, StageError
from qatlib.pipeline import stage as module
from qatlib.pipeline.config import CalibrateParams, Config
from qatlib.pipeline.stage import anchor, discard_scratch, fingerprint, lock, scratch_dir, stage

ROOT = Path(__file__).parents[2]
PARAMS = 'model: {factory: "m:build", checkpoint: w.pt, code: m.py}\ndata: {factory: "d:build", code: d.py}\n'
STAGE = """
import os, sys, time
from pathlib import Path
from qatlib.atomic import atomic_path
from qatlib.pipeline.stage import stage

@stage("slow")
def main(config):
    with atomic_path("out.bin") as temporary:
        temporary.write_bytes(b"half")
        Path("started").write_text(str(os.getpid()))
        time.sleep(60)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working copy with a params.yaml and a stage that takes a minute, as current folder."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "slow_stage.py").write_text(STAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    yield tmp_path
    for key in list(module._scratch):
        discard_scratch(key)


def run(body: Callable[[Config], None], *arguments: str) -> Result:
    return CliRunner().invoke(stage("demo")(body), arguments)


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


def start(folder: Path, **extra: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "slow_stage"], cwd=folder, env=environment(**extra), stderr=subprocess.PIPE, text=True
    )
    until(lambda: (folder / "started").exists() or process.poll() is not None)
    return process


# -- the command -------------------------------------------------------------------------------------------------


def test_a_stage_gets_its_config(project: Path) -> None:
    seen: list[Config] = []
    result = run(seen.append)
    assert result.exit_code == 0
    assert result.output == ""
    assert seen[0].qat.epochs == 2


def test_click_options_are_kept(project: Path) -> None:
    @stage("demo")
    @click.option("--target", required=True)
    def main(config: Config, target: str) -> None:
        click.echo(target)

    assert CliRunner().invoke(main, ["--target", "bayes"]).output == "bayes\n"


def test_config_errors_come_first(project: Path) -> None:
    (project / "params.yaml").write_text(PARAMS + "qat: {epochs: -1}\n")
    result = run(lambda config: pytest.fail("the stage ran"))
    assert result.exit_code == 1
    assert result.stderr.startswith("QAT101 params.yaml: 1 problem\n  qat.epochs: -1")


def test_user_error_is_one_line_and_traceback_only_when_asked(project: Path) -> None:
    def body(config: Config) -> None:
        raise DataError("QAT110", "val data", "is empty", "Fill it")

    result = run(body)
    assert result.exit_code == 1
    assert result.stderr == "QAT110 val data: is empty. Fill it.\n"
    verbose = run(body, "-v")
    assert verbose.stderr.startswith("Traceback")
    assert verbose.stderr.splitlines()[-1] == "QAT110 val data: is empty. Fill it."
    assert CliRunner(env={"QATLIB_VERBOSE": "1"}).invoke(stage("demo")(body), []).stderr.startswith("Traceback")


def test_unexpected_error_is_one_line_with_place(project: Path) -> None:
    (project / "user_code.py").write_text("def go():\n    return {}['key']\n")

    def body(config: Config) -> None:
        namespace: dict[str, Any] = {}
        path = Path("user_code.py").resolve()
        exec(compile(path.read_text(), str(path), "exec"), namespace)
        namespace["go"]()

    result = run(body)
    assert result.exit_code == 1
    assert result.stderr.startswith("QAT199 stage demo: KeyError at user_code.py:2: 'key'. For the traceback run")
    assert "python -m stages.demo -v" in result.stderr
    assert result.stderr.count("\n") == 1


def test_out_of_memory_says_what_to_lower(project: Path) -> None:
    def body(config: Config) -> None:
        raise MemoryError

    assert "Lower the batch_size" in run(body).stderr


def test_interrupt(project: Path) -> None:
    def body(config: Config) -> None:
        raise KeyboardInterrupt

    result = run(body)
    assert result.exit_code == 130
    assert result.stderr == "stage demo was interrupted; run it again to go on\n"


def test_handlers_are_restored(project: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run(lambda config: None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_importing_the_wrapper_imports_no_torch() -> None:
    script = "import sys, qatlib.pipeline.stage; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


# -- no orphans --------------------------------------------------------------------------------------------------


def test_sigterm_cleans_up_and_says_so(project: Path) -> None:
    process = start(project)
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors == "stage slow was terminated, or the process that started it ended\n"
    assert not list(project.glob("*.tmp")) + list(project.glob(".*.tmp")) + list(project.glob("out.bin"))


PARENT = """
import os, subprocess, sys, time
command = [sys.executable, "-m", "slow_stage"]
how = sys.argv[1]
if how == "through a shell":
    command = ["/bin/sh", "-c", f"{sys.executable} -m slow_stage; true"]
environment = dict(os.environ) if how == "by hand" else {**os.environ, "DVC_STAGE": "slow"}
subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", ["directly", "through a shell", "by hand"])
def test_a_stage_dies_with_dvc_but_outlives_a_shell(project: Path, how: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, how], cwd=project, env=environment())
    until(lambda: (project / "started").exists() and (project / "started").read_text())
    child = int((project / "started").read_text())
    parent.kill()
    parent.wait()
    try:
        if how == "by hand":
            time.sleep(1)
            assert alive(child)
            return
        until(lambda: not alive(child))
        assert not list(project.glob(".*.tmp"))
        with lock("slow"):
            pass
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)


def test_a_stage_whose_dvc_ended_before_it_could_watch(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "init").write_bytes(b"/sbin/init\0")
    monkeypatch.setenv("DVC_STAGE", "demo")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(module, "_INIT_COMMAND", project / "init")
    result = run(lambda config: pytest.fail("the stage ran"))
    assert result.exit_code == 143


def test_dvc_may_be_process_1_of_a_container(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "init").write_bytes(b"/usr/bin/python3\0/usr/bin/dvc\0repro\0")
    monkeypatch.setenv("DVC_STAGE", "demo")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(module, "_INIT_COMMAND", project / "init")
    assert run(lambda config: None).exit_code == 0


# -- locks -------------------------------------------------------------------------------------------------------


def test_a_second_run_of_the_stage_is_refused_with_the_pid(project: Path) -> None:
    process = start(project)
    try:
        with pytest.raises(StageError) as caught, lock("slow"):
            pass
        assert caught.value.code == "QAT190"
        assert f"already running here as process {process.pid}" in str(caught.value)
        with lock("other"):
            pass
    finally:
        process.kill()
        process.communicate()
    with lock("slow"):
        assert (project / ".qatlib" / "locks" / "slow.pid").read_text() == str(os.getpid())


def test_the_state_folder_ignores_itself(project: Path) -> None:
    subprocess.run(["git", "init", "-q"], check=True, cwd=project)
    with lock("demo"):
        scratch_dir("abc")
    status = subprocess.run(
        ["git", "status", "--short", "-uall"], check=True, cwd=project, capture_output=True, text=True
    ).stdout
    assert ".qatlib" not in status
    assert "params.yaml" in status


# -- fingerprint and scratch -------------------------------------------------------------------------------------


def test_fingerprint_depends_on_each_part(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    (tmp_path / "w").write_bytes(b"2")

    def of(**changed: Any) -> str:
        parts = {
            "code": tmp_path / "code",
            "files": [tmp_path / "w"],
            "calibrate": CalibrateParams(),
            "extra": {"a": 1},
        }
        return fingerprint(**{**parts, **changed})

    first = of()
    assert of() == first
    assert of(calibrate=CalibrateParams(batches=3)) != first
    assert of(extra={"a": 2}) != first
    assert of(files=[]) != first
    assert of(other=None) != first
    (tmp_path / "code" / "__pycache__").mkdir()
    (tmp_path / "code" / "__pycache__" / "a.pyc").write_text("x")
    assert of() == first
    (tmp_path / "w").write_bytes(b"3")
    assert of() != first
    (tmp_path / "w").write_bytes(b"2")
    (tmp_path / "code" / "a.py").rename(tmp_path / "code" / "b.py")
    assert of() != first


def test_fingerprint_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"QAT192 .*none.pt: does not exist"):
        fingerprint(weights=tmp_path / "none.pt")


def test_scratch_is_found_again_and_discarded(project: Path) -> None:
    (scratch_dir("abc") / "step").write_text("7")
    module._scratch.pop("abc")[1].release()
    assert (scratch_dir("abc") / "step").read_text() == "7"
    assert not (scratch_dir("other") / "step").exists()
    discard_scratch("abc")
    assert not (project / ".qatlib" / "scratch" / "abc").exists()


def test_scratch_in_use_gives_a_private_folder(project: Path) -> None:
    script = "import sys, qatlib.pipeline.stage as s; p = s.scratch_dir('abc'); (p / 'x').write_text(''); print(p)"
    own = scratch_dir("abc")
    other = subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment(), capture_output=True, text=True
    ).stdout.strip()
    assert Path(other) != own
    assert not Path(other).exists()
    assert list(own.iterdir()) == []


def test_old_scratch_is_pruned(project: Path) -> None:
    for name, days in (("old", 15), ("new", 13)):
        folder = project / ".qatlib" / "scratch" / name
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - days * 86400,) * 2)
    scratch_dir("abc")
    assert {path.name for path in (project / ".qatlib" / "scratch").iterdir() if path.is_dir()} == {"new", "abc"}


def test_anchor(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = project / ".dvc" / "tmp" / "exps" / "standalone" / "tmpx" / "sub"
    copy.mkdir(parents=True)
    assert anchor() == project
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    assert anchor() == project
    (project / "models").mkdir()
    monkeypatch.chdir(project / "models")
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert anchor() == project
    monkeypatch.chdir(copy)
    monkeypatch.delenv("DVC_ROOT")
    assert anchor() == project
