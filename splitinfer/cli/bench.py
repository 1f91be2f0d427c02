"""`splitinfer bench`: measure this machine, these nodes, this link."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitinfer import __version__
from splitinfer.cli import options
from splitinfer.cli.console import busy, human_size, run, screen
from splitinfer.cli.demo import node_process
from splitinfer.cli.link_options import reaching_nodes
from splitinfer.cli.rtt import CallFigures, measure_calls, percentile
from splitinfer.cli.session import client_config, model_of, name_of
from splitinfer.config import Settings, load_settings
from splitinfer.errors import UsageError

if TYPE_CHECKING:
    from splitinfer.model.weights import Checkpoint

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer bench --rtt                   the demo model, a node on loopback
  splitinfer bench path/to/gemma --rtt --nodes host:7077
  splitinfer bench --rtt --json | jq .decode.network_ms
"""


@reaching_nodes
def command(
    model: options.ModelArgument = None,
    model_option: options.Model = None,
    rtt: Annotated[
        bool, typer.Option("--rtt", help="Round trips of expert calls: one decode row, one prefill block.")
    ] = False,
    json_: options.Json = False,
    nodes: options.Nodes = None,
    timeout: options.Timeout = None,
    token_file: options.TokenFile = None,
    *,
    link: dict[str, Any],
) -> None:
    """Measure what a link and its nodes allow.

    Without --nodes one node with all experts is started on loopback, in a
    process of its own.
    """
    if not rtt:
        raise UsageError("there is nothing to measure", remedy="say what: splitinfer bench --rtt")
    settings = load_settings(
        {
            "model": options.one_model(model, model_option),
            "nodes": nodes,
            "timeout": timeout,
            "token_file": token_file,
            **link,
        }
    )
    with busy(f"opening {name_of(settings)}"):
        from splitinfer.model.hub import resolve_model
        from splitinfer.model.weights import Checkpoint

        checkpoint = Checkpoint.open(resolve_model(model_of(settings)))
    with ExitStack() as stack:
        addresses = settings.nodes
        if not addresses:
            with busy("starting a node on loopback"):
                addresses = (stack.enter_context(node_process(_everything(checkpoint))),)
        figures = run(_measure(settings, checkpoint, addresses))
    if json_:
        print(json.dumps(_as_json(settings, figures)))
    else:
        _print_table(settings, figures)


def _everything(checkpoint: Checkpoint) -> list[str]:
    """The arguments of a node that holds the whole model, whatever this user's settings say of nodes."""
    config = checkpoint.config
    ranges = ["--experts", f"0-{config.num_experts - 1}", "--layers", f"0-{config.num_hidden_layers - 1}"]
    return [str(checkpoint.path), *ranges, "--host", "127.0.0.1"]


async def _measure(
    settings: Settings, checkpoint: Checkpoint, addresses: tuple[str, ...]
) -> dict[str, CallFigures]:
    """The figures by kind of call."""
    from splitinfer.dispatch import RemoteExperts
    from splitinfer.engine import PREFILL_ROWS

    config = checkpoint.config
    async with AsyncExitStack() as stack:
        experts = await RemoteExperts.connect(
            addresses,
            layers=range(config.num_hidden_layers),
            num_experts=config.num_experts,
            columns=config.moe_intermediate_size,
            fingerprint=checkpoint.fingerprint,
            timeout=settings.timeout,
            config=client_config(settings),
        )
        stack.push_async_callback(experts.close)
        with busy("calling with one decode row"):
            decode = await measure_calls(experts, config, rows=1, at_least=50, at_most=2000, seconds=3.0)
        with busy(f"calling with a prefill block of {PREFILL_ROWS} rows"):
            prefill = await measure_calls(
                experts, config, rows=PREFILL_ROWS, at_least=5, at_most=100, seconds=5.0
            )
    return {"decode": decode, "prefill": prefill}


def _as_json(settings: Settings, figures: Mapping[str, CallFigures]) -> dict[str, Any]:
    return {
        "bench": "rtt",
        "version": __version__,
        "model": settings.model or None,
        "nodes": list(settings.nodes),
        "layers": figures["decode"].layers,
        **{kind: calls.to_json() for kind, calls in figures.items()},
    }


def _print_table(settings: Settings, figures: Mapping[str, CallFigures]) -> None:
    """The percentiles as a table, then what they mean in tokens/s."""
    from rich.table import Table

    where = ", ".join(settings.nodes) if settings.nodes else "one node on loopback"
    table = Table(title=f"expert calls to {where}", title_justify="left")
    for heading in (
        "call",
        "rows",
        "sent",
        "received",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "network p50",
        "p99",
        "calls",
    ):
        table.add_column(heading, justify="left" if heading == "call" else "right")
    for kind, calls in figures.items():
        times = [percentile(calls.total, p) for p in (50, 90, 99)]
        times += [percentile(calls.network, p) for p in (50, 99)]
        table.add_row(
            kind,
            str(calls.rows),
            human_size(calls.nbytes_sent),
            human_size(calls.nbytes_received),
            *(f"{seconds * 1e3:.3f}" for seconds in times),
            str(len(calls.total)),
        )
    decode, prefill = figures["decode"], figures["prefill"]
    console = screen(stderr=False)
    console.print(table)
    console.print(
        f"network-only ceiling: {decode.ceiling:.1f} tokens/s in decode "
        f"({decode.layers} layers × {percentile(decode.network, 50) * 1e3:.3f} ms), "
        f"{prefill.ceiling:.0f} in prefill\n"
        f"with the nodes' arithmetic: {decode.with_arithmetic:.1f} tokens/s in decode, "
        f"{prefill.with_arithmetic:.0f} in prefill",
        markup=False,
    )
