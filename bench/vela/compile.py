"""Run Vela and read what it estimates. Needs the command ``vela``: see ``README.md`` beside."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.vela.tables import BUFFERS, LAYERS, TOTALS, Buffer, Layer, Total, write_rows

CONFIGS = {
    "u55-256": ("ethos-u55-256", "Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "u85-256": ("ethos-u85-256", "Ethos_U85_SYS_Flash_High", "Shared_Sram"),
    "u85-512": ("ethos-u85-512", "Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
}
"""Accelerator, system and memory mode of Vela's own ``vela.ini``; the last is its default for U85."""

_OFF_CHIP = ("Dram", "OffChipFlash")
_KINDS = ("FeatureMap", "Weights", "Scales", "Lut")
_AXES = {"H": 0, "W": 1, "C": 2}
_Row = dict[str, str]
_Tables = dict[str, list[_Row]]


def compile_network(tflite: Path, config: str) -> tuple[list[Layer], list[Buffer], Total]:
    """Compile one file with Vela for one of :data:`CONFIGS`; what it says of its layers, its buffers and the whole."""
    accelerator, system, memory = CONFIGS[config]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--accelerator-config", accelerator, "--system-config", system, "--memory-mode", memory]
        fixed = ["--config", "Arm/vela.ini", "--optimise", "Performance", "--enable-debug-db", "--output-dir", folder]
        subprocess.run(["vela", str(tflite), *flags, *fixed], check=True, capture_output=True)
        tables = read_tables(Path(folder, f"{tflite.stem}_debug.xml").read_text())
        with next(Path(folder).glob("*_summary_*.csv")).open(newline="") as file:
            (summary,) = csv.DictReader(file)
    names = (tflite.stem, config)
    return list(layers(tables, *names)), list(buffers(tables, *names)), _total(summary, *names)


def read_tables(document: str) -> _Tables:
    """The tables of Vela's debug database: CSV in the CDATA of an XML file."""
    found = re.findall(r'<table name="(\w+)">\s*<!\[CDATA\[\s*(.*?)\]\]>', document, re.DOTALL)
    return {name: list(csv.DictReader(text.splitlines())) for name, text in found}


def layers(tables: _Tables, network: str, config: str) -> Iterator[Layer]:
    """The operations that take time, in the order in which they run."""
    blocks, shapes = ({row["id"]: row for row in tables[name]} for name in ("perf_debug_main", "perf_debug"))
    groups: list[list[_Row]] = []
    for row in tables["perf"]:
        if int(row["op_cycles"]) or not groups:
            groups.append([])
        groups[-1].append(row)
    place = {row["id"]: number for number, group in enumerate(groups) for row in group} | {"-1": -1}
    sources: dict[int, set[int]] = {}
    for edge in tables["perf_debug_conn"]:
        source, reader = place.get(edge["input_op_id"]), place.get(edge["id"])
        if source is not None and reader is not None and source < reader:  # constants have no place
            sources.setdefault(reader, set()).add(source)
    buffer = {row["name"]: int(row["id"]) for row in tables["tensors"] if row["usage"] != "Constant"}
    for number, group in enumerate(groups):
        reads = " ".join(map(str, sorted(sources.get(number, ()))))
        writes = next((buffer[row["name"]] for row in reversed(group) if row["name"] in buffer), -1)
        graph = (number, reads, writes)
        yield _layer(network, config, graph, group, [shapes[row["id"]] for row in group], blocks[group[0]["id"]])


def buffers(tables: _Tables, network: str, config: str) -> Iterator[Buffer]:
    """The memory plan, without what is stored for good."""
    for row in tables["tensors"]:
        if row["usage"] == "Constant":
            continue
        yield Buffer(
            network=network,
            config=config,
            number=int(row["id"]),
            memory=_memory(row["memory"]),
            use=row["usage"],
            first=int(row["start_time"]),
            last=int(row["end_time"]),
            address=int(row["start_address"], 16),
            size=int(row["size"], 16),
            layout=row["format"],
        )


