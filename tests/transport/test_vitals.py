"""Who is silent, slow or choked, told in ticks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from splitinfer.errors import ConnectionLost
from splitinfer.transport.frames import CHUNK_NBYTES, PING, PONG, pack_frame
from splitinfer.transport.protocol import Connection
from tests.transport.wire import LARGE, call, feed, move, pair, taken


def ticks(end: Connection, count: int, before: Callable[[], object] = lambda: None) -> None:
    """So many seconds, and what happens in each."""
    for _ in range(count):
        before()
        end.tick()


def test_silence_is_pinged_and_then_found_within_five_ticks() -> None:
    client, server = pair()
    client.tick()
    assert taken(client) == b""
    client.tick()
    ping = taken(client)
    assert ping == pack_frame(PING)
    feed(server, ping)
    move(server, client)
    ticks(client, 4)
    with pytest.raises(ConnectionLost, match="silent"):
        client.tick()


def test_who_is_heard_is_not_lost() -> None:
    client, server = pair()
    for _ in range(30):
        client.tick()
        server.tick()
        move(client, server)
        move(server, client)
    assert client.open


def test_a_handshake_that_does_not_end() -> None:
    for role in ("client", "server"):
        end = Connection(role)
        feed(end, taken(Connection("client"))[:10])
        ticks(end, 3)
        with pytest.raises(ConnectionLost):
            ticks(end, 7)


def test_a_peer_that_reads_a_byte_a_second_is_cut_off() -> None:
    client, server = pair()
    call(client, server)
    server.reply(1, [LARGE], {})

    def one_byte_goes() -> None:
        server.outbox.pieces()
        server.outbox.sent(1)
        feed(server, pack_frame(PONG))

    with pytest.raises(ConnectionLost, match="reads too slowly"):
        ticks(server, 11, one_byte_goes)


def test_a_peer_that_sends_a_byte_a_second_is_cut_off() -> None:
    client, server = pair()
    client.request("m", [LARGE], {}, 0)
    data = taken(client)
    feed(server, data[:1000])
    rest = iter(data[1000:])
    with pytest.raises(ConnectionLost, match="sends too slowly"):
        ticks(server, 11, lambda: feed(server, bytes((next(rest),))))


def test_slow_but_steady_is_not_cut_off() -> None:
    client, server = pair()
    client.request("m", [np.zeros(600_000, np.uint8)], {}, 0)
    data = memoryview(taken(client))
    messages = []
    while data:
        messages += feed(server, bytes(data[:5000]))
        data = data[5000:]
        server.tick()
    assert len(messages) == 1


def test_a_body_announced_and_never_sent_is_cut_off() -> None:
    client, server = pair()
    client.request("m", [LARGE], {}, 0)
    data = taken(client)
    first = len(data) - 2 * (CHUNK_NBYTES + 64)
    feed(server, data[:first])
    with pytest.raises(ConnectionLost, match="sends too slowly"):
        ticks(server, 11, lambda: feed(server, pack_frame(PONG)))


def test_a_server_with_much_unsent_is_choked_and_not_deaf() -> None:
    client, server = pair()
    call(client, server)
    server.reply(1, [np.zeros(9 << 20, np.uint8)], {})
    assert server.choked
    feed(server, pack_frame(PING, 3))

    def a_little_goes() -> None:
        server.outbox.pieces()
        server.outbox.sent(30_000)

    ticks(server, 8, a_little_goes)
    assert pack_frame(PONG, 3) not in taken(server)
    assert not server.choked
