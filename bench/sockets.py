"""What each way to move a row costs, without any protocol: 5,632 bytes there and back, two processes.

    python bench/sockets.py                 each process has cores of its own, as two machines would; 30 s
    python bench/sockets.py --cores any     cores as the scheduler likes

The ways: a blocking socket; on asyncio's loop and on uvloop a Protocol (`data_received`, `write`), a
BufferedProtocol (`get_buffer`, `write`), and `add_reader` with `recv_into` and `send`; the last one also with
the write put off to the next turn of the loop, where the others are eager, and with the loop kept turning
instead of sleeping (busy polling). Both ends go the same way. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cores import halves, run_on

ROW_NBYTES: Final = 5632
ROW: Final = bytes(ROW_NBYTES)
ROUNDS: Final = 5
ROWS_PER_ROUND: Final = 1000
WAYS: Final = (
    "blocking", "blocking, polled",
    "asyncio Protocol", "asyncio BufferedProtocol", "asyncio add_reader",
    "uvloop Protocol", "uvloop BufferedProtocol", "uvloop add_reader", "uvloop add_reader, late send",
    "uvloop add_reader, busy polling",
)  # fmt: skip
Write = Callable[[bytes], Any]
Whole = Callable[[Write], None]


class Blocking:
    """`sendall` and `recv_into`; polled: without ever sleeping in the kernel."""

    def __init__(self, sock: socket.socket, polled: bool) -> None:
        self.sock, self.polled = sock, polled
        self.row = memoryview(bytearray(ROW_NBYTES))
        sock.setblocking(not polled)

    def receive(self) -> bool:
        filled = 0
        while filled < ROW_NBYTES:
            try:
                nbytes = self.sock.recv_into(self.row[filled:])
            except BlockingIOError:
                continue
            if not nbytes:
                return False
            filled += nbytes
        return True

    def serve(self) -> None:
        while self.receive():
            self.sock.send(self.row)

    def measure(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            start = perf_counter()
            self.sock.send(ROW)
            self.receive()
            times.append(perf_counter() - start)
        return times


class Rows:
    """What comes, cut into rows; `whole` is told of each, and how to answer."""

    write: Write

    def __init__(self, whole: Whole) -> None:
        self.whole, self.filled = whole, 0

    def came(self, nbytes: int) -> None:
        self.filled += nbytes
        if self.filled == ROW_NBYTES:
            self.filled = 0
            self.whole(self.write)


class Stream(Rows, asyncio.Protocol):
    """Counts what comes; `whole` is called for each row, with the way to answer it."""

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write

    def data_received(self, data: bytes) -> None:
        self.came(len(data))


class Buffered(Rows, asyncio.BufferedProtocol):
    """The same with a buffer of its own."""

    def __init__(self, whole: Whole) -> None:
        super().__init__(whole)
        self.buffer = memoryview(bytearray(1 << 16))

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.came(nbytes)


class Reader(Rows):
    """`add_reader`: the socket itself, non-blocking."""

    def __init__(self, sock: socket.socket, whole: Whole, *, late: bool, polling: bool) -> None:
        super().__init__(whole)
        self.sock = sock
        self.buffer = memoryview(bytearray(1 << 16))
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(sock.fileno(), self.readable)
        self.write = sock.send
        if late:
            self.write = lambda row: self.loop.call_soon(sock.send, row)
        if polling:
            self.turn()

    def turn(self) -> None:
        self.loop.call_soon(self.turn)

    def readable(self) -> None:
        nbytes = self.sock.recv_into(self.buffer)
        if nbytes:
            self.came(nbytes)
        else:
            self.loop.remove_reader(self.sock.fileno())


async def run_loop(way: str, sock: socket.socket, count: int | None) -> list[float]:
    """Answer rows for good, or (`count`) send so many and say how long each took."""
    sock.setblocking(False)
    loop, times, done = asyncio.get_running_loop(), [], asyncio.Event()
    started = 0.0

    def whole(write: Write) -> None:
        nonlocal started
        if count is None:
            write(ROW)
            return
        times.append(perf_counter() - started)
        if len(times) == count:
            done.set()
        else:
            started = perf_counter()
            write(ROW)

    end: Any
    if "add_reader" in way:
        end = Reader(sock, whole, late="late" in way, polling="polling" in way)
    else:
        kind = Buffered if "Buffered" in way else Stream
        _, end = await loop.create_connection(lambda: kind(whole), sock=sock)
    if count is not None:
        started = perf_counter()
        end.write(ROW)
    await done.wait()
    return times


def use(way: str, sock: socket.socket, count: int | None) -> list[float]:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if way.startswith("blocking"):
        end = Blocking(sock, "polled" in way)
        if count is not None:
            return end.measure(count)
        end.serve()
        return []
    run = uvloop.run if way.startswith("uvloop") else asyncio.run
    return run(run_loop(way, sock, count))


def serve(way: str, pipe: Connection, cores: set[int]) -> None:
    run_on(cores)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        use(way, listener.accept()[0], None)


def client(way: str, port: int, pipe: Connection, cores: set[int]) -> None:
    run_on(cores)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        pipe.send(use(way, sock, ROWS_PER_ROUND)[ROWS_PER_ROUND // 10 :])


def measure(way: str, cores: tuple[set[int], set[int]]) -> list[float]:
    """Seconds of each row but the first tenth."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(way, there, cores[0]), daemon=True)
    server.start()
    port = here.recv()
    caller = context.Process(target=client, args=(way, port, there, cores[1]), daemon=True)
    caller.start()
    try:
        if not here.poll(30):
            raise SystemExit(f"error: {way}: no answer")
        times: list[float] = here.recv()
        return times
    finally:
        for process in (caller, server):
            process.terminate()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", choices=("apart", "any"), default="apart")
    arguments = parser.parse_args()
    cores = halves(arguments.cores == "apart")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way in WAYS:
            times[way] += measure(way, cores)
    title = f"{ROW_NBYTES:,} bytes there and back, {os.cpu_count()} cores"
    table = Table("", title=title, title_justify="left")
    for heading in ("p50 µs", "p90 µs", "p99 µs"):
        table.add_column(heading, justify="right")
    records = []
    for way, taken in times.items():
        taken.sort()
        figures = {f"p{p}_us": taken[len(taken) * p // 100] * 1e6 for p in (50, 90, 99)}
        table.add_row(way, *(f"{value:.1f}" for value in figures.values()))
        records.append({"way": way, **figures})
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(json.dumps({"bench": "sockets", "cores": arguments.cores, "ways": records}))


if __name__ == "__main__":
    main()
