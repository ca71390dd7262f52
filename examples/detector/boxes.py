"""Geometry of the detector: where its outputs look, boxes from offsets, intersection over union, NMS.

Boxes are ``(x1, y1, x2, y2)`` in pixels of the scene, x to the right, y down, the far edges excluded.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 64
"""Side of a scene in pixels."""
STRIDES = (4, 8)
"""Pixels between the locations of each level of the pyramid that has heads."""


def locations() -> tuple[Tensor, Tensor]:
    """Centres ``[A, 2]`` (x, y) in pixels and strides ``[A]`` of all locations, in the order of the model's outputs."""
    centres, strides = [], []
    for stride in STRIDES:
        steps = (torch.arange(SIZE // stride) + 0.5) * stride
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()], 1))
        strides.append(torch.full((len(steps) ** 2,), float(stride)))
    return torch.cat(centres), torch.cat(strides)


def decode(offsets: Tensor) -> Tensor:
    """Boxes ``[N, A, 4]`` from offsets ``[N, 4, A]``: distances to left, top, right, bottom in units of the stride.

    Distances below 0 count as 0.
    """
    centres, strides = (tensor.to(offsets) for tensor in locations())
    distances = offsets.clamp(min=0).transpose(1, 2) * strides[:, None]
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], -1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union ``[n, m]`` of boxes ``[n, 4]`` and ``[m, 4]``; 0 where both are empty."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    union = area(a)[:, None] + area(b)[None] - shared
    return torch.where(union > 0, shared / union, 0.0)


def area(boxes: Tensor) -> Tensor:
    """Area ``[n]`` of boxes ``[n, 4]``."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)


def nms(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Indices that greedy non-maximum suppression keeps, best score first.

    A box goes if one of its class with a higher score was kept and their IoU is above ``threshold``. Of equal scores,
    which are common in integer networks, the one that comes first ranks first.
    """
    order = scores.sort(descending=True, stable=True).indices
    suppresses = (iou(boxes[order], boxes[order]) > threshold) & (classes[order, None] == classes[None, order])
    alive = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for rank in range(len(order)):
        if alive[rank]:
            alive[rank + 1 :] &= ~suppresses[rank, rank + 1 :]
    return order[alive]
