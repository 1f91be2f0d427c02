"""Decoding for real beside what was predicted for it: the cases of `bench --decode`.

A case is predicted from the calibration (`splitinfer.cli.calibration`) and then run. Calls are calibrated
over the first link only; of the others only the round trip of an empty message is known beforehand, and,
where that is short, what this machine's own work costs after such a wait. How many drafts are right is not a
matter of time: it is taken from decoding the same text.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from splitinfer.cli.calibration import (
    Effort,
    calibrate_calls,
    calibrate_client,
    calibrate_drafter,
    measure_message,
    measure_work,
)
from splitinfer.cli.console import busy, run
from splitinfer.planning.cost import CallCost, ClientCost, Prediction, Setup, batched, drafted, plain

if TYPE_CHECKING:
    from splitinfer.engine import AsyncEngine
    from splitinfer.engine_config import EngineConfig
    from splitinfer.generation import Completion
    from splitinfer.model.experts import ExpertBank
    from splitinfer.transport import ClientConfig
    from splitinfer.transport.link import LinkSpec

__all__ = ["STREAMS", "Bench", "Case", "Decoded", "Link", "apart", "beside_others"]

STREAMS = 8
PROMPT = '''"""Reads settings from a file.

Every line is a name, an equals sign and a value.
"""

import os


def read_settings(path):
    """Return the settings in the file as a dictionary."""
'''
SAMPLING: dict[str, Any] = {"temperature": 0.7, "ignore_eos": True}
AT_LEAST = 0.4  # seconds that a case is run in a pass: short ones are repeated, and the median counts
AT_MOST = 3  # times
SLOW = 0.01  # seconds of a round trip
# Of slow links, which take most of the time and hide most of what disturbs, fewer passes are measured: from
# so many seconds of a round trip on, one in so many.
ONE_IN = ((SLOW, 6), (0.001, 2), (0.0, 1))
DISTURBED = 0.25  # cores that others take while something is measured: one of two halves every figure

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One line of the table: what is asked of the engine, and how many replies at once."""

    name: str
    local: tuple[int, ...] = ()
    depth: int = 0
    streams: int = 1


@dataclass(frozen=True)
class Link:
    """A link by name; `spec` None is the one at hand."""

    name: str
    spec: LinkSpec | None


@dataclass(frozen=True)
class Decoded:
    """One case over one link: the link's own round trip in seconds, what was predicted, the tokens per second
    that were measured, and how many cores other programs took meanwhile."""

    link: str
    nodes: str
    case: str
    round_trip: float
    predicted: Prediction
    measured: float
    others: float

    @property
    def disturbed(self) -> bool:
        return self.others >= DISTURBED

    @property
    def ratio(self) -> float:
        return self.predicted.tokens_per_second / self.measured


