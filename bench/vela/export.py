"""Networks as int8 TFLite files, which Vela reads. Run in an environment of its own: see ``README.md`` beside."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench import models
from examples.detector.model import build as detector

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mobilenet_v2": (models.MobileNetV2, (1, 3, 224, 224)),
    "resnet18": (models.ResNet18, (1, 3, 224, 224)),
    "detector": (detector, (1, 1, 256, 256)),
}
"""Factory of each network and the shape of its input."""


def export(name: str, folder: Path) -> Path:
    """Write network ``name`` with int8 activations and int8 weights per channel; the path of the file.

    Weights are those of the initialization and calibration sees random images: Vela's estimates depend on shapes, and
    on the weights only through their compression.
    """
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    network, images = build().eval(), torch.randn(4, *shape)
    rows_first = [image.permute(0, 2, 3, 1) for image in images]
    floats, path = folder / f"{name}_float.tflite", folder / f"{name}.tflite"
    path.unlink(missing_ok=True)
    litert_torch.convert(litert_torch.to_channel_last_io(network, args=[0]), (rows_first[0],)).export(str(floats))
    job = quantizer.Quantizer(str(floats), recipe.static_wi8_ai8())
    calibrated = job.calibrate({"serving_default": [{"args_0": image.numpy()} for image in rows_first]})
    job.quantize(calibrated).export_model(str(path))
    return path


def main(folder: Path) -> None:
    """Write every network to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for network in NETWORKS:
        print(export(network, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
