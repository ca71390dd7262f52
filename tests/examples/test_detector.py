from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from examples.detector import boxes, loss, metric, model, scenes
from examples.detector.boxes import SIZE, STRIDES, locations
from examples.detector.metric import MeanAveragePrecision, average_precision
from qatlib.errors import ConfigError, DataError
from qatlib.pipeline.metrics import Metric
from tests.examples import committed, integer

NAME = "detector"

A = sum((SIZE // stride) ** 2 for stride in STRIDES)
Box = tuple[float, float, float, float]


def random_boxes(random: np.random.Generator, count: int, size: int = 16) -> Tensor:
    low = random.integers(0, size - 1, (count, 2))
    high = random.integers(low + 1, size + 1)
    return torch.from_numpy(np.concatenate([low, high], 1)).float()


# -- geometry -------------------------------------------------------------------------------------------------------


def test_iou_counts_pixels() -> None:
    random = np.random.default_rng(0)
    a, b = random_boxes(random, 20), random_boxes(random, 15)

    def mask(box: Tensor) -> np.ndarray:
        x1, y1, x2, y2 = box.int().tolist()
        pixels = np.zeros((16, 16), bool)
        pixels[y1:y2, x1:x2] = True
        return pixels

    expected = [[(mask(p) & mask(q)).sum() / (mask(p) | mask(q)).sum() for q in b] for p in a]
    np.testing.assert_allclose(boxes.iou(a, b).numpy(), expected, rtol=1e-6)


def test_iou_of_empty_boxes_is_0() -> None:
    empty = torch.tensor([[3.0, 3, 3, 9], [5, 5, 2, 2]])
    assert boxes.iou(empty, empty).equal(torch.zeros(2, 2))


@pytest.mark.parametrize("seed", range(20))
def test_nms_is_greedy_within_a_class(seed: int) -> None:
    random = np.random.default_rng(seed)
    found = random_boxes(random, 30, size=8)
    scores = torch.from_numpy(random.integers(0, 8, 30)).float() / 8  # ties
    classes = torch.from_numpy(random.integers(0, 3, 30))
    overlap = boxes.iou(found, found)
    kept: list[int] = []
    for index in sorted(range(30), key=lambda i: (-float(scores[i]), i)):
        if all(classes[index] != classes[k] or overlap[index, k] <= 0.4 for k in kept):
            kept.append(index)
    assert boxes.nms(found, scores, classes, 0.4).tolist() == kept
    assert len(kept) < 30


def test_nms_of_nothing() -> None:
    assert boxes.nms(torch.empty(0, 4), torch.empty(0), torch.empty(0), 0.5).tolist() == []


def test_locations_are_the_centres_of_the_maps_in_their_order() -> None:
    centres, strides = locations()
    assert centres.shape == (A, 2)
    assert (centres[0].tolist(), centres[1].tolist(), centres[16].tolist()) == ([2, 2], [6, 2], [2, 6])
    assert (centres[256].tolist(), centres[257].tolist(), centres[-1].tolist()) == ([4, 4], [12, 4], [60, 60])
    assert strides.tolist() == [4] * 256 + [8] * 64


def offsets_of(box: Box, location: int) -> Tensor:
    centres, strides = locations()
    (x, y), stride = centres[location].tolist(), float(strides[location])
    return torch.tensor([x - box[0], y - box[1], box[2] - x, box[3] - y]) / stride


def test_decode_turns_offsets_into_the_box() -> None:
    offsets = torch.zeros(1, 4, A)
    offsets[0, :, 20] = offsets_of((3, 1, 30, 22), 20)
    offsets[0, :, 300] = offsets_of((10, 20, 50, 64), 300)
    offsets[0, :, 5] = torch.tensor([-1.0, 1, 1, -3])
    found = boxes.decode(offsets)[0]
    assert found[20].tolist() == [3, 1, 30, 22]
    assert found[300].tolist() == [10, 20, 50, 64]
    assert found[5].tolist() == [22, -2, 26, 2]


# -- scenes ---------------------------------------------------------------------------------------------------------


def test_a_scene_shows_its_items_in_their_boxes_and_nothing_else() -> None:
    counts = set()
    for seed in range(60):
        random = np.random.default_rng(seed)
        scene, target = scenes.compose(torch.ones(5, 28, 28), torch.arange(5), random)
        real = target[target[:, 0] >= 0]
        counts.add(len(real))
        shown = torch.zeros(SIZE, SIZE)
        for label, x1, y1, x2, y2 in real.int().tolist():
            assert label in range(5)
            assert 0 <= x1 < x2 <= SIZE
            assert 0 <= y1 < y2 <= SIZE
            assert scenes.SIDES[0] <= max(x2 - x1, y2 - y1) <= scenes.SIDES[1]
            shown[y1:y2, x1:x2] = 1
        torch.testing.assert_close(scene, shown)
        assert (target[len(real) :] == -1).all()
        sides = boxes.area(real[:, 1:])
        for i in range(len(real)):
            for j in range(i):
                ratio = float(boxes.iou(real[i : i + 1, 1:], real[j : j + 1, 1:]))
                shared = ratio * float(sides[i] + sides[j]) / (1 + ratio)
                assert shared <= 0.2 * float(min(sides[i], sides[j])) + 1e-3
    assert counts == {2, 3, 4, 5}


def test_the_box_is_that_of_the_ink() -> None:
    image = torch.zeros(5, 28, 28)
    image[:, 10:14, 3:25] = 1  # wide and flat
    scene, target = scenes.compose(image, torch.zeros(5), np.random.default_rng(1))
    real = target[target[:, 0] >= 0, 1:]
    width, height = (real[:, 2] - real[:, 0]), (real[:, 3] - real[:, 1])
    assert (height - width * 4 / 22).abs().max() <= 0.5
    assert boxes.area(real).sum() >= (scene > 0).sum() > 0


def test_no_image_is_in_two_scenes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, ...]] = []
    compose = scenes.compose

    def spy(images: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        seen.extend(map(tuple, images.flatten(1).tolist()))
        return compose(images, labels, random)

    monkeypatch.setattr(scenes, "compose", spy)
    for split in ("train", "val", "calib"):
        assert len(scenes.build(split, root=root, limit=30)) == 30
    assert len(seen) == len(set(seen)) == 3 * 30 * 5


def test_build(root: Path) -> None:
    images, targets = scenes.build("calib", root=root).tensors
    assert images.shape == (200, 1, SIZE, SIZE)
    assert images.dtype == targets.dtype == torch.float32
    assert targets.shape == (200, 5, 5)
    assert -1 == float(images.min()) < float(images.max()) <= 1
    fewer = scenes.build("calib", root=root, limit=3)
    assert fewer.tensors[0].equal(images[:3])
    assert fewer.tensors[1].equal(targets[:3])
    assert not scenes.build("calib", root=root, seed=1, limit=3).tensors[1].equal(targets[:3])


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "3"])
def test_a_wrong_limit_is_one_message(root: Path, limit: Any) -> None:
    with pytest.raises(DataError, match=r"QAT119 data.kwargs.limit"):
        scenes.build("val", root=root, limit=limit)