@dataclass
class Bench:
    """Calibrates, predicts and decodes. `config` is that of every engine, but for the link, drafts and local
    layers, which are the case's; `drafter` is what `--draft` would name. What was calibrated stays readable.
    """

    model: Path
    config: EngineConfig
    links: Sequence[Link]
    drafter: str | None = None
    settle: Callable[[], None] = lambda: None
    effort: Effort = Effort()  # noqa: RUF009 -- it is frozen
    clients: dict[str, ClientCost] = field(default_factory=dict)
    calls: dict[str, CallCost] = field(default_factory=dict)
    yields: dict[int, float] = field(default_factory=dict)

    def measure(self, nodes: str, addresses: Sequence[str], cases: Sequence[Case]) -> Iterator[Decoded]:
        """Every case over every link, on nodes known as `nodes`: the middle one of a few passes.

        A pass calibrates, predicts and decodes all of them, so that what disturbs the machine for some
        seconds spoils one pass and not a case. Links come in as many of them as `ONE_IN` says.
        """
        found = defaultdict[tuple[str, str], list[Decoded]](list)
        trips: dict[str, float] = {}
        for number in range(self.effort.passes):
            due = [link for link in self.links if not number % _one_in(trips.get(link.name, 0.0))]
            for one in self._pass(nodes, addresses, due, cases):
                found[one.link, one.case].append(one)
                trips.setdefault(one.link, one.round_trip)
        yield from map(_middle, found.values())

    def _pass(
        self, nodes: str, addresses: Sequence[str], links: Sequence[Link], cases: Sequence[Case]
    ) -> Iterator[Decoded]:
        if not links:
            return

        def calibrate() -> list[float]:
            for link in links:
                self.clients.pop(link.name, None)
            return run(self._calibrate(nodes, addresses, links, cases))

        with busy(f"{nodes}: calibrating"):
            trips, _ = beside_others(calibrate)
        for link, trip in zip(links, trips, strict=True):
            for case in cases:
                with busy(f"{nodes}, {link.name}: {case.name}"):
                    call = replace(self.calls[nodes], round_trip=trip)
                    predicted = self._predict(self._client_over(link), call, case)
                    measured, others = beside_others(partial(self._decode_once, addresses, link, case))
                yield Decoded(link.name, nodes, case.name, trip, predicted, measured, others)

    def _decode_once(self, addresses: Sequence[str], link: Link, case: Case) -> float:
        return run(self._decode(addresses, link, case))

    def _client_over(self, link: Link) -> ClientCost:
        """Over that link, or the last before it that is not slow."""
        return self.clients.get(link.name) or list(self.clients.values())[-1]

    def _predict(self, client: ClientCost, call: CallCost, case: Case) -> Prediction:
        local = len(case.local)
        setup = Setup(client, ((local, None), (self.layers - local, call)))
        if case.streams > 1:
            return batched(setup, case.streams)
        return drafted(setup, case.depth, self.yields[case.depth]) if case.depth else plain(setup)

    async def _calibrate(
        self, nodes: str, addresses: Sequence[str], links: Sequence[Link], cases: Sequence[Case]
    ) -> list[float]:
        """Learn what the cases need and is not known yet; the links' round trips."""
        from splitinfer.dispatch import RemoteExperts
        from splitinfer.model.experts import ExpertBank

        first, pings = addresses[0], self.effort.pings
        trips = [await measure_message(first, self._transport(link), pings, self.settle) for link in links]
        bank: ExpertBank | None = None
        for link, trip in zip(links, trips, strict=True):
            if link is not links[0] and trip >= SLOW:
                continue
            async with self._open(addresses, link) as engine:
                self.settle()
                if link is links[0]:
                    self.layers = engine.config.num_hidden_layers
                    experts = engine.model.experts
                    assert isinstance(experts, RemoteExperts)  # no layer is local yet
                    work = await measure_work(first, self._transport(link), pings, self.settle)
                    self.calls[nodes] = await calibrate_calls(
                        experts, engine.config, engine.model.dtype, trip, work, self.effort
                    )
                    if any(case.local for case in cases):
                        every = {0: range(engine.config.num_experts)}
                        format, dtype = self.config.quant_config().experts, self.config.torch_dtype()
                        bank = ExpertBank(engine.checkpoint, every, dtype=dtype, format=format)
                self.clients[link.name] = await self._calibrate_client(engine, bank, cases)
        for depth in {case.depth for case in cases} - self.yields.keys() - {0}:
            self.yields[depth] = await self._accepted(addresses, depth)
        return trips

    async def _calibrate_client(
        self, engine: AsyncEngine, bank: ExpertBank | None, cases: Sequence[Case]
    ) -> ClientCost:
        """What the cases need of this machine, measured over the engine's link."""
        client = await calibrate_client(engine, bank, self.effort)
        if self.drafter is None:
            return client
        depth = max(case.depth for case in cases)
        return replace(client, draft=await calibrate_drafter(engine, self.drafter, depth, self.effort))

    def _transport(self, link: Link) -> ClientConfig:
        from splitinfer.transport import ClientConfig

        given = self.config.transport or ClientConfig()
        return given if link.spec is None else replace(given, link=link.spec)

    def _open(self, addresses: Sequence[str], link: Link, case: Case | None = None) -> AsyncEngine:
        """An engine on these nodes over that link, with what the case asks for (None: nothing)."""
        from splitinfer.engine import AsyncEngine
        from splitinfer.placement import format_ranges

        config = replace(
            self.config,
            draft="off",
            draft_depth="auto",
            local_layers=None,
            local_memory=None,
            transport=self._transport(link),
        )
        if case is not None and case.depth and self.drafter is not None:
            config = replace(config, draft=self.drafter, draft_depth=case.depth)
        if case is not None and case.local:
            config = replace(config, local_layers=format_ranges(case.local))
        return AsyncEngine(self.model, addresses, config=config)

    async def _accepted(self, addresses: Sequence[str], depth: int) -> float:
        """Tokens of a step with that many drafts, in the text that the cases decode."""
        async with self._open(addresses, self.links[0], Case("", depth=depth)) as engine:
            self.settle()
            usage = (await self._reply(engine)).usage
        return 1 + depth * usage.accepted_tokens / max(1, usage.drafted_tokens)

    async def _decode(self, addresses: Sequence[str], link: Link, case: Case) -> float:
        """Tokens per second, the median of as many runs as there is time for."""
        rates: list[float] = []
        async with self._open(addresses, link, case) as engine:
            self.settle()
            await self._reply(engine, max_tokens=4)
            begun = perf_counter()
            while len(rates) < AT_MOST and (not rates or perf_counter() - begun < AT_LEAST):
                if case.streams > 1:
                    rates.append(await self._together(engine, case.streams))
                else:
                    rates.append((await self._reply(engine)).timings.decode_tokens_per_second)
        return median(rates)

    async def _reply(self, engine: AsyncEngine, max_tokens: int | None = None) -> Completion:
        return await engine.generate(
            _prompt(engine), max_tokens=max_tokens or self.effort.tokens, seed=1, **SAMPLING
        )

    async def _together(self, engine: AsyncEngine, streams: int) -> float:
        """Tokens of all replies per second, while all of them are decoding."""
        arrivals: list[list[float]] = [[] for _ in range(streams)]

        async def follow(number: int) -> None:
            # Until the last of them has its tokens: the first may have its own before that one begins.
            async with aclosing(engine.stream(_prompt(engine), seed=number, **SAMPLING)) as pieces:
                async for _ in pieces:
                    arrivals[number].append(perf_counter())
                    if min(map(len, arrivals)) >= self.effort.tokens:
                        return

        await asyncio.gather(*(follow(number) for number in range(streams)))
        # From the time that the last of them has its first token until the first of them stops.
        begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
        return sum(_rate([at for at in times if begin <= at <= end]) for times in arrivals)


