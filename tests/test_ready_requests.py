"""Expert calls that lie ready: kernels fill and send them, and read the answers, wherever that can be done.

The nodes run on a thread of their own: a client that waits within a layer gives its event loop no turn.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from splitinfer import AsyncEngine, Completion, ExpertNode, transport
from splitinfer.errors import RemoteError
from splitinfer.expert_call import ExpertCalls
from splitinfer.model.native import kernels
from splitinfer.ready_requests import PATIENCE, ReadyRequests, Waits
from splitinfer.transport.polling import Polling
from splitinfer.transport.server import _Peer
from tests.checkpoints import tiny_config, write_checkpoint
from tests.test_split import PLACEMENTS, PROMPT, Part, addresses, running

TOKENS = 24
LAYERS = 4

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiler: no kernels")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> tuple[int, ...]:
    return generate(checkpoint, []).token_ids


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often answers were read where they were waited for, were missed, and came as others do."""
    counts: Counter[str] = Counter()

    def count(name: str) -> None:
        method = getattr(ReadyRequests, name)

        def counted(self: ReadyRequests, *args: Any) -> Any:
            counts[name] += 1
            return method(self, *args)

        monkeypatch.setattr(ReadyRequests, name, counted)

    for name in ("answered", "missed", "post"):
        count(name)
    return counts


class Apart:
    """Nodes on a thread and an event loop of their own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, nodes: list[ExpertNode]) -> None:
        self._loop = loop
        self.nodes = nodes
        self.addresses = addresses(nodes)

    def do(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)


@contextmanager
def apart(model: Path, parts: Sequence[Part], **settings: Any) -> Iterator[Apart]:
    begun, there = Event(), list[Apart]()

    async def serve() -> None:
        end = asyncio.Event()
        async with running(model, parts, **settings) as nodes:
            there.append(Apart(asyncio.get_running_loop(), nodes))
            ends.append(lambda: there[0]._loop.call_soon_threadsafe(end.set))
            begun.set()
            await end.wait()

    ends: list[Callable[[], object]] = []
    thread = Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert begun.wait(20)
        yield there[0]
    finally:
        ends[0]()
        thread.join(20)


def generate(model: Path, nodes: Sequence[str], **settings: Any) -> Completion:
    async def work() -> Completion:
        async with AsyncEngine(model, nodes, **{"draft": "off", "threads": 2, **settings}) as engine:
            return await engine.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)

    return asyncio.run(work())


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_same_tokens_and_the_same_calls(
    checkpoint: Path, expected: tuple[int, ...], ways: Counter[str], name: str
) -> None:
    with apart(checkpoint, PLACEMENTS[name]) as on:
        found = generate(checkpoint, on.addresses)
        calls = sum(node.calls for node in on.nodes)
    assert found.token_ids == expected
    assert found.usage.calls == calls
    assert ways["answered"] > 0


@pytest.mark.parametrize("draft", ["lookup", "off"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_node_gives_the_bits_of_one_process(
    tmp_path: Path, ways: Counter[str], draft: str, threads: int, dtype: str
) -> None:
    model = write_checkpoint(tmp_path / dtype, tiny_config(dtype=dtype))
    settings = {"draft": draft, "threads": threads}
    alone = generate(model, [], **settings)
    with apart(model, PLACEMENTS["1 node"]) as on:
        assert generate(model, on.addresses, **settings).token_ids == alone.token_ids
    assert ways["answered"] > 0


def test_several_sequences_share_the_event_loop(checkpoint: Path, ways: Counter[str]) -> None:
    prompts = [PROMPT, PROMPT[:7], [9]]
    options: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}

    async def work(nodes: Sequence[str]) -> None:
        async with AsyncEngine(checkpoint, nodes, draft="off", threads=2) as engine:
            alone = [await engine.generate(prompt, **options) for prompt in prompts]
            ways.clear()
            together = await asyncio.gather(*(engine.generate(prompt, **options) for prompt in prompts))
            assert [c.token_ids for c in alone] == [c.token_ids for c in together]
            assert ways["post"] > ways["answered"]

    with apart(checkpoint, PLACEMENTS["2 nodes by experts"]) as on:
        asyncio.run(work(on.addresses))


@pytest.mark.parametrize(
    "settings", [{"exact": True}, {"transport": transport.ClientConfig(wire_dtype="bfloat16")}]
)
def test_what_the_kernels_cannot_read_comes_as_before(
    tmp_path: Path, ways: Counter[str], settings: dict[str, Any]
) -> None:
    model = write_checkpoint(tmp_path / "model", tiny_config(hidden_size=512))
    with apart(model, PLACEMENTS["2 nodes by experts"]) as on:
        assert len(generate(model, on.addresses, **settings).token_ids) == TOKENS
    assert ways["answered"] == 0


# ---- nodes that do otherwise


def never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as an ordinary handler does."""
    monkeypatch.setattr(ExpertCalls, "ready_answer", lambda *_: None)


