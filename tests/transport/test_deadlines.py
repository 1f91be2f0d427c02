"""On a loop and a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import cast

import pytest

from splitinfer.transport import deadlines as module
from splitinfer.transport.deadlines import Deadlines


class Loop:
    """Timers of one owner, who sets one at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.timers: list[Loop] = []
        self.due: Callable[[], None] | None = None
        self.at = inf
        monkeypatch.setattr(module, "monotonic", lambda: self.now)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Loop:
        assert self.due is None
        self.at, self.due = self.now + seconds, callback
        self.timers.append(self)
        return self

    def cancel(self) -> None:
        self.due = None

    def run(self, until: float) -> None:
        """Time passes; a timer comes a tenth of a millisecond early, as those of asyncio may."""
        while self.due is not None and self.at <= until:
            due, self.due = self.due, None
            self.now = self.at - 1e-4 if self.at - self.now > 1e-3 else self.at
            due()
        self.now = until


def sweeping(loop: Loop, answers: list[float]) -> tuple[Deadlines, list[float]]:
    """Deadlines whose sweeps answer so, and when they came."""
    swept: list[float] = []

    def sweep(now: float) -> float:
        swept.append(now)
        return answers.pop(0)

    return Deadlines(cast(asyncio.AbstractEventLoop, loop), sweep), swept


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(monkeypatch)


def test_the_sweep_comes_at_the_earliest_and_then_at_what_it_says(loop: Loop) -> None:
    deadlines, swept = sweeping(loop, [110.0, inf])
    for at in (120.0, 105.0, 130.0):
        deadlines.watch(at)
    assert deadlines.at == 105.0
    loop.run(104.0)
    assert swept == []
    loop.run(108.0)
    assert swept == pytest.approx([105.0])
    assert (swept[0] >= 105.0, deadlines.at) == (True, 110.0)
    loop.run(200.0)
    assert swept == pytest.approx([105.0, 110.0])
    assert deadlines.at == inf


def test_a_later_deadline_sets_no_timer(loop: Loop) -> None:
    deadlines, _ = sweeping(loop, [])
    for at in range(105, 120):
        deadlines.watch(at)
    assert len(loop.timers) == 1
    deadlines.close()
    assert deadlines.at == inf


def test_one_that_has_passed_is_swept_at_once(loop: Loop) -> None:
    deadlines, swept = sweeping(loop, [inf])
    deadlines.watch(90.0)
    loop.run(100.0)
    assert swept == [100.0]


def test_closed_means_no_sweep(loop: Loop) -> None:
    deadlines, swept = sweeping(loop, [])
    deadlines.watch(105.0)
    deadlines.close()
    loop.run(200.0)
    assert swept == []
