"""One cell of bench/network.py's table: tokens/s of one way to decode over one emulated link, and its bound.

The client runs in this process on half of the cores, nodes and links on the other half, one thread each.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from splitinfer import AsyncEngine, Completion
from splitinfer.dispatch import RemoteExperts
from splitinfer.generation import Usage
from splitinfer.model.config import ModelConfig, load_config
from splitinfer.model.experts import Where
from splitinfer.model.weights import Checkpoint
from splitinfer.node import ECHO_CALL
from splitinfer.transport import ClientConfig, connect
from splitinfer.transport.link import LinkSpec

__all__ = [
    "PROMPTS",
    "STREAMS",
    "WARM",
    "Figures",
    "Local",
    "Way",
    "config_of",
    "in_process",
    "link_of",
    "one_at_a_time",
    "open_way",
    "pin",
    "prefill_seconds",
    "prompt_of",
    "round_trip",
    "several_at_once",
]

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
WARM = 8
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
    """One cell. Bytes and calls are for each token of all replies, prompts left out. Where there is a bound,
    its terms are in seconds: a round trip, a call's experts, and a token's local time."""

    tokens_per_second: float
    bytes_per_token: float
    calls_per_token: float
    acceptance: float = 0.0
    of_bound: float = 0.0
    round_trip: float = 0.0
    experts: float = 0.0
    local: float = 0.0
    same_tokens: bool = True


@dataclass(frozen=True)
class Local:
    """The model in this process: its replies, and the seconds of a prompt of `PREFILL` tokens (0: not
    timed)."""

    replies: Reference
    prefill: float = 0.0


class Late:
    """Experts that are asked only when their answer is wanted: as if nothing ran beside them."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts

    def where(self, layer: int) -> Where:
        return "here"

    def dispatch(self, *arguments: Any) -> Awaitable[torch.Tensor]:
        return _Asked(lambda: self.experts.dispatch(*arguments))


class _Asked:
    def __init__(self, ask: Callable[[], Awaitable[torch.Tensor]]) -> None:
        self.ask = ask

    def __await__(self) -> Generator[Any, None, torch.Tensor]:
        return self.ask().__await__()


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


def link_of(rtt: float) -> ClientConfig:
    return ClientConfig(link=LinkSpec(rtt=rtt) if rtt else None)


async def round_trip(address: str, config: ModelConfig, rtt: float) -> float:
    """Seconds of a call with the bytes of one decode row, the median of some."""
    row: list[Any] = [
        torch.zeros((1, config.hidden_size), dtype=torch.bfloat16),
        np.zeros((1, config.top_k_experts), np.int16),
        np.zeros((1, config.top_k_experts), np.float32),
    ]
    times = []
    async with await connect(address, config=link_of(rtt)) as channel:
        pin()
        for _ in range(100 if rtt < 0.01 else 20):
            start = perf_counter()
            await channel.call(ECHO_CALL, row, {"layer": 0, "out": "bfloat16"})
            times.append(perf_counter() - start)
    return median(times)


def open_way(model: Path, addresses: Sequence[str], way: Way, rtt: float) -> AsyncEngine:
    """An engine that is not open yet."""
    return AsyncEngine(model, addresses, threads=1, transport=link_of(rtt), **way.settings)


async def in_process(
    model: Path, prompts: int, tokens: int, sampling: dict[str, Any], *, prefill: bool
) -> Local:
    """All of it here: the replies that every other way has to give, and what a prompt takes."""
    async with AsyncEngine(model, threads=1, draft="off") as engine:
        pin()
        await engine.generate(prompt_of(engine, 0), max_tokens=WARM, ignore_eos=True)
        replies = {
            n: await engine.generate(prompt_of(engine, n), max_tokens=tokens, ignore_eos=True, **sampling)
            for n in range(prompts)
        }
        seconds = await prefill_seconds(engine) if prefill else 0.0
        return Local({n: reply.token_ids for n, reply in replies.items()}, seconds)


async def prefill_seconds(engine: AsyncEngine) -> float:
    """Seconds of a prompt of PREFILL tokens, the median of three."""
    times = []
    for number in range(3):
        done = await engine.generate(prompt_of(engine, number, PREFILL), max_tokens=1, ignore_eos=True)
        times.append(done.timings.ttft)
    return median(times)


async def one_at_a_time(
    engine: AsyncEngine, prompts: int, tokens: int, sampling: dict[str, Any], local: Local, trip: float
) -> Figures:
    """Replies to several prompts, one after the other; figures from the engine's own account."""
    found = [await _one(engine, number, tokens, sampling) for number in range(prompts)]
    decoded = prompts * (tokens - 1)
    usages = [(one.reply.usage, one.alone) for one in found]
    calls = sum(usage.calls - alone.calls for usage, alone in usages) / decoded
    rate = decoded / sum((tokens - 1) / one.reply.timings.decode_tokens_per_second for one in found)
    experts = sum(one.experts for one in found) / decoded
    here = sum(local_seconds(one.reply) for one in found) / prompts
    trips = calls / max(1, len(engine.nodes))
    return Figures(
        tokens_per_second=rate,
        bytes_per_token=sum(_nbytes(usage) - _nbytes(alone) for usage, alone in usages) / decoded,
        calls_per_token=calls,
        acceptance=sum(u.accepted_tokens for u, _ in usages)
        / max(1, sum(u.drafted_tokens for u, _ in usages)),
        of_bound=rate * (trips * trip + experts + here),
        round_trip=trip,
        experts=experts / trips,
        local=here,
        same_tokens=all(
            one.reply.token_ids == local.replies[number][:tokens] for number, one in enumerate(found)
        ),
    )


class _One(NamedTuple):
    """A reply, what its prompt cost, and the seconds of the nodes' arithmetic behind the prompt."""

    reply: Completion
    alone: Usage
    experts: float


async def _one(engine: AsyncEngine, number: int, tokens: int, sampling: dict[str, Any]) -> _One:
    prompt, before = prompt_of(engine, number), None
    alone = (await engine.generate(prompt, max_tokens=1, ignore_eos=True)).usage
    async for piece in engine.stream(prompt, max_tokens=tokens, ignore_eos=True, **sampling):
        before = nodes_seconds(engine) if before is None else before  # with the first token, no call is left
        if piece.completion is not None:
            return _One(piece.completion, alone, nodes_seconds(engine) - before)
    raise AssertionError("a stream ends with its completion")


def nodes_seconds(engine: AsyncEngine) -> float:
    """Of the nodes' arithmetic so far, by their own account."""
    experts: Any = engine.model.experts
    while not isinstance(experts, RemoteExperts):
        experts = experts.experts if isinstance(experts, Late) else experts.remote
    return experts.compute_seconds


def local_seconds(reply: Completion) -> float:
    """What this machine does for a token while no node computes for it, by the engine's own account of the
    same reply: attention and combining in every layer, experts that are kept here, lm_head and sampling."""
    timings = reply.timings
    seconds = sum(timings.phases.get(phase, 0.0) for phase in ("head", "sampling")) / len(reply.token_ids)
    for layer in timings.layers:
        kept = () if "network" in layer else ("experts", "dense")
        seconds += sum(layer.get(phase, 0.0) for phase in ("attention", "combine", *kept))
    return seconds


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


def config_of(model: Path) -> ModelConfig:
    return load_config(model) if model.is_dir() else Checkpoint.open(model).config
