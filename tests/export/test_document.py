"""The document itself: names, shapes, metadata, files, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import qatlib
from qatlib.cli import main
from qatlib.conversion import to_program
from qatlib.errors import ProgramError
from qatlib.export import check_onnx, export_onnx
from qatlib.export.document import OLDEST_OPSET, OPSET, to_onnx
from qatlib.export.graph import Array
from qatlib.export.trial import try_document
from qatlib.ops.base import BY_KIND, BY_NAME, Operator
from qatlib.program import Op, Program, Value
from qatlib.qtype import FLOAT, QType
from tests.export.programs import metadata, program_of, run
from tests.kind_nets import IDS, NETS
from tests.models import calibrated, everything, images, model


@pytest.fixture(scope="module")
def bundled() -> Program:
    return program_of(everything(), images(8))


def program(shape: tuple[int, ...], out: tuple[int, ...], outputs: tuple[str, ...] = ("y",)) -> Program:
    """One reshape of int8 codes."""
    qtype = QType("int8", 0.5)
    op = Op("reshape", "y", ("x",), {"shape": [max(size, -1) for size in out]})
    return Program(("x",), outputs, (op,), {"x": Value("x", shape, qtype), "y": Value("y", out, qtype)}, {})


def test_tensors_have_the_names_dtypes_and_shapes_of_the_values(bundled: Program) -> None:
    document = to_onnx(bundled)
    graph = document.graph
    infos = {info.name: info.type.tensor_type for info in (*graph.input, *graph.output, *graph.value_info)}
    assert infos.keys() == bundled.values.keys()
    for name, value in bundled.values.items():
        sizes = [dim.dim_param or dim.dim_value for dim in infos[name].shape.dim]
        assert sizes == ["batch", *value.shape[1:]]
        assert onnx.helper.tensor_dtype_to_np_dtype(infos[name].elem_type) == np.dtype(value.qtype.dtype)
    assert [i.name for i in graph.input] == list(bundled.inputs)
    assert [o.name for o in graph.output] == list(bundled.outputs)
    names = [output for node in graph.node for output in node.output] + [i.name for i in graph.initializer]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("flavour", ["integer", "qdq"])
def test_the_document_says_what_it_is(bundled: Program, flavour: str) -> None:
    document = to_onnx(bundled, flavour)  # type: ignore[arg-type]
    told = metadata(document)
    assert document.opset_import[0].version == OPSET
    assert document.producer_name == "qatlib"
    assert (told["qatlib.schema"], told["qatlib.flavour"], told["qatlib.float_islands"]) == ("1", flavour, "[]")
    scales = {name: v.qtype.scale for name, v in bundled.values.items() if v.qtype.scale is not None}
    assert json.loads(told["qatlib.scales"]) == scales
    assert {node.domain for node in document.graph.node} == {""}


def test_islands_are_named(bundled: Program) -> None:
    kept = program_of(everything(), images(8), preserve=("smooth",))
    assert json.loads(metadata(to_onnx(kept))["qatlib.float_islands"]) == ["smooth"]


def test_the_same_program_gives_the_same_bytes(bundled: Program, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_onnx(bundled, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_size_may_be_a_multiple_of_the_batch(tmp_path: Path) -> None:
    net = program((-1, 12, 2), (-12, 2))
    document = export_onnx(net, tmp_path / "net.onnx")
    assert document.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "12*batch"
    x = torch.arange(72, dtype=torch.int8).reshape(3, 12, 2)
    assert check_onnx(net, tmp_path / "net.onnx", x) == {"x": 0, "y": 0}
    assert run(tmp_path / "net.onnx", x)[0].shape == (36, 2)


def test_an_input_may_be_an_output_and_an_output_come_twice(tmp_path: Path) -> None:
    net = program((-1, 4), (-1, 2, 2), outputs=("y", "x", "y"))
    document = export_onnx(net, tmp_path / "net.onnx")
    assert [o.name for o in document.graph.output] == ["y", "x"]
    assert check_onnx(net, tmp_path / "net.onnx", torch.ones(2, 4, dtype=torch.int8)) == {"x": 0, "y": 0}


def test_values_keep_their_names_where_helpers_want_them_too(tmp_path: Path) -> None:
    net = program((-1, 4), (-1, 2, 2))
    renamed = Program(
        ("x",), ("y",), (*net.ops[:0], Op("reshape", "constant", ("x",), net.ops[0].attrs),
                         Op("reshape", "y", ("constant",), {"shape": [-1, 4]})),
        {"x": net.values["x"], "constant": Value("constant", (-1, 2, 2), net.values["x"].qtype),
         "y": Value("y", (-1, 4), net.values["x"].qtype)}, {},
    )  # fmt: skip
    export_onnx(renamed, tmp_path / "net.onnx")
    assert set(check_onnx(renamed, tmp_path / "net.onnx", torch.ones(2, 4, dtype=torch.int8)).values()) == {0}


# -- refusals ----------------------------------------------------------------------------------------------------


def test_a_path_that_cannot_be_written_leaves_nothing(bundled: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "file" / "net.onnx"):
        with pytest.raises(ProgramError, match=r"QAT221 .*cannot be written"):
            export_onnx(bundled, path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_refused_export_leaves_the_old_file(bundled: Program, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_text("old")
    with pytest.raises(ProgramError, match="QAT223 opset: is 17"):
        export_onnx(bundled, tmp_path / "net.onnx", opset=17)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("net.onnx", "old")]


def test_flavour_and_opset_are_checked(bundled: Program, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"QAT223 flavour: is 'int4'. Use one of integer, qdq"):
        export_onnx(bundled, tmp_path / "net.onnx", "int4")  # type: ignore[arg-type]
    with pytest.raises(ProgramError, match=r"QAT223 opset: is 20. The flavour qdq can use 21"):
        export_onnx(bundled, tmp_path / "net.onnx", "qdq", opset=20)


@pytest.mark.parametrize("name", ["attention", "masks", "image pyramid"])
def test_the_oldest_opset_that_is_offered_has_every_operator(name: str, tmp_path: Path) -> None:
    net, oldest = NETS[name], OLDEST_OPSET["integer"]
    document = export_onnx(net.program(), tmp_path / "net.onnx", opset=oldest)
    assert document.opset_import[0].version == oldest
    assert set(check_onnx(net.program(), tmp_path / "net.onnx", net.inputs).values()) == {0}


@pytest.mark.parametrize("flavour", ["integer", "qdq"])
def test_a_document_beyond_protobuf_is_refused(
    bundled: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    monkeypatch.setattr("qatlib.export.document.LARGEST_CONSTANTS", 5000)
    with pytest.raises(ProgramError, match=r"QAT220 document: has 0.00 GiB of constants; .* ends at 2 GiB"):
        export_onnx(bundled, tmp_path / "net.onnx", flavour)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def formless() -> Iterator[str]:
    """Name of an operator that the Program can run and ONNX cannot; in the registry for one test alone."""

    class Formless(Operator):
        name = "formless_for_this_test"
        forward = BY_NAME["clamp"].forward
        kernel = BY_KIND["clamp"].kernel

    yield Formless.name
    del BY_NAME[Formless.name], BY_KIND[Formless.name]


def test_a_kind_without_onnx_form_is_named(formless: str) -> None:
    qtype = QType("int8", 0.5)
    values = {name: Value(name, (-1, 4), qtype) for name in ("x", "y")}
    op = Op(formless, "y", ("x",), {"lo": 0, "hi": 5})
    net = Program(("x",), ("y",), (op,), values, {})
    for flavour in ("integer", "qdq"):
        with pytest.raises(ProgramError, match=r"QAT220 y: .*formless_for_this_test"):
            to_onnx(net, flavour)  # type: ignore[arg-type]
    island = Op("float_op", "y", ("x",), {"operator": formless, "attrs": {"clamp": [0, None]}})
    net = Program(("x",), ("y",), (island,), {**values, "y": Value("y", (-1, 4), FLOAT)}, {})
    with pytest.raises(ProgramError, match="QAT220 y: operator 'formless_for_this_test' has no float ONNX form"):
        to_onnx(net)


def test_wrong_inputs_are_refused_as_the_emulator_does(bundled: Program, tmp_path: Path) -> None:
    export_onnx(bundled, tmp_path / "net.onnx")
    for inputs in ([images(1, size=8)], [images(1), images(1)], [images(1).to(torch.int8)]):
        with pytest.raises(ProgramError, match="QAT180"):
            check_onnx(bundled, tmp_path / "net.onnx", inputs)


@pytest.mark.parametrize("content", [b"", b"not onnx at all", None])
def test_a_file_that_is_no_document_cannot_be_checked(bundled: Program, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProgramError, match="QAT224"):
        check_onnx(bundled, path, images(1))


def test_a_document_of_another_program_is_refused(bundled: Program, tmp_path: Path) -> None:
    export_onnx(program((-1, 4), (-1, 2, 2)), tmp_path / "net.onnx")
    with pytest.raises(ProgramError, match=r"QAT224 .*has no tensor 'add'"):
        check_onnx(bundled, tmp_path / "net.onnx", images(1))


def test_without_onnx_the_error_says_what_to_install() -> None:
    script = "import sys; sys.modules['onnx'] = None; import qatlib; qatlib.export_onnx"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "QAT222 export: needs a package that is not installed (onnx). pip install 'qatlib[onnx]'." in done.stderr


# -- command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flavour", "line"), [("integer", "0 of "), ("qdq", "output head.dequant: ")])
def test_the_command_exports_and_compares(bundled: Program, tmp_path: Path, flavour: str, line: str) -> None:
    bundled.save(tmp_path / "program")
    done = CliRunner().invoke(
        main, ["export", str(tmp_path / "program"), str(tmp_path / "net.onnx"), "--flavour", flavour]
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"{flavour} flavour, opset {OPSET}" in done.stdout
    assert done.stdout.splitlines()[1].startswith(line)
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"), full_check=True)


def test_the_command_fails_in_one_line(bundled: Program, tmp_path: Path) -> None:
    bundled.save(tmp_path / "program")
    done = CliRunner().invoke(main, ["export", str(tmp_path / "program"), str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "QAT221" in done.stderr


def test_a_difference_outside_islands_fails(bundled: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled.save(tmp_path / "program")
    monkeypatch.setattr("qatlib.export.trial.check_onnx", lambda *_: {"stem": 3, "x": 0})
    lines, good = try_document(tmp_path / "program", tmp_path / "net.onnx")
    assert not good
    assert "  stem: 3 differ" in lines


def _logarithm() -> Program:
    """Random inputs make NaN of it."""
    net = model(lambda m, x: m.fc(torch.log(x)), fc=nn.Linear(6, 3))
    return to_program(calibrated(net, torch.rand(8, 6) + 0.1), ["log"])


def _ids_from_one() -> Program:
    """Random ids are 0 or 1; 0 is outside of the table."""
    net = model(lambda m, x: m.table(x - 1), table=nn.Embedding(6, 4))
    return to_program(calibrated(net, IDS + 1))


@pytest.mark.parametrize(
    ("make", "code", "good", "bad"),
    [
        (_logarithm, "QAT181", np.full((3, 6), 0.5), np.full((3, 6), -0.5)),
        (_ids_from_one, "QAT207", IDS.numpy() + 1, IDS.numpy() * 0),
    ],
)
def test_a_program_that_random_inputs_do_not_suit(
    make: Callable[[], Program], code: str, good: Array, bad: Array, tmp_path: Path
) -> None:
    def run(*options: str) -> Result:
        return CliRunner().invoke(main, ["export", str(tmp_path / "program"), str(tmp_path / "net.onnx"), *options])

    make().save(tmp_path / "program")
    np.save(tmp_path / "good.npy", good)
    np.save(tmp_path / "bad.npy", bad)
    by_chance = run()
    assert (by_chance.exit_code, by_chance.stderr) == (0, "")
    written, compared, *_ = by_chance.stdout.splitlines()
    assert "net.onnx: integer flavour" in written
    assert compared.startswith(f"written, but not compared on random inputs: {code} ")
    assert "--inputs" in by_chance.stdout
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"), full_check=True)
    given = run("--inputs", str(tmp_path / "good.npy"))
    assert given.exit_code == 0
    values = Program.load(tmp_path / "program").values.values()
    assert f" of {sum(value.elements(3) for value in values)} elements" in given.stdout
    unfit = run("--inputs", str(tmp_path / "bad.npy"))
    assert (unfit.exit_code, f"written, but not compared: {code} " in unfit.stdout) == (1, True)
    unread = run("--inputs", str(tmp_path / "none.npy"))
    assert (unread.exit_code, "QAT205" in unread.stderr) == (1, True)


def test_the_public_names(tmp_path: Path) -> None:
    net = program_of(model(lambda m, x: m.fc(x.flatten(1)), fc=nn.Linear(12, 3)), images(4, size=2))
    qatlib.export_onnx(net, tmp_path / "net.onnx")
    assert set(qatlib.check_onnx(net, tmp_path / "net.onnx", images(4, size=2)).values()) == {0}


def test_the_docs_say_how_every_kind_is_written() -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    table = page[page.index("## Flavour `integer`") : page.index("Signed by signed, because")]
    becomes = {"sub": "add", "div": "mul", "floor_divide": "refused", "masked_fill": "where"}  # no kinds of a Program
    kinds = {kind for kind, op in BY_KIND.items() if type(op).export is not Operator.export} - set(becomes)
    assert len(kinds) > 30
    assert {kind for kind in kinds if f"`{kind}`" not in table} == set()