def _one_in(round_trip: float) -> int:
    return next(count for seconds, count in ONE_IN if round_trip >= seconds)


def _middle(same: Sequence[Decoded]) -> Decoded:
    """Of one case in several passes the one whose ratio is the middle one. Where a machine's speed changes,
    what was predicted and measured within one pass belongs together."""
    return sorted(same, key=lambda found: found.ratio)[len(same) // 2]


def _rate(times: Sequence[float]) -> float:
    """Tokens per second of arrivals, by what lies between the first and the last."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def _prompt(engine: AsyncEngine) -> str | list[int]:
    """The same text for every case, or token ids where the model has no tokenizer."""
    if engine.tokenizer is not None:
        return PROMPT
    return [n % engine.config.vocab_size for n in range(2, 40)]


def beside_others(measure: Callable[[], T]) -> tuple[T, float]:
    """What `measure` gives, and how many cores other programs took meanwhile."""
    before, start = _taken_by_others(), perf_counter()
    found = measure()
    return found, max(0.0, (_taken_by_others() - before) / (perf_counter() - start))


def _taken_by_others() -> float:
    """Seconds of processor time that programs other than this one and those that it started have taken, and
    on a virtual machine other machines."""
    import psutil

    every, own = psutil.cpu_times(), psutil.Process()
    spent = own.cpu_times()
    mine = spent.user + spent.system + spent.children_user + spent.children_system
    for child in own.children():
        with suppress(psutil.NoSuchProcess):
            mine += sum(child.cpu_times()[:2])
    stolen = getattr(every, "steal", 0.0)
    return float(every.user + every.nice + every.system + stolen - mine)


@contextmanager
def apart() -> Iterator[Callable[[], None]]:
    """Keeps this process on one half of the cores; what it yields moves the processes that it has started,
    nodes and links, to the other half. So they do not take the client's core, as they would not on other
    machines.

    Does nothing where there is one core, or the system does not let a process choose.
    """
    import psutil

    if not hasattr(os, "sched_setaffinity") or len(before := sorted(os.sched_getaffinity(0))) < 2:
        yield lambda: None
        return
    half = len(before) // 2

    def move() -> None:
        for child in psutil.Process().children():
            child.cpu_affinity(before[half:])

    os.sched_setaffinity(0, before[:half])
    try:
        yield move
    finally:
        os.sched_setaffinity(0, before)
