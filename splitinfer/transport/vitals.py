"""Whether the peer is still there, and fast enough. Time is counted in ticks: no clock.

A tick that comes late says that this side was busy, not that the peer was silent, so ticks are what is
counted and not seconds: what the peer sent meanwhile is read before the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from splitinfer.errors import ConnectionLost

if TYPE_CHECKING:
    from splitinfer.transport.protocol import Connection

__all__ = ["TICK_SECONDS", "Vitals"]

TICK_SECONDS: Final = 1.0

_PING_AFTER: Final = 1  # silent ticks
_LOST_AFTER: Final = 4
_HANDSHAKE_TICKS: Final = 10
_STALL_TICKS: Final = 10
_STALL_NBYTES: Final = 16 * 1024  # at least this much has to move in so many ticks: 13 kbit/s


class _Stall:
    """Finds a peer that moves too few bytes while some are due."""

    __slots__ = ("_mark", "_ticks")

    def __init__(self) -> None:
        self._mark = 0
        self._ticks = 0

    def found(self, due: bool, moved: int) -> bool:
        if not due or moved - self._mark >= _STALL_NBYTES:
            self._mark, self._ticks = moved, 0
        else:
            self._ticks += 1
        return self._ticks >= _STALL_TICKS


class Vitals:
    """One connection's."""

    __slots__ = ("_heard_nbytes", "_opening_ticks", "_reading", "_silent_ticks", "_writing")

    def __init__(self) -> None:
        self._heard_nbytes = 0
        self._silent_ticks = self._opening_ticks = 0
        self._reading, self._writing = _Stall(), _Stall()

    def tick(self, connection: Connection) -> None:
        """Pings a silent peer. Raises ConnectionLost for one that is gone or too slow."""
        inbox, outbox, peer = connection.inbox, connection.outbox, connection.peer
        # While choked a server does not listen; whether the peer is there shows in what it takes.
        heard = inbox.nbytes > self._heard_nbytes or connection.choked
        self._silent_ticks = 0 if heard else self._silent_ticks + 1
        self._heard_nbytes = inbox.nbytes
        if self._silent_ticks >= _LOST_AFTER:
            raise ConnectionLost(f"{peer} has been silent for {_LOST_AFTER} s", peer=peer)
        if self._silent_ticks == _PING_AFTER and connection.open:
            connection.ping()
        self._opening_ticks += not connection.open
        if self._opening_ticks >= _HANDSHAKE_TICKS:
            raise ConnectionLost(f"{peer} did not finish the handshake", peer=peer)
        if self._writing.found(outbox.nbytes > 0, outbox.sent_nbytes):
            raise ConnectionLost(f"{peer} reads too slowly", peer=peer)
        if self._reading.found(inbox.unfinished and not connection.choked, inbox.nbytes):
            raise ConnectionLost(f"{peer} sends too slowly", peer=peer)
