"""A fuzzer for the protocol: damaged streams go in, and only exceptions of a short list may come out.

    python tests/transport/fuzz.py --inputs 1000000       a long run; stops at the first finding and writes it
    python tests/transport/fuzz.py FILE...                run single inputs again

An input is what one peer sends from the first byte on. The corpus holds whole, valid streams (`seeds.py` made
them), one file each, whose name begins with the role of the receiver, and inputs that once found something
(`server-found-...`). Mutations know where frames begin, so that most of them get past the head, and spare the
handshake four times of five.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import psutil

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from splitinfer.errors import (
    AuthenticationError,
    ConnectionLost,
    DeadlineExceeded,
    LimitExceeded,
    Overloaded,
    RemoteError,
    RemoteProtocolError,
    VersionMismatch,
)
from splitinfer.transport.buffers import BufferPool
from splitinfer.transport.codec import TensorCodec
from splitinfer.transport.frames import HEAD, REQUEST, Limits
from splitinfer.transport.protocol import Connection

__all__ = [
    "ALLOWED",
    "CORPUS",
    "Finding",
    "Role",
    "connection_of",
    "execute",
    "feed_whole",
    "frames_of",
    "load_corpus",
    "mutations",
    "role_of",
    "run",
]

CORPUS: Final = Path(__file__).parent / "corpus"
Role = Literal["client", "server"]

# What a peer can cause. Anything else that comes out of the protocol is a finding.
ALLOWED: Final = (
    RemoteProtocolError,
    VersionMismatch,
    AuthenticationError,
    ConnectionLost,
    Overloaded,
    RemoteError,
    DeadlineExceeded,
)
LIMITS: Final = Limits(
    max_table=4096, max_meta=8192, max_body=1 << 20, max_tensors=8, max_calls=16, max_buffered=4 << 20
)
SECONDS_PER_INPUT: Final = 2.0
HANG_SECONDS: Final = 60.0
GROWTH_NBYTES: Final = 24 << 20
CALLS: Final = 12

_POOL: Final = BufferPool(keep_nbytes=4 << 20)
_HANDSHAKE_FRAMES: Final = 2
_EDGES: Final = (
    0,
    1,
    2,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    0x7FFF,
    0xFFFF,
    1 << 18,
    1 << 20,
    0x7FFFFFFF,
    0xFFFFFFFF,
)

# First bytes of msgpack's kinds: nil, bin, ext, uint64, int64, array, map, empty array, empty map, -1.
_MSGPACK: Final = (0xC0, 0xC4, 0xC7, 0xCF, 0xD3, 0xDC, 0xDD, 0xDE, 0xDF, 0x90, 0x80, 0xFF)


class Finding(Exception):
    """An input that did what none may do. `data` is the input."""

    def __init__(self, message: str, role: Role, data: bytes) -> None:
        super().__init__(message)
        self.role = role
        self.data = data


def connection_of(role: Role) -> Connection:
    codec = TensorCodec(role, "on", wire_dtype="int8" if role == "client" else None)
    return Connection(role, limits=LIMITS, info=dict, codec=codec, peer="fuzz", pool=_POOL)


def execute(role: Role, data: bytes, sizes: Callable[[], int]) -> None:
    """Feed one input to a fresh connection, `sizes()` bytes at a time at most, and act on what it says.

    Raises Finding for an exception outside `ALLOWED` and for an input that takes too long.
    """
    start = time.process_time()  # not the clock: the machine may have other things to do
    connection = connection_of(role)
    try:
        feed_whole(connection, data, sizes)
    except ALLOWED:
        pass
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}", role, data) from error
    seconds = time.process_time() - start
    if seconds > SECONDS_PER_INPUT:
        raise Finding(f"took {seconds:.1f} s", role, data)


def feed_whole(connection: Connection, data: bytes, sizes: Callable[[], int]) -> None:
    """All of one input, up to the end of the stream; raises what the connection raises, eof at the latest."""
    # What follows the handshake is never sent before the peer has answered it.
    cut = _handshake_nbytes(data)
    for part in (data[:cut], data[cut:]):
        _feed(connection, memoryview(part), sizes)
        if connection.open and connection.role == "client":
            _call(connection)
    connection.tick()
    raise connection.eof()


def _feed(connection: Connection, data: memoryview, sizes: Callable[[], int]) -> None:
    while data:
        buffer = connection.buffer()
        if not len(buffer):
            raise AssertionError("no room for the next bytes")
        nbytes = min(len(buffer), len(data), sizes())
        buffer[:nbytes] = data[:nbytes]
        data = data[nbytes:]
        for message in connection.received(nbytes):
            for tensor in message.tensors or ():
                _use(tensor)
            if message.kind == REQUEST:
                _answer(connection, message)
        _send(connection)


def _handshake_nbytes(data: bytes) -> int:
    """Where the second frame ends, by what the heads claim."""
    end = 0
    for _ in range(_HANDSHAKE_FRAMES):
        if end + HEAD.size <= len(data):
            table, meta, body = HEAD.unpack_from(data, end)[5:8]
            end += ((HEAD.size + table + meta + 63) & -64) + body
    return min(end, len(data))


def _use(tensor: Any) -> None:
    assert tensor.data.nbytes == tensor.nbytes
    if tensor.dtype not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        array = tensor.numpy()
        assert array.shape == tensor.shape


def _answer(connection: Connection, message: Any) -> None:
    """As a server would: an echo, an error, a stream, by the call's id."""
    with contextlib.suppress(LimitExceeded):  # ours: the peer's limits forbid the answer
        if message.id % 4 == 0:
            connection.error(message.id, RemoteError("no", code="failed"))
        elif message.id % 4 == 1:
            connection.item(message.id, message.tensors, {"n": 1})
            connection.end(message.id)
        elif message.id % 4 == 2:
            connection.reply(message.id, message.tensors, message.meta)
    # Every fourth call stays open, so that cancelling and limits are reached too.


