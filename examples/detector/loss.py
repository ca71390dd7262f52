"""What the detector is trained with: focal loss on the scores, smooth L1 on the offsets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.detector.boxes import STRIDES, locations

LARGE = 20.0
"""Items whose longer side has so many pixels belong to the coarser level."""
_RADIUS = 1.5
"""In strides: how far from the centre of an item a location may be that is to find it."""


def detection_loss(outputs: tuple[Tensor, Tensor], targets: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Loss of scores ``[N, classes, A]`` and offsets ``[N, 4, A]`` against ``[N, items, 5]``, per positive location.

    Focal loss after Lin et al., 2017: each cross-entropy times ``alpha`` (1 - ``alpha`` where nothing is) and the
    ``gamma``-th power of the error.
    """
    scores, offsets = outputs
    classes, distances = assign(targets)
    positive = classes >= 0
    wanted = F.one_hot(classes.clamp(min=0), scores.shape[1]).transpose(1, 2) * positive[:, None]
    wanted = wanted.to(scores)
    error = (scores - wanted).abs()
    weight = torch.where(wanted > 0, alpha, 1 - alpha) * error**gamma
    focal = (weight * F.binary_cross_entropy(scores, wanted, reduction="none")).sum()
    found = offsets.transpose(1, 2)[positive]
    return (focal + F.smooth_l1_loss(found, distances[positive], reduction="sum", beta=0.2)) / positive.sum().clamp(1)


def assign(targets: Tensor) -> tuple[Tensor, Tensor]:
    """What each location is to find: class ``[N, A]`` int64, -1 for nothing, and distances ``[N, A, 4]`` in strides.

    A location finds an item of its level's sizes whose box it lies in and whose centre is within 1.5 strides in x and
    in y (the centre sampling of FCOS); of several, the one with the smallest box.
    """
    centres, strides = (tensor.to(targets) for tensor in locations())
    labels, boxes = targets[..., 0], targets[..., 1:]
    size = boxes[..., 2:] - boxes[..., :2]  # [N, items, 2]
    sides = torch.cat([centres[:, None] - boxes[:, None, :, :2], boxes[:, None, :, 2:] - centres[:, None]], 3)
    from_middle = (centres[:, None] - (boxes[..., :2] + boxes[..., 2:])[:, None] / 2).abs().amax(3)
    coarse = (strides == STRIDES[1])[:, None]
    own = (labels >= 0)[:, None] & ((size.amax(2) >= LARGE)[:, None] == coarse)
    fits = own & (sides.amin(3) > 0) & (from_middle <= _RADIUS * strides[:, None])  # [N, A, items]
    area, item = torch.where(fits, size.prod(2)[:, None], torch.inf).min(2)
    classes = labels[:, None].expand(fits.shape).gather(2, item[..., None])[..., 0].long()
    chosen = sides.gather(2, item[..., None, None].expand(*item.shape, 1, 4))[:, :, 0]
    return torch.where(area.isfinite(), classes, -1), chosen / strides[:, None]
