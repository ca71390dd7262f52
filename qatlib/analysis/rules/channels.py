"""Channels of one tensor that are far apart in range: they share a scale, in which most have hardly a code."""

from __future__ import annotations

from statistics import median

from qatlib.analysis.edits import override, set_values
from qatlib.analysis.facts import Facts
from qatlib.analysis.findings import Finding
from qatlib.analysis.records import OpRecord
from qatlib.analysis.rules import rule
from qatlib.analysis.rules.calibration import DEFAULT_GOAL

FEW_CODES = 8.0
"""A channel whose largest value has fewer codes than this has 3 bits and a sign."""
UNLIKE = 8.0
"""Ratio of the largest channel to the median from which the channels, and not the scale of all, are the cause."""
LEAST_CHANNELS = 4
MOST = 3


def unlike_channels(facts: Facts) -> dict[str, float]:
    """Codes that the median channel of an int8 convolution or linear reaches, where that is few; fewest first."""
    found = {}
    for record in facts.fvsq.records if facts.fvsq else ():
        live = [amax for amax in record.channel_amax if amax > 0]
        if record.qtype.dtype == "int8" and record.scale is not None and len(live) >= LEAST_CHANNELS:
            codes = median(live) / record.scale
            if codes < FEW_CODES and max(live) >= UNLIKE * median(live):
                found[record.name] = codes
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


@rule("QAT039", guide="G33, G35")
def channels_share_a_scale(facts: Facts) -> list[Finding]:
    """An error where calibration misses its goal. Beside ops that can be equalized, the cure of all is the same."""
    by_name = {record.name: record for record in facts.fvsq.records} if facts.fvsq else {}
    return [_finding(by_name[name], codes, facts) for name, codes in list(unlike_channels(facts).items())[:MOST]]


def _finding(record: OpRecord, codes: float, facts: Facts) -> Finding:
    ratio = facts.ratio("calib")
    missed = ratio is not None and ratio < facts.goal_minimum("ratio.calib", DEFAULT_GOAL)
    if record.name in facts.equalizable:
        edit, cure = (
            set_values({"calibrate.equalize": True}),
            "give them like ranges, which leaves the network as it is",
        )
    else:
        edit, cure = override(record.match, facts.overrides, activation="int16"), "give this output int16"
    assert record.scale is not None
    return Finding(
        "QAT039",
        "error" if missed else "warning",
        f"Channels of unlike ranges share one scale, in which most have few codes: {cure}",
        module=record.title,
        evidence={
            "codes_of_median_channel": codes,
            "channels_below_8_codes": sum(0 < amax < FEW_CODES * record.scale for amax in record.channel_amax),
            "channels": len(record.channel_amax),
            "largest_over_median": max(record.channel_amax) / (codes * record.scale),
        },
        edit=edit.yaml,
        command=edit.command,
    )
