"""What hides the round trip, and how much of it: tokens/s over emulated links, one row for each round trip.

    python bench/network.py                             the demo model and its drafter, 0.2, 2 and 20 ms
    python bench/network.py MODEL --drafter DIR --rtt 20ms --tokens 64 --plot docs/network.png

Nodes are processes of their own on this machine, one thread each, behind an emulated link that delays bytes
in user space (`transport/link.py`); the client has one thread and half of the cores to itself, as it would on
a machine of its own. Columns: plain decoding (whose dense network runs while the experts travel), a third of
the layers local, prompt lookup, the model's drafter, the drafter with a third of the layers local, and eight
replies at once. The bound of plain decoding, printed beside it, is 1 / (layers x (round trip + experts) +
local time): the round trip of a ping on the emulated link, the nodes' own account of their arithmetic, and
the client's time less that of the calls and of the dense network beside them. Rounds alternate between the
columns; figures are medians.

What it leaves out: bandwidth, lost packets, and machines of their own for the nodes: at short round trips
client, link and nodes compete for this machine's cores. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see splitinfer.cli.console

import psutil
from rich.console import Console
from rich.table import Table

from splitinfer import AsyncEngine
from splitinfer.cli.processes import node_process
from splitinfer.model.config import load_config
from splitinfer.placement import format_ranges
from splitinfer.transport import ClientConfig, connect
from splitinfer.transport.link import LinkSpec, parse_duration

PROMPT = '''"""Reads settings from a file.

Every line is a name, an equals sign and a value.
"""

import os


def read_settings(path):
    """Return the settings in the file as a dictionary."""
'''
STREAMS = 8


@dataclass(frozen=True)
class Way:
    """One column: settings of the engine, and the number of replies at once."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    streams: int = 1


@dataclass
class Figures:
    """One cell. Bytes and calls are for each token of all replies, prompts left out."""

    tokens_per_second: float
    acceptance: float
    bytes_per_token: float
    calls_per_token: float
    bound: float
    same_tokens: bool = True