# -- model and loss -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_trace_computes_the_same() -> None:
    torch.manual_seed(0)
    net = model.build(width=4).eval()
    traced = fx.symbolic_trace(net)
    resized = [node for node in traced.graph.nodes if getattr(node.target, "__name__", "") == "interpolate"]
    assert [node.kwargs["mode"] for node in resized] == ["nearest", "bilinear"]
    for batch in (1, 3):
        images = torch.rand(batch, 1, SIZE, SIZE) * 2 - 1
        scores, offsets = net(images)
        assert (scores.shape, offsets.shape) == ((batch, 10, A), (batch, 4, A))
        assert 0 <= float(scores.min()) <= float(scores.max()) <= 1
        assert all(a.equal(b) for a, b in zip(traced(images), (scores, offsets), strict=True))


def test_the_levels_share_one_head() -> None:
    nodes = fx.symbolic_trace(model.build(width=4)).graph.nodes
    calls = [node.target for node in nodes if node.op == "call_module" and str(node.target).startswith("head.")]
    assert sorted(calls) == sorted(2 * list(dict.fromkeys(calls)))
    assert len(calls) == 2 * 6


def test_outputs_are_in_the_order_of_the_locations() -> None:
    torch.manual_seed(0)
    net = model.build(width=4).eval()
    levels: list[tuple[Tensor, list[Tensor]]] = []
    net.head.register_forward_hook(lambda head, inputs, outputs: levels.append((inputs[0], outputs)))  # type: ignore[union-attr]
    outputs = net(torch.rand(1, 1, SIZE, SIZE))
    centres, strides = locations()
    first = 0
    for level, of_level in levels:
        height, width = level.shape[2:]
        for y, x in ((0, 0), (0, 1), (1, 0), (height - 1, 2)):
            location = first + y * width + x
            stride = float(strides[location])
            assert centres[location].tolist() == [(x + 0.5) * stride, (y + 0.5) * stride]
            assert (width * stride, height * stride) == (SIZE, SIZE)
            for whole, part in zip(outputs, of_level, strict=True):
                assert whole[..., location].equal(part.reshape(1, -1, height, width)[:, :, y, x])
        first += height * width
    assert first == A


