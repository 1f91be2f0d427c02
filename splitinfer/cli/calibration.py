"""A few quantities from which every case of `bench --decode` is predicted: this machine's work by rows over
each link that is not slow, calls by rows over one, round trips of the others.

The client's work is measured with experts that are not there: each layer waits for an empty message to come
back instead of calling, or for a moment where there are no nodes, so that caches and cores are as idle as
they are with a network in between. Calls are made one after the other, of random rows with random routing. No
case of the table is run for it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

from splitinfer.planning.cost import Alone, CallCost, ClientCost, Curve
from splitinfer.timing import Timeline

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from splitinfer.dispatch import RemoteExperts
    from splitinfer.engine import AsyncEngine
    from splitinfer.model.cache import KVCache
    from splitinfer.model.config import ModelConfig
    from splitinfer.model.experts import ExpertBank, Where
    from splitinfer.transport import ClientConfig

__all__ = [
    "ROWS",
    "Effort",
    "calibrate_calls",
    "calibrate_client",
    "calibrate_drafter",
    "measure_message",
    "measure_work",
]

ROWS = (1, 2, 4, 8)
GROUP = 4  # sequences in a step of several: half of the table's streams
PAUSE = 0.001  # seconds that a layer waits where a call would be, without nodes
BETWEEN_CALLS = 0.0003  # seconds of the client's own work between two calls, about
ANSWER_NANOSECONDS = 1_000_000_000  # that the kernels wait for a call's answers
CONTEXT = 96  # tokens before the rows that are measured
SAMPLING: dict[str, Any] = {"temperature": 0.7, "seed": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Effort:
    """How often each kind of thing is measured. A fifth as many come before, to warm up. All of it is done in
    so many `passes`: many that are short, as a machine's speed changes within seconds."""

    steps: int = 20
    calls: int = 40
    pings: int = 20
    tokens: int = 32
    passes: int = 19

    @staticmethod
    def warm_up(count: int) -> int:
        return 1 + count // 5


class _Absent:
    """Experts that are not there: `pause` is awaited in place of a call. The rows themselves are the answer.

    Or `bank` is asked for every layer's rows, to time what a layer costs that is kept here.
    """

    def __init__(self, pause: Callable[[], Awaitable[object]]) -> None:
        self.pause = pause
        self.bank: ExpertBank | None = None

    def where(self, layer: int) -> Where:
        return "here"  # so that the dense network is timed on its own

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        if self.bank is not None:
            start = perf_counter()
            self.bank.forward(0, x, top_k_index, top_k_weights)
            if timeline is not None:
                timeline.add("experts", layer, start, perf_counter())
        return self._wait(layer, x, timeline)

    async def _wait(self, layer: int, x: Tensor, timeline: Timeline | None) -> Tensor:
        start = perf_counter()
        if self.bank is None:
            await self.pause()
        if timeline is not None:
            timeline.add("network", layer, start, perf_counter())
        return x


@contextmanager
def _without_experts(engine: AsyncEngine) -> Iterator[_Absent]:
    from splitinfer.dispatch import RemoteExperts

    model = engine.model
    there = model.experts
    pause = there.ping if isinstance(there, RemoteExperts) else partial(asyncio.sleep, PAUSE)
    model.experts = absent = _Absent(pause)
    try:
        yield absent
    finally:
        model.experts = there


async def measure_message(
    address: str,
    config: ClientConfig,
    count: int,
    settle: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = perf_counter,
) -> float:
    """Seconds by `clock` of an empty message and its answer; `settle` is called once before."""
    from splitinfer.transport import connect

    async with await connect(address, config=config) as channel:
        settle()
        at = [clock()]
        for _ in range(count):
            await channel.ping()
            at.append(clock())
    return _usual(b - a for a, b in pairwise(at))


async def measure_work(
    address: str, config: ClientConfig, count: int, settle: Callable[[], None] = lambda: None
) -> float:
    """The seconds of it for which this thread works where nobody polls for the answer. Sending is in them,
    which `send` has too: more than an answer takes, as turning to another group does."""
    return await measure_message(address, replace(config, busy_poll=0.0), count, settle, thread_time)


