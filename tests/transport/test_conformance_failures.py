"""Whichever way two ends are connected: what ends a call early, and what lives on."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.errors import ConnectionLost, DeadlineExceeded, LimitExceeded, Overloaded, RemoteError
from splitinfer.transport import ClientConfig, Limits, Reply, ServerConfig
from tests.patience import run, until, with_more_time
from tests.transport.conformance import Pair, echo, running, sleeper


def test_errors_of_a_handler(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def fails(call: transport.Call) -> Reply:
        raise ValueError("no such layer")

    async def fails_later(call: transport.Call) -> Reply:
        await asyncio.sleep(0)
        raise Overloaded("no room", remedy="Wait.")

    def answers_nonsense(call: transport.Call) -> Any:
        return [object()]

    handlers = {"fails": fails, "fails_later": fails_later, "nonsense": answers_nonsense, "echo": echo}

    async def work() -> None:
        async with pair(handlers) as (_, channel):
            with pytest.raises(RemoteError, match="ValueError: no such layer") as caught:
                await channel.call("fails")
            assert caught.value.code == "failed"
            assert caught.value.peer == channel.address
            with pytest.raises(Overloaded, match="no room") as full:
                await channel.call("fails_later")
            assert full.value.remedy == "Wait."
            with pytest.raises(RemoteError, match="object cannot be sent"):
                await channel.call("nonsense")
            with pytest.raises(RemoteError, match="no method 'absent'") as absent:
                await channel.call("absent")
            assert absent.value.code == "no_method"
            assert (await channel.call("echo", (), {"still": "alive"})).meta == {"still": "alive"}

    run(work())


def test_deadlines_travel(pair: Pair) -> None:
    with_more_time(lambda timeout: deadlines_travel(pair, timeout), 0.2, 3.0)


def deadlines_travel(pair: Pair, timeout: float) -> None:
    left: list[float] = []
    ended: list[str] = []

    async def handler(call: transport.Call) -> Reply:
        left.append(call.time_left())
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append(call.method)
            raise
        return Reply()

    async def work() -> None:
        async with pair(handler) as (_, channel):
            start = monotonic()
            with pytest.raises(DeadlineExceeded, match=rf"within {timeout:.3g} s") as caught:
                await channel.call("late", timeout=timeout)
            assert timeout - 0.05 < monotonic() - start < timeout + 5
            assert caught.value.timeout == timeout
            assert isinstance(caught.value, TimeoutError)
            assert left
            assert timeout / 2 < left[0] <= timeout
            await until(lambda: ended)
            assert ended == ["late"]

    run(work())


def test_server_bounds_a_call_that_names_no_deadline(pair: Pair) -> None:
    async def work() -> None:
        async with pair(sleeper, server=ServerConfig(call_timeout=0.1)) as (_, channel):
            with pytest.raises(DeadlineExceeded, match="time was over"):
                await channel.call("s", (), {"seconds": 20})

    run(work())


def test_cancelling_reaches_the_handler(pair: Pair) -> None:
    async def work() -> None:
        began, cancelled = asyncio.Event(), asyncio.Event()

        async def handler(call: transport.Call) -> Reply:
            began.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return Reply()

        async with pair({"h": handler, "echo": echo}) as (server, channel):
            task = asyncio.create_task(channel.call("h"))
            await began.wait()
            task.cancel()
            await cancelled.wait()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await channel.call("echo")).meta == {}
            assert all(not peer.running and not peer.connection.calls for peer in server.peers)

    run(work())


def test_cancelling_a_large_request_half_way_leaves_the_connection_whole(pair: Pair) -> None:
    async def work() -> None:
        async with pair(echo) as (server, channel):
            for size in (2 << 20, 32 << 20):
                future = channel.start("any", [np.zeros(size, np.uint8)])
                other = channel.start("any", [np.ones(2 << 20, np.uint8)])
                await asyncio.sleep(0)
                future.cancel()
                assert (await other).tensors[0].numpy().all()
            assert (await channel.call("any", (), {"a": 1})).meta == {"a": 1}
            assert all(not peer.connection.calls for peer in server.peers)

    run(work())


def test_drain_answers_what_is_in_flight_and_refuses_the_rest(pair: Pair) -> None:
    async def work() -> None:
        go_on = asyncio.Event()

        async def handler(call: transport.Call) -> Reply:
            await go_on.wait()
            return Reply((), {"went": "on"})

        async with pair(handler) as (server, channel):
            slow = channel.start("any")
            await until(lambda: running(server))
            draining = asyncio.create_task(server.drain(timeout=15))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="draining"):
                await channel.call("any")
            assert not draining.done()
            go_on.set()
            assert (await slow).meta == {"went": "on"}
            assert await draining

    run(work())


def test_drain_gives_up_in_time(pair: Pair) -> None:
    async def work() -> None:
        async with pair(sleeper) as (server, channel):
            slow = channel.start("s", (), {"seconds": 60})
            await until(lambda: running(server))
            assert not await server.drain(timeout=0.05)
            await server.close()
            with pytest.raises(ConnectionLost):
                await slow

    run(work())


def test_closing_the_channel_fails_its_calls_and_cancels_their_work(pair: Pair) -> None:
    async def work() -> None:
        async with pair(sleeper) as (server, channel):
            slow = channel.start("s", (), {"seconds": 60})
            await until(lambda: running(server))
            (task,) = running(server)
            await channel.close()
            with pytest.raises(ConnectionLost, match="closed"):
                await slow
            with pytest.raises(ConnectionLost, match="closed"):
                await channel.call("s")
            await asyncio.wait([task])
            assert task.cancelled()

    run(work())


def test_limits_of_the_server_are_kept_by_the_client(pair: Pair) -> None:
    limits = Limits(max_body=4096, max_tensors=2, max_rank=2, max_meta=100, max_calls=2, max_table=64)

    async def work() -> None:
        async with pair({"s": sleeper, "e": echo}, server=ServerConfig(limits=limits)) as (_, channel):
            for tensors, meta, name in (
                ([np.zeros(5000, np.uint8)], {}, "max_body"),
                ([np.zeros(1)] * 3, {}, "max_tensors"),
                ([np.zeros((1, 1, 1))], {}, "max_rank"),
                ([], {"a": "x" * 200}, "max_meta"),
            ):
                with pytest.raises(LimitExceeded) as caught:
                    await channel.call("e", tensors, meta)
                assert caught.value.limit_name == name
                assert caught.value.value > caught.value.limit == getattr(limits, name)
            with pytest.raises(LimitExceeded, match="max_table"):
                await channel.call("e" * 100)
            calls = [channel.start("s", (), {"seconds": 0.05}) for _ in range(2)]
            with pytest.raises(LimitExceeded, match="in flight"):
                channel.start("s", (), {"seconds": 0})
            await asyncio.gather(*calls)
            assert (await channel.call("e", [np.zeros(4096, np.uint8)])).tensors[0].nbytes == 4096

    run(work())


def test_what_the_server_cannot_send_fails_only_that_call(pair: Pair) -> None:
    async def work() -> None:
        def big(call: transport.Call) -> Reply:
            return Reply([np.zeros(1 << 16)])

        async with pair({"big": big, "echo": echo}, client=ClientConfig(limits=Limits(max_body=1024))) as (
            _,
            channel,
        ):
            with pytest.raises(RemoteError, match="max_body"):
                await channel.call("big")
            assert (await channel.call("echo", [np.arange(3)])).tensors[0].numpy().tolist() == [0, 1, 2]

    run(work())
