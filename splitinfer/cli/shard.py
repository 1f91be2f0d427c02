"""`splitinfer shard`: write a part of a model to disk, in the layout that the kernels read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitinfer.cli.console import human_size, screen
from splitinfer.cli.options import MODEL, QUANT, takes
from splitinfer.cli.session import model_of
from splitinfer.config import Settings
from splitinfer.errors import UsageError

if TYPE_CHECKING:
    from splitinfer.model.sharding import Plan

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer shard path/to/gemma --experts 0-63 --quant int4 -o half
  splitinfer shard path/to/gemma --slice 1/2 --quant int4 -o left   half of every expert
  splitinfer shard path/to/gemma --client --quant int4 -o client    everything but experts
  splitinfer shard path/to/gemma --quant int4 --dry-run             how large each file would be
  splitinfer node half                                              serve it

Without --experts, --layers, --slice and --client it is the whole model. A run that was stopped
goes on where it left off.
"""

_WHAT = "What it holds"


@takes(*MODEL, "experts", "layers", "slice", *QUANT)
def command(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Where the shard goes.")
    ] = None,
    client: Annotated[
        bool, typer.Option("--client", help="Hold everything but the experts.", rich_help_panel=_WHAT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print bytes per file and write nothing.")
    ] = False,
    *,
    settings: Settings,
) -> None:
    """Write a part of a model to disk as nodes and clients map it.

    A node or client started on a shard is ready at once, and two on one
    machine share its memory.
    """
    if out is None and not dry_run:
        raise UsageError("there is no place to write to", remedy="Give -o FOLDER, or --dry-run.")
    plan = _plan(settings, client=client)
    if out is None or dry_run:
        for file in plan.files:
            print(f"{file.nbytes:>15,}  {file.name}")
        print(f"{plan.nbytes:>15,}  bytes in all")
    else:
        _write(plan, out)


def _plan(settings: Settings, *, client: bool) -> Plan:
    from splitinfer.model.hub import resolve_model
    from splitinfer.model.quantize import QuantConfig
    from splitinfer.model.sharding import plan_shard
    from splitinfer.model.weights import Checkpoint
    from splitinfer.placement import parse_ranges, parse_slice

    checkpoint = Checkpoint.open(resolve_model(model_of(settings)))
    config = checkpoint.config
    held_experts, held_layers = checkpoint.held_experts, checkpoint.held_layers
    if settings.experts is not None:
        checkpoint.check_experts()
        held_experts = parse_ranges(settings.experts, config.num_experts, "--experts")
    elif client:
        held_experts = ()
    if settings.layers is not None:
        held_layers = parse_ranges(settings.layers, config.num_hidden_layers, "--layers")
    columns = checkpoint.held_columns
    if settings.slice is not None:
        checkpoint.check_experts()
        columns = parse_slice(settings.slice, config.moe_intermediate_size, "--slice")
    whole = settings.experts is None and settings.layers is None and columns is None
    quant = QuantConfig.of(
        settings.quant,
        attention=settings.quant_attention,
        dense=settings.quant_dense,
        embeddings=settings.quant_embeddings,
        lm_head=settings.quant_lm_head,
    )
    return plan_shard(
        checkpoint,
        experts=held_experts,
        layers=held_layers,
        client=client or whole,
        quant=quant,
        columns=columns,
    )


def _write(plan: Plan, out: Path) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from splitinfer.model.sharding import write_shard

    total = sum(file.nbytes for file in plan.files)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = screen()
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(out.name, total=total)

        def advance(name: str, nbytes: int) -> None:
            progress.update(task, advance=nbytes, description=name)

        manifest = write_shard(plan, out, progress=advance)
    print(f"{out}: {len(manifest.files)} files, {human_size(plan.nbytes)}")
