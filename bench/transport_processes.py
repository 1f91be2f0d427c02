"""The two processes of one peer of bench/transport.py: one serves, the other measures what it is told to.

All of them run on uvloop: pyzmq and grpc.aio answer a row as fast on it as on asyncio's own loop, or faster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import uvloop
from cores import run_on
from transport_peers import IN_FLIGHT, PEERS, Peer, RawSocket

__all__ = ["run_client", "run_server"]


def run_server(peer: str, pipe: Connection, cores: set[int]) -> None:
    """A server process on these cores: sends where it listens, then serves until it is terminated."""
    run_on(cores)
    uvloop.run(PEERS[peer]().serve(pipe.send))


def run_client(peer: str, address: Any, pipe: Connection, cores: set[int]) -> None:
    """A client process on these cores: reads (what, how many), answers with seconds per call or calls/s."""
    run_on(cores)
    uvloop.run(drive(PEERS[peer](), address, pipe))


async def drive(peer: Peer, address: Any, pipe: Connection) -> None:
    await peer.connect(address)
    while (order := await asyncio.get_running_loop().run_in_executor(None, pipe.recv)) is not None:
        what, count = order
        if what == "flight":
            pipe.send(await calls_per_second(peer, count))
        else:
            pipe.send(await seconds_per_call(peer.row if what == "row" else peer.bulk, count))
    await peer.close()


async def seconds_per_call(call: Callable[[], Awaitable[None]], count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await call()
        times.append(time.perf_counter() - start)
    return times


async def calls_per_second(peer: Peer, rounds: int) -> float:
    """With `IN_FLIGHT` callers that each make `rounds` calls one after another."""
    if isinstance(peer, RawSocket):
        return peer.rows_in_flight(rounds)

    async def caller() -> None:
        for _ in range(rounds):
            await peer.row()

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    return rounds * IN_FLIGHT / (time.perf_counter() - start)
