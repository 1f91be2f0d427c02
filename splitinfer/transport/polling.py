"""Busy polling: where the next bytes are due within microseconds, look for them and do not sleep.

A process that sleeps in `epoll` has to be woken, which costs 5 to 50 µs at each end of a round trip: often
more than everything else about a small call. Instead the loop is kept turning for a moment after each send,
and serves whatever else is ready meanwhile.

The moment adapts, as the halt polling of Linux's KVM does (Documentation/virt/kvm/halt-polling.rst): it grows
while waits are shorter than the limit, and is nothing as soon as one is longer, because then sleeping costs
little in comparison and the cores may be needed for what is waited for. And it ends where somebody else wants
the core: every few turns the core is offered, and a taker means that polling is given up for a while.
"""

from __future__ import annotations

import asyncio
import os
from contextvars import Context
from time import monotonic
from typing import Final

__all__ = ["Polling"]

_FIRST_SECONDS: Final = 50e-6
_TURNS_PER_OFFER: Final = 8
# An offer of the core that nobody takes lasts a microsecond or two.
_TAKEN_SECONDS: Final = 30e-6
# So many times as long as the taker kept it there is no polling: at most 2 % of the time is lost to takers.
_REST_FACTOR: Final = 50

_offer_core: Final = getattr(os, "sched_yield", lambda: None)


class Polling:
    """One connection's. `limit` is the longest that is ever polled for, in seconds; 0 is never."""

    __slots__ = (
        "_context",
        "_limit",
        "_loop",
        "_rest_until",
        "_since",
        "_turning",
        "_turns",
        "_until",
        "_window",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: float) -> None:
        self._loop = loop
        self._limit = limit
        self._window = 0.0  # for how long the next wait is polled
        self._since = 0.0  # when the present wait began, 0 where there is none
        self._until = 0.0
        self._rest_until = 0.0
        self._turning = False
        self._turns = 0
        self._context = Context()

    def begin(self) -> None:
        """Something was sent: an answer to it may come at any moment."""
        self._since = now = monotonic()
        if self._window:
            self._until = now + self._window
            if not self._turning:
                self._turning = True
                self._loop.call_soon(self._turn, context=self._context)

    def came(self) -> None:
        """Something was received."""
        if self._since:
            now = monotonic()
            waited, self._since = now - self._since, 0.0
            if waited > self._limit:
                self._window = 0.0
            elif waited > self._window and now > self._rest_until:
                self._window = min(self._limit, max(2 * self._window, _FIRST_SECONDS))

    def _turn(self) -> None:
        """One more turn of the loop, unless the wait is over or has lasted long enough."""
        if not self._since or (now := monotonic()) > self._until:
            self._turning = False
            return
        self._turns += 1
        if not self._turns % _TURNS_PER_OFFER:
            _offer_core()
            taken = monotonic() - now
            if taken > _TAKEN_SECONDS:
                self._turning = False
                self._window, self._rest_until = 0.0, now + _REST_FACTOR * taken
                return
        self._loop.call_soon(self._turn, context=self._context)
