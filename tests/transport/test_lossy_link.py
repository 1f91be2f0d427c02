"""Calls over links that stall, reset or deliver single bytes: each ends in an answer or a LinkError."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.errors import ConnectionLost, LinkError
from splitinfer.transport import ClientConfig
from splitinfer.transport.frames import CHUNK_NBYTES
from splitinfer.transport.link import LinkSpec
from tests.patience import run

ROW = np.arange(2816, dtype=np.uint16)
LARGE = np.random.default_rng(0).integers(0, 256, 3 * CHUNK_NBYTES + 5, dtype=np.uint8)


def echo(call: transport.Call) -> list[Any]:
    return list(call.tensors)


@contextlib.asynccontextmanager
async def over(spec: LinkSpec, **settings: Any) -> AsyncIterator[tuple[transport.Channel, transport.Channel]]:
    """Channels to one server: over the link, and without it."""
    async with (
        await transport.serve(echo, "127.0.0.1:0") as server,
        await transport.connect(server.address) as direct,
        await transport.connect(server.address, config=ClientConfig(link=spec, **settings)) as channel,
    ):
        yield channel, direct


async def holds(channel: transport.Channel, array: Any) -> None:
    reply = await channel.call("echo", [array], timeout=10)
    assert np.array_equal(reply.tensors[0].numpy(), array)


def test_a_reset_fails_the_calls_in_flight_and_the_next_call_connects_again() -> None:
    async def work() -> None:
        async with over(LinkSpec(reset_after=20_000)) as (channel, direct):
            lost = 0
            for _ in range(12):
                calls = [channel.start("echo", [ROW], timeout=10) for _ in range(2)]
                for outcome in await asyncio.gather(*calls, return_exceptions=True):
                    lost += isinstance(outcome, ConnectionLost)
                    assert isinstance(outcome, (transport.Reply, ConnectionLost))
                await holds(direct, ROW)
            assert lost >= 2
            assert channel.stats.connects >= 3

    run(work())


@pytest.mark.parametrize("after", [700, 1000, 6_000, 100_000, CHUNK_NBYTES + 700, 2 * CHUNK_NBYTES + 1000])
def test_a_reset_anywhere_in_a_message_is_a_lost_connection(after: int) -> None:
    async def work() -> None:
        async with over(LinkSpec(reset_after=after), compression="off") as (channel, direct):
            with pytest.raises(ConnectionLost):
                await channel.call("echo", [LARGE], timeout=10)
            await holds(direct, LARGE)

    run(work())


@pytest.mark.parametrize("after", [1, 31, 64, 200, 310])
def test_a_reset_within_the_handshake_is_a_link_error(after: int) -> None:
    async def work() -> None:
        with pytest.raises(LinkError):
            async with over(LinkSpec(reset_after=after), reconnect_timeout=0.0):
                pass

    run(work())


def test_single_bytes_make_whole_messages() -> None:
    async def work() -> None:
        async with over(LinkSpec(slice_nbytes=1), compression="off") as (channel, _):
            for array in (np.arange(5), np.zeros((0, 3)), np.array(True)):
                await holds(channel, array)

    run(work())


@pytest.mark.parametrize("nbytes", [63, 1000, 4097])
def test_slices_of_any_size_make_whole_messages(nbytes: int) -> None:
    async def work() -> None:
        async with over(LinkSpec(slice_nbytes=nbytes), compression="off") as (channel, _):
            await holds(channel, ROW)
            if nbytes > 4096:
                await holds(channel, LARGE)

    run(work())


def test_a_short_stall_delays_and_loses_nothing() -> None:
    async def work() -> None:
        async with over(LinkSpec(stall_after=4_000, stall_for=0.3)) as (channel, _):
            start = monotonic()
            await holds(channel, ROW)
            assert monotonic() - start > 0.55  # once each way
            assert channel.stats.connects == 1

    run(work())


def test_a_link_that_goes_silent_is_found_within_five_seconds_or_so() -> None:
    """The connection stays open as far as TCP can tell; only the missing PONGs show it."""

    async def work() -> None:
        async with over(LinkSpec(stall_after=4_000, stall_for=60.0), reconnect_timeout=0.0) as (
            channel,
            direct,
        ):
            start = monotonic()
            with pytest.raises(ConnectionLost):
                await channel.call("echo", [ROW], timeout=18)
            assert 2 < monotonic() - start < 12  # ticks, which a busy machine stretches, are counted
            await holds(direct, ROW)

    run(work())


def test_many_calls_over_a_slow_and_jittery_link() -> None:
    async def work() -> None:
        async with over(LinkSpec(rtt=0.01, jitter=0.008, bandwidth=50e6)) as (channel, _):
            rows = [np.full(700, number, np.float32) for number in range(40)]
            replies = await asyncio.gather(*(channel.call("echo", [row], timeout=10) for row in rows))
            for row, reply in zip(rows, replies, strict=True):
                assert np.array_equal(reply.tensors[0].numpy(), row)

    run(work())


def test_the_round_trip_over_the_link_is_what_was_asked_for() -> None:
    async def work() -> None:
        async with over(LinkSpec(rtt=0.02)) as (channel, direct):
            assert 0.0198 < min([await channel.ping() for _ in range(20)]) < 0.035
            assert min([await direct.ping() for _ in range(20)]) < 0.0198

    run(work())