def test_assign_gives_each_item_to_the_centre_of_its_level() -> None:
    small, large = (1.0, 8.0, 8.0, 20.0, 18.0), (7.0, 30.0, 30.0, 58.0, 54.0)
    targets = torch.tensor([[small, large, (-1.0, -1, -1, -1, -1)]])
    classes, distances = loss.assign(targets)
    centres, strides = locations()
    for location in range(A):
        (x, y), stride = centres[location].tolist(), float(strides[location])
        expected = -1
        for label, x1, y1, x2, y2 in (small, large):
            level = STRIDES[int(max(x2 - x1, y2 - y1) >= loss.LARGE)]
            near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) <= 1.5 * stride
            if level == stride and near and x1 < x < x2 and y1 < y < y2:
                expected = int(label)
                torch.testing.assert_close(distances[0, location], offsets_of((x1, y1, x2, y2), location))
        assert int(classes[0, location]) == expected
    assert set(classes[0].tolist()) == {-1, 1, 7}


def test_of_two_items_a_location_finds_the_smaller() -> None:
    targets = torch.tensor([[(3.0, 8, 8, 26, 24), (4.0, 9, 9, 25, 23)]])
    assert set(loss.assign(targets)[0].flatten().tolist()) == {-1, 4}
    assert set(loss.assign(targets.flip(1))[0].flatten().tolist()) == {-1, 4}


def test_the_loss_by_hand() -> None:
    targets = torch.full((1, 5, 5), -1.0)
    targets[0, 0] = torch.tensor([2.0, 8, 8, 20, 18])
    classes, distances = loss.assign(targets)
    torch.manual_seed(0)
    scores, offsets = torch.rand(1, 10, A) * 0.9 + 0.05, torch.rand(1, 4, A) * 3
    total, positives = 0.0, 0
    for a in range(A):
        for c in range(10):
            p = float(scores[0, c, a])
            if c == int(classes[0, a]):
                total -= 0.25 * (1 - p) ** 2 * math.log(p)
            else:
                total -= 0.75 * p**2 * math.log(1 - p)
        if int(classes[0, a]) >= 0:
            positives += 1
            for side in range(4):
                error = abs(float(offsets[0, side, a] - distances[0, a, side]))
                total += error - 0.1 if error > 0.2 else error**2 / 0.4
    assert positives > 0
    assert float(loss.detection_loss((scores, offsets), targets)) == pytest.approx(total / positives, rel=1e-4)


def test_a_batch_without_items_has_a_finite_loss() -> None:
    scores = torch.full((2, 10, A), 0.5)
    value = loss.detection_loss((scores, torch.zeros(2, 4, A)), torch.full((2, 5, 5), -1.0))
    assert float(value) == pytest.approx(2 * 10 * A * 0.75 * 0.25 * math.log(2), rel=1e-5)


def test_outputs_made_from_the_targets_are_found(root: Path) -> None:
    targets = scenes.build("val", root=root, limit=100).tensors[1]
    classes, distances = loss.assign(targets)
    scores = torch.zeros(100, 10, A).scatter_(1, classes.clamp(min=0)[:, None], (classes >= 0).float()[:, None])
    perfect = MeanAveragePrecision()
    perfect.update((scores, distances.transpose(1, 2)), targets)
    assert perfect.compute() > 0.95


# -- the metric -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "truths", "expected"),
    [
        ([1], 1, 1.0),
        ([], 3, 0.0),
        ([0, 0], 2, 0.0),
        ([1, 1], 4, 0.5),
        ([0, 1], 1, 0.5),
        # recall 1/4, 1/4, 2/4, 3/4, 3/4; precision 1, 1/2, 2/3, 3/4, 3/5; best later 1, -, 3/4, 3/4, -
        ([1, 0, 1, 1, 0], 4, (1 + 3 / 4 + 3 / 4) / 4),
        # precision 1/2 at recall 1/2, 2/5 at recall 1
        ([0, 1, 0, 0, 1], 2, (1 / 2 + 2 / 5) / 2),
    ],
)
def test_average_precision_by_hand(hits: list[int], truths: int, expected: float) -> None:
    assert average_precision(torch.tensor(hits, dtype=torch.bool), truths) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_average_precision_is_the_integral_of_the_best_precision(seed: int) -> None:
    random = np.random.default_rng(seed)
    hits = random.random(40) < 0.4
    truths = int(hits.sum()) + int(random.integers(0, 5))
    points = [(hits[:n].sum() / truths, hits[:n].sum() / n) for n in range(1, 41)]
    edges = sorted({0.0, *(recall for recall, _ in points)})
    expected = sum((b - a) * max(p for recall, p in points if recall >= b) for a, b in pairwise(edges))
    assert average_precision(torch.from_numpy(hits), truths) == pytest.approx(expected)