def ways(layers: int, drafter: str | None) -> list[Way]:
    third = format_ranges(range(layers // 3))
    chosen = [
        Way("plain", {"draft": "off"}),
        Way("third local", {"draft": "off", "local_layers": third}),
        Way("lookup", {"draft": "lookup"}),
    ]
    if drafter is not None:
        chosen += [
            Way("drafter", {"draft": drafter}),
            Way("drafter, third local", {"draft": drafter, "local_layers": third}),
        ]
    return [*chosen, Way(f"{STREAMS} replies", {"draft": "off"}, STREAMS)]


def pin() -> None:
    """The client on one half of the cores, nodes and links on the other: woken processes would share its."""
    cores = sorted(os.sched_getaffinity(0) | set(range(os.cpu_count() or 1)))
    half = max(1, len(cores) // 2)
    os.sched_setaffinity(0, cores[:half])
    for child in psutil.Process().children():
        child.cpu_affinity(cores[half:] or cores)


async def round_trip(address: str, transport: ClientConfig) -> float:
    """Seconds of a ping, the median of some."""
    async with await connect(address, config=transport) as channel:
        pin()
        return statistics.median([await channel.ping() for _ in range(20)])


async def one_reply(
    engine: AsyncEngine, prompt: str | list[int], rtt: float, tokens: int, sampling: dict[str, Any]
) -> tuple[Any, ...]:
    """Figures of one reply and its token ids, from the engine's own account."""
    completion = await engine.generate(prompt, max_tokens=tokens, ignore_eos=True, **sampling)
    prefill = await engine.generate(prompt, max_tokens=1, ignore_eos=True)  # what the prompt alone costs
    usage, decoded = completion.usage, tokens - 1
    rate = completion.timings.decode_tokens_per_second
    layers = completion.timings.layers
    experts, *waits = (
        sum(layer.get(name, 0.0) for layer in layers) for name in ("experts", "dispatch", "dense", "network")
    )
    calls = (usage.calls - prefill.usage.calls) / decoded
    local = 1 / rate - experts - sum(waits)  # all that is neither the calls nor what runs beside them
    figures = Figures(
        tokens_per_second=rate,
        acceptance=usage.accepted_tokens / max(1, usage.drafted_tokens),
        bytes_per_token=_traffic(usage, prefill.usage) / decoded,
        calls_per_token=calls,
        bound=1 / (calls * rtt + experts + local),
    )
    return figures, completion.token_ids


def _traffic(usage: Any, less: Any) -> int:
    return usage.bytes_sent + usage.bytes_received - less.bytes_sent - less.bytes_received


async def several_replies(
    engine: AsyncEngine, prompt: str | list[int], tokens: int, sampling: dict[str, Any]
) -> tuple[Any, ...]:
    """Tokens of all replies per second, while all of them are decoding."""
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    ids: list[list[int]] = [[] for _ in range(STREAMS)]

    async def follow(number: int) -> None:
        async for piece in engine.stream(prompt, max_tokens=tokens, ignore_eos=True, **sampling):
            arrivals[number].append(perf_counter())
            ids[number] += piece.token_ids

    prefill = await engine.generate(prompt, max_tokens=1, ignore_eos=True)
    before = engine.traffic()
    await asyncio.gather(*(follow(number) for number in range(STREAMS)))
    sent, received, calls = (b - a for a, b in zip(before, engine.traffic(), strict=True))
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    made = sum(sum(begin < at <= end for at in times) for times in arrivals)
    decoded, usage = STREAMS * (tokens - 1), prefill.usage
    nbytes = sent + received - STREAMS * (usage.bytes_sent + usage.bytes_received)
    calls -= STREAMS * usage.calls
    figures = Figures(made / (end - begin), 0.0, nbytes / decoded, calls / decoded, 0.0)
    return figures, tuple(ids[0]) if all(i == ids[0] for i in ids) else ()


async def measure(
    model: Path, addresses: Sequence[str], way: Way, rtt: float, tokens: int, sampling: dict[str, Any]
) -> tuple[Figures, tuple[int, ...]]:
    transport = ClientConfig(link=LinkSpec(rtt=rtt) if rtt else None)
    measured = await round_trip(addresses[0], transport)
    async with AsyncEngine(model, addresses, threads=1, transport=transport, **way.settings) as engine:
        pin()
        prompt: str | list[int] = PROMPT if engine.tokenizer is not None else [2, *range(5, 50)]
        await engine.generate(prompt, max_tokens=4, ignore_eos=True)
        if way.streams > 1:
            return await several_replies(engine, prompt, tokens, sampling)
        return await one_reply(engine, prompt, measured, tokens, sampling)


def median(rounds: list[Figures]) -> Figures:
    names = asdict(rounds[0])
    return Figures(**{name: statistics.median(getattr(r, name) for r in rounds) for name in names})


def run(arguments: argparse.Namespace, model: Path, drafter: str | None) -> dict[str, dict[str, Figures]]:
    config = load_config(model)
    count, nodes = config.num_experts, arguments.nodes
    shares = [format_ranges(range(n * count // nodes, (n + 1) * count // nodes)) for n in range(nodes)]
    columns = ways(config.num_hidden_layers, drafter)
    table: dict[str, dict[str, Figures]] = {}
    with ExitStack() as stack:
        addresses = [
            stack.enter_context(node_process([str(model), "--experts", share, "--threads", "1"]))
            for share in shares
        ]
        for rtt in arguments.rtt.split(","):
            rounds: dict[str, list[Figures]] = {way.name: [] for way in columns}
            for number in range(arguments.rounds):
                expected: tuple[int, ...] = ()
                sampling = {"temperature": arguments.temperature, "seed": number}
                for way in columns:
                    link = parse_duration(rtt)
                    figures, ids = asyncio.run(
                        measure(model, addresses, way, link, arguments.tokens, sampling)
                    )
                    expected = expected or ids
                    figures.same_tokens = ids == expected
                    rounds[way.name].append(figures)
            table[rtt] = {name: median(found) for name, found in rounds.items()}
    return table


def show(table: dict[str, dict[str, Figures]]) -> None:
    shown = Table(
        "round trip",
        "",
        "tokens/s",
        "× plain",
        "of its bound",
        "acceptance",
        "kB/token",
        "calls/token",
        "tokens",
    )
    for rtt, cells in table.items():
        plain = cells["plain"].tokens_per_second
        for name, cell in cells.items():
            shown.add_row(
                rtt,
                name,
                f"{cell.tokens_per_second:.2f}",
                f"{cell.tokens_per_second / plain:.2f}",
                f"{cell.tokens_per_second / cell.bound:.2f}" if name in ("plain", "third local") else "",
                f"{cell.acceptance:.2f}" if cell.acceptance else "",
                f"{cell.bytes_per_token / 1e3:.1f}",
                f"{cell.calls_per_token:.2f}",
                "same" if cell.same_tokens else "OTHER",
            )
        shown.add_section()
    Console(stderr=True, width=100).print(shown)


def plot(table: dict[str, dict[str, Figures]], file: str) -> None:
    """Speed against plain decoding, grouped by round trip."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    names = list(next(iter(table.values())))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        rates = [cells[name].tokens_per_second for cells in table.values()]
        at = [group + place * width for group in range(len(table))]
        bars = axes.bar(at, rates, width * 0.92, label=name)
        axes.bar_label(bars, [f"{rate:.0f}" for rate in rates], fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(
        [group + 0.4 - width / 2 for group in range(len(table))], [f"{rtt} round trip" for rtt in table]
    )
    axes.set_ylabel("tokens/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=3, frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="default: the demo model")
    parser.add_argument("--drafter", help="its drafter (default: the demo model's)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--rtt", default="0.2ms,2ms,20ms", help="round trips, separated by commas")
    parser.add_argument("--tokens", type=int, default=64, help="of each reply")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; the seed is the round's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", help="a PNG file")
    arguments = parser.parse_args()
    model, drafter = arguments.model, arguments.drafter
    if model is None:
        from splitinfer import demo

        model, drafter = demo.path(), drafter or str(demo.drafter_path())
    table = run(arguments, model, drafter)
    show(table)
    if arguments.plot:
        plot(table, arguments.plot)
    json.dump({rtt: {n: asdict(c) for n, c in cells.items()} for rtt, cells in table.items()}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
