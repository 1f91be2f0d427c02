"""Busy polling: where the next bytes are due within microseconds, look for them and do not sleep.

A process that sleeps in `epoll` has to be woken, which costs 5 to 50 µs at each end of a round trip: often
more than everything else about a small call. Instead the loop is kept turning for a moment after each send,
and serves whatever else is ready meanwhile.

Whether the next wait will be short is foretold as processors foretell branches (J. E. Smith, "A study of
branch prediction strategies", 1981): a counter of two bits that short waits raise and long ones lower, so
that one wait out of the ordinary changes nothing. And polling ends where somebody else wants the core: every
few turns the core is offered, and a taker means that polling is given up for a while.
"""

from __future__ import annotations

import asyncio
import os
from contextvars import Context
from time import monotonic
from typing import Final

__all__ = ["Polling"]

# What waking up adds to a wait while both ends sleep, at most: polled, it would be shorter by that.
_WAKING_SECONDS: Final = 200e-6
_POLL_FROM: Final = 2  # of 0 to 3
_MOST: Final = 3
_TURNS_PER_OFFER: Final = 8
# An offer of the core that nobody takes lasts a microsecond or two, with a timer's interrupt up to 100.
_TAKEN_SECONDS: Final = 30e-6
# So many times as long as takers keep the core there is no polling: at most 2 % of the time is lost to them.
_REST_FACTOR: Final = 50
# Rest that may be owed before any is taken: a taker of 5 ms, say, that does not come back within this time.
_CREDIT_SECONDS: Final = 0.25

_offer_core: Final = getattr(os, "sched_yield", lambda: None)


class Polling:
    """One connection's. `limit` is the longest that is ever polled for, in seconds; 0 is never."""

    __slots__ = (
        "_context",
        "_limit",
        "_loop",
        "_rest_until",
        "_short",
        "_since",
        "_turning",
        "_turns",
        "_until",
        "_worth",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: float) -> None:
        self._loop = loop
        self._limit = limit
        self._worth = limit + _WAKING_SECONDS if limit else 0.0  # a wait that would be short if polled
        self._short = 0  # the counter
        self._since = 0.0  # when the present wait began, 0 where there is none
        self._until = 0.0  # how long it is polled for, 0 where it is not
        self._rest_until = 0.0
        self._turning = False
        self._turns = 0
        self._context = Context()

    def begin(self) -> None:
        """Something was sent: an answer to it may come at any moment."""
        self._since = now = monotonic()
        if self._short >= _POLL_FROM and now > self._rest_until:
            self._until = now + self._limit
            if not self._turning:
                self._turning = True
                self._loop.call_soon(self._turn, context=self._context)
        else:
            self._until = 0.0

    def came(self) -> None:
        """Something was received."""
        if self._since:
            # While the loop still turns the wait was short: no look at the clock.
            if self._turning or monotonic() - self._since <= (self._limit if self._until else self._worth):
                if self._short < _MOST:
                    self._short += 1
            elif self._short:
                self._short -= 1
            self._since = 0.0

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
                self._rest_until = max(self._rest_until, now - _CREDIT_SECONDS) + _REST_FACTOR * taken
                if now < self._rest_until:
                    self._turning = False
                    return
        self._loop.call_soon(self._turn, context=self._context)