def with_a_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says something else first, in the same piece of the stream."""
    stamp = _Peer._stamp

    def stamps(self: _Peer, id: int, parcel: transport.Parcel) -> int | None:
        self.connection.ping()
        return stamp(self, id, parcel)

    monkeypatch.setattr(_Peer, "_stamp", stamps)


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third answer comes in two pieces, the second one later."""
    post, count = transport.protocol.Connection.post_answer, itertools.count()
    stamp = _Peer._stamp

    def stamps(self: _Peer, id: int, parcel: transport.Parcel) -> int | None:
        file = stamp(self, id, parcel)
        return -1 if not next(count) % 3 else file

    def posts(self: Any, id: int, parcel: transport.Parcel, sent: int) -> None:
        if not sent:
            sent = os.write(files[0], parcel.frame[:100])
        post(self, id, parcel, sent)

    files: list[int] = []
    init = _Peer.__init__

    def initialised(self: _Peer, *args: Any) -> None:
        init(self, *args)
        files[:] = [self.link.file]

    monkeypatch.setattr(_Peer, "__init__", initialised)
    monkeypatch.setattr(_Peer, "_stamp", stamps)
    monkeypatch.setattr(transport.protocol.Connection, "post_answer", posts)


def late_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as an ordinary handler does, and every third time later than anybody waits within a layer."""
    never_ready(monkeypatch)
    answer, count = ExpertNode._answer, itertools.count()

    def answers(self: ExpertNode, call: transport.Call) -> Any:
        async def later() -> Any:
            await asyncio.sleep(1.2 * PATIENCE)
            return answer(self, call)

        return answer(self, call) if next(count) % 3 else later()

    monkeypatch.setattr(ExpertNode, "_answer", answers)


@pytest.mark.parametrize("otherwise", [never_ready, with_a_ping, in_pieces, late_now_and_then])
def test_an_answer_that_comes_otherwise_is_taken_as_before(
    checkpoint: Path,
    expected: tuple[int, ...],
    ways: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    otherwise: Callable[[pytest.MonkeyPatch], None],
) -> None:
    otherwise(monkeypatch)
    with apart(checkpoint, PLACEMENTS["1 node"]) as on:
        for _ in range(3):
            found = generate(checkpoint, on.addresses)
            assert found.token_ids == expected
            assert found.usage.calls == TOKENS * LAYERS
        assert sum(node.calls for node in on.nodes) == 3 * TOKENS * LAYERS  # none was lost and asked again
    assert (ways["answered"] > 0) == (otherwise is in_pieces)
    if otherwise is in_pieces:
        assert ways["answered"] > ways["post"]


def test_an_error_is_raised(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def failing(self: ExpertCalls, *_: Any) -> None:
        if next(calls) > 10 * LAYERS:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(ExpertCalls, "ready_answer", failing)
    with apart(checkpoint, PLACEMENTS["1 node"]) as on, pytest.raises(RemoteError, match="out of luck"):
        generate(checkpoint, on.addresses)


@pytest.mark.parametrize("parts", [[("0-7", None), (None, None)], [(None, None), (None, None)]])
def test_a_replica_takes_over_from_one_that_goes(
    checkpoint: Path, expected: tuple[int, ...], ways: Counter[str], parts: list[Part]
) -> None:
    async def lose(on: Apart) -> tuple[int, ...]:
        ids: list[int] = []
        async with AsyncEngine(checkpoint, on.addresses, draft="off", threads=2) as engine:
            async for piece in engine.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                ids += piece.token_ids
                if len(ids) == TOKENS // 2:
                    assert ways["answered"] > 0
                    await asyncio.to_thread(on.do, on.nodes[0].stop())
                    ways.clear()
        return tuple(ids)

    with apart(checkpoint, parts) as on:
        assert asyncio.run(lose(on)) == expected
    assert ways["answered"] > 0  # of the others


def test_a_client_in_the_nodes_own_loop_seldom_waits_in_vain(
    checkpoint: Path, expected: tuple[int, ...], ways: Counter[str]
) -> None:
    async def work() -> tuple[int, ...]:
        async with (
            running(checkpoint, PLACEMENTS["1 node"]) as nodes,
            AsyncEngine(checkpoint, addresses(nodes), draft="off", threads=2) as engine,
        ):
            return (await engine.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)).token_ids

    patient = list[bool]()
    missed = ReadyRequests.missed

    def counted(self: ReadyRequests) -> None:
        patient.append(self.patience > 0)
        missed(self)

    ReadyRequests.missed = counted  # type: ignore[method-assign]
    try:
        assert asyncio.run(work()) == expected
    finally:
        ReadyRequests.missed = missed  # type: ignore[method-assign]
    assert ways["answered"] == 0
    assert 0 < sum(patient) <= 6  # of 96 waits: after 4, 8, 16 and so on


def test_a_trace_shows_nodes_that_are_processes_of_their_own(
    checkpoint: Path, tmp_path: Path, ways: Counter[str]
) -> None:
    file = tmp_path / "trace.json"
    with apart(checkpoint, PLACEMENTS["2 nodes by experts"]) as on:
        generate(checkpoint, on.addresses, trace=str(file))
    assert ways["answered"] > 0
    events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    pids = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    shown = [e for e in events if e["ph"] == "X"]
    for address in on.addresses:
        theirs = Counter(e["args"]["layer"] for e in shown if e["pid"] == pids[f"node {address}"])
        assert set(theirs) == set(range(LAYERS))
        assert all(calls <= TOKENS for calls in theirs.values())
    row = sorted((e for e in shown if e["pid"] == pids["client"]), key=lambda e: e["ts"])
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.2 for a, b in itertools.pairwise(row))
    for phase in ("attention", "dense", "network", "experts"):
        assert sum(e["name"] == phase for e in row) == TOKENS * LAYERS


def test_patience_is_for_short_waits() -> None:
    waits = Waits()
    assert waits.patience == 0
    for _ in range(2):
        waits.note(PATIENCE / 2, 0.25)
    assert waits.patience == PATIENCE * 1e9
    assert waits.seconds == 0.5
    waits.note(PATIENCE * 2, 0.0)
    waits.note(PATIENCE * 2, 0.0)
    assert waits.patience == 0
    for pause in (4, 8, 16):  # each wait in vain puts the next one off
        for _ in range(3):
            waits.note(0.0, 0.0)
        assert waits.patience
        waits.in_vain()
        for _ in range(pause + 1):
            waits.note(0.0, 0.0)
            assert waits.patience == 0
        waits.note(0.0, 0.0)
    waits.worth_it()
    assert waits.patience
    waits.in_vain()
    for _ in range(6):
        waits.note(0.0, 0.0)
    assert waits.patience


def test_a_ready_answer_keeps_a_node_awake(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Counter[str]()
    begin = Polling.begin

    def counted(self: Polling) -> None:
        begun[threading.current_thread().name] += 1
        begin(self)

    monkeypatch.setattr(Polling, "begin", counted)
    with apart(checkpoint, PLACEMENTS["1 node"]) as on:
        calls = generate(checkpoint, on.addresses).usage.calls
    assert sum(n for name, n in begun.items() if name != threading.current_thread().name) >= calls
