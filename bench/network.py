"""What hides the round trip, and how much of it: tokens/s over emulated links, one row for each round trip.

    python bench/network.py                             the demo model and its drafter, 0.2, 2 and 20 ms
    python bench/network.py MODEL --drafter DIR --rtt 20ms --plot docs/network.png
    python bench/network.py --llama-cpp BIN --gguf FILE.gguf        and llama.cpp beside it, true shapes

Nodes are processes of their own on this machine, one thread each, behind an emulated link that delays bytes
in user space (`transport/link.py`); the client has one thread and half of the cores to itself, as it would on
a machine of its own. Columns: plain decoding with the dense network after the experts' answer; the same with
it beside the travelling experts, which is how it is always done; a third of the layers local; prompt lookup;
the model's drafter; the drafter with a third of the layers local; eight replies at once.

The bound of plain decoding is 1 / (layers x (round trip + experts) + local time), each term measured by
itself in the same run:
    round trip   a call that carries a decode row to a node and has it sent back, without arithmetic
    experts      the nodes' own account of their arithmetic
    local time   a step of the same model with all experts in this process, less the experts' time and that of
                 the dense network, which runs while the experts travel

A prompt is measured against layers x round trip + the time of the same prompt in this process. Speeds of
plain decoding do not depend on the text and are taken over fewer tokens on slow links; those of drafts are
over several prompts. Every reply is compared with that of the model in this process: "same" tokens.

What it leaves out: bandwidth, lost packets, and machines of their own for the nodes: at short round trips
client, link and nodes compete for this machine's cores. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see splitinfer.cli.console

import network_report
import numpy as np
import psutil
import torch

from splitinfer import AsyncEngine, Completion
from splitinfer.cli.console import run as run_loop
from splitinfer.cli.processes import node_process
from splitinfer.model.config import ModelConfig, load_config
from splitinfer.model.weights import Checkpoint
from splitinfer.node import ECHO_CALL
from splitinfer.placement import format_ranges
from splitinfer.transport import ClientConfig, connect
from splitinfer.transport.link import LinkSpec, parse_duration

PROMPTS = (
    '''"""Reads settings from a file.

Every line is a name, an equals sign and a value.
"""

import os


def read_settings(path):
    """Return the settings in the file as a dictionary."""
''',
    '''class Queue:
    """A queue of items, first in, first out."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.items = []

    def put(self, item):
