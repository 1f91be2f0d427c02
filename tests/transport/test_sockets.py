"""The Link on real sockets: partial writes, reading in turns, the end of a connection from either side."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from time import sleep
from typing import Any

import numpy as np
import pytest

from splitinfer.errors import ConnectionLost, RemoteProtocolError, TransportError
from splitinfer.transport import sockets
from splitinfer.transport.frames import (
    CHUNK_NBYTES,
    GOAWAY,
    LARGE_CHUNK_NBYTES,
    PING,
    REPLY,
    REQUEST,
    WELCOME,
    pack_frame,
)
from splitinfer.transport.protocol import Connection
from splitinfer.transport.sockets import Link
from tests.patience import run, until


class Owner:
    """Notes what a Link tells; a server's echoes."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.messages: list[Any] = []
        self.lost: list[TransportError] = []
        self.event = asyncio.Event()

    def on_message(self, message: Any) -> None:
        if not self.connection.accept(message):
            return
        self.messages.append(message)
        if message.kind == REQUEST:
            self.connection.reply(message.id, message.tensors, message.meta)
        self.event.set()

    def on_lost(self, error: TransportError) -> None:
        self.lost.append(error)
        self.event.set()

    async def until(self, true: Callable[[], object]) -> None:
        while not true():
            self.event.clear()
            await self.event.wait()


def link(role: Any, sock: socket.socket) -> tuple[Link, Owner]:
    sock.setblocking(False)
    connection = Connection(role, peer="other")
    owner = Owner(connection)
    return Link(asyncio.get_running_loop(), sock, connection, owner), owner


def close(*links: Link) -> None:
    for one in links:
        one.abort(ConnectionLost("done"))


def test_two_links_talk() -> None:
    async def work() -> None:
        one, other = socket.socketpair()
        client, mine = link("client", one)
        server, _ = link("server", other)
        await mine.until(lambda: client.connection.open)
        assert mine.messages[0].kind == WELCOME
        client.connection.request("m", [np.arange(2_000_000)], {}, 0)
        client.flush()
        await mine.until(lambda: len(mine.messages) == 2)
        assert mine.messages[1].kind == REPLY
        assert (mine.messages[1].tensors[0].numpy() == np.arange(2_000_000)).all()
        close(client, server)

    run(work())


async def two_links() -> tuple[Link, Owner, Link]:
    one, other = socket.socketpair()
    client, mine = link("client", one)
    server, _ = link("server", other)
    await mine.until(lambda: client.connection.open)
    mine.messages.clear()
    return client, mine, server


def ask(client: Link) -> None:
    client.connection.request("m", [np.arange(3)], {}, 0)
    client.flush()


def test_looking_takes_what_is_there_without_a_turn_of_the_loop() -> None:
    async def work() -> None:
        client, mine, server = await two_links()
        client.look()  # nothing there
        ask(client)
        server.look()
        client.look()
        assert [message.id for message in mine.messages] == [1]
        close(client, server)
        client.look()

    run(work())


def test_looking_is_limited_between_turns() -> None:
    async def work() -> None:
        client, mine, server = await two_links()
        for _ in range(10):
            ask(client)
            server._looks = 0
            server.look()
            client.look()
        assert 0 < len(mine.messages) < 10
        await mine.until(lambda: len(mine.messages) == 10)
        assert [message.id for message in mine.messages] == list(range(1, 11))
        close(client, server)

    run(work())


def test_looking_from_within_a_message_does_not_overtake_those_behind_it() -> None:
    async def work() -> None:
        client, mine, server = await two_links()
        told = mine.on_message

        def on_message(message: Any) -> None:
            told(message)
            if message.id < 3:
                ask(client)
                server._looks = 0
                server.look()
                client.look()

        client._on_message = on_message
        ask(client)
        ask(client)
        server.look()
        client.look()
        await mine.until(lambda: len(mine.messages) == 4)
        assert [message.id for message in mine.messages] == [1, 2, 3, 4]
        close(client, server)

    run(work())


def test_looking_finds_the_end_too() -> None:
    async def work() -> None:
        client, mine, server = await two_links()
        close(server)
        client.look()
        assert client.closed
        assert len(mine.lost) == 1

    run(work())


def test_what_the_kernel_does_not_take_waits_and_then_goes() -> None:
    async def work() -> None:
        one, other = socket.socketpair()
        client, mine = link("client", one)
        server, theirs = link("server", other)
        await mine.until(lambda: client.connection.open)
        loop = asyncio.get_running_loop()
        loop.remove_reader(other.fileno())
        for number in range(50):
            client.connection.request("m", [np.full(100_000, number, np.uint8)], {}, 0)
            client.flush()
        assert client.connection.outbox.nbytes > 1_000_000
        drained = asyncio.create_task(client.drained())
        await asyncio.sleep(0.05)
        assert not drained.done()
        loop.add_reader(other.fileno(), server._readable)
        await drained
        assert client.connection.outbox.nbytes == 0
        await mine.until(lambda: len(mine.messages) == 51)
        for message in mine.messages[1:]:
            assert (message.tensors[0].numpy() == message.id - 1).all()
        close(client, server)
        del theirs

    run(work())


