"""One timer for all deadlines of a connection.

Calls mostly carry the same timeout, so a new deadline is nearly always later than those before it, and taking
note of it is one comparison; the timer's owner looks through its calls when the earliest one is due.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from time import monotonic

__all__ = ["Deadlines"]


class Deadlines:
    """Calls `sweep(now)` when the earliest deadline has come; it answers with the next one, or inf.

    Times are of the monotonic clock, in seconds.
    """

    __slots__ = ("_loop", "_sweep", "_timer", "at")

    def __init__(self, loop: asyncio.AbstractEventLoop, sweep: Callable[[float], float]) -> None:
        self._loop = loop
        self._sweep = sweep
        self._timer: asyncio.TimerHandle | None = None
        self.at = inf

    def watch(self, deadline: float) -> None:
        """See that the sweep comes at `deadline` at the latest."""
        if deadline < self.at:
            self._arm(deadline)

    def close(self) -> None:
        self.at = inf
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, deadline: float) -> None:
        self.close()
        if deadline < inf:
            self.at = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - monotonic()), self._due)

    def _due(self) -> None:
        now = monotonic()
        if now < self.at:  # the loop's clock and ours may differ by a millisecond
            self._arm(self.at)
        else:
            self.at = inf
            self._arm(self._sweep(now))
