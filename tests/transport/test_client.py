"""The Channel over broken connections: what fails at once, what connects again, what waits, how long."""

from __future__ import annotations

import asyncio
import socket
from time import monotonic
from typing import Any

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.errors import (
    CapacityError,
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    LinkError,
    Overloaded,
    PlacementError,
    RemoteProtocolError,
    UsageError,
    VersionMismatch,
)
from splitinfer.transport import ClientConfig, Reply, client
from splitinfer.transport.frames import ERROR, HELLO, pack_frame, pack_map
from splitinfer.transport.link import EmulatedLink, LinkSpec
from splitinfer.transport.protocol import Connection
from tests.patience import run, until, with_more_time
from tests.transport.conformance import echo


async def sleeper(call: transport.Call) -> Reply:
    await asyncio.sleep(call.meta["seconds"])
    return Reply()


async def again(address: str, info: Any = None) -> transport.Server:
    """A server on an address that was just left."""
    for _ in range(100):
        try:
            return await transport.serve({"echo": echo, "sleep": sleeper}, address, info=info)
        except CapacityError:
            await asyncio.sleep(0.01)
    raise AssertionError("the port stays taken")


async def leave(server: transport.Server, channel: transport.Channel) -> None:
    """Close the server, and wait until the channel has noticed."""
    await server.close()
    await until(lambda: not channel.connected)


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> float:
    """No time passes for the channel, however long this machine takes."""
    monkeypatch.setattr(client, "monotonic", lambda: 1000.0)
    return 1000.0


def test_a_call_leaves_before_start_returns() -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(5)
            port = listener.getsockname()[1]
            connecting = asyncio.create_task(transport.connect(f"127.0.0.1:{port}"))
            accepted, _ = await asyncio.to_thread(listener.accept)
            server = Connection("server")
            accepted.settimeout(5)

            def answer() -> None:
                for _ in range(2):
                    nbytes = accepted.recv_into(server.buffer())
                    server.received(nbytes)
                    pieces = b"".join(server.outbox.pieces())
                    accepted.sendall(pieces)
                    server.outbox.sent(len(pieces))

            await asyncio.to_thread(answer)
            channel = await connecting
            future = channel.start("m", [np.arange(1408)], {"layer": 1})
            accepted.setblocking(False)
            nbytes = accepted.recv_into(server.buffer())
            (request,) = server.received(nbytes)
            assert (request.method, request.meta) == ("m", {"layer": 1})
            assert not future.done()
            accepted.close()
            with pytest.raises(ConnectionLost):
                await future
            await channel.close()

    run(work())


def test_calls_in_flight_fail_at_once_and_the_next_one_connects_again() -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0", {"run": 1})
        async with await transport.connect(server.address) as channel:
            calls = [channel.start("sleep", (), {"seconds": 60}) for _ in range(3)]
            await asyncio.sleep(0.02)
            await server.close()
            for call in calls:
                with pytest.raises(ConnectionLost) as caught:
                    await call
                assert caught.value.peer == channel.address
            assert not channel.connected
            assert channel.file == -1
            server = await again(channel.address, {"run": 2})
            assert (await channel.call("echo", [np.arange(3)])).tensors[0].numpy().tolist() == [0, 1, 2]
            assert channel.connected
            assert channel.file >= 0
            assert channel.info == {"run": 2}
            assert (channel.stats.connects, channel.stats.calls) == (2, 4)
            await server.close()

    run(work())


def test_a_call_waits_for_a_server_that_comes_back_in_time() -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0")
        async with await transport.connect(
            server.address, config=ClientConfig(reconnect_timeout=15)
        ) as channel:
            await leave(server, channel)
            calls = [channel.start("echo", (), {"n": number}) for number in range(5)]
            stream = channel.stream("echo", (), {"n": 9})
            first = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.3)
            server = await again(channel.address)
            assert [(await call).meta["n"] for call in calls] == list(range(5))
            assert (await first).meta["n"] == 9
            assert channel.stats.connects == 2
            await stream.aclose()
            await server.close()

    run(work())


def test_without_reconnect_timeout_there_is_one_attempt_and_then_a_pause(stopped_clock: float) -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0")
        async with await transport.connect(
            server.address, config=ClientConfig(reconnect_timeout=0)
        ) as channel:
            await leave(server, channel)
            for _ in range(20):
                with pytest.raises(LinkError):
                    await channel.call("echo")
            # Nobody hammers: the other calls were refused without asking the network.
            assert channel._failures == 1
            assert stopped_clock < channel._retry_at <= stopped_clock + 0.05

    run(work())


def test_attempts_are_spread_and_end() -> None:
    async def work(seconds: float) -> None:
        server = await again("127.0.0.1:0")
        async with await transport.connect(
            server.address, config=ClientConfig(reconnect_timeout=seconds)
        ) as channel:
            await leave(server, channel)
            start = monotonic()
            with pytest.raises(ConnectError) as caught:
                await channel.call("echo")
            assert monotonic() - start > 0.1
            assert 2 <= channel._failures <= 8
            assert caught.value.remedy

    with_more_time(lambda unit: run(work(0.6 * unit)), 1, 4)


def test_the_thousandth_failure_is_like_the_tenth(stopped_clock: float) -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0")
        config = ClientConfig(reconnect_timeout=0.05)
        async with await transport.connect(server.address, config=config) as channel:
            await leave(server, channel)
            channel._failures = 5000
            with pytest.raises(ConnectError):
                await channel.call("echo")
            assert 1.0 <= channel._retry_at - stopped_clock <= 2.0

    run(work())