def _call(connection: Connection) -> None:
    with contextlib.suppress(LimitExceeded, Overloaded):
        for number in range(CALLS):
            connection.request("experts", (), {}, 1000)
            if number % 5 == 4:
                connection.cancel(number)


def _send(connection: Connection) -> None:
    """The kernel takes everything."""
    outbox = connection.outbox
    while outbox.nbytes:
        outbox.sent(sum(len(memoryview(piece).cast("B")) for piece in outbox.pieces()))


# ---- mutations


def frames_of(stream: bytes) -> list[bytes]:
    """A valid stream cut at its frames."""
    frames, start = [], 0
    while start < len(stream):
        table, meta, body = HEAD.unpack_from(stream, start)[5:8]
        end = start + ((HEAD.size + table + meta + 63) & -64) + body
        frames.append(stream[start:end])
        start = end
    return frames


def mutations(corpus: Sequence[tuple[Role, bytes]], rng: random.Random) -> Iterator[tuple[Role, bytes]]:
    """Endless damaged inputs."""
    streams = [(role, frames_of(stream)) for role, stream in corpus]
    donors = [frame for _, frames in streams for frame in frames]
    while True:
        role, whole = rng.choice(streams)
        frames = list(whole)
        first = 0 if rng.random() < 0.2 else min(_HANDSHAKE_FRAMES, len(frames) - 1)
        for _ in range(1 + int(rng.expovariate(0.7))):
            if len(frames) > first:
                _mutate(frames, rng.randrange(first, len(frames)), donors, rng)
        data = b"".join(frames)
        if rng.random() < 0.15:
            data = data[: rng.randrange(len(data) + 1)]
        yield role, data


def _mutate(frames: list[bytes], index: int, donors: Sequence[bytes], rng: random.Random) -> None:
    choice = rng.randrange(9)
    if choice == 0:
        del frames[index]
    elif choice == 1:
        frames.insert(index, frames[index])
    elif choice == 2:
        frames.insert(index, rng.choice(donors))
    elif choice == 3 and index + 1 < len(frames):
        frames[index], frames[index + 1] = frames[index + 1], frames[index]
    elif choice in (4, 5) and len(frames[index]) >= HEAD.size:
        frames[index] = _change_head(frames[index], rng)
    else:
        frames[index] = _change_bytes(frames[index], rng)


