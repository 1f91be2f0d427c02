from __future__ import annotations

import asyncio

import pytest

from splitinfer import transport
from splitinfer.cli.transport_figures import IN_FLIGHT, LoadFigures, measure_transport
from splitinfer.node import ECHO_CALL, echo
from splitinfer.transport import ClientConfig
from splitinfer.transport.link import LinkSpec


def measure(link: LinkSpec | None = None) -> dict[str, LoadFigures]:
    async def work() -> list[LoadFigures]:
        async with (
            asyncio.timeout(60),
            await transport.serve({ECHO_CALL: echo}, "127.0.0.1:0") as server,
            await transport.connect(server.address, config=ClientConfig(link=link)) as channel,
        ):
            return await measure_transport(channel, seconds=0.1, timeout=30)

    return {figures.load: figures for figures in asyncio.run(work())}


def test_every_load_is_measured_and_adds_up() -> None:
    figures = measure()
    assert list(figures) == ["ping", "one row", "16 MiB", f"{IN_FLIGHT} rows at a time"]
    for load in figures.values():
        assert len(load.seconds) >= 10
        assert load.calls_per_second == pytest.approx(len(load.seconds) / load.elapsed)
        assert load.bytes_per_second == 2 * load.nbytes * load.calls_per_second
        record = load.to_json()
        assert 0 < record["round_trip_ms"]["p50"] <= record["round_trip_ms"]["p99"]
    row, many = figures["one row"], figures[f"{IN_FLIGHT} rows at a time"]
    assert row.elapsed >= sum(row.seconds)
    assert sum(many.seconds) > 5 * many.elapsed  # they wait side by side


def test_a_link_shows_in_every_load() -> None:
    figures = measure(LinkSpec(rtt=0.02))
    for load in ("ping", "one row"):
        assert 0.0198 < min(figures[load].seconds) < 0.035
    assert figures["one row"].calls_per_second < 51
