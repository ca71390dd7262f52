"""Commands on a Program, wherever it lies: golden vectors, dumps of devices, ONNX, its compiled form in time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from qatlib.cli.common import one_line_errors


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--inputs", "files", multiple=True, required=True, type=click.Path(path_type=Path),
              help=".npy of one input, batch first; once per input of the Program, in its order.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def golden(program: Path, files: tuple[Path, ...], out: Path) -> None:
    """Run the Program in folder PROGRAM and write its inputs and every op's integers."""
    from qatlib.golden.vectors import read_inputs, write_golden
    from qatlib.program import Program

    with one_line_errors(2):
        write_golden(Program.load(program), read_inputs(files), out)


@click.command("compare-dump")
@click.argument("dump", type=click.Path(path_type=Path))
@click.option("--golden", "golden_folder", required=True, type=click.Path(path_type=Path), help="Golden vectors.")
@click.option("--map", "map_file", type=click.Path(path_type=Path), help="YAML or JSON: device name to golden name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def compare_dump_command(dump: Path, golden_folder: Path, map_file: Path | None, as_json: bool) -> None:
    """Compare tensors that a device wrote to DUMP with golden vectors; exit 0 equal, 1 differs, 2 error."""
    from qatlib.golden import compare_dump
    from qatlib.golden.dump import load_map
    from qatlib.golden.view import show

    with one_line_errors(2):
        comparison = compare_dump(golden_folder, dump, load_map(map_file) if map_file else None)
    if as_json:
        click.echo(json.dumps(comparison.document(), indent=2, allow_nan=False))
    else:
        show(comparison)
    sys.exit(0 if comparison.equal else 1)


@click.command()
@click.argument("program_dir", type=click.Path())
@click.argument("path", type=click.Path())
@click.option("--flavour", type=click.Choice(["integer", "qdq"]), default="integer", show_default=True)
@click.option("--opset", type=int, help="ONNX operator set; the default is stated in the output.")
@click.option("--inputs", "files", multiple=True, type=click.Path(path_type=Path),
              help=".npy of one input to compare on, batch first; once per input, in their order.")  # fmt: skip
def export(program_dir: str, path: str, flavour: Any, opset: int | None, files: tuple[Path, ...]) -> None:
    """Write the Program in PROGRAM_DIR to PATH as ONNX, and run it beside the emulator on random inputs, or on yours.

    Exits with 1 if the integer flavour differs from the emulator anywhere but behind a float island.
    """
    with one_line_errors():
        from qatlib.export.trial import try_document
        from qatlib.golden.vectors import read_inputs

        lines, good = try_document(program_dir, path, flavour, opset, read_inputs(files))
        for line in lines:
            click.echo(line)
    sys.exit(0 if good else 1)


@click.command()
@click.argument("executable", default="artifacts/executable", type=click.Path(path_type=Path))
@click.option("--out", default="trace.json", show_default=True, type=click.Path(path_type=Path), help="File to write.")
def trace(executable: Path, out: Path) -> None:
    """Write what each unit does when, of the compiled Program in folder EXECUTABLE, for ui.perfetto.dev.

    Default: that of the last run.
    """
    with one_line_errors():
        from qatlib.compiler import Executable, write_trace
        from qatlib.compiler.perf import BASIS
        from qatlib.errors import CompileError

        if not (executable / "executable.json").exists():
            refused = (executable / "refused.json").exists()
            seen = "is of a Program that its target refuses" if refused else "holds no executable.json"
            fix = "See reports/compile_sim/refusals.json" if refused else "Run dvc repro, or name another folder"
            raise CompileError("QAT189", str(executable), seen, fix)
        performance = Executable.load(executable).performance
        write_trace(out, performance)
    click.echo(f"{out}: {performance.latency_us:.4g} µs on {performance.target}, an {BASIS}")