def _layer(
    network: str, config: str, graph: tuple[int, str, int], group: Sequence[_Row], shapes: Sequence[_Row], block: _Row
) -> Layer:
    perf, row, last = group[0], shapes[0], shapes[-1]
    second = next((shape for shape in shapes if int(shape["ifm2_shape_h"] or 0)), row)
    off = [name for name in _OFF_CHIP if f"{name}_ac" in perf]
    ofm = _shape(row, "ofm")
    depth = 1 if perf["operator"] == "DepthwiseConv2D" else _shape(row, "ifm")[2]
    taps = int(row["kernel_size_x"]) * int(row["kernel_size_y"])
    return Layer(
        network=network,
        config=config,
        place=graph[0],
        name=_short(perf["name"]),
        kind=perf["operator"],
        fused="+".join(after["operator"] for after in group[1:]),
        reads=graph[1],
        writes=graph[2],
        ifm=_text(_shape(row, "ifm")),
        ifm2=_text(_shape(second, "ifm2")),
        ofm=_text(ofm),
        kernel=f"{row['kernel_size_y']}x{row['kernel_size_x']}",
        stride=f"{row['kernel_stride_y']}x{row['kernel_stride_x']}",
        ifm_type=row["ifm_dtype"],
        ofm_type=row["ofm_dtype"],
        ifm_at=_at(row, "ifm"),
        ifm2_at=_at(second, "ifm2"),
        ofm_at=_at(last, "ofm") or _at(row, "ofm"),
        weights=taps * depth * ofm[2] if row["weight_total_bytes"] else 0,
        weight_bytes=int(row["weight_total_bytes"] or 0),
        depth_slices=max(1, row["ofm_depth_slices"].count("|")),
        buffering=row["weight_buffering"],
        stripe_rows=int(row["ofm_stripe_h"] or 0),
        cascade=int(row["cascade"] or 0),
        ifm_block=_text(_axes(block, "ifm_block")),
        ofm_block=_text(_axes(block, "ofm_block")),
        ofm_tile=_text(_axes(block, "ofm_ublock")) if "ofm_ublock_h" in block else "",
        traversal=block["traversal"],
        macs=int(perf["mac_count"]),
        cycles=int(perf["op_cycles"]),
        npu_cycles=int(perf["npu_cycles"]),
        mac_cycles=int(block["mac_cycles"] or 0),
        output_cycles=int(block["ao_cycles"] or 0),
        sram_cycles=int(perf["Sram_ac"]),
        off_cycles=sum(int(perf[f"{name}_ac"]) for name in off),
        sram_read=_bytes(row, ["Sram"], "read"),
        sram_write=_bytes(row, ["Sram"], "write"),
        off_read=_bytes(row, off, "read"),
        off_write=_bytes(row, off, "write"),
        sram_in_use=int(perf["staging_usage"]),
    )


def _axes(row: _Row, of: str) -> list[int]:
    """Rows, columns, channels."""
    return [int(row[f"{of}_{axis}"] or 0) for axis in "hwc"]


def _shape(row: _Row, of: str) -> list[int]:
    """Of the part that the layer reads or writes, if it is not the whole; of the result before a fused transpose."""
    part, whole = _axes(row, f"{of}_slice"), _axes(row, f"{of}_shape")
    sizes = part if any(part) else whole
    order = row["transpose_type"].removeprefix("N")
    if of == "ofm" and sorted(order) == ["C", "H", "W"]:
        back = [0, 0, 0]
        for size, axis in zip(sizes, order, strict=True):
            back[_AXES[axis]] = size
        return back
    return sizes


def _text(sizes: Iterable[int]) -> str:
    text = "x".join(map(str, sizes))
    return "" if text == "0x0x0" else text


def _memory(name: str) -> str:
    return "sram" if name == "Sram" else "off" if name in _OFF_CHIP else ""


def _at(row: _Row, of: str) -> str:
    """Empty where there is no such tensor or it never leaves the accelerator."""
    memory = _memory(row[f"{of}_memory"])
    return f"{memory}:{row[f'{of}_format']}" if memory else ""


def _bytes(row: _Row, memories: Sequence[str], way: str) -> int:
    return sum(int(row.get(f"{memory}{kind}_{way}") or 0) for memory in memories for kind in _KINDS)


def _short(name: str) -> str:
    """The last parts of a name that lists the whole path of every module fused into a layer."""
    path = name.rstrip(";").split(";;")[-1].split(";")[0].split("/")
    keep = [part.rsplit(".", 1)[-1] for part in path if "_" in part and "wrapped" not in part]
    return "/".join(keep[-3:]) or path[-1]


def _total(row: _Row, network: str, config: str) -> Total:
    def size(*keys: str) -> int:
        return round(sum(float(row[key]) for key in keys))

    return Total(
        network=network,
        config=config,
        cycles=size("cycles_total"),
        macs=size("nn_macs"),
        sram_peak=round(1024 * float(row["sram_memory_used"])),
        off_chip_size=round(1024 * (float(row["dram_memory_used"]) + float(row["off_chip_flash_memory_used"]))),
        off_chip_traffic=size("dram_total_bytes", "off_chip_flash_total_bytes"),
        weights=size("total_original_weights"),
        encoded_weights=size("total_npu_encoded_weights"),
    )


def main(folder: Path) -> None:
    """Compile the files that :mod:`bench.vela.export` wrote to ``folder`` for every configuration; write the tables."""
    from bench.vela.export import NETWORKS

    found = [compile_network(folder / f"{network}.tflite", config) for network in NETWORKS for config in CONFIGS]
    write_rows(LAYERS, [row for rows, _, _ in found for row in rows])
    write_rows(BUFFERS, [row for _, rows, _ in found for row in rows])
    write_rows(TOTALS, [total for _, _, total in found])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