''',
)
STREAMS = 8
PREFILL = 512  # tokens of the prompt that is timed
LONG = 2048  # tokens of the prompt beside which another reply goes on
WARM = 8
LONG_TRIP = 0.01  # seconds of a round trip from which on plain decoding is measured over fewer tokens
Reference = dict[int, tuple[int, ...]]  # by prompt: the reply of the model in this process


@dataclass(frozen=True)
class Way:
    """One column: settings of the engine, and how it is used."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    streams: int = 1
    overlap: bool = True
    drafts: bool = False


@dataclass
class Figures:
    """One cell. Bytes and calls are for each token of all replies, prompts left out."""

    tokens_per_second: float
    bytes_per_token: float
    calls_per_token: float
    acceptance: float = 0.0
    of_bound: float = 0.0
    same_tokens: bool = True


@dataclass(frozen=True)
class Local:
    """The model in this process: seconds of a step less experts and dense network, of a prompt; replies."""

    step: float
    prefill: float
    replies: Reference


class Late:
    """Experts that are asked only when their answer is wanted: as if nothing ran beside them."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts

    def dispatch(self, *arguments: Any) -> Awaitable[torch.Tensor]:
        return _Asked(lambda: self.experts.dispatch(*arguments))


class _Asked:
    def __init__(self, ask: Callable[[], Awaitable[torch.Tensor]]) -> None:
        self.ask = ask

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        return self.ask().__await__()


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


def pin() -> None:
    """The client on one half of the cores, nodes and links on the other: woken processes would share its."""
    cores = sorted(os.sched_getaffinity(0) | set(range(os.cpu_count() or 1)))
    half = max(1, len(cores) // 2)
    os.sched_setaffinity(0, cores[:half])
    for child in psutil.Process().children():
        child.cpu_affinity(cores[half:] or cores)


def prompt_of(engine: AsyncEngine, number: int, tokens: int = 0) -> str | list[int]:
    """One of the prompts; or token ids of that many tokens."""
    if engine.tokenizer is not None and not tokens:
        return PROMPTS[number]
    count = min(1000, engine.config.vocab_size - 10)
    return [2, *(5 + (7 * i + number) % count for i in range((tokens or 50) - 1))]


async def round_trip(address: str, config: ModelConfig, transport: ClientConfig) -> float:
    """Seconds of a call with the bytes of one decode row, the median of some."""
    row: list[Any] = [
        torch.zeros((1, config.hidden_size), dtype=torch.bfloat16),
        np.zeros((1, config.top_k_experts), np.int16),
        np.zeros((1, config.top_k_experts), np.float32),
    ]
    times = []
    async with await connect(address, config=transport) as channel:
        pin()
        for _ in range(100 if transport.link is None or transport.link.rtt < 0.01 else 20):
            start = perf_counter()
            await channel.call(ECHO_CALL, row, {"layer": 0, "out": "bfloat16"})
            times.append(perf_counter() - start)
    return median(times)


def per_token(completion: Completion, *phases: str) -> float:
    """Seconds of these phases in all layers, for each decoded token."""
    return sum(layer.get(phase, 0.0) for layer in completion.timings.layers for phase in phases)


async def in_process(model: Path, prompts: int, tokens: int, sampling: dict[str, Any]) -> Local:
    """All of it here: what the client's half takes, and the replies that every other way has to give."""
    async with AsyncEngine(model, threads=1, draft="off") as engine:
        pin()
        await engine.generate(prompt_of(engine, 0), max_tokens=WARM, ignore_eos=True)
        replies = [
            await engine.generate(prompt_of(engine, n), max_tokens=tokens, ignore_eos=True, **sampling)
            for n in range(prompts)
        ]
        steps = [
            1 / reply.timings.decode_tokens_per_second - per_token(reply, "experts", "dense")
            for reply in replies
        ]
        return Local(
            median(steps), await prefill_seconds(engine), {n: r.token_ids for n, r in enumerate(replies)}
        )


async def prefill_seconds(engine: AsyncEngine) -> float:
    """Seconds of a prompt of PREFILL tokens, the median of three."""
    times = []
    for number in range(3):
        done = await engine.generate(prompt_of(engine, number, PREFILL), max_tokens=1, ignore_eos=True)
        times.append(done.timings.ttft)
    return median(times)


async def one_at_a_time(
    engine: AsyncEngine, prompts: int, tokens: int, sampling: dict[str, Any], local: Local, rtt: float
) -> Figures:
    """Replies to several prompts, one after the other; figures from the engine's own account."""
    found = []
    same = True
    for number in range(prompts):
        prompt = prompt_of(engine, number)
        alone = (await engine.generate(prompt, max_tokens=1, ignore_eos=True)).usage  # what the prompt costs
        reply = await engine.generate(prompt, max_tokens=tokens, ignore_eos=True, **sampling)
        same &= reply.token_ids == local.replies[number][:tokens]
        found.append((reply, alone))
    decoded = prompts * (tokens - 1)
    usages = [(reply.usage, alone) for reply, alone in found]
    calls = sum(usage.calls - alone.calls for usage, alone in usages) / decoded
    experts = mean(per_token(reply, "experts") for reply, _ in found)
    rate = decoded / sum((tokens - 1) / reply.timings.decode_tokens_per_second for reply, _ in found)
    return Figures(
        tokens_per_second=rate,
        bytes_per_token=sum(_nbytes(usage) - _nbytes(alone) for usage, alone in usages) / decoded,
        calls_per_token=calls,
        acceptance=sum(u.accepted_tokens for u, _ in usages)
        / max(1, sum(u.drafted_tokens for u, _ in usages)),
        of_bound=rate * (calls * rtt / max(1, len(engine.nodes)) + experts + local.step),
        same_tokens=same,
    )


def _nbytes(usage: Any) -> int:
    return int(usage.bytes_sent + usage.bytes_received)


async def several_at_once(
    engine: AsyncEngine, tokens: int, sampling: dict[str, Any], local: Local
) -> Figures:
    """Tokens of all replies per second, while all of them are decoding."""
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    ids: list[list[int]] = [[] for _ in range(STREAMS)]
    prompt = prompt_of(engine, 0)

    async def follow(number: int) -> None:
        async for piece in engine.stream(prompt, max_tokens=tokens, ignore_eos=True, **sampling):
            arrivals[number].append(perf_counter())
            ids[number] += piece.token_ids

    alone = (await engine.generate(prompt, max_tokens=1, ignore_eos=True)).usage
    before = engine.traffic()
    await asyncio.gather(*(follow(number) for number in range(STREAMS)))
    sent, received, calls = (b - a for a, b in zip(before, engine.traffic(), strict=True))
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    made = sum(sum(begin < at <= end for at in times) for times in arrivals)
    decoded = STREAMS * (tokens - 1)
    return Figures(
        tokens_per_second=made / (end - begin),
        bytes_per_token=(sent + received - STREAMS * _nbytes(alone)) / decoded,
        calls_per_token=(calls - STREAMS * alone.calls) / decoded,
        same_tokens=all(tuple(i) == local.replies[0][:tokens] for i in ids),
    )


async def prompt_figures(engine: AsyncEngine, local: Local, rtt: float) -> dict[str, float]:
    """A long prompt against its bound, and how long it holds up a reply that is being written."""
    layers = engine.config.num_hidden_layers
    took = await prefill_seconds(engine)
    bound = layers * rtt + local.prefill
    gaps: list[float] = []
    going = asyncio.Event()

    async def write() -> None:
        last = perf_counter()
        async for _ in engine.stream(prompt_of(engine, 0), max_tokens=1000, ignore_eos=True):
            gaps.append(perf_counter() - last)
            last = perf_counter()
            if len(gaps) == 12:
                going.set()

    writing = asyncio.create_task(write())
    await going.wait()
    usual, first = median(gaps[2:]), len(gaps)
    length = min(LONG, engine.context - WARM)
    done = await engine.generate(prompt_of(engine, 1, length), max_tokens=1, ignore_eos=True)
    held_up = max(gaps[first:], default=0.0)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    return {
        "prefill_seconds": took,
        "prefill_bound": bound,
        "long_prompt_tokens": length,
        "long_prompt_seconds": done.timings.ttft,
        "usual_pause": usual,
        "longest_pause": held_up,
        "tokens_beside": len(gaps) - first,
    }


async def measure(
    arguments: argparse.Namespace,
    addresses: Sequence[str],
    way: Way,
    rtt: float,
    local: Local,
    sampling: dict[str, Any],
) -> tuple[Figures, dict[str, float]]:
    transport = ClientConfig(link=LinkSpec(rtt=rtt) if rtt else None)
    measured = await round_trip(addresses[0], config_of(arguments.model), transport)
    async with AsyncEngine(
        arguments.model, addresses, threads=1, transport=transport, **way.settings
    ) as engine:
        pin()
        if not way.overlap:
            engine.model.experts = Late(engine.model.experts)
        await engine.generate(prompt_of(engine, 0), max_tokens=WARM, ignore_eos=True)
        tokens = arguments.plain_tokens if rtt >= LONG_TRIP else arguments.tokens
        if way.streams > 1:
            figures = await several_at_once(engine, tokens, sampling, local)
            return figures, {"round_trip": measured, **await prompt_figures(engine, local, measured)}
        prompts = len(PROMPTS) if way.drafts else 1
        tokens = arguments.tokens if way.drafts else tokens
        return await one_at_a_time(engine, prompts, tokens, sampling, local, measured), {}


def config_of(model: Path) -> ModelConfig:
    return load_config(model) if model.is_dir() else Checkpoint.open(model).config


def middle(rounds: list[Any]) -> dict[str, float]:
    return {name: median(found[name] for found in rounds) for name in rounds[0]}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The cells of every round trip, and its prompts, as plain numbers."""
    config = config_of(arguments.model)
    count, nodes = config.num_experts, arguments.nodes
    shares = [format_ranges(range(n * count // nodes, (n + 1) * count // nodes)) for n in range(nodes)]
    columns = ways(config.num_hidden_layers, arguments.drafter)
    table: dict[str, Any] = {}
    with ExitStack() as stack:
        addresses = [
            stack.enter_context(node_process([str(arguments.model), "--experts", share, "--threads", "1"]))
            for share in shares
        ]
        for rtt in arguments.rtt.split(","):
            cells: dict[str, list[Any]] = {way.name: [] for way in columns}
            prompts: list[dict[str, float]] = []
            for number in range(arguments.rounds):
                sampling = {"temperature": arguments.temperature, "seed": number}
                local = run_loop(in_process(arguments.model, len(PROMPTS), arguments.tokens, sampling))
                for way in columns:
                    figures, found = run_loop(
                        measure(arguments, addresses, way, parse_duration(rtt), local, sampling)
                    )
                    cells[way.name].append(asdict(figures))
                    prompts += [{**found, "local_step": local.step}] if found else []
            table[rtt] = {"cells": {name: middle(rounds) for name, rounds in cells.items()}}
            table[rtt]["prompts"] = middle(prompts)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="default: the demo model")
    parser.add_argument("--drafter", help="its drafter (default: the demo model's)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--rtt", default="0.2ms,2ms,20ms", help="round trips, separated by commas")
    parser.add_argument("--tokens", type=int, default=128, help="of each reply with drafts")
    parser.add_argument("--plain-tokens", type=int, default=48, help="of each reply without, from 10 ms on")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy; the seed is the round's")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plot", help="a PNG file")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama-bench and ggml-rpc-server")
    parser.add_argument("--gguf", type=Path, help="true shapes for both, made if missing (3.2 GB)")
    arguments = parser.parse_args()
    if arguments.llama_cpp is not None:
        import network_llama

        figures = network_llama.compare(arguments)
        network_report.show_llama(figures)
        print(json.dumps(figures))
        return
    if arguments.model is None:
        from splitinfer import demo

        arguments.model, arguments.drafter = demo.path(), arguments.drafter or str(demo.drafter_path())
    table = run(arguments)
    network_report.show(table)
    if arguments.plot:
        network_report.plot(table, arguments.plot)
    json.dump(table, sys.stdout)
    print()


if __name__ == "__main__":
    main()
