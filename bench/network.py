"""What hides the round trip, and how much of it: tokens/s over emulated links, one row for each round trip.

    python bench/network.py                             the demo model and its drafter, 0.2, 2 and 20 ms
    python bench/network.py MODEL --drafter DIR --rtt 20ms --plot docs/network.png
    python bench/network.py MODEL --columns plain --rounds 3        plain decoding and its bound only
    python bench/network.py --windows                   one window of drafts under way, or several
    python bench/network.py --llama-cpp BIN --gguf FILE.gguf        and llama.cpp beside it, true shapes

Nodes are processes of their own on this machine, one thread each, behind an emulated link that delays bytes
in user space (`transport/link.py`); the client has one thread and half of the cores to itself, as it would on
a machine of its own. Columns: plain decoding with the dense network after the experts' answer; the same with
it beside the travelling experts, which is how it is always done; a third of the layers local; prompt lookup;
the model's drafter; the drafter with a third of the layers local; eight replies at once.

The bound of plain decoding is 1 / (layers x (round trip + experts) + local time):
    round trip   a call that carries a decode row to a node and has it sent back, without arithmetic, over
                 the same link before each reply: a median
    experts      the nodes' own account of their arithmetic, as it comes with their answers to this reply
    local time   the engine's own account of this reply: attention with routing, combining, lm_head and
                 sampling. It is taken with the experts in flight, because after each wait the same arithmetic
                 takes up to twice as long as in a loop that never waits. The dense network is not in it: it
                 runs while the experts travel. Nor is what lies between: making calls, taking answers and
                 the event loop, here and at the node, are what the bound is missed by.

A prompt is measured against layers x round trip + the time of the same prompt in this process. Speeds of
plain decoding do not depend on the text and are taken over fewer tokens on slow links; those of drafts are
over several prompts. Every reply is compared with that of the model in this process: "same" tokens.

What it leaves out: bandwidth, lost packets, and machines of their own for the nodes: at short round trips
client, link and nodes compete for this machine's cores. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see splitinfer.cli.console

import network_cells as cells
import network_prompts
import network_report
from network_cells import STREAMS, Figures, Local, Way

from splitinfer.cli.console import run as run_loop
from splitinfer.cli.processes import node_process
from splitinfer.errors import UsageError
from splitinfer.placement import format_ranges
from splitinfer.transport.link import parse_duration

LONG_TRIP = 0.01  # seconds of a round trip from which on plain decoding is measured over fewer tokens


def ways(layers: int, drafter: str | None) -> list[Way]:
    third = format_ranges(range(layers // 3))
    chosen = [
        Way("no overlap", {"draft": "off"}, overlap=False),
        Way("plain", {"draft": "off"}),
        Way("third local", {"draft": "off", "local_layers": third}),
        Way("lookup", {"draft": "lookup"}, drafts=True),
    ]
    if drafter is not None:
        chosen += [
            Way("drafter", {"draft": drafter}, drafts=True),
            Way("drafter, third local", {"draft": drafter, "local_layers": third}, drafts=True),
        ]
    return [*chosen, Way(f"{STREAMS} replies", {"draft": "off"}, STREAMS)]


def chosen(arguments: argparse.Namespace) -> list[Way]:
    """The columns that were asked for."""
    every = ways(cells.config_of(arguments.model).num_hidden_layers, arguments.drafter)
    wanted = None if arguments.columns is None else [name.strip() for name in arguments.columns.split(";")]
    unknown = set(wanted or ()) - {way.name for way in every}
    if unknown:
        names = "; ".join(way.name for way in every)
        raise UsageError(f"no columns {', '.join(unknown)}", remedy=f"Choose from: {names}.")
    return [way for way in every if wanted is None or way.name in wanted]


async def measure(
    arguments: argparse.Namespace,
    addresses: Sequence[str],
    way: Way,
    rtt: float,
    local: Local,
    sampling: dict[str, Any],
) -> tuple[Figures, dict[str, float]]:
    """One cell, and where several replies go on at once how a prompt fares beside them."""
    trip = await cells.round_trip(addresses[0], cells.config_of(arguments.model), rtt)
    async with cells.open_way(arguments.model, addresses, way, rtt) as engine:
        cells.pin()
        if not way.overlap:
            engine.model.experts = cells.Late(engine.model.experts)
        await engine.generate(cells.prompt_of(engine, 0), max_tokens=cells.WARM, ignore_eos=True)
        tokens = arguments.plain_tokens if rtt >= LONG_TRIP else arguments.tokens
        if way.streams > 1:
            figures = await cells.several_at_once(engine, tokens, sampling, local)
            return figures, {"round_trip": trip, **await network_prompts.prompt_figures(engine, local, trip)}
        prompts = len(cells.PROMPTS) if way.drafts else 1
        tokens = arguments.tokens if way.drafts else tokens
        return await cells.one_at_a_time(engine, prompts, tokens, sampling, local, trip), {}


def middle(rounds: list[Any]) -> dict[str, float]:
    return {name: median(found[name] for found in rounds) for name in rounds[0]}


@contextmanager
def nodes(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The nodes' addresses, while they run."""
    count, nodes = cells.config_of(arguments.model).num_experts, arguments.nodes
    shares = [format_ranges(range(n * count // nodes, (n + 1) * count // nodes)) for n in range(nodes)]
    with ExitStack() as stack:
        yield [
            stack.enter_context(node_process([str(arguments.model), "--experts", share, "--threads", "1"]))
            for share in shares
        ]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The cells of every round trip, and its prompts, as plain numbers: medians over the rounds, in each of
    which every column is measured once."""
    columns, trips = chosen(arguments), arguments.rtt.split(",")
    prefill = any(way.streams > 1 for way in columns)
    prompts = len(cells.PROMPTS) if any(way.drafts for way in columns) else 1
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    beside: dict[str, list[dict[str, float]]] = {rtt: [] for rtt in trips}
    with nodes(arguments) as addresses:
        for number in range(arguments.rounds):
            sampling = {"temperature": arguments.temperature, "seed": number}
            alone = cells.in_process(arguments.model, prompts, arguments.tokens, sampling, prefill=prefill)
            local = run_loop(alone)
            for rtt in trips:
                for way in columns:
                    figures, prompt = run_loop(
                        measure(arguments, addresses, way, parse_duration(rtt), local, sampling)
                    )
                    found.setdefault((rtt, way.name), []).append(asdict(figures))
                    beside[rtt] += [prompt] if prompt else []
    table: dict[str, Any] = {}
    for rtt in trips:
        table[rtt] = {"cells": {way.name: middle(found[rtt, way.name]) for way in columns}}
        if beside[rtt]:
            table[rtt]["prompts"] = middle(beside[rtt])
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="default: the demo model")
    parser.add_argument("--drafter", help="its drafter (default: the demo model's)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--rtt", default="0.2ms,2ms,20ms", help="round trips, separated by commas")
    parser.add_argument("--columns", help="their names, separated by semicolons (default: all)")
    parser.add_argument("--tokens", type=int, default=128, help="of each reply with drafts")
    parser.add_argument("--plain-tokens", type=int, default=48, help="of each reply without, from 10 ms on")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy; the seed is the round's")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plot", help="a PNG file")
    parser.add_argument("--windows", action="store_true", help="windows of drafts under way, instead")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama-bench and ggml-rpc-server")
    parser.add_argument("--gguf", type=Path, help="true shapes for both, made if missing (3.2 GB)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.llama_cpp is not None:
        import network_llama

        figures = network_llama.compare(arguments)
        network_report.show_llama(figures)
        print(json.dumps(figures))
        return
    if arguments.model is None:
        from splitinfer import demo

        arguments.model, arguments.drafter = demo.path(), arguments.drafter or str(demo.drafter_path())
    if arguments.windows:
        import network_windows

        figures = network_windows.compare(arguments)
        network_report.show_windows(figures)
        print(json.dumps(figures))
        return
    table = run(arguments)
    network_report.show(table)
    if arguments.plot:
        network_report.plot(table, arguments.plot)
    json.dump(table, sys.stdout)
    print()


if __name__ == "__main__":
    main()
