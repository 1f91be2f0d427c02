"""Busy polling on a clock of the test's own: when it starts, how long it lasts, what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.transport import polling
from splitinfer.transport.polling import Polling

LIMIT = 200e-6
TURN = 3e-6  # what one turn of the loop takes here


class World:
    """A loop and a clock: a turn takes `TURN`, an offer of the core `offer_takes`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: float = LIMIT) -> None:
        self.now = 1.0
        self.offers = 0
        self.offer_takes = 1e-6
        self.ready: list[Callable[[], None]] = []
        monkeypatch.setattr(polling, "monotonic", lambda: self.now)
        monkeypatch.setattr(polling, "_offer_core", self._offer)
        self.polling = Polling(cast(asyncio.AbstractEventLoop, self), limit)

    def call_soon(self, callback: Callable[[], None], **_: Any) -> None:
        self.ready.append(callback)

    def _offer(self) -> None:
        self.offers += 1
        self.now += self.offer_takes

    def wait(self, seconds: float) -> int:
        """Something is sent and its answer comes so much later: how many turns the loop made meanwhile."""
        self.polling.begin()
        end, turns = self.now + seconds, 0
        while self.ready and self.now < end:
            self.ready.pop()()
            self.now += TURN
            turns += 1
        self.now = max(self.now, end)
        self.polling.came()
        while self.ready:
            self.ready.pop()()
        return turns


def polling_world(monkeypatch: pytest.MonkeyPatch) -> World:
    """One whose waits have been short for long."""
    world = World(monkeypatch)
    for _ in range(5):
        world.wait(40e-6)
    return world


def test_polls_where_waits_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    assert world.wait(40e-6) == world.wait(40e-6) == 0  # these show how long waits are
    for seconds in (40e-6, 150e-6, 40e-6):
        assert world.wait(seconds) * TURN == pytest.approx(seconds, abs=4 * TURN)


def test_waits_that_are_long_for_waking_up_only_are_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    for _ in range(2):
        assert world.wait(LIMIT + 100e-6) == 0
    assert world.wait(100e-6) > 0


def test_one_long_wait_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = polling_world(monkeypatch)
    for _ in range(5):
        assert world.wait(1e-3) > 0
        assert world.wait(40e-6) > 0


def test_long_waits_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = polling_world(monkeypatch)
    assert [world.wait(1e-3) > 0 for _ in range(4)] == [True, True, False, False]
    assert world.wait(40e-6) == world.wait(40e-6) == 0
    assert world.wait(40e-6) > 0


@pytest.mark.parametrize("limit", [0.0, 30e-6])
def test_never_polls_for_longer_than_the_limit(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    world = World(monkeypatch, limit)
    for _ in range(5):
        assert world.wait(25e-6) * TURN <= limit
        assert world.wait(80e-6) * TURN <= limit + 2 * TURN


def test_a_core_that_others_want_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    world = polling_world(monkeypatch)
    world.offer_takes = 3e-3
    start, offers = world.now, world.offers
    while world.now < start + 10:
        world.wait(100e-6)
    lost = (world.offers - offers) * world.offer_takes
    assert 0.01 < lost / (world.now - start) <= 0.021
    world.offer_takes = 1e-6
    world.now += 0.2  # the last rest
    for _ in range(3):
        world.wait(40e-6)
    assert world.wait(100e-6) > 0


@pytest.mark.parametrize(("takes", "every"), [(100e-6, 0.01), (2e-3, 0.15)])
def test_interrupts_and_a_taker_now_and_then_change_nothing(
    monkeypatch: pytest.MonkeyPatch, takes: float, every: float
) -> None:
    world = polling_world(monkeypatch)
    for _ in range(20):
        world.now += every
        world.offer_takes, offers = takes, world.offers
        world.wait(100e-6)
        assert world.offers > offers
        world.offer_takes = 1e-6
        assert world.wait(100e-6) > 0


def test_what_is_not_awaited_is_not_polled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world = polling_world(monkeypatch)
    world.polling.came()
    assert not world.ready


def test_calls_poll_at_both_ends_and_the_loop_goes_on_with_other_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[Polling] = []
    turn = Polling._turn

    def counting(self: Polling) -> None:
        turns.append(self)
        turn(self)

    monkeypatch.setattr(Polling, "_turn", counting)
    monkeypatch.setattr(polling, "_offer_core", lambda: None)
    # However slow this machine: waits of seconds count as short.
    settings = {"busy_poll": 5.0}

    async def work() -> int:
        beside = 0

        async def other_work() -> None:
            nonlocal beside
            while True:
                await asyncio.sleep(0)
                beside += 1

        async with (
            await transport.serve(
                lambda call: transport.Reply(call.tensors),
                "127.0.0.1:0",
                config=transport.ServerConfig(**settings),
            ) as server,
            await transport.connect(server.address, config=transport.ClientConfig(**settings)) as channel,
        ):
            task = asyncio.create_task(other_work())
            for _ in range(10):
                await channel.call("any", [np.zeros(10)], timeout=30)
            task.cancel()
        count = len(turns)
        await asyncio.sleep(0.01)
        assert len(turns) <= count + 2  # nobody looks for answers on a connection that is closed
        return beside

    assert asyncio.run(work()) > 0
    assert len(set(turns)) == 2