def _change_head(frame: bytes, rng: random.Random) -> bytes:
    fields = list(HEAD.unpack_from(frame))
    which = rng.randrange(1, len(fields))
    edges = [*_EDGES, fields[which] + 1, fields[which] - 1, fields[which] ^ (1 << rng.randrange(32))]
    fields[which] = rng.choice(edges)
    for index, width in enumerate((3, 1, 4, 8, 4, 4, 4, 4)):
        if index:
            fields[index] &= (1 << 8 * width) - 1
    return HEAD.pack(*fields) + frame[HEAD.size :]


def _change_bytes(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame or b"\0")
    at = rng.randrange(len(data))
    choice = rng.randrange(5)
    if choice == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif choice == 1:
        data[at] = rng.randrange(256)
    elif choice == 2:
        data[at : at + 4] = struct.pack("<I", rng.choice(_EDGES))
    elif choice == 3:
        # Around the start lie the head, the table and the meta: that is where parsing happens.
        at = rng.randrange(min(len(data), HEAD.size + 64))
        data[at] = rng.choice(_MSGPACK)
    else:
        del data[at : at + rng.choice((1, 4, 32, 64))]
    return bytes(data)


# ---- runs


def role_of(file: Path) -> Role:
    return "client" if file.name.startswith("client") else "server"


def load_corpus(folder: Path = CORPUS) -> list[tuple[Role, bytes]]:
    """(receiver's role, stream) of the seeds."""
    files = [file for file in sorted(folder.glob("*.bin")) if "-found-" not in file.name]
    return [(role_of(file), file.read_bytes()) for file in files]


def run(
    inputs: int,
    seed: int,
    *,
    corpus: Sequence[tuple[Role, bytes]] | None = None,
    progress: Callable[[int], None] = lambda number: None,
) -> None:
    """Run so many inputs. Raises Finding, also for memory that grows by more than `GROWTH_NBYTES`.

    A hang ends the process after `HANG_SECONDS`, with a traceback.
    """
    rng = random.Random(seed)
    process, settled = psutil.Process(), 0
    for number, (role, data) in enumerate(mutations(corpus or load_corpus(), rng)):
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            progress(number)
        if number == inputs:
            break
        execute(role, data, _piece_sizes(len(data), rng))
        if number == max(inputs // 10, 2000):
            settled = process.memory_info().rss
    faulthandler.cancel_dump_traceback_later()
    growth = process.memory_info().rss - settled if settled else 0
    if growth > GROWTH_NBYTES:
        raise Finding(f"memory grew by {growth >> 20} MiB over {inputs} inputs", "server", b"")


def _piece_sizes(nbytes: int, rng: random.Random) -> Callable[[], int]:
    choice = rng.randrange(60)
    if choice == 0 and nbytes < 8192:  # byte by byte only what is short: it would take most of the run
        return lambda: 1
    if choice < 4 and nbytes < 65536:
        return lambda: rng.randrange(1, 200)
    if choice < 20:
        return lambda: 4096
    return lambda: 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = time.time_ns() if arguments.seed is None else arguments.seed
    try:
        for file in arguments.files:
            execute(role_of(file), file.read_bytes(), lambda: 1 << 20)
        if not arguments.files:
            print(f"seed {seed}")
            start = time.perf_counter()
            run(arguments.inputs, seed, progress=lambda number: print(f"\r{number:,}", end="", flush=True))
            print(f"\r{arguments.inputs:,} inputs in {time.perf_counter() - start:.0f} s, no finding")
    except Finding as finding:
        file = CORPUS / f"{finding.role}-found-{seed}.bin"
        if finding.data and not arguments.files:
            file.write_bytes(finding.data)
        raise SystemExit(f"\n{finding}\nthe input is in {file}") from finding


if __name__ == "__main__":
    main()
