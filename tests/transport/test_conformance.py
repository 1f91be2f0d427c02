"""One suite for every way to connect: tcp, IPv6, unix, memory, TLS, through an emulated link, compressed.

What holds for one has to hold for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer import transport
from splitinfer.errors import (
    ConnectionLost,
    DeadlineExceeded,
    LimitExceeded,
    LocalProtocolError,
    Overloaded,
    RemoteError,
)
from splitinfer.transport import ClientConfig, Limits, Reply, ServerConfig
from splitinfer.transport.certificates import Certificate, TLSConfig, make_certificate
from splitinfer.transport.frames import CHUNK_NBYTES, LARGE_CHUNK_NBYTES
from splitinfer.transport.link import LinkSpec
from splitinfer.transport.security import Token
from splitinfer.transport.sockets import Link
from splitinfer.transport.tensors import DTYPES
from tests.patience import until, with_more_time

Pair = Callable[..., contextlib.AbstractAsyncContextManager[tuple[transport.Server, transport.Channel]]]


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(params=["127.0.0.1:0", "[::1]:0", "unix", "memory:conformance", "tls", "link", "lz4"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, certificate: Certificate) -> Pair:
    """A server and a channel to it, both closed at the end."""
    address: str = request.param
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if address.startswith("[") and not _has_ipv6():
        pytest.skip("no IPv6 loopback on this machine")
    if address == "unix":
        address = f"unix:{tmp_path}/socket"
    elif address == "tls":
        token = Token("the token of this suite")
        ours = {"tls": TLSConfig(fingerprints=(certificate.fingerprint,)), "token": token}
        theirs = {"tls": TLSConfig(certificate=certificate.certificate, key=certificate.key), "token": token}
    elif address == "link":
        ours = {"link": LinkSpec(rtt=0.001)}
    elif address == "lz4":
        ours = theirs = {"compression": "on"}
    if ours:
        address = "127.0.0.1:0"

    @contextlib.asynccontextmanager
    async def open_pair(
        handler: Any, *, info: Any = None, server: Any = None, client: Any = None
    ) -> AsyncIterator[tuple[transport.Server, transport.Channel]]:
        serving = replace(server or ServerConfig(), **theirs)
        calling = replace(client or ClientConfig(), **ours)
        async with (
            await transport.serve(handler, address, info=info, config=serving) as served,
            await transport.connect(served.address, config=calling) as channel,
        ):
            yield served, channel

    return open_pair


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(limited())


def echo(call: transport.Call) -> Reply:
    return Reply(call.tensors, call.meta)


def running(server: transport.Server) -> list[asyncio.Future[Any]]:
    """What the server does for its clients at the moment."""
    return [entry.task for peer in server.peers for entry in peer.running.values() if entry.task is not None]


async def sleeper(call: transport.Call) -> Reply:
    await asyncio.sleep(call.meta["seconds"])
    return Reply(call.tensors, {"slept": call.meta["seconds"]})


def every_dtype() -> list[Any]:
    rng = np.random.default_rng(0)
    arrays: list[Any] = [np.array([True, False]), torch.tensor([True])]
    for row in DTYPES.values():
        if row.numpy is not None and row.name != "bool":
            arrays.append((rng.normal(size=(3, 5)) * 10).astype(row.numpy))
        dtype = getattr(torch, row.name)
        arrays.append(torch.from_numpy(rng.normal(size=(2, 7)) * 10).to(dtype))
    return arrays


def test_every_dtype_comes_back_bit_for_bit(pair: Pair) -> None:
    async def work() -> None:
        async with pair(echo) as (_, channel):
            sent = every_dtype()
            reply = await channel.call("any", sent)
            assert len(reply.tensors) == len(sent)
            for before, after in zip(sent, reply.tensors, strict=True):
                assert after.shape == tuple(before.shape)
                if isinstance(before, torch.Tensor):
                    back = after.torch()
                    assert back.dtype == before.dtype
                    assert torch.equal(back.view(torch.uint8), before.view(torch.uint8))
                else:
                    back = after.numpy()
                    assert back.dtype == before.dtype
                    assert back.tobytes() == before.tobytes()

    run(work())


def test_odd_shapes(pair: Pair) -> None:
    arrays = [
        np.zeros((0, 3), np.float32),
        np.float64(2.5),
        np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(5, dtype=">i4"),
        torch.arange(12).view(3, 4).t(),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.zeros(0, 2, dtype=torch.float8_e4m3fn),
        torch.arange(6.0)[::2],
        np.arange(7.0)[::-1],
        np.empty((1, 1, 1, 1, 1, 1, 1, 1)),
    ]

    async def work() -> None:
        async with pair(echo) as (_, channel):
            reply = await channel.call("any", arrays)
            for before, after in zip(arrays, reply.tensors, strict=True):
                assert after.shape == tuple(before.shape)
                if isinstance(before, torch.Tensor):
                    assert torch.equal(after.torch().float(), before.float())
                else:
                    assert (after.numpy() == before).all()

    run(work())


def test_received_tensors_are_aligned_writable_and_stay_valid(pair: Pair) -> None:
    async def work() -> None:
        async with pair(echo) as (_, channel):
            kept = []
            for size in (1, 63, 64, 1000, 5632, 40_000, CHUNK_NBYTES + 1, 3 * CHUNK_NBYTES):
                array = np.full(size, size % 251, np.uint8)
                reply = await channel.call("any", [array, array[:1]])
                kept.append(reply.tensors[0].numpy())
            for array in kept:
                assert array.ctypes.data % 64 == 0
                assert array.flags.writeable
                assert (array == array.size % 251).all()

    run(work())


def test_meta_and_info(pair: Pair) -> None:
    meta = {"text": "ä", "int": 2**60, "float": 0.1, "none": None, "list": [1, {"a": b"\x00"}], "yes": True}

    async def work() -> None:
        async with pair(echo, info=lambda: {"layers": [1, 2]}) as (_, channel):
            assert channel.info == {"layers": [1, 2]}
            assert (await channel.call("any", (), meta)).meta == meta

    run(work())


def test_many_in_flight_answered_in_any_order(pair: Pair) -> None:
    async def work() -> None:
        async with pair(sleeper) as (_, channel):
            many = await asyncio.gather(*[channel.call("s", (), {"seconds": 0.001 * i}) for i in range(100)])
            assert [round(reply.meta["slept"] * 1000) for reply in many] == list(range(100))

    run(work())


def test_replies_come_in_the_order_in_which_they_are_ready(pair: Pair) -> None:
    async def work() -> None:
        ready = [asyncio.Event() for _ in range(4)]

        async def handler(call: transport.Call) -> Reply:
            await ready[call.meta["n"]].wait()
            return Reply((), call.meta)

        async with pair(handler) as (_, channel):
            calls = [channel.start("any", [np.float32(n)], {"n": n}) for n in range(4)]
            for number in (2, 3, 1, 0):
                assert not calls[number].done()
                ready[number].set()
                assert (await calls[number]).meta == {"n": number}

    run(work())


def test_large_bodies_both_ways_beside_small_ones(pair: Pair) -> None:
    async def work() -> None:
        async with pair(echo) as (_, channel):
            large = [np.random.default_rng(seed).integers(0, 255, 3_000_001, np.uint8) for seed in range(3)]
            calls = [channel.start("any", [array], {"n": 1}) for array in large]
            small = channel.start("any", [np.arange(10)])
            first, _ = await asyncio.wait([small, *calls], return_when=asyncio.FIRST_COMPLETED)
            assert small in first
            for array, call in zip(large, calls, strict=True):
                assert ((await call).tensors[0].numpy() == array).all()

    run(work())


class Tap:
    """Everything that one end hands to its stream, in order (before TLS encrypts it)."""

    def __init__(self, link: Link) -> None:
        self.stream = bytearray()
        link._send, link._sendmsg = self._tapped(link._send), self._tapped(link._sendmsg)

    def _tapped(self, send: Callable[[Any], int]) -> Callable[[Any], int]:
        def tapped(data: Any) -> int:
            nbytes = send(data)
            whole = data if isinstance(data, bytes | memoryview) else b"".join(data)
            self.stream += whole[:nbytes]
            return nbytes

        return tapped

    async def holds(self, nbytes: int) -> None:
        for _ in range(100_000):
            if len(self.stream) >= nbytes:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"{len(self.stream)} bytes, and no more come")


def test_a_small_message_waits_for_one_chunk_of_a_large_one_at_most(pair: Pair) -> None:
    """Both ways: what a large body puts before a small message that comes later."""
    sign = b"the small one that came later...."
    taps: list[Tap] = []
    replied: list[int] = []

    async def handler(call: transport.Call) -> Reply:
        if call.tensors[0].nbytes == len(sign):
            await taps[1].holds(1 << 20)
        return Reply(call.tensors)

    async def work() -> None:
        async with pair(handler) as (server, channel):
            (peer,) = server.peers
            taps[:] = Tap(channel._session.link), Tap(peer.link)
            reply = peer.connection.reply

            def replying(id: int, tensors: Any, meta: Any) -> None:
                if tensors[0].nbytes == len(sign):
                    replied.append(len(taps[1].stream))
                reply(id, tensors, meta)

            peer.connection.reply = replying
            noise = np.random.default_rng(0).integers(0, 256, 16 << 20, np.uint8)
            large = channel.start("any", [noise])
            await taps[0].holds(1 << 20)
            called = len(taps[0].stream)
            await channel.call("any", [np.frombuffer(sign, np.uint8)])
            await large
            for tap, position in zip(taps, (called, *replied), strict=True):
                assert 0 < tap.stream.index(sign) - position <= LARGE_CHUNK_NBYTES + 1024

    run(work())


def test_errors_of_a_handler(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def fails(call: transport.Call) -> Reply:
        raise ValueError("no such layer")

    async def fails_later(call: transport.Call) -> Reply:
        await asyncio.sleep(0)
        raise Overloaded("no room", remedy="Wait.")

    def answers_nonsense(call: transport.Call) -> Any:
        return [object()]

    handlers = {"fails": fails, "fails_later": fails_later, "nonsense": answers_nonsense, "echo": echo}

    async def work() -> None:
        async with pair(handlers) as (_, channel):
            with pytest.raises(RemoteError, match="ValueError: no such layer") as caught:
                await channel.call("fails")
            assert caught.value.code == "failed"
            assert caught.value.peer == channel.address
            with pytest.raises(Overloaded, match="no room") as full:
                await channel.call("fails_later")
            assert full.value.remedy == "Wait."
            with pytest.raises(RemoteError, match="object cannot be sent"):
                await channel.call("nonsense")
            with pytest.raises(RemoteError, match="no method 'absent'") as absent:
                await channel.call("absent")
            assert absent.value.code == "no_method"
            assert (await channel.call("echo", (), {"still": "alive"})).meta == {"still": "alive"}

    run(work())


def test_deadlines_travel(pair: Pair) -> None:
    with_more_time(lambda timeout: deadlines_travel(pair, timeout), 0.2, 3.0)


def deadlines_travel(pair: Pair, timeout: float) -> None:
    left: list[float] = []
    ended: list[str] = []

    async def handler(call: transport.Call) -> Reply:
        left.append(call.time_left())
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append(call.method)
            raise
        return Reply()

    async def work() -> None:
        async with pair(handler) as (_, channel):
            start = monotonic()
            with pytest.raises(DeadlineExceeded, match=rf"within {timeout:.3g} s") as caught:
                await channel.call("late", timeout=timeout)
            assert timeout - 0.05 < monotonic() - start < timeout + 5
            assert caught.value.timeout == timeout
            assert isinstance(caught.value, TimeoutError)
            assert left
            assert timeout / 2 < left[0] <= timeout
            await until(lambda: ended)
            assert ended == ["late"]

    run(work())


def test_server_bounds_a_call_that_names_no_deadline(pair: Pair) -> None:
    async def work() -> None:
        async with pair(sleeper, server=ServerConfig(call_timeout=0.1)) as (_, channel):
            with pytest.raises(DeadlineExceeded, match="time was over"):
                await channel.call("s", (), {"seconds": 20})

    run(work())


def test_cancelling_reaches_the_handler(pair: Pair) -> None:
    async def work() -> None:
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(call: transport.Call) -> Reply:
            began.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return Reply()

        async with pair({"h": handler, "echo": echo}) as (server, channel):
            task = asyncio.create_task(channel.call("h"))
            await began.wait()
            task.cancel()
            await cancelled.wait()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await channel.call("echo")).meta == {}
            assert all(not peer.running and not peer.connection.calls for peer in server.peers)

    run(work())


def test_cancelling_a_large_request_half_way_leaves_the_connection_whole(pair: Pair) -> None:
    async def work() -> None:
        async with pair(echo) as (server, channel):
            for size in (2 << 20, 32 << 20):
                future = channel.start("any", [np.zeros(size, np.uint8)])
                other = channel.start("any", [np.ones(2 << 20, np.uint8)])
                await asyncio.sleep(0)
                future.cancel()
                assert (await other).tensors[0].numpy().all()
            assert (await channel.call("any", (), {"a": 1})).meta == {"a": 1}
            assert all(not peer.connection.calls for peer in server.peers)

    run(work())


def test_streams(pair: Pair) -> None:
    ahead = 0

    async def count(call: transport.Call) -> AsyncIterator[Reply]:
        nonlocal ahead
        for i in range(call.meta["n"]):
            ahead = i
            yield Reply([np.full(call.meta["size"], i)], {"i": i})
        if call.meta.get("fail"):
            raise RuntimeError("half way")

    async def work() -> None:
        async with pair({"count": count, "echo": echo}) as (server, channel):
            for size in (0, 3, 100_000):
                seen = []
                async for reply in channel.stream("count", (), {"n": 20, "size": size}):
                    assert (reply.tensors[0].numpy() == reply.meta["i"]).all()
                    seen.append(reply.meta["i"])
                    await asyncio.sleep(0.001)
                    assert ahead <= len(seen) + 9
                assert seen == list(range(20))
            assert [reply.meta async for reply in channel.stream("echo", (), {"one": 1})] == [{"one": 1}]
            seen = []
            stream = channel.stream("count", (), {"n": 3, "size": 1, "fail": True})
            assert [(await anext(stream)).meta["i"] for _ in range(3)] == [0, 1, 2]
            with pytest.raises(RemoteError, match="half way"):
                await anext(stream)
            async with contextlib.aclosing(channel.stream("count", (), {"n": 10**9, "size": 1})) as stream:
                async for reply in stream:
                    if reply.meta["i"] == 5:
                        break
            with pytest.raises(LocalProtocolError, match="answers with a stream"):
                await channel.call("count", (), {"n": 30, "size": 1})
            await until(lambda: not running(server))

    run(work())


def test_drain_answers_what_is_in_flight_and_refuses_the_rest(pair: Pair) -> None:
    async def work() -> None:
        go_on = asyncio.Event()

        async def handler(call: transport.Call) -> Reply:
            await go_on.wait()
            return Reply((), {"went": "on"})

        async with pair(handler) as (server, channel):
            slow = channel.start("any")
            await until(lambda: running(server))
            draining = asyncio.create_task(server.drain(timeout=15))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="draining"):
                await channel.call("any")
            assert not draining.done()
            go_on.set()
            assert (await slow).meta == {"went": "on"}
            assert await draining

    run(work())


def test_drain_gives_up_in_time(pair: Pair) -> None:
    async def work() -> None:
        async with pair(sleeper) as (server, channel):
            slow = channel.start("s", (), {"seconds": 60})
            await until(lambda: running(server))
            assert not await server.drain(timeout=0.05)
            await server.close()
            with pytest.raises(ConnectionLost):
                await slow

    run(work())


def test_closing_the_channel_fails_its_calls_and_cancels_their_work(pair: Pair) -> None:
    async def work() -> None:
        async with pair(sleeper) as (server, channel):
            slow = channel.start("s", (), {"seconds": 60})
            await until(lambda: running(server))
            (task,) = running(server)
            await channel.close()
            with pytest.raises(ConnectionLost, match="closed"):
                await slow
            with pytest.raises(ConnectionLost, match="closed"):
                await channel.call("s")
            await asyncio.wait([task])
            assert task.cancelled()

    run(work())


def test_limits_of_the_server_are_kept_by_the_client(pair: Pair) -> None:
    limits = Limits(max_body=4096, max_tensors=2, max_rank=2, max_meta=100, max_calls=2, max_table=64)

    async def work() -> None:
        async with pair({"s": sleeper, "e": echo}, server=ServerConfig(limits=limits)) as (_, channel):
            for tensors, meta, name in (
                ([np.zeros(5000, np.uint8)], {}, "max_body"),
                ([np.zeros(1)] * 3, {}, "max_tensors"),
                ([np.zeros((1, 1, 1))], {}, "max_rank"),
                ([], {"a": "x" * 200}, "max_meta"),
            ):
                with pytest.raises(LimitExceeded) as caught:
                    await channel.call("e", tensors, meta)
                assert caught.value.limit_name == name
                assert caught.value.value > caught.value.limit == getattr(limits, name)
            with pytest.raises(LimitExceeded, match="max_table"):
                await channel.call("e" * 100)
            calls = [channel.start("s", (), {"seconds": 0.05}) for _ in range(2)]
            with pytest.raises(LimitExceeded, match="in flight"):
                channel.start("s", (), {"seconds": 0})
            await asyncio.gather(*calls)
            assert (await channel.call("e", [np.zeros(4096, np.uint8)])).tensors[0].nbytes == 4096

    run(work())


def test_what_the_server_cannot_send_fails_only_that_call(pair: Pair) -> None:
    async def work() -> None:
        def big(call: transport.Call) -> Reply:
            return Reply([np.zeros(1 << 16)])

        async with pair({"big": big, "echo": echo}, client=ClientConfig(limits=Limits(max_body=1024))) as (
            _,
            channel,
        ):
            with pytest.raises(RemoteError, match="max_body"):
                await channel.call("big")
            assert (await channel.call("echo", [np.arange(3)])).tensors[0].numpy().tolist() == [0, 1, 2]

    run(work())


def test_ping_and_stats(pair: Pair) -> None:
    async def work() -> None:
        async with pair(echo) as (_, channel):
            assert await channel.ping() > 0
            before = channel.stats
            await channel.call("any", [np.random.default_rng(0).integers(0, 256, 5632, np.uint8)])
            after = channel.stats
            assert after.calls == before.calls + 1
            assert 5632 < after.sent_nbytes - before.sent_nbytes < 6000
            assert 5632 < after.received_nbytes - before.received_nbytes < 6000
            assert after.connects == 1

    run(work())
