"""Traces against a schema of what Perfetto reads, and against the estimate that they show."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qatlib.cli import main
from qatlib.compiler import Executable, Performance, compile_model, write_trace
from tests.compiler.compiler_nets import Net, random_net, tiny

Number = (int, float)
COMMON: dict[str, Any] = {"name": str, "pid": int}
EVENTS: dict[str, dict[str, Any]] = {
    "X": COMMON | {"ph": str, "cat": str, "tid": int, "ts": Number, "dur": Number, "args": dict},
    "C": COMMON | {"ph": str, "ts": Number, "args": dict},
    "M": COMMON | {"ph": str, "tid": int, "args": dict},
}
"""Keys of the Trace Event Format that each phase needs, and all that we write, with their types."""
NAMES = {"process_name": {"name": str}, "thread_name": {"name": str}, "thread_sort_index": {"sort_index": int}}


def check(document: Any) -> None:
    """Of the subset of the Trace Event Format that this package writes."""
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    for event in document["traceEvents"]:
        schema = EVENTS[event["ph"]]
        assert set(event) == set(schema), event
        for key, kind in schema.items():
            assert isinstance(event[key], kind), (key, event)
            assert not isinstance(event[key], bool)
        if event["ph"] == "M":
            (seen,), (expected,) = event["args"].items(), NAMES[event["name"]].items()
            assert (seen[0], type(seen[1])) == expected
        else:
            assert event["ts"] >= 0
            assert event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(count, Number) for count in event["args"].values())


@pytest.fixture(scope="module")
def executable() -> Executable:
    return compile_model(random_net(3, 14)[1], tiny())


@pytest.fixture(scope="module")
def document(executable: Executable, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    write_trace(path, executable.performance)
    return json.loads(path.read_text())


def test_it_is_of_the_format(document: Any) -> None:
    check(document)
    assert "estimate" in document["otherData"]["basis"]
    assert "estimate" in document["traceEvents"][0]["args"]["name"]


def test_what_is_not_of_the_format_is_seen(document: Any) -> None:
    for change in ({"ts": "0"}, {"ph": "Q"}, {"dur": -1.0}, {"more": 1}):
        event = next(event for event in document["traceEvents"] if event["ph"] == "X") | change
        with pytest.raises((AssertionError, KeyError)):
            check(document | {"traceEvents": [event]})


def by_track(document: Any) -> dict[str, list[Any]]:
    names = {e["tid"]: e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    found: dict[str, list[Any]] = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            found[names[event["tid"]]].append(event)
    return found


def test_it_shows_the_estimate(executable: Executable, document: Any) -> None:
    performance, tracks = executable.performance, by_track(document)
    assert [event["name"] for event in tracks["ops"]] == [op.op for op in performance.timeline.ops]
    assert sum(event["dur"] for event in tracks["ops"]) == pytest.approx(performance.latency_us)
    for unit in performance.timeline.units:
        busy = sum(event["args"]["busy cycles"] for event in tracks[unit])
        assert busy == pytest.approx(performance.timeline.busy[unit], abs=0.01)
    sram = [e["args"]["bytes"] for e in document["traceEvents"] if e["name"] == "SRAM bytes"]
    assert max(sram) == executable.memory.sram.live_bytes
    assert sram[-1] == 0


def test_events_of_a_track_do_not_overlap(document: Any) -> None:
    for events in by_track(document).values():
        for a, b in pairwise(events):
            assert round(a["ts"] + a["dur"], 6) <= b["ts"]


def test_equal_timelines_give_equal_files(executable: Executable, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_trace(tmp_path / name, executable.performance)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def nothing() -> Performance:
    net = Net()
    return compile_model(net.program(net.dequantize(net.quantize(net.input((4,), "float32")))), tiny()).performance


def test_nothing_to_do_is_an_empty_trace(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", nothing())
    document = json.loads((tmp_path / "trace.json").read_text())
    check(document)
    assert {event["ph"] for event in document["traceEvents"]} == {"M"}


def test_the_command_writes_it(executable: Executable, tmp_path: Path) -> None:
    executable.save(tmp_path / "executable")
    done = CliRunner().invoke(main, ["trace", str(tmp_path / "executable"), "--out", str(tmp_path / "trace.json")])
    assert done.exit_code == 0, done.output
    check(json.loads((tmp_path / "trace.json").read_text()))
    assert str(tmp_path / "trace.json") in done.output
    assert "estimate" in done.output


@pytest.mark.parametrize(("file", "seen"), [("other.json", "holds no executable"), ("refused.json", "refuses")])
def test_the_command_needs_an_executable(tmp_path: Path, file: str, seen: str) -> None:
    (tmp_path / file).write_text("[]")
    done = CliRunner().invoke(main, ["trace", str(tmp_path), "--out", str(tmp_path / "trace.json")])
    assert done.exit_code == 1
    assert done.output.startswith("QAT189")
    assert seen in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "trace.json").exists()
