"""Two Connections without a link: what one end would send is put into the other, in steps of any size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import numpy as np

from splitinfer.transport.frames import CHUNK_NBYTES
from splitinfer.transport.messages import Message
from splitinfer.transport.protocol import Connection

__all__ = ["LARGE", "call", "feed", "move", "pair", "taken"]

LARGE = np.zeros(3 * CHUNK_NBYTES, np.uint8)


def taken(sender: Connection) -> bytes:
    """Everything that waits to be sent."""
    data = bytearray()
    while pieces := sender.outbox.pieces():
        sent = b"".join(pieces)
        sender.outbox.sent(len(sent))
        data += sent
    assert sender.outbox.nbytes == 0
    return bytes(data)


def feed(receiver: Connection, data: bytes, steps: Iterator[int] | None = None) -> list[Message]:
    """The messages that `data` gives when it arrives in these steps (all at once)."""
    steps = steps or repeat(1 << 30)
    messages = []
    rest = memoryview(data)
    while rest:
        buffer = receiver.buffer()
        nbytes = min(next(steps), len(buffer), len(rest))
        buffer[:nbytes] = rest[:nbytes]
        rest = rest[nbytes:]
        messages += receiver.received(nbytes)
    return messages


def move(sender: Connection, receiver: Connection, steps: Iterator[int] | None = None) -> list[Message]:
    """Everything that waits goes over."""
    return feed(receiver, taken(sender), steps)


def pair(
    client: dict[str, Any] | None = None, server: dict[str, Any] | None = None
) -> tuple[Connection, Connection]:
    """A client and a server that have shaken hands."""
    one = Connection("client", peer="server", **(client or {}))
    other = Connection("server", peer="client", **(server or {}))
    for _ in range(2):
        move(one, other)
        move(other, one)
    assert one.open
    assert other.open
    return one, other


def call(client: Connection, server: Connection, *tensors: Any, **meta: Any) -> Any:
    """A call made and arrived; the server's message."""
    client.request("m", tensors, meta, 1000, caller=("caller", meta))
    (message,) = move(client, server)
    return message
