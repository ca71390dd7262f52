"""Targets and params.yaml that somebody spoilt: they load, and can be compiled for, or are refused in one way."""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from qatlib.compiler import compile_model, load_target, shipped_targets
from qatlib.compiler.target import SHIPPED, parse_target
from qatlib.errors import CompileError, ConfigError
from qatlib.pipeline.config import check_config, load_config
from tests.compiler.compiler_nets import random_net, tiny_document

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
"""Far more than any file here needs, on a busy computer; what hangs does not end."""

quick = settings(
    max_examples=int(os.environ.get("FUZZ", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


nasty = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**400, 0.0, -0.5, 0.5, 1e-320, 1e308,
        float("inf"), float("nan"),
        "", "int8", "x" * 5000, "1e9", "\x00", "é\n", b"\xff", [], {}, [1, 1, 1], [65536, 65536, 65536], [[1, 1, 16]],
        {"bytes": 1}, {1: 2}, {None: None}, deep(7), deep(90), datetime.date(2024, 1, 2), 1j, ("a",), {3},
    ]
).map(copy.deepcopy)  # fmt: skip


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of the document with every key in it."""
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys):
        yield document, key
        yield from places(document[key])


def spoil(document: Any, data: st.DataObject) -> None:
    """Change the document in one to three places."""
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(document))
        if not found:
            return
        container, key = found[data.draw(st.integers(0, len(found) - 1))]
        how = data.draw(st.sampled_from(["set", "delete", "add", "swap"]))
        if how == "set":
            container[key] = data.draw(nasty)
        elif how == "delete":
            del container[key]
        elif how == "add" and isinstance(container, dict):
            container[data.draw(st.sampled_from(["extra", 1, None, "bytes", ("a", 1), "a.b"]))] = data.draw(nasty)
        else:
            other, name = found[data.draw(st.integers(0, len(found) - 1))]
            if name in other if isinstance(other, dict) else name < len(other):
                container[key] = copy.deepcopy(other[name])


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """Code and text of the refusal, "" if there is none; any other exception passes."""
    start = monotonic()
    try:
        call()
        found = ("", "")
    except (CompileError, ConfigError) as error:
        found = (error.code, str(error))
    assert monotonic() - start < SECONDS
    return found


def safe(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


@quick
@given(st.sampled_from(["tiny", *shipped_targets()]), st.data())
def test_a_spoilt_target_loads_and_serves_or_is_refused(name: str, data: st.DataObject) -> None:
    document = tiny_document() if name == "tiny" else safe((SHIPPED / f"{name}.yaml").read_text())
    spoil(document, data)
    code, message = outcome(lambda: compile_model(random_net(1, 4)[1], parse_target(document, "target.yaml")))
    assert code in ("", "QAT183", "QAT184", "QAT185", "QAT186", "QAT188")
    assert "\n" not in message or code != "QAT183"


@quick
@given(st.sampled_from([path.read_text() for path in sorted(SHIPPED.glob("*.yaml"))]), st.data())
def test_a_target_file_of_any_text_loads_or_is_refused(tmp_path: Path, text: str, data: st.DataObject) -> None:
    path = tmp_path / "target.yaml"
    path.write_bytes(spoilt_bytes(text, data))
    code, message = outcome(lambda: load_target(path))
    assert code in ("", "QAT183")
    assert "\n" not in message


def spoilt_bytes(text: str, data: st.DataObject) -> bytes:
    """Pieces of a text cut out, doubled, or replaced by what YAML gives a meaning to."""
    pieces = [
        "&a ", "*a", "!!python/object:os.system ", "!<", "<<: ", "- ", "? ", "? [1]\n", ": ", "a: " * 20, "{", "[",
        "[" * 300, "|", ">", '"', "\t", "%", "---\n", "...\n", "#", "1e400", ".nan", "0x", "9" * 5000, "2024-01-02",
        "'", "\x00", "\ufeff", "\\", "=", "~", "@", "`", "\x85", "\u2028",
    ]  # fmt: skip
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 30))
        text = text[:at] + data.draw(st.sampled_from(["", *pieces])) + text[at + length :]
    blob = text.encode()
    return blob[: data.draw(st.integers(0, len(blob)))] if data.draw(st.booleans()) else blob


@quick
@given(st.data())
def test_spoilt_params_load_or_are_refused(data: st.DataObject) -> None:
    document = safe((ROOT / "params.yaml").read_text())
    spoil(document, data)
    assert outcome(lambda: check_config(document, "params.yaml"))[0] in ("", "QAT101")


@quick
@given(st.data())
def test_params_of_any_text_load_or_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(spoilt_bytes((ROOT / "params.yaml").read_text(), data))
    assert outcome(lambda: load_config(path))[0] in ("", "QAT100", "QAT101")


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]\n", "a: &a {b: *a}\n", "[" * 20000, "a: " + "{b: " * 3000, "- " * 20000 + "1"]
)
def test_yaml_that_grows_or_nests_without_end_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    start = monotonic()
    with pytest.raises(ConfigError, match=r"^QAT100 [^\n]*$"):
        load_config(path)
    with pytest.raises(CompileError, match=r"^QAT183 [^\n]*$"):
        load_target(path)
    assert monotonic() - start < SECONDS


@pytest.mark.parametrize("where", [".", "missing.yaml", "bayes-lik", "", "\0", "x" * 5000, "/dev/null", "/dev/zero"])
def test_what_is_no_file_is_refused(where: str) -> None:
    with pytest.raises(CompileError, match=r"^QAT183 [^\n]*$"):
        load_target(where)
    with pytest.raises(ConfigError, match=r"^QAT100 [^\n]*$"):
        load_config(where)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dram.bytes_per_s": 0.0}, "dram.bytes_per_s"),
        ({"sram.bytes_per_cycle": float("nan")}, "sram.bytes_per_cycle"),
        ({"mac_array.tiles": [[1, 1, 32]], "sram.bytes": 16}, "sram.bytes is 16; one tile 1x1x32 of mac_array has 32"),
        ({"mac_array.tiles": [[1, 1, 128]]}, "buffers.max_block 8x8x64 holds no whole tile 1x1x128"),
        (
            {"buffers.accumulator_bytes": 64},
            "buffers do not hold two tiles 1x1x16 of mac_array: 32 bytes of inputs and 128",
        ),
        ({"buffers.input_bytes": 16}, "buffers do not hold two tiles 1x1x16"),
        ({"buffers.block_channels": 128}, "block_channels is 128, max_block has only 64 channels"),
        ({"sram.burst_bytes": 2048, "sram.bytes": 1024}, "burst_bytes is 2048; it must not exceed bytes (1024)"),
        ({"cores": 0}, "cores"),
    ],
)
def test_an_impossible_target_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CompileError, match=r"^QAT183 [^\n]*$") as caught:
        parse_target(tiny_document(changes), "target.yaml")
    assert says in str(caught.value)