async def calibrate_calls(
    experts: RemoteExperts,
    config: ModelConfig,
    dtype: torch.dtype,
    round_trip: float,
    work: float,
    effort: Effort,
) -> CallCost:
    """What calls of 1 to 8 rows of `dtype` cost, over a link of that round trip, where an empty message takes
    so much `work` here (see `measure_work`)."""
    import torch

    from splitinfer.ready_requests import PATIENCE

    generator = torch.Generator().manual_seed(0)
    layers = list(experts.placement.holders)
    taken, ready = (defaultdict[tuple[str, int], list[float]](list) for _ in range(2))
    for number in range(-effort.warm_up(effort.calls), effort.calls):
        for place, rows in enumerate(ROWS):  # by turns: a machine's speed changes within tens of milliseconds
            x = torch.randn(rows, config.hidden_size, generator=generator).to(dtype)
            weights = torch.full((rows, config.top_k_experts), 1.0 / config.top_k_experts)
            index = torch.rand(rows, config.num_experts, generator=generator).topk(config.top_k_experts)[1]
            index = index.to(torch.int16)
            layer = layers[(len(ROWS) * number + place) % len(layers)]
            for way, asked in ((taken, _dispatched), (ready, _by_kernels)):
                _work_for(BETWEEN_CALLS)
                timeline = await asked(experts, layer, x, index, weights)
                for name, seconds in timeline.by_phase().items() if number >= 0 else ():
                    way[name, rows].append(seconds)
    parts, alone = _by_rows(taken), _by_rows(ready)
    handling = {rows: max(0.0, seconds - round_trip) for rows, seconds in parts["network"].items()}
    by_itself = {rows: seconds - round_trip for rows, seconds in alone["network"].items()}
    return CallCost(
        round_trip,
        experts=Curve.of(parts["experts"]),
        send=Curve.of(parts["dispatch"]),
        combine=Curve.of(parts["combine"]),
        handling=Curve.of(handling),
        message=work,
        nodes=len(experts.nodes),
        alone=Alone(
            PATIENCE,
            send=Curve.of(alone["dispatch"]),
            combine=Curve.of(alone["combine"]),
            handling=Curve.of(by_itself),
        ),
    )