Detection = tuple[int, int, float, Box]
"""Image, class, score, box."""


def outputs_of(images: int, detections: list[Detection]) -> tuple[Tensor, Tensor]:
    """What a model would have to give; every detection gets a location of its own that its box may be far from."""
    scores, offsets = torch.zeros(images, 10, A), torch.zeros(images, 4, A)
    centres, _ = locations()
    used: set[tuple[int, int]] = set()
    for image, label, score, box in detections:
        inside = ((centres >= torch.tensor(box[:2])) & (centres <= torch.tensor(box[2:]))).all(1).nonzero().flatten()
        location = next(int(a) for a in inside if (image, int(a)) not in used)
        used.add((image, location))
        scores[image, label, location] = score
        offsets[image, :, location] = offsets_of(box, location)
    return scores, offsets


def targets_of(images: int, items: list[tuple[int, int, Box]]) -> Tensor:
    targets = torch.full((images, 5, 5), -1.0)
    for image, label, box in items:
        targets[image, int((targets[image, :, 0] >= 0).sum())] = torch.tensor([float(label), *box])
    return targets


P, Q, R = (0.0, 0.0, 16.0, 16.0), (32.0, 0.0, 48.0, 16.0), (32.0, 32.0, 56.0, 56.0)


@pytest.mark.parametrize(
    ("items", "detections", "expected"),
    [
        ([(0, 3, P)], [(0, 3, 0.9, P)], 1.0),
        ([(0, 3, P)], [], 0.0),
        ([(0, 3, P)], [(0, 4, 0.9, P)], 0.0),  # another class
        ([(0, 3, P)], [(1, 3, 0.9, P)], 0.0),  # another image
        ([(0, 3, P)], [(0, 3, 0.9, (0, 0, 16, 8))], 1.0),  # IoU 1/2 exactly
        ([(0, 3, P)], [(0, 3, 0.9, (0, 0, 16, 7.5))], 0.0),
        ([(0, 3, P)], [(0, 3, 0.04, P)], 0.0),  # below min_score
        ([(0, 3, P)], [(0, 3, 0.9, P), (0, 3, 0.8, P)], 1.0),  # the second goes by NMS
        # Too far apart for NMS (IoU 2/5), both over the same item (IoU 0.7 each): the second is wrong.
        ([(0, 3, P), (0, 3, R)],
         [(0, 3, 0.9, (0, 0, 16, 11.2)), (0, 3, 0.8, (0, 4.8, 16, 16)), (0, 3, 0.7, R)], (1 + 2 / 3) / 2),
        # The wrong one in image 0 scores higher than the right one in image 1.
        ([(0, 3, P), (1, 3, P)], [(0, 3, 0.9, Q), (1, 3, 0.8, P)], 1 / 4),
        ([(0, 3, P), (1, 3, P)], [(0, 3, 0.7, Q), (1, 3, 0.8, P)], 1 / 2),
        # Mean over the classes 3 (all found) and 5 (none found); class 7 is in no target.
        ([(0, 3, P), (0, 5, Q)], [(0, 3, 0.9, P), (0, 7, 0.9, R)], 1 / 2),
        # Each detection takes the item that it overlaps most.
        ([(0, 3, P), (0, 3, Q), (1, 3, R)], [(0, 3, 0.9, Q), (0, 3, 0.8, P), (1, 3, 0.6, P), (1, 3, 0.5, R)],
         (1 + 1 + 3 / 4) / 3),
    ],
)  # fmt: skip
def test_mean_average_precision_by_hand(
    items: list[tuple[int, int, Box]], detections: list[Detection], expected: float
) -> None:
    outputs, targets = outputs_of(2, detections), targets_of(2, items)
    whole, parts = MeanAveragePrecision(), MeanAveragePrecision()
    whole.update(outputs, targets)
    for image in range(2):
        parts.update((outputs[0][image : image + 1], outputs[1][image : image + 1]), targets[image : image + 1])
    assert whole.compute() == parts.compute() == pytest.approx(expected, abs=1e-6)