def test_a_deadline_holds_while_connecting_too() -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0")
        async with await transport.connect(
            server.address, config=ClientConfig(reconnect_timeout=60)
        ) as channel:
            await leave(server, channel)
            with pytest.raises(DeadlineExceeded):
                await channel.call("echo", timeout=0.1)
            with pytest.raises(DeadlineExceeded):
                await channel.ping(timeout=0.1)

    run(work())


def test_a_call_that_waits_for_a_connection_can_be_cancelled() -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0")
        async with await transport.connect(
            server.address, config=ClientConfig(reconnect_timeout=15)
        ) as channel:
            await leave(server, channel)
            gone, stays = channel.start("echo", (), {"n": 1}), channel.start("echo", (), {"n": 2})
            await asyncio.sleep(0.02)
            gone.cancel()
            server = await again(channel.address)
            assert (await stays).meta == {"n": 2}
            assert gone.cancelled()
            assert channel.stats.calls == 1
            await server.close()

    run(work())


def test_closing_ends_the_waiting() -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0")
        channel = await transport.connect(server.address, config=ClientConfig(reconnect_timeout=30))
        await leave(server, channel)
        call = channel.start("echo")
        await asyncio.sleep(0.05)
        await channel.close()
        with pytest.raises(ConnectionLost, match="closed"):
            await call
        await channel.close()

    run(work())


def test_a_server_that_changed_can_be_refused() -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0", {"model": "a"})
        async with await transport.connect(server.address) as channel:
            seen: list[Any] = []

            def check(info: dict[str, Any]) -> None:
                seen.append(info)
                if info["model"] != "a":
                    raise PlacementError("the node holds another model now")

            channel.on_info = check
            await leave(server, channel)
            server = await again(channel.address, {"model": "b"})
            with pytest.raises(PlacementError, match="another model"):
                await channel.call("echo")
            assert channel.info == {"model": "a"}
            assert not channel.connected
            await leave(server, channel)
            server = await again(channel.address, {"model": "a"})
            await channel.call("echo")
            assert seen == [{"model": "b"}, {"model": "a"}]
            await server.close()

    run(work())


def test_after_draining_the_next_server_is_found() -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0")
        async with await transport.connect(server.address) as channel:
            assert await server.drain()
            await asyncio.sleep(0.02)
            with pytest.raises(Overloaded, match="draining"):
                await channel.call("echo")
            await leave(server, channel)
            server = await again(channel.address)
            await channel.call("echo")
            await server.close()

    run(work())


@pytest.mark.parametrize("address", ["127.0.0.1", "host:99999", "unix:"])
def test_no_address(address: str) -> None:
    with pytest.raises(UsageError):
        asyncio.run(transport.connect(address))


async def dial(answer: bytes) -> BaseException:
    """What connecting to a server that says just this raises."""

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        try:
            await writer.drain()
            await asyncio.sleep(0 if answer else 60)
        finally:
            writer.close()

    server = await asyncio.start_server(on_client, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        seconds = 15 if answer else 0.3
        await transport.connect(f"127.0.0.1:{port}", config=ClientConfig(connect_timeout=seconds))
    except Exception as error:
        return error
    finally:
        server.close()
    raise AssertionError("connected to something else")


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            RemoteProtocolError,
            "does not speak",
        ),
        (pack_frame(HELLO).replace(b"SI\x01", b"SI\x02"), VersionMismatch, "version 2"),
        (pack_frame(HELLO), RemoteProtocolError, "nonce"),
        (
            pack_frame(ERROR, meta=pack_map({"code": "overloaded", "message": "full"}, 100)),
            Overloaded,
            "full",
        ),
        (b"SI", ConnectError, "middle of a frame"),
        (b"", ConnectError, "no answer within"),
    ],
)
def test_something_else_listens_there(answer: bytes, kind: type[Exception], text: str) -> None:
    error = asyncio.run(dial(answer))
    assert type(error) is kind
    assert text in str(error)
    assert "127.0.0.1:" in str(error) or kind is RemoteProtocolError or kind is VersionMismatch


def test_a_failed_connect_leaves_nothing_running() -> None:
    async def work() -> None:
        with pytest.raises(ConnectError):
            await transport.connect("127.0.0.1:9")
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= 2

    run(work())


def test_one_channel_from_many_tasks() -> None:
    async def work() -> None:
        server = await again("127.0.0.1:0")
        async with await transport.connect(server.address, config=ClientConfig()) as channel:

            async def caller(number: int) -> None:
                for step in range(20):
                    reply = await channel.call("echo", [np.full(number * 100, step)], {"n": number})
                    assert reply.meta == {"n": number}
                    assert (reply.tensors[0].numpy() == step).all()

            await asyncio.gather(*[caller(number) for number in range(32)])
            assert channel.stats.calls == 640
            await server.close()

    run(work())


def test_errors_name_the_node_and_not_the_emulated_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether nobody is behind the emulator, or the emulator itself is gone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = f"127.0.0.1:{listener.getsockname()[1]}"
    config = ClientConfig(link=LinkSpec(rtt=0.001), connect_timeout=15)

    async def refused() -> None:
        with pytest.raises(ConnectError, match=gone) as caught:
            await transport.connect(gone, config=config)
        assert caught.value.peer == gone
        assert "splitinfer node" in caught.value.remedy

    run(refused())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = f"127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr(EmulatedLink, "address", property(lambda self: other))
    run(refused())
