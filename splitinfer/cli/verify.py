"""`splitinfer verify`: read a shard and compare it with its checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitinfer.cli.console import busy, human_size

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer verify half     a shard that `splitinfer shard -o half` wrote
"""


def command(
    shard: Annotated[
        Path, typer.Argument(metavar="SHARD", help="A folder made by `splitinfer shard`.", show_default=False)
    ],
) -> None:
    """Read every file of a shard and compare it with its checksum.

    Names the first file that is missing or damaged, and leaves with 1.
    """
    from splitinfer.model.shard import verify

    with busy(f"reading {shard}"):
        records = [record for _, record in verify(shard)]
    print(f"{shard}: {len(records)} files, {human_size(sum(r.nbytes for r in records))}, all as written")
