"""The process behind an emulated link: a TCP proxy that holds bytes back until they would have arrived.

Run as a script by `link.EmulatedLink`, with the standard library alone, so that it starts in some 20 ms. A
process of its own, because a thread would wait for the interpreter lock of the program that is being
measured.

Timers of the event loops are too coarse (epoll counts milliseconds): this loop sleeps in `select`, whose
timeout counts microseconds, until shortly before the next release and polls for the rest.

Argument: one JSON object, the fields of `Plan`. It prints the port that it listens on and runs until its
standard input closes, so that it cannot outlive its parent.
"""

from __future__ import annotations

import errno
import json
import random
import select
import socket
import struct
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter, time
from typing import Any, Final

__all__ = ["Plan", "Proxy", "main"]

# `select` may wake this much late on a busy machine: the end of a wait is polled.
_SPIN_SECONDS: Final = 150e-6
# From our `send` until the receiver's kernel has the bytes: so much earlier are they released.
_SEND_SECONDS: Final = 25e-6
# A pause between slices, long enough for the receiver to wake for each.
_SLICE_GAP_SECONDS: Final = 100e-6
# Bytes on the way that a direction holds at most beside what the link itself holds (bandwidth × delay).
_QUEUE_NBYTES: Final = 1 << 20
# Bytes that lay longer in the kernel waited for room in the queue, or the clock was set.
_MAX_AGE_SECONDS: Final = 0.002
_MAX_CONNECTIONS: Final = 200
# With a bandwidth, bytes are released in pieces of this many seconds, so that a transfer flows.
_PIECE_SECONDS: Final = 0.0005
_MIN_PIECE_NBYTES: Final = 1448
_MAX_PIECE_NBYTES: Final = 256 * 1024

_RESET: Final = struct.pack("ii", 1, 0)
# Linux notes when bytes arrived (SO_TIMESTAMPNS), so that the time this process takes to wake up is not
# added.
_STAMP: Final = 35 if sys.platform == "linux" else 0
_STAMP_SPACE: Final = socket.CMSG_SPACE(16)
# As `endpoints.tune`: on loopback a congestion control that paces packets would add to the link's own delay.
_PACING: Final[int | None] = getattr(socket, "TCP_CONGESTION", None)


@dataclass(frozen=True)
class Plan:
    """What the proxy is told: `delay`, `jitter` in seconds, `bandwidth` in bytes/s (0: any), each one way."""

    host: str
    port: int
    unix: bool = False  # `host` is the path of a Unix socket
    delay: float = 0.0
    jitter: float = 0.0
    bandwidth: float = 0.0
    stall_after: int = -1
    stall_for: float = 0.0
    slice_nbytes: int = 0
    reset_after: int = -1


@dataclass
class Direction:
    """One way of a connection. `queue` has (time of release, bytes); empty bytes end the stream."""

    source: socket.socket
    sink: socket.socket
    earliest: float
    queue: deque[tuple[float, memoryview]] = field(default_factory=deque)
    queued: int = 0
    delivered: int = 0
    free_at: float = 0.0
    last_release: float = 0.0
    not_before: float = 0.0
    ended: bool = False
    blocked: bool = False
    stalled: bool = False

    def next_release(self) -> float | None:
        return max(self.queue[0][0], self.not_before) if self.queue and not self.blocked else None


class Connection:
    """Both ways between one client and the server."""

    def __init__(self, client: socket.socket, server: socket.socket, now: float, delay: float) -> None:
        # Connecting to the proxy took no time; over the link it would have taken a round trip.
        self.up = Direction(client, server, earliest=now + 2 * delay)
        self.down = Direction(server, client, earliest=now + 3 * delay)
        self.connecting = True

    def directions(self) -> tuple[Direction, Direction]:
        return self.up, self.down

    def close(self, *, reset: bool = False) -> None:
        for end in (self.up.source, self.up.sink):
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.close()