def test_the_arguments_of_the_metric_act() -> None:
    items, half = [(0, 3, P), (0, 3, R)], (0.0, 0.0, 16.0, 9.6)

    def value(detections: list[Detection], **kwargs: Any) -> float:
        measured = MeanAveragePrecision(**kwargs)
        measured.update(outputs_of(1, detections), targets_of(1, items))
        return measured.compute()

    assert value([(0, 3, 0.9, half)]) == 1 / 2
    assert value([(0, 3, 0.9, half)], iou_threshold=0.7) == 0
    twice: list[Detection] = [(0, 3, 0.9, P), (0, 3, 0.8, P), (0, 3, 0.7, R)]
    assert value(twice) == 1
    assert value(twice, nms_iou=1.0) == pytest.approx((1 + 2 / 3) / 2)
    assert value(twice, min_score=0.75) == 1 / 2
    assert value(twice, candidates=2) == 1 / 2


def test_the_metric_keeps_the_protocol() -> None:
    measured = MeanAveragePrecision()
    assert isinstance(measured, Metric)
    assert (measured.name, measured.higher_is_better) == ("map50", True)
    assert MeanAveragePrecision(iou_threshold=0.75).name == "map75"
    with pytest.raises(DataError, match="QAT110"):
        measured.compute()
    measured.update(outputs_of(1, []), targets_of(1, []))
    with pytest.raises(DataError, match="QAT110"):
        measured.compute()


@pytest.mark.parametrize(
    ("outputs", "targets", "code"),
    [
        ((torch.zeros(2, 10, A), torch.zeros(2, 4, A)), torch.zeros(1, 5, 5), "QAT114"),
        ((torch.zeros(2, 10, A), torch.zeros(2, 4, A - 1)), torch.zeros(2, 5, 5), "QAT114"),
        ((torch.zeros(2, 10, A), torch.zeros(2, 5, A)), torch.zeros(2, 5, 5), "QAT114"),
        ((torch.zeros(2, 10, A), torch.zeros(2, 4, A)), torch.zeros(2, 5, 4), "QAT114"),
        ((torch.zeros(2, 10, A),), torch.zeros(2, 5, 5), "QAT114"),
        (torch.zeros(2, 10), torch.zeros(2), "QAT114"),
        ((torch.zeros(2, 10, A), torch.zeros(2, 4, A)), torch.full((2, 5, 5), 10.0), "QAT113"),
    ],
)
def test_outputs_and_targets_that_do_not_fit_are_one_message(outputs: Any, targets: Tensor, code: str) -> None:
    with pytest.raises(DataError, match=code):
        MeanAveragePrecision().update(outputs, targets)


@pytest.mark.parametrize(
    "kwargs", [{"iou_threshold": 1.5}, {"nms_iou": "x"}, {"min_score": True}, {"candidates": 0}, {"candidates": 1.0}]
)
def test_wrong_arguments_are_one_message(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"QAT105 metric.kwargs.{next(iter(kwargs))}"):
        metric.MeanAveragePrecision(**kwargs)


def test_agreement_counts_where_either_decides() -> None:
    ours, others = torch.zeros(1, 10, A), torch.zeros(1, 10, A)
    for place, (a, b) in enumerate(
        [((3, 0.9), (3, 0.5)), ((3, 0.9), (4, 0.9)), ((3, 0.5), (3, 0.49)), ((2, 0.4), (2, 0.3))]
    ):
        ours[0, a[0], place], others[0, b[0], place] = a[1], b[1]
    scored, offsets = metric.Agreement(), torch.zeros(1, 4, A)
    scored.update((ours, offsets), metric.against(torch.zeros(1, 5, 5), (others, offsets)))
    assert (
        scored.compute() == 1 / 3
    )  # of three decisions, one alike, one of another class, one that the other does not take
    with pytest.raises(DataError, match="QAT110 agreement"):
        metric.Agreement().compute()


# -- integers --------------------------------------------------------------------------------------------------------


def test_the_docs_show_the_scores() -> None:
    assert committed.scores(NAME)["integer"]["map50"] >= 0.98 * committed.scores(NAME)["float"]["map50"]
    integer.assert_the_docs_show_the_scores(NAME, "map50")


@pytest.mark.slow
def test_the_scores_are_the_committed() -> None:
    with integer.made(NAME) as it:
        integer.assert_scores_are_the_committed(it, abs=0.01)


@pytest.mark.slow
def test_every_op_agrees_with_fake_quant(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_ops_agree(it, tmp_path)


@pytest.mark.slow
def test_onnx_runtime_gives_the_integers(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_onnx_runtime_gives_the_integers(it, tmp_path)


@pytest.mark.slow
def test_the_oracle_gives_the_integers() -> None:
    with integer.made(NAME) as it:
        integer.assert_the_oracle_gives_the_integers(it, items=2)
