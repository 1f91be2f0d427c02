"""`splitinfer bench`: measure this machine, these nodes, this link."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitinfer import __version__
from splitinfer.cli.console import busy, human_size, run, screen
from splitinfer.cli.options import LINK, MODEL, QUANT, Json, takes
from splitinfer.cli.processes import node_arguments, node_process
from splitinfer.cli.rtt import CallFigures, measure_calls, percentile
from splitinfer.cli.session import client_config, model_of, name_of
from splitinfer.cli.transport_figures import measure_transport, table_of
from splitinfer.config import Settings
from splitinfer.errors import UsageError

if TYPE_CHECKING:
    from splitinfer.model.weights import Checkpoint

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer bench --rtt                   the demo model, a node on loopback
  splitinfer bench path/to/gemma --rtt --nodes host:7077
  splitinfer bench --rtt --json | jq .decode.network_ms
  splitinfer bench --transport --nodes host:7077
  splitinfer bench --decode                predicted beside measured, at 0.2, 2 and 20 ms
  splitinfer bench path/to/gemma --decode --nodes host:7077
"""

# How long each kind of call is measured.
LOAD: dict[str, Any] = {"seconds": 2.0}
DECODE: dict[str, Any] = {"at_least": 50, "at_most": 2000, "seconds": 3.0}
PREFILL: dict[str, Any] = {"at_least": 5, "at_most": 100, "seconds": 5.0}
_LAST_OF_SECTION = ("received", "round trip, p99 ms")


@takes(*MODEL, *QUANT, *LINK)
def command(
    rtt: Annotated[
        bool, typer.Option("--rtt", help="Round trips of expert calls: one decode row, one prefill block.")
    ] = False,
    transport: Annotated[
        bool,
        typer.Option("--transport", help="What the link carries: one row, 16 MiB, many rows at a time."),
    ] = False,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Tokens/s of several ways to decode, predicted beside measured."),
    ] = False,
    json_: Json = False,
    *,
    settings: Settings,
) -> None:
    """Measure what a link and its nodes allow.

    Without --nodes one node with all experts is started on loopback, in a
    process of its own; --decode starts one or two, and emulates three links
    unless --simulate-rtt names one.
    """
    if rtt + transport + decode != 1:
        raise UsageError(
            "one thing can be measured at a time" if rtt or decode else "there is nothing to measure",
            remedy="Say what: splitinfer bench --rtt, --transport or --decode.",
        )
    with busy(f"opening {name_of(settings)}"):
        from splitinfer.model.hub import resolve_model
        from splitinfer.model.weights import Checkpoint

        checkpoint = Checkpoint.open(resolve_model(model_of(settings)))
    if decode:
        from splitinfer.cli.bench_decode import bench_decode

        bench_decode(settings, checkpoint, json_=json_)
        return
    with ExitStack() as stack:
        addresses = settings.nodes
        if not addresses:
            with busy("starting a node on loopback"):
                addresses = (stack.enter_context(node_process(node_arguments(checkpoint, settings))),)
        if transport:
            run(_measure_links(settings, addresses, json_=json_))
            return
        figures = run(_measure(settings, checkpoint, addresses))
    if json_:
        print(json.dumps(_as_json(settings, figures)))
    else:
        _print_table(settings, figures)


async def _measure(
    settings: Settings, checkpoint: Checkpoint, addresses: tuple[str, ...]
) -> dict[str, CallFigures]:
    """The figures by kind of call."""
    from splitinfer.dispatch import RemoteExperts
    from splitinfer.model.pipeline import PREFILL_ROWS

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
            decode = await measure_calls(experts, config, rows=1, **DECODE)
        with busy(f"calling with a prefill block of {PREFILL_ROWS} rows"):
            prefill = await measure_calls(experts, config, rows=PREFILL_ROWS, **PREFILL)
    return {"decode": decode, "prefill": prefill}


async def _measure_links(settings: Settings, addresses: tuple[str, ...], *, json_: bool) -> None:
    """Measure the link to each node by itself, and print what it carries."""
    from splitinfer.transport import connect

    figures = {}
    for address in addresses:
        with busy(f"measuring the link to {address}"):
            async with await connect(address, config=client_config(settings)) as channel:
                figures[address] = await measure_transport(channel, timeout=settings.timeout, **LOAD)
    if json_:
        links = [
            {"node": address, "loads": [load.to_json() for load in figures[address]]} for address in figures
        ]
        print(json.dumps({"bench": "transport", "version": __version__, "links": links}))
        return
    for address, loads in figures.items():
        screen(stderr=False).print(table_of(f"the link to {address}", loads))


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
    table.add_column("")
    for kind in figures:
        table.add_column(f"one {kind} {'row' if kind == 'decode' else 'block'}", justify="right")
    columns = [_column(calls) for calls in figures.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns), end_section=name in _LAST_OF_SECTION)
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
        soft_wrap=True,
    )


def _column(calls: CallFigures) -> dict[str, str]:
    """One kind of call as lines of the table."""
    lines = {
        "rows": str(calls.rows),
        "calls": str(len(calls.total)),
        "sent": human_size(calls.nbytes_sent),
        "received": human_size(calls.nbytes_received),
    }
    for what, times in (("round trip", calls.total), ("network alone", calls.network)):
        for p in (50, 90, 99):
            lines[f"{what}, p{p} ms"] = f"{percentile(times, p) * 1e3:.3f}"
    return lines
