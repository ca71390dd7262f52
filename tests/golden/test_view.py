"""What people and programs are told: the command, its tables and its JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from torch import nn

from qatlib.cli import main
from qatlib.conversion import convert_fx
from qatlib.golden import Golden, compare_dump, load_golden, write_golden
from qatlib.golden.view import show
from qatlib.program import Program
from tests.golden.planting import BATCH, channels_last, dump, parted
from tests.models import Written, calibrated, images


def test_the_commands_from_program_to_verdict(program: Program, golden: Golden, tmp_path: Path) -> None:
    program.save(tmp_path / "program")
    np.save(tmp_path / "x.npy", images(BATCH, seed=3).double().numpy())
    run = CliRunner().invoke
    made = run(main, ["golden", str(tmp_path / "program"), "--inputs", str(tmp_path / "x.npy"),
                      "--out", str(tmp_path / "golden")])  # fmt: skip
    assert made.exit_code == 0, made.output
    for name in ("values.safetensors", "manifest.json"):
        assert (tmp_path / "golden" / name).read_bytes() == (golden.folder / name).read_bytes()
    good = dump(golden, tmp_path / "good", {})
    bad = dump(golden, tmp_path / "bad", {"stem": channels_last(golden.tensors["stem"])})
    (good / "stem.npy").rename(good / "conv0.npy")
    (tmp_path / "map.yaml").write_text("conv0: stem\nconv9: add\n")
    asked = ["--golden", str(tmp_path / "golden")]
    equal = run(main, ["compare-dump", str(good), *asked, "--map", str(tmp_path / "map.yaml")])
    assert (equal.exit_code, "equal: 15 of 15" in equal.output) == (0, True), equal.output
    assert "names of the map that no file has: conv9" in equal.output
    differs = run(main, ["compare-dump", str(bad), *asked, "--json"])
    assert differs.exit_code == 1
    document = json.loads(differs.output)
    assert document["first"]["tensor"] == "stem"
    assert document["first"]["cause"]["kind"] == "layout"
    table = run(main, ["compare-dump", str(bad), *asked])
    assert (table.exit_code, "likely cause: layout" in table.output) == (1, True)
    error = run(main, ["compare-dump", str(tmp_path / "nowhere"), *asked])
    assert (error.exit_code, "QAT202" in error.output) == (2, True)
    refused = run(main, ["golden", str(tmp_path / "program"), "--inputs", str(tmp_path / "map.yaml"), "--out", "o"])
    assert (refused.exit_code, "QAT205" in refused.output) == (2, True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["x", "cat", "head.dequant"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_null_in_json(golden: Golden, tmp_path: Path, name: str, value: float) -> None:
    spoiled = golden.tensors[name].astype(np.float32)
    spoiled[0, 0] = value
    comparison = parted(golden, tmp_path, {name: spoiled})
    assert comparison.first is not None
    assert (comparison.first.tensor, comparison.first.cause.kind) == (name, "unknown")
    document: Any = json.loads(json.dumps(comparison.document(), allow_nan=False))
    if name == "x":
        assert document["statistics"]["x"]["device"]["mean"] is None


@pytest.mark.filterwarnings("error")
def test_garbage_warns_nobody(golden: Golden, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = {name: rng.bytes(x.nbytes) for name, x in golden.tensors.items()}
    assert not parted(golden, tmp_path, noise).equal


@pytest.mark.parametrize("name", ["head[cls]", "a[/b]"])
def test_names_are_shown_as_they_are_and_whole(tmp_path: Path, name: str) -> None:
    long = f"{name}_of_a_network_whose_modules_have_names_that_no_terminal_of_eighty_columns_holds"
    net = Written(lambda s, x: getattr(s, long)(x)).eval()
    net.add_module(long, nn.Linear(4, 4))
    x = images(2).flatten(1)[:, :4]
    write_golden(convert_fx(calibrated(net, x)).program, x, tmp_path / "golden")
    golden = load_golden(tmp_path / "golden")
    folder = tmp_path / "dump"
    folder.mkdir()
    np.save(folder / "renamed.npy", golden.tensors[long] + 1)
    comparison = compare_dump(golden.folder, folder, {"renamed": long})
    piped, narrow = io.StringIO(), io.StringIO()
    show(comparison, Console(file=piped))
    show(comparison, Console(file=narrow, width=80, force_terminal=True, color_system=None))
    assert f"│ {long} " in piped.getvalue()
    assert f"first difference: {long} (linear)" in piped.getvalue()
    assert "…" not in narrow.getvalue()
    cells = [line.split("│")[1].strip() for line in narrow.getvalue().splitlines() if line.startswith("│")]
    assert long in "".join(cells)
