"""Handlers of every form, and what the server does around them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.errors import (
    CapacityError,
    ConnectError,
    DeadlineExceeded,
    LimitExceeded,
    RemoteError,
    UsageError,
)
from splitinfer.transport import Limits, Reply, ServerConfig
from tests.patience import run, until, with_more_time


async def plus_one(call: transport.Call) -> list[Any]:
    return [call.tensors[0].numpy() + 1]


def in_a_thread(call: transport.Call) -> Any:
    loop = asyncio.get_running_loop()
    return loop.run_in_executor(None, lambda: Reply([call.tensors[0].numpy() + 1]))


async def stream_after_waiting(call: transport.Call) -> AsyncIterator[Reply]:
    await asyncio.sleep(0)

    async def items() -> AsyncIterator[Reply]:
        yield Reply([call.tensors[0].numpy() + 1])

    return items()


HANDLERS: dict[str, Any] = {
    "coroutine": plus_one,
    "function": lambda call: Reply([call.tensors[0].numpy() + 1]),
    "sequence": lambda call: (call.tensors[0].numpy() + 1,),
    "future": in_a_thread,
    "iterator later": stream_after_waiting,
}


@pytest.mark.parametrize("form", HANDLERS)
def test_handlers_of_every_form(form: str) -> None:
    async def work() -> None:
        async with (
            await transport.serve(HANDLERS[form], "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            replies = [reply async for reply in channel.stream("any", [np.arange(3)])]
            assert [reply.tensors[0].numpy().tolist() for reply in replies] == [[1, 2, 3]]

    run(work())


def test_a_handler_that_answers_nothing() -> None:
    async def work() -> None:
        async with (
            await transport.serve(lambda call: None, "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            reply = await channel.call("any")
            assert (list(reply.tensors), reply.meta) == ([], {})

    run(work())


def test_what_need_not_wait_is_answered_within_the_same_turn_of_the_loop() -> None:
    in_flight_next_turn: list[int] = []

    async def work() -> None:
        def count() -> None:
            in_flight_next_turn.append(sum(peer.connection.calls for peer in server.peers))

        async def handler(call: transport.Call) -> Reply:
            asyncio.get_running_loop().call_soon(count)
            return Reply()

        server = await transport.serve(handler, "memory:turn")
        async with server, await transport.connect(server.address) as channel:
            await channel.call("any")
        assert in_flight_next_turn == [0]

    run(work())


def test_what_a_call_tells_its_handler() -> None:
    calls: list[transport.Call] = []

    async def work() -> None:
        async with (
            await transport.serve(lambda call: calls.append(call), "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            await channel.call("name", [np.arange(2)], {"a": 1}, timeout=60)
            (call,) = calls
            assert (call.method, call.meta) == ("name", {"a": 1})
            assert call.tensors[0].shape == (2,)
            assert 30 < call.time_left() <= 60
            assert call.peer.startswith("127.0.0.1:")
            assert call.peer != server.address
            assert "name" in repr(call)

    run(work())


def test_time_left_is_never_negative_nor_more_than_the_server_allows() -> None:
    with_more_time(time_left, 0.1, 2.0)


def time_left(allowed: float) -> None:
    left: list[float] = []

    async def handler(call: transport.Call) -> None:
        left.append(call.time_left())
        try:
            await asyncio.sleep(60)
        finally:
            left.append(call.time_left())

    async def work() -> None:
        config = ServerConfig(call_timeout=allowed)
        async with (
            await transport.serve(handler, "127.0.0.1:0", config=config) as server,
            await transport.connect(server.address) as channel,
        ):
            with pytest.raises(DeadlineExceeded):
                await channel.call("any", timeout=30)
            await until(lambda: len(left) == 2)
        assert 0 < left[0] <= allowed
        assert left[1] == 0

    run(work())


def test_a_handler_that_will_not_be_cancelled_still_counts() -> None:
    async def work() -> None:
        stop = asyncio.Event()

        async def stubborn(call: transport.Call) -> Reply:
            while not stop.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await stop.wait()
            return Reply()

        config = ServerConfig(limits=Limits(max_calls=2))
        async with (
            await transport.serve(stubborn, "127.0.0.1:0", config=config) as server,
            await transport.connect(server.address) as channel,
        ):
            for _ in range(2):
                call = channel.start("any")
                await asyncio.sleep(0.01)
                call.cancel()
            with pytest.raises(LimitExceeded, match="2 calls are in flight"):
                channel.start("any")
            stop.set()
            await until(lambda: not channel._session.connection.calls)  # type: ignore[union-attr]
            await channel.call("any")

    run(work())


def test_a_handlers_failure_is_logged_with_its_traceback_and_told_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handler(call: transport.Call) -> None:
        raise KeyError("layers.3")

    async def work() -> None:
        async with (
            await transport.serve(handler, "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            with pytest.raises(RemoteError, match=r"KeyError: 'layers\.3'") as caught:
                await channel.call("any")
            assert "Traceback" not in str(caught.value)

    with caplog.at_level(logging.ERROR, "splitinfer.transport"):
        run(work())
    assert caplog.records[0].exc_info is not None


def test_a_mistake_of_the_callers_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    def handler(call: transport.Call) -> None:
        raise UsageError("layer 99 is not held here", remedy="Ask for layers 0-5.")

    async def work() -> None:
        async with (
            await transport.serve(handler, "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            with pytest.raises(RemoteError, match="layer 99") as caught:
                await channel.call("any")
            assert caught.value.remedy == "Ask for layers 0-5."

    run(work())
    assert caplog.records == []


@pytest.mark.parametrize("later", [False, True])
def test_a_handler_that_waits_for_something_cancelled(later: bool) -> None:
    async def handler(call: transport.Call) -> Reply:
        other = asyncio.get_running_loop().create_future()
        other.cancel()
        if later:
            await asyncio.sleep(0)
        await other
        return Reply()

    async def work() -> None:
        async with (
            await transport.serve(handler, "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            with pytest.raises(RemoteError) as caught:
                await channel.call("any")
            assert caught.value.code == "cancelled"

    run(work())


@pytest.mark.parametrize("timeout", [inf, 1e12, 0.0, -1.0])
def test_timeouts_of_any_size(timeout: float) -> None:
    async def work() -> None:
        async with (
            await transport.serve(lambda call: asyncio.sleep(0.05), "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            if timeout > 0:
                await channel.call("any", timeout=timeout)
            else:
                with pytest.raises(DeadlineExceeded):
                    await channel.call("any", timeout=timeout)

    run(work())


def test_a_stream_whose_reader_is_gone_is_closed() -> None:
    closed = []

    async def endless(call: transport.Call) -> AsyncIterator[Reply]:
        try:
            while True:
                yield Reply()
        finally:
            closed.append(call.method)

    async def work() -> None:
        async with await transport.serve(endless, "127.0.0.1:0") as server:
            channel = await transport.connect(server.address)
            stream = channel.stream("endless")
            await anext(stream)
            await channel.close()
            await until(lambda: closed)
            await stream.aclose()

    run(work())


def test_a_port_in_use_is_said() -> None:
    async def work() -> None:
        async with await transport.serve(lambda call: None, "127.0.0.1:0") as server:
            with pytest.raises(CapacityError, match=server.address):
                await transport.serve(lambda call: None, server.address)

    run(work())


def test_a_socket_file_goes_with_its_server(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "socket"
        server = await transport.serve(lambda call: None, f"unix:{path}")
        assert path.exists()
        await server.close()
        assert not path.exists()
        with pytest.raises(ConnectError):
            await transport.connect(f"unix:{path}")

    run(work())


def test_after_closing_nobody_is_connected_and_nothing_runs() -> None:
    began, ended = [], []

    async def handler(call: transport.Call) -> None:
        began.append(1)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(1)

    async def work() -> None:
        gc.collect()  # what other tests left behind goes now, not in the middle
        before = len(os.listdir("/dev/fd"))
        server = await transport.serve(handler, "127.0.0.1:0")
        channels = [await transport.connect(server.address) for _ in range(3)]
        calls = [channel.start("any") for channel in channels]
        await until(lambda: began == [1, 1, 1])
        await server.close()
        assert ended == [1, 1, 1]
        assert not server.peers
        await asyncio.gather(*calls, return_exceptions=True)
        for channel in channels:
            await channel.close()
        await server.close()
        assert len(os.listdir("/dev/fd")) == before

    run(work())


def test_info_is_made_for_each_client() -> None:
    async def work() -> None:
        count = iter(range(10))
        async with await transport.serve(
            lambda call: None, "127.0.0.1:0", info=lambda: {"n": next(count)}
        ) as server:
            for number in range(3):
                async with await transport.connect(server.address) as channel:
                    assert channel.info == {"n": number}

    run(work())


def test_draining_waits_for_what_is_still_being_sent() -> None:
    async def work() -> None:
        large = np.ones(30 << 20, np.uint8)
        async with (
            await transport.serve(lambda call: Reply([large]), "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            call = channel.start("any")
            async with asyncio.timeout(15):
                while not any(peer.connection.outbox.nbytes for peer in server.peers):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            assert await server.drain(timeout=15)
            await server.close()
            assert (await call).tensors[0].numpy().all()

    run(work())
