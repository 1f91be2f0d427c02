"""Clients that flood, dawdle, send rubbish or stop listening: they are cut off, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from time import monotonic
from typing import Any

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.errors import Overloaded
from splitinfer.transport import Limits, ServerConfig
from splitinfer.transport.frames import PING, pack_frame
from splitinfer.transport.protocol import Connection
from tests.patience import until
from tests.transport.fuzz import frames_of
from tests.transport.seeds import Conversation

ROW = np.arange(2816, dtype=np.uint16)
LARGE_NBYTES = 64 << 20


async def echo(call: transport.Call) -> list[Any]:
    return list(call.tensors)


async def large(call: transport.Call) -> list[Any]:
    return [np.zeros(LARGE_NBYTES, np.uint8)]


async def wait(call: transport.Call) -> list[Any]:
    await asyncio.sleep(call.time_left())
    return []


def run(work: Coroutine[Any, Any, None], seconds: float = 20) -> None:
    async def limited() -> None:
        async with asyncio.timeout(seconds):
            await work

    asyncio.run(limited())


class Raw:
    """A client that says whatever it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def read_to_the_end(self) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionError):
            while piece := await self.reader.read(1 << 16):
                data += piece
        return data

    async def say(self, talk: Conversation) -> None:
        """The client's part of a conversation; the handshake, its first two frames, with pauses."""
        for number, frame in enumerate(frames_of(bytes(talk.streams["server"]))):
            self.writer.write(frame)
            await asyncio.sleep(0.05 if number < 2 else 0)


@contextlib.asynccontextmanager
async def beside_another(**settings: Any) -> AsyncIterator[tuple[Raw, transport.Channel]]:
    """A raw connection, and an honest channel to the same server."""
    methods = {"echo": echo, "large": large, "wait": wait}
    async with (
        await transport.serve(methods, "127.0.0.1:0", config=ServerConfig(**settings)) as server,
        await transport.connect(server.address) as honest,
    ):
        raw = Raw(*await asyncio.open_connection("127.0.0.1", int(server.address.rpartition(":")[2])))
        try:
            yield raw, honest
        finally:
            raw.writer.close()


async def answers(channel: transport.Channel) -> None:
    reply = await channel.call("echo", [ROW], timeout=3)
    assert np.array_equal(reply.tensors[0].numpy(), ROW)


@pytest.mark.parametrize(
    "rubbish",
    [bytes(4096), b"\xff" * 4096, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100, b"\x16\x03\x01" + bytes(600)],
    ids=["zeros", "ones", "http", "tls"],
)
def test_rubbish_ends_its_own_connection_only(rubbish: bytes) -> None:
    async def work() -> None:
        async with beside_another() as (raw, honest):
            raw.writer.write(rubbish)
            assert len(await raw.read_to_the_end()) < 2048
            await answers(honest)

    run(work())


def test_rubbish_after_the_handshake_too(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with beside_another() as (raw, honest):
            await raw.say(Conversation())
            raw.writer.write(b"\0" * 640)
            await raw.read_to_the_end()
            await answers(honest)

    with caplog.at_level(logging.CRITICAL):
        run(work())


def test_a_client_that_leaves_in_the_middle_of_a_call() -> None:
    async def work() -> None:
        async with beside_another() as (raw, honest):
            await raw.say(talk := Conversation())
            talk.call(np.ones((4, 64), np.float32))
            talk.exchange()
            raw.writer.write(frames_of(bytes(talk.streams["server"]))[2][:200])
            await raw.writer.drain()
            raw.writer.transport.abort()
            await answers(honest)

    run(work())


async def connected_in_the_end(address: str) -> transport.Channel:
    """The server may not have noticed yet that another has left."""
    async with asyncio.timeout(15):
        while True:
            try:
                return await transport.connect(address)
            except Overloaded:
                await asyncio.sleep(0.01)


def test_connections_over_the_limit_are_told_so() -> None:
    async def work() -> None:
        async with beside_another(max_connections=3) as (_, honest):
            address = honest.address
            async with await transport.connect(address):
                with pytest.raises(Overloaded, match="too many connections"):
                    await transport.connect(address)
                await answers(honest)
            async with await connected_in_the_end(address) as again:
                await answers(again)

    run(work())


def test_calls_and_bytes_in_flight_are_limited_per_client() -> None:
    """The client keeps to the limits that the server named; one that does not is answered Overloaded."""

    async def work() -> None:
        limits = Limits(max_calls=4)
        async with beside_another(limits=limits) as (_, honest):
            calls = [honest.start("wait", timeout=60) for _ in range(4)]
            with pytest.raises(Exception, match="4 calls are in flight"):
                await honest.start("echo", [ROW], timeout=1)
            async with await transport.connect(honest.address) as other:
                await answers(other)
            for call in calls:
                call.cancel()
            await until(lambda: not honest._session.connection.calls)  # type: ignore[union-attr]
            await answers(honest)

    run(work())


@pytest.mark.slow
def test_one_byte_a_second_is_cut_off() -> None:
    async def work() -> None:
        async with beside_another() as (raw, honest):
            await raw.say(talk := Conversation())
            talk.call(np.ones((4, 64), np.float32))
            talk.exchange()
            frame = frames_of(bytes(talk.streams["server"]))[-1]
            start = monotonic()
            with contextlib.suppress(ConnectionError):
                for byte in frame[:40]:
                    raw.writer.write(bytes([byte]))
                    await raw.writer.drain()
                    await asyncio.sleep(1)
                    await answers(honest)
                    if raw.reader.at_eof():
                        break
            assert 5 < monotonic() - start < 20

    run(work(), seconds=50)


@pytest.mark.slow
def test_a_client_that_asks_and_never_reads_is_cut_off() -> None:
    async def work() -> None:
        async with beside_another() as (raw, honest):
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
            talk = Conversation(Connection)
            for _ in range(3):
                talk.client.request("large", (), {}, 60_000)
            talk.exchange()
            await raw.say(talk)
            start = monotonic()
            while monotonic() - start < 30:
                await answers(honest)
                # A server that has let go resets what is sent to it.
                raw.writer.write(pack_frame(PING, 1))
                try:
                    await asyncio.wait_for(raw.writer.drain(), 0.1)
                except TimeoutError:
                    pass
                except ConnectionError:
                    break
                await asyncio.sleep(0.2)
            assert 3 < monotonic() - start < 20

    run(work(), seconds=60)