def _usual(seconds: Iterable[float]) -> float:
    """The mean without the slowest tenth. Where a machine has two speeds a median is one of them, and what is
    decoded meets both."""
    kept = sorted(seconds)
    return fmean(kept[: max(1, len(kept) * 9 // 10)])


def _by_rows(taken: Mapping[tuple[str, int], list[float]]) -> dict[str, dict[int, float]]:
    found = defaultdict[str, dict[int, float]](dict)
    for (name, rows), seconds in taken.items():
        found[name][rows] = _usual(seconds)
    return found


async def _dispatched(
    experts: RemoteExperts, layer: int, x: Tensor, index: Tensor, weights: Tensor
) -> Timeline:
    """Where a call's time goes that Python makes and waits for."""
    timeline = Timeline()
    await experts.dispatch(layer, x, index, weights, timeline)
    return timeline


async def _by_kernels(
    experts: RemoteExperts, layer: int, x: Tensor, index: Tensor, weights: Tensor
) -> Timeline:
    """The same of one that the kernels make and wait for, as in a layer; `_dispatched` where they cannot."""
    from splitinfer.model.native import kernels

    built, ready = kernels(), experts.outgoing(layer, x, index.shape[1])
    if built is None or ready is None:
        return await _dispatched(experts, layer, x, index, weights)
    timeline, start = Timeline(), perf_counter()
    built.send(ready.requests, x, index, weights)
    sent, expected = perf_counter(), ready.expected()
    if expected is None or not built.read(expected, ANSWER_NANOSECONDS):
        await ready.post(x, index, weights, timeline)
        return timeline
    timeline.add("dispatch", layer, start, sent)
    end = ready.answered(sent, timeline)
    timeline.add("combine", layer, end, perf_counter())
    return timeline


def _work_for(seconds: float) -> None:
    """Keeps this core busy, as the client's own half of a layer does between two calls."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


async def calibrate_client(engine: AsyncEngine, bank: ExpertBank | None, effort: Effort) -> ClientCost:
    """What this machine's half of a step costs, by rows; `bank` has one layer's experts, if any stay here."""
    with _without_experts(engine) as absent:
        parts = {rows: await _steps(engine, [rows], effort) for rows in ROWS}
        group = await _steps(engine, [1] * GROUP, effort)
        alone = await _token(engine, parts[1], effort)
        absent.pause = partial(asyncio.sleep, PAUSE)  # a message would take processor time
        together = await _token_of_many(engine, group, effort)
        if bank is not None:  # layers that are kept here follow each other without a pause
            absent.bank = bank
            for rows in ROWS:
                parts[rows]["experts"] = (await _steps(engine, [rows], effort))["experts"]
    apart = (group["attention"] - parts[GROUP]["attention"]) / (GROUP - 1)
    curves = {name: Curve.of({n: found[name] for n, found in parts.items()}) for name in parts[1]}
    return ClientCost(
        attention=curves["attention"],
        dense=curves["dense"],
        experts=curves["experts"],
        head=curves["head"],
        step=curves["step"],
        sequence=max(0.0, apart),
        token=Curve.of({1: alone, GROUP: together}),
    )


async def _steps(engine: AsyncEngine, sequences: Sequence[int], effort: Effort) -> dict[str, float]:
    """Seconds of a step with that many rows of each sequence: of a layer by part, of the head, of the
    rest."""
    import torch

    from splitinfer.model.compute import compute
    from splitinfer.model.gemma import Segment

    model, layers = engine.model, engine.config.num_hidden_layers
    caches: list[KVCache] = []
    for _ in sequences:
        caches.append(engine.new_cache())
        await model.forward([Segment(_tokens(engine), caches[-1])])
    taken = defaultdict[str, list[float]](list)
    for number in range(-effort.warm_up(effort.steps), effort.steps):
        pairs = zip(sequences, caches, strict=True)
        segments = [Segment(torch.arange(rows), cache) for rows, cache in pairs]
        timeline, start = Timeline(), perf_counter()
        hidden = await model.forward(segments, timeline=timeline)
        await compute(len(hidden), model.logits, hidden, timeline=timeline)
        seconds = perf_counter() - start
        for cache in caches:
            cache.truncate(_context(engine))
        if number < 0:
            continue
        phases = timeline.by_phase()
        taken["attention"].append((phases["attention"] + phases["combine"]) / layers)
        taken["dense"].append(phases["dense"] / layers)
        taken["experts"].append(phases.get("experts", 0.0) / layers)
        taken["head"].append(phases["head"])
        taken["step"].append(seconds - sum(phases.values()))
    return {name: _usual(found) for name, found in taken.items()}


async def _token(engine: AsyncEngine, step: dict[str, float], effort: Effort) -> float:
    """What a token costs once its logits are there: choosing it, its text, and the engine's steps around
    it."""
    prompt = _tokens(engine).tolist()
    await engine.generate(prompt, max_tokens=2, **SAMPLING)
    timings = (await engine.generate(prompt, max_tokens=effort.tokens, **SAMPLING)).timings
    in_layers = sum(sum(layer.values()) for layer in timings.layers)
    return max(0.0, 1 / timings.decode_tokens_per_second - in_layers - step["head"] - step["step"])


async def _token_of_many(engine: AsyncEngine, step: dict[str, float], effort: Effort) -> float:
    """The same where many sequences share steps, from the processor time that it takes here: the pauses of
    one group are filled with the work of the other."""
    prompt, streams = _tokens(engine).tolist(), 2 * GROUP

    async def busy(tokens: int) -> float:
        start = thread_time()
        replies = (engine.generate(prompt, max_tokens=tokens, **SAMPLING) for _ in range(streams))
        await asyncio.gather(*replies)
        return thread_time() - start

    await busy(2)
    prefill = await busy(1)
    each = (await busy(effort.tokens) - prefill) / (streams * (effort.tokens - 1))
    layers = engine.config.num_hidden_layers
    shared = layers * (step["attention"] + step["dense"]) + step["head"] + step["step"]
    return max(0.0, each - shared / GROUP)


async def calibrate_drafter(engine: AsyncEngine, drafter: str, depth: int, effort: Effort) -> float:
    """Seconds of one guess, where `depth` are made at a time and verified."""
    import torch

    from splitinfer.batching import Batcher
    from splitinfer.draft_depth import Depth
    from splitinfer.drafting import Decoder, choose_drafter
    from splitinfer.model.gemma import Segment
    from splitinfer.model.sampling import Sampler, SamplingParams

    made = choose_drafter(drafter, engine.model, engine.checkpoint.path)
    assert made is not None
    ids, cache, taken, drafted = _tokens(engine).tolist(), engine.new_cache(), list[float](), 0
    sampler, timeline = Sampler(SamplingParams(temperature=0.7, seed=0)), Timeline()
    with _without_experts(engine):
        hidden = (await engine.model.forward([Segment(torch.tensor(ids[:-1]), cache)]))[-1:]
        decoder = Decoder(
            Batcher(engine.model).seat(),
            cache,
            ids,
            hidden,
            sampler=sampler,
            timeline=timeline,
            drafter=made(),
            depth=Depth(depth),
        )
        for number in range(-effort.warm_up(effort.steps), effort.steps):
            before = timeline.by_phase().get("draft", 0.0)
            ids += await decoder.step(depth + 1)
            seconds, guesses = timeline.by_phase().get("draft", 0.0) - before, decoder.count.drafted - drafted
            drafted = decoder.count.drafted
            if number >= 0 and guesses:
                taken.append(seconds / guesses)
    return _usual(taken) if taken else 0.0


def _context(engine: AsyncEngine) -> int:
    return min(CONTEXT, engine.context // 2)


def _tokens(engine: AsyncEngine) -> Tensor:
    """Some token ids, as many as there is context before what is measured."""
    import torch

    return torch.arange(_context(engine)) % engine.config.vocab_size