class Proxy:
    """Accepts, shapes, forwards. One thread, no callbacks: `step` is the whole loop."""

    def __init__(self, plan: Plan, listener: socket.socket) -> None:
        self.plan = plan
        self._listener = listener
        self._connections: list[Connection] = []
        self._random = random.Random()
        self._family: int = socket.AF_UNIX
        self._target: Any = plan.host
        if not plan.unix:
            found = socket.getaddrinfo(plan.host, plan.port, type=socket.SOCK_STREAM)[0]
            self._family, self._target = found[0], found[4]
        self._near = not plan.unix and str(self._target[0]).startswith(("127.", "::1"))
        piece = plan.bandwidth * _PIECE_SECONDS or _MAX_PIECE_NBYTES
        self._piece = int(min(max(piece, _MIN_PIECE_NBYTES), _MAX_PIECE_NBYTES))
        self._room = _QUEUE_NBYTES + int(2 * plan.bandwidth * (plan.delay + plan.jitter))

    def step(self, parent: int) -> bool:
        """Wait for what comes next and do it. False once the parent is gone."""
        readable, writable, wait = self._interest()
        now = perf_counter()
        timeout = None if wait is None else max(wait - now - _SPIN_SECONDS, 0.0)
        inputs: list[int | socket.socket] = [parent, self._listener, *readable]
        ready, free, _ = select.select(inputs, writable, [], timeout)
        if parent in ready:
            return False
        if self._listener in ready:
            self._accept()
        for connection in list(self._connections):
            try:
                self._serve(connection, ready, free)
            except OSError:
                self._drop(connection, reset=True)
        return True

    def _interest(self) -> tuple[list[socket.socket], list[socket.socket], float | None]:
        readable: list[socket.socket] = []
        writable: list[socket.socket] = []
        wait: float | None = None
        for connection in self._connections:
            if connection.connecting:
                writable.append(connection.up.sink)
            for way in connection.directions():
                if (
                    not way.ended
                    and way.queued < self._room
                    and not (connection.connecting and way is connection.down)
                ):
                    readable.append(way.source)
                if way.blocked:
                    writable.append(way.sink)
                release = None if connection.connecting else way.next_release()
                if release is not None and (wait is None or release < wait):
                    wait = release
        return readable, writable, wait

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if len(self._connections) >= _MAX_CONNECTIONS:
            client.close()
            return
        server = socket.socket(self._family, socket.SOCK_STREAM)
        for end in (client, server):
            end.setblocking(False)
            if _STAMP:
                end.setsockopt(socket.SOL_SOCKET, _STAMP, 1)
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if _PACING is not None and (end is client or self._near):
                    with suppress(OSError):
                        end.setsockopt(socket.IPPROTO_TCP, _PACING, b"reno")
            if self.plan.bandwidth:
                # Large buffers here would swallow what the link is meant to hold up.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE_NBYTES // 4)
        if server.connect_ex(self._target) not in (0, errno.EINPROGRESS):
            server.close()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        self._connections.append(Connection(client, server, perf_counter(), self.plan.delay))

    def _serve(
        self, connection: Connection, ready: list[int | socket.socket], free: list[socket.socket]
    ) -> None:
        if connection.connecting:
            if connection.up.sink not in free:
                return
            failure = connection.up.sink.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failure:
                raise OSError(failure, "the target does not answer")
            connection.connecting = False
        for way in connection.directions():
            if way.source in ready:
                self._receive(way)
            if way.sink in free:
                way.blocked = False
            self._release(connection, way)
        if all(way.ended and not way.queue for way in connection.directions()):
            self._drop(connection)

    def _receive(self, way: Direction) -> None:
        try:
            read, ancillary, _, _ = way.source.recvmsg(self._piece, _STAMP_SPACE)
        except BlockingIOError:
            return
        data, now = memoryview(read), _arrival(ancillary)
        plan = self.plan
        delay = max(plan.delay + plan.jitter * self._random.uniform(-1, 1), 0.0)
        arrival = max(now, way.earliest)
        if plan.bandwidth:
            arrival = max(arrival, way.free_at) + data.nbytes / plan.bandwidth
            way.free_at = arrival
        way.last_release = max(
            arrival + delay - _SEND_SECONDS, way.last_release
        )  # TCP keeps its order, whatever the packets do
        way.queue.append((way.last_release, data))
        way.queued += data.nbytes
        way.ended = not data

    def _release(self, connection: Connection, way: Direction) -> None:
        plan = self.plan
        while (release := way.next_release()) is not None and release <= perf_counter():
            due, data = way.queue[0]
            if not data:
                way.queue.popleft()
                way.sink.shutdown(socket.SHUT_WR)
                return
            allowed = self._allowed(way, data.nbytes)
            if allowed == 0:
                return
            try:
                sent = way.sink.send(data[:allowed])
            except BlockingIOError:
                way.blocked = True
                return
            way.queued -= sent
            way.delivered += sent
            if sent == data.nbytes:
                way.queue.popleft()
            else:
                way.queue[0] = (due, data[sent:])
            if plan.slice_nbytes:
                way.not_before = perf_counter() + _SLICE_GAP_SECONDS
            if way.delivered == plan.reset_after:
                raise ConnectionResetError("as planned")

    def _allowed(self, way: Direction, nbytes: int) -> int:
        """How many of the bytes that are due may go now: less than all for slices, stalls and resets."""
        plan = self.plan
        if plan.slice_nbytes:
            nbytes = min(nbytes, plan.slice_nbytes)
        if plan.reset_after > way.delivered:
            nbytes = min(nbytes, plan.reset_after - way.delivered)
        if plan.stall_after >= 0 and not way.stalled:
            nbytes = min(nbytes, plan.stall_after - way.delivered)
            if nbytes == 0:
                way.stalled = True
                way.not_before = perf_counter() + plan.stall_for
        return nbytes

    def _drop(self, connection: Connection, *, reset: bool = False) -> None:
        connection.close(reset=reset)
        self._connections.remove(connection)

    def close(self) -> None:
        for connection in list(self._connections):
            self._drop(connection, reset=True)
        self._listener.close()


def _arrival(ancillary: list[tuple[int, int, bytes]]) -> float:
    """When the bytes arrived, on `perf_counter`'s clock: now, less how long ago the kernel noted them."""
    for level, kind, stamp in ancillary:
        if level == socket.SOL_SOCKET and kind == _STAMP and len(stamp) == 16:
            seconds, nanoseconds = struct.unpack("=qq", stamp)
            age: float = time() - (seconds + nanoseconds * 1e-9)
            return perf_counter() - min(max(age, 0.0), _MAX_AGE_SECONDS)
    return perf_counter()


def _sharpen_timers() -> None:
    """Linux bundles timers of ordinary processes within 50 µs. Elsewhere, or where refused, the polling
    covers it.
    """
    with suppress(OSError), open("/proc/self/timerslack_ns", "w", encoding="ascii") as slack:
        slack.write("1")


def main(argument: str) -> None:
    """The whole life of the process."""
    proxy = Proxy(
        Plan(**json.loads(argument)), listener := socket.create_server(("127.0.0.1", 0), backlog=64)
    )
    _sharpen_timers()
    print(listener.getsockname()[1], flush=True)
    while proxy.step(sys.stdin.fileno()):
        pass
    proxy.close()


if __name__ == "__main__":
    main(sys.argv[1])
