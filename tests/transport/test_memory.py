from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.errors import CapacityError, ConnectError
from splitinfer.transport import memory


def echo(call: transport.Call) -> transport.Reply:
    return transport.Reply(call.tensors, {"thread": threading.get_ident()})


def test_a_name_is_taken_once_and_free_again_after_closing() -> None:
    async def work() -> None:
        for _ in range(2):
            server = await transport.serve(echo, "memory:name")
            with pytest.raises(CapacityError, match="memory:name"):
                await transport.serve(echo, "memory:name")
            await server.close()
        with pytest.raises(ConnectError):
            await transport.connect("memory:name")

    asyncio.run(work())


def test_the_two_ends_may_live_in_different_threads() -> None:
    ready, done = threading.Event(), threading.Event()
    ends: list[int] = []

    async def serve() -> None:
        async with await transport.serve(echo, "memory:threads"):
            ends.append(threading.get_ident())
            ready.set()
            await asyncio.to_thread(done.wait)

    async def call() -> None:
        async with await transport.connect("memory:threads") as channel:
            reply = await channel.call("any", [np.arange(500_000)])
            assert reply.meta["thread"] == ends[0] != threading.get_ident()
            assert (reply.tensors[0].numpy() == np.arange(500_000)).all()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        asyncio.run(call())
    finally:
        done.set()
        thread.join()


def test_a_loop_that_is_gone_serves_nobody() -> None:
    async def leave_it() -> None:
        await transport.serve(echo, "memory:gone")

    async def call() -> None:
        with pytest.raises(ConnectError):
            await transport.connect("memory:gone")

    try:
        asyncio.run(leave_it())
        asyncio.run(call())
    finally:
        memory.unlisten("gone")
