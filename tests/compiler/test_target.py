"""Target files: what is read, what is refused, and how the refusal reads."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from qatlib.compiler import load_target, shipped_targets
from qatlib.compiler.yaml_file import MAX_BYTES
from qatlib.errors import CompileError
from tests.compiler.compiler_nets import tiny, tiny_document


def dump(document: Any) -> str:
    out = io.StringIO()
    YAML(typ="safe", pure=True).dump(document, out)
    return out.getvalue()


def refusal(folder: Path, content: str | bytes) -> str:
    path = folder / "target.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CompileError) as caught:
        load_target(path)
    assert caught.value.code == "QAT183"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _tables(**more: Any) -> dict[str, Any]:
    return {"lookups_per_cycle": {"int8": 4}, **more}


def _interleaved(size: int) -> dict[str, Any]:
    return {"count": 2, "bytes_per_cycle": 8, "interleave_bytes": size}


def test_shipped_targets_load_by_name_and_by_path() -> None:
    own, arm = ("bayes-like", "bernoulli-like", "nash-like"), ("u55-256", "u85-256", "u85-512")
    assert shipped_targets() == (*own[:2], *(f"ethos-{name}-like" for name in arm), own[2])
    for name in shipped_targets():
        target = load_target(name)
        assert target.name == name
        assert ("illustrative" if name in own else "not silicon") in target.source
    assert load_target("bayes-like").mac_array.slowdown("int16") == 4
    assert load_target("bernoulli-like").mac_array.slowdown("int16") is None
    assert load_target("qatlib/targets/bayes-like.yaml") == load_target("bayes-like")


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("bernoulli-like", 2048), ("bayes-like", 4096), ("nash-like", 32768), ("ethos-u55-256-like", 256),
        ("ethos-u85-256-like", 256), ("ethos-u85-512-like", 512),
    ],
)  # fmt: skip
def test_the_arrays_have_the_macs_that_they_are_named_for(name: str, macs: int) -> None:
    assert load_target(name).mac_array.peak == macs


def test_every_value_of_a_shipped_target_states_its_source() -> None:
    for name in shipped_targets():
        lines = Path(f"qatlib/targets/{name}.yaml").read_text().split("\nops:")[0].splitlines()
        numbers = [line for line in lines if re.search(r": .*[0-9]", line.split("#")[0]) and "source:" not in line]
        assert len(numbers) > 12
        for line in numbers:
            known = ("illustrative", "JEDEC", "vela.ini", "model", "ours")
            assert line.startswith("name:") or any(word in line.partition("#")[2] for word in known), line


def test_a_written_target_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump(tiny_document()))
    assert load_target(path) == tiny()
    assert tiny().dram_bytes_per_cycle == 4.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: &x [1]\nb: *x\n", "anchor"),
        ("a: *x\n", "alias"),
        ("name: !!python/object/apply:os.system [id]\n", "tag"),
        ("name: !mine x\n", "tag"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: [1, 2\n", "not valid YAML"),
        ("[" * 50, "nested deeper"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a: 2020-13-45\n", "cannot express"),
        (f"a: {'9' * 5000}\n", "cannot express"),
        (b"\xff\xfe\xff", "not UTF-8"),
        ("x" * (MAX_BYTES + 1), "larger than"),
        ("a: \x00\n", "not valid YAML"),
        ("", "valid dictionary"),
        ("- 1\n", "valid dictionary"),
    ],
)
def test_hostile_yaml_is_one_line(tmp_path: Path, content: str | bytes, says: str) -> None:
    assert says in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("clock_hz", 0.0, "clock_hz: Input should be greater than or equal to 0.000000001, not 0.0"),
        ("clock_hz", float("inf"), "clock_hz"),
        ("clock_hz", float("nan"), "clock_hz"),
        ("clock_hz", "1e9", "clock_hz: Input should be a valid number, not '1e9'"),
        ("sram.bytes_per_cycle", 1e-320, "sram.bytes_per_cycle: Input should be greater than or equal to"),
        ("sram.bytes", 0, "sram.bytes: Input should be greater than 0, not 0"),
        ("sram.bytes", 65537, "multiple of alignment"),
        ("sram.bytes_per_cycle", 0, "sram.bytes_per_cycle"),
        ("sram.alignment", 24, "power of two"),
        ("sram.alignment", 2, "sram.alignment"),
        (
            "sram.banks",
            {"count": 0, "bytes_per_cycle": 8},
            "sram.banks.count: Input should be greater",
        ),
        (
            "sram.banks",
            {"count": 4096, "bytes_per_cycle": 8},
            "sram.banks.count: Input should be less than",
        ),
        ("sram.banks", {"count": 2}, "sram.banks.bytes_per_cycle: Field required"),
        (
            "sram.banks",
            {"count": 2, "bytes_per_cycle": 0},
            "sram.banks.bytes_per_cycle: Input should be",
        ),
        ("sram.banks", {"count": 3, "bytes_per_cycle": 8}, "which is not 3 banks of whole alignment (16)"),
        ("sram.banks", _interleaved(0), "sram.banks.interleave_bytes: Input should be greater than 0, not 0"),
        ("sram.banks", _interleaved(48), "which is not 2 banks of whole interleave_bytes (48)"),
        ("dram.bytes_per_s", 0, "dram.bytes_per_s"),
        ("dram.read_latency_cycles", -1, "dram.read_latency_cycles"),
        ("dram.latency_cycles", 10, "dram.latency_cycles: unknown key"),
        ("buffers.shared_bytes", 4096, "shared_bytes or input_bytes and accumulator_bytes, not both"),
        ("buffers.input_bytes", None, "give input_bytes and accumulator_bytes, or shared_bytes"),
        ("buffers.max_block", [8, 8], "buffers.max_block"),
        ("launch_cycles", True, "launch_cycles"),
        ("multiplier_bits", 22, "multiplier_bits"),
        ("multiplier_bits", 7, "multiplier_bits"),
        ("mac_array.tiles", [], "mac_array.tiles"),
        ("mac_array.tiles", [[1, 0, 16]], "mac_array.tiles.0.1"),
        ("mac_array.depth_first.channels", 1.5, "mac_array.depth_first.channels"),
        ("mac_array.depth_first", None, "mac_array.depth_first: Field required"),
        ("vector_unit.operations", {"sine": 1.0}, "vector_unit.operations.sine"),
        ("table_unit", {}, "table_unit.lookups_per_cycle: Field required"),
        ("table_unit", {"lookups_per_cycle": {"int8": 0}}, "table_unit.lookups_per_cycle.int8: Input should be"),
        ("table_unit", _tables(ports=0), "table_unit.ports: Input should be greater than 0, not 0"),
        ("table_unit", _tables(ports=2.5), "table_unit.ports: Input should be a valid integer"),
        ("table_unit", _tables(load_bytes_per_cycle=-1), "table_unit.load_bytes_per_cycle"),
        ("table_unit", _tables(tables_from="flash"), "table_unit.tables_from: Input should be 'dram' or 'unit'"),
        ("table_unit", _tables(tables_from="unit", load_bytes_per_cycle=8), "which loads nothing"),
        ("table_unit", _tables(beside_vector_unit=1), "table_unit.beside_vector_unit: Input should be a valid boolean"),
        ("in_flight", {"weights": 64}, "in_flight.scales: Field required"),
        ("weights", {"padding": 1.5}, "weights.padding"),
        ("name", "../x", "name"),
        ("source", "", "source"),
        ("source", None, "source: Field required"),
        ("ops", {}, "ops"),
        ("ops.conv.inputs", [], "ops.conv.inputs"),
        ("ops.conv.inputs", "int8", "ops.conv.inputs"),
        ("ops.conv.inputs", ["int4"], "not 'int4'"),
        ("ops.conv.max_kernel", 0, "ops.conv.max_kernel"),
        ("ops.convv", {"inputs": ["int8"], "outputs": ["int8"]}, "did you mean 'conv'?"),
        ("ops.float_op", {"inputs": ["int8"], "outputs": ["int8"]}, "unknown kinds 'float_op'"),
        ("vector_unit.elements_per_cycle.int32", None, "ops use int32"),
        ("speed", 3, "speed: unknown key"),
    ],
)
def test_schema_errors(tmp_path: Path, key: str, value: Any, says: str) -> None:
    assert says in refusal(tmp_path, dump(tiny_document({key: value})))


def test_a_table_unit_has_a_rate_for_all_that_tables_read(tmp_path: Path) -> None:
    ops = {"table": {"inputs": ["int8", "int16"], "outputs": ["int8"]}}
    says = refusal(tmp_path, dump(tiny_document({"ops": ops, "table_unit": _tables()})))
    assert "ops.table reads int16, for which table_unit has no rate" in says


def test_dates_are_not_numbers(tmp_path: Path) -> None:
    text = dump(tiny_document()).replace("name: tiny", "name: 2024-01-02")
    assert "name: Input should be a valid string" in refusal(tmp_path, text)


def test_all_errors_come_together(tmp_path: Path) -> None:
    message = refusal(
        tmp_path, dump(tiny_document({"clock_hz": 0, "sram.bytes": -5, "extra": 1, "launch_cycles": "x"}))
    )
    for key in ("clock_hz", "sram.bytes", "extra", "launch_cycles"):
        assert f"{key}: " in message


def test_a_missing_file_names_the_shipped_targets() -> None:
    with pytest.raises(CompileError, match=r"did you mean 'bayes-like'\?.*bernoulli-like"):
        load_target("bayes-lik")
