"""The fuzzer's seeds: what each end of a real conversation sends, recorded.

    python tests/transport/seeds.py        writes tests/transport/corpus anew (after a change of the wire)

Streams with bodies that travel in pieces are a quarter of a megabyte long; they are made when needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from splitinfer.errors import RemoteError
from splitinfer.transport.frames import CHUNK_NBYTES, REQUEST
from splitinfer.transport.protocol import Connection
from tests.transport.fuzz import CORPUS, Role, connection_of

__all__ = ["large_streams", "small_streams"]

Script = Callable[["Conversation"], None]


class Conversation:
    """A client and a server without a link; `streams` has what each has received."""

    def __init__(self, make: Callable[[Role], Connection] = connection_of) -> None:
        self.client, self.server = make("client"), make("server")
        self.streams: dict[Role, bytearray] = {"client": bytearray(), "server": bytearray()}
        self.requests: list[Any] = []
        self.exchange()

    def exchange(self) -> None:
        """Move bytes until neither has any."""
        while self.client.outbox.nbytes or self.server.outbox.nbytes:
            self._move(self.client, self.server)
            self._move(self.server, self.client)

    def _move(self, sender: Connection, receiver: Connection) -> None:
        while sender.outbox.nbytes:
            pieces = b"".join(sender.outbox.pieces())
            sender.outbox.sent(len(pieces))
            self.streams[receiver.role] += pieces
            data = memoryview(pieces)
            while data:
                buffer = receiver.buffer()
                nbytes = min(len(buffer), len(data))
                buffer[:nbytes] = data[:nbytes]
                data = data[nbytes:]
                self.requests += [message for message in receiver.received(nbytes) if message.kind == REQUEST]

    def call(self, *tensors: Any, **meta: Any) -> None:
        self.client.request("experts", tensors, meta, 1000)


def _calls(talk: Conversation) -> None:
    """Twelve calls with tensors of many kinds, and every sort of answer."""
    rows = np.ones((2, 16), np.float32)
    ids = np.zeros((2, 4), np.int16)
    for number in range(6):
        talk.call(rows, ids, layer=number)
    talk.call()
    talk.call(np.zeros((0, 16), np.float64), np.array(True), np.zeros((1, 2, 3), np.complex64))
    for number in range(4):
        talk.call(ids, text="text", nothing=None, numbers=[1, -1, 1.5], depth={"a": {"b": number}})
    talk.client.ping(7)
    talk.exchange()
    for request in talk.requests:
        if request.id == 3:
            talk.server.error(3, RemoteError("failed", code="failed"))
        elif request.id == 5:
            for item in range(3):
                talk.server.item(5, [rows], {"item": item})
            talk.server.end(5)
        elif request.id != 12:
            talk.server.reply(request.id, request.tensors, {"compute_us": 12})
    talk.exchange()
    talk.client.credit(12, 4)
    talk.client.cancel(12)
    talk.server.ping()
    talk.server.goaway()
    talk.exchange()


def _encoded(talk: Conversation) -> None:
    """Tensors in every form that is not their own bytes."""
    ramp = np.linspace(-1, 1, 1024, dtype=np.float32)
    talk.call(np.zeros(4096, np.int8), np.arange(2048, dtype=np.int64), ramp.reshape(8, 128))
    talk.call(ramp, np.zeros((64, 64), np.float16))
    talk.exchange()
    for request in talk.requests:
        talk.server.reply(request.id, request.tensors, {})
    talk.exchange()


def _large(talk: Conversation) -> None:
    """Bodies in pieces, the last ones longer than the others, with small calls between them."""
    noise = np.random.default_rng(0).integers(0, 256, 3 * CHUNK_NBYTES + 4096, dtype=np.uint8)
    talk.call(noise)
    talk.call(noise)
    talk.call(np.ones(4, np.float32))
    talk.call(noise[: CHUNK_NBYTES // 2])
    talk.exchange()
    for request in talk.requests:
        talk.server.reply(request.id, request.tensors, {})
    talk.exchange()


def _record(*scripts: Script) -> list[tuple[str, Role, bytes]]:
    made: list[tuple[str, Role, bytes]] = []
    for script in scripts:
        talk = Conversation()
        script(talk)
        name = script.__name__.strip("_")
        made += [(f"{role}-{name}", role, bytes(stream)) for role, stream in talk.streams.items()]
    return made


def small_streams() -> list[tuple[str, Role, bytes]]:
    """(name, receiver's role, stream) of the seeds that are kept as files."""
    return _record(_calls, _encoded)


def large_streams() -> list[tuple[str, Role, bytes]]:
    """The same, of those that are not kept."""
    return _record(_large)


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for name, _, stream in small_streams():
        (CORPUS / f"{name}.bin").write_bytes(stream)
        print(f"{name}.bin: {len(stream):,} bytes")