def test_a_large_transfer_does_not_keep_the_loop_from_other_work() -> None:
    """However fast the kernel takes it: between two turns of the loop about one piece goes."""

    async def work() -> None:
        one, other = socket.socketpair()
        client, mine = link("client", one)
        server, _ = link("server", other)
        await mine.until(lambda: client.connection.open)
        sent: list[int] = []
        real = client._sendmsg

        def swallow(pieces: Any) -> int:
            sent.append(sum(map(len, pieces)))
            return sent[-1]

        client._sendmsg = swallow
        client.connection.request("m", [np.zeros(30 << 20, np.uint8)], {}, 0)
        client.flush()
        turns = 1
        while client.connection.outbox.nbytes:
            before = sum(sent)
            await asyncio.sleep(0)
            assert sum(sent) - before <= LARGE_CHUNK_NBYTES + 2 * CHUNK_NBYTES
            turns += 1
        assert turns > 20
        client._sendmsg = real
        close(client, server)

    run(work())


def test_a_server_whose_client_does_not_read_stops_reading() -> None:
    async def work() -> None:
        one, other = socket.socketpair()
        client, mine = link("client", one)
        server, theirs = link("server", other)
        await mine.until(lambda: client.connection.open)
        loop = asyncio.get_running_loop()
        loop.remove_reader(one.fileno())
        for _ in range(60):
            client.connection.request("m", [np.zeros(1_000_000, np.uint8)], {}, 0)
            client.flush()
        await until(lambda: server.connection.outbox.nbytes >= 8 << 20)
        await asyncio.sleep(0.2)  # there is more to read, and it does not
        waiting = server.connection.outbox.nbytes
        assert 8 << 20 <= waiting < 24 << 20
        assert client.connection.outbox.nbytes > 1_000_000
        loop.add_reader(one.fileno(), client._readable)
        await mine.until(lambda: len(mine.messages) == 61)
        assert len(theirs.messages) == 60
        close(client, server)

    run(work())


def test_the_other_end_closes() -> None:
    async def work() -> None:
        one, other = socket.socketpair()
        client, mine = link("client", one)
        other.close()
        await mine.until(lambda: mine.lost)
        assert isinstance(mine.lost[0], ConnectionLost)
        assert client.closed
        client.flush()
        close(client)
        assert len(mine.lost) == 1

    run(work())


def test_a_write_to_a_closed_socket_is_told_later_not_raised() -> None:
    async def work() -> None:
        one, other = socket.socketpair()
        other.close()
        client, mine = link("client", one)
        assert mine.lost == []
        await mine.until(lambda: mine.lost)
        assert isinstance(mine.lost[0], ConnectionLost)
        assert client.closed

    run(work())


def test_the_other_end_resets() -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            other, _ = listener.accept()
        client, mine = link("client", one)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        other.close()
        await mine.until(lambda: mine.lost)
        assert "reset" in str(mine.lost[0])
        assert client.closed

    run(work())


def test_a_server_says_why_it_goes() -> None:
    async def work() -> None:
        one, other = socket.socketpair()
        server, theirs = link("server", other)
        one.sendall(pack_frame(PING))
        await theirs.until(lambda: theirs.lost)
        assert isinstance(theirs.lost[0], RemoteProtocolError)
        one.settimeout(15)
        assert b"not allowed here" in one.recv(4096)
        assert one.recv(4096) == b""
        one.close()
        assert server.closed

    run(work())


def test_frames_behind_one_that_breaks_the_rules_are_not_acted_on() -> None:
    async def work() -> None:
        one, other = socket.socketpair()
        client, mine = link("client", one)
        server, _ = link("server", other)
        await mine.until(lambda: client.connection.open)
        before = len(mine.messages)
        other_end = server._sock
        other_end.setblocking(True)
        other_end.sendall(pack_frame(REPLY, 99) + pack_frame(GOAWAY))
        await mine.until(lambda: mine.lost)
        assert len(mine.messages) == before
        close(server)

    run(work())


def test_ticks_find_a_peer_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "TICK_SECONDS", 0.02)

    async def work() -> None:
        one, other = socket.socketpair()
        client, mine = link("client", one)
        await mine.until(lambda: mine.lost)
        assert "silent" in str(mine.lost[0])
        other.close()
        assert client.closed

    run(work())


def test_a_loop_that_was_busy_does_not_take_its_peer_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks are counted, not seconds: what came meanwhile is read before the next one."""
    monkeypatch.setattr(sockets, "TICK_SECONDS", 0.02)

    async def work() -> None:
        one, other = socket.socketpair()
        client, mine = link("client", one)
        server, theirs = link("server", other)
        await mine.until(lambda: client.connection.open)
        for _ in range(3):
            sleep(0.3)  # noqa: ASYNC251
            await asyncio.sleep(0.05)
        assert mine.lost == theirs.lost == []
        close(client, server)

    run(work())
