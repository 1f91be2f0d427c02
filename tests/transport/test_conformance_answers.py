"""Whichever way two ends are connected: every answer comes whole, in its order, to whoever waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer import transport
from splitinfer.errors import LocalProtocolError, RemoteError
from splitinfer.transport import Reply
from splitinfer.transport.frames import CHUNK_NBYTES, LARGE_CHUNK_NBYTES
from splitinfer.transport.sockets import Link
from splitinfer.transport.tensors import DTYPES
from tests.patience import run, until
from tests.transport.conformance import Pair, echo, running, sleeper


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
