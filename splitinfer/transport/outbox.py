"""Messages out, as pieces of memory in the order in which they go to the kernel. No I/O, no clock.

A tensor is never copied: its owner's memoryview is handed out as it is, unless the whole body is so small
that one buffer is cheaper than several (`JOIN_NBYTES`). A body above CHUNK_NBYTES waits aside and goes out
piece by piece when nothing else is waiting, so a small message is never behind more than one piece of a
large one. Messages of one id never overtake each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, TypeAlias

from splitinfer.transport.frames import CHUNK_NBYTES, DATA, pack_frame

__all__ = ["JOIN_NBYTES", "Outbox", "Piece"]

Piece: TypeAlias = "bytes | memoryview"

# Below this one copy costs less than a longer list of pieces to the kernel (about 0.1 µs each).
JOIN_NBYTES: Final = 16 * 1024


_Waiting: TypeAlias = "deque[tuple[bytes, Sequence[Piece], int]]"


class _Bulk:
    """A large body under way: its first frame's head until that has gone, the rest of it, what follows it."""

    __slots__ = ("head", "id", "left", "pieces", "then")

    def __init__(self, id: int, head: bytes, pieces: Sequence[Piece], left: int) -> None:
        self.id = id
        self.head = head
        self.pieces = deque(pieces)
        self.left = left
        self.then: _Waiting = deque()

    def take(self, nbytes: int) -> list[Piece]:
        """The next `nbytes` bytes of the body."""
        self.left -= nbytes
        taken: list[Piece] = []
        while nbytes:
            piece = self.pieces.popleft()
            if len(piece) > nbytes:
                view = memoryview(piece)
                self.pieces.appendleft(view[nbytes:])
                piece = view[:nbytes]
            taken.append(piece)
            nbytes -= len(piece)
        return taken


class Outbox:
    """One connection's outgoing half. `nbytes` bytes wait in all, `sent_nbytes` have gone so far."""

    __slots__ = ("_bulk", "_bulk_by_id", "_pieces", "nbytes", "sent_nbytes")

    def __init__(self) -> None:
        self.nbytes = 0
        self.sent_nbytes = 0
        self._pieces: list[Piece] = []
        self._bulk: deque[_Bulk] = deque()
        self._bulk_by_id: dict[int, _Bulk] = {}

    def add(self, id: int, head: bytes, body: Sequence[Piece] = (), body_nbytes: int = 0) -> None:
        """Queue one message: `head` is its first frame up to the body, of which that frame carries the first
        CHUNK_NBYTES bytes at most.
        """
        self.nbytes += len(head) + body_nbytes
        if self._bulk_by_id and id in self._bulk_by_id:
            self._bulk_by_id[id].then.append((head, body, body_nbytes))
        else:
            self._add(id, head, body, body_nbytes)

    def _add(self, id: int, head: bytes, body: Sequence[Piece], body_nbytes: int) -> None:
        if body_nbytes > CHUNK_NBYTES:
            bulk = self._bulk_by_id[id] = _Bulk(id, head, body, body_nbytes)
            self._bulk.append(bulk)
        elif body_nbytes <= JOIN_NBYTES:
            self._pieces.append(b"".join((head, *body)) if body else head)
        else:
            self._pieces.append(head)
            self._pieces += body

    def pieces(self) -> list[Piece]:
        """What to hand to the kernel next, in order; empty where nothing waits. Say `sent` afterwards."""
        if not self._pieces and self._bulk:
            self._take_chunk()
        return self._pieces

    def sent(self, nbytes: int) -> None:
        """The kernel took the first `nbytes` bytes of `pieces()`."""
        self.sent_nbytes += nbytes
        self.nbytes -= nbytes
        pieces = self._pieces
        if not self.nbytes:
            pieces.clear()
            return
        whole = 0
        # Empty pieces go with what is before them: one left alone would never count as sent.
        while whole < len(pieces) and nbytes >= len(pieces[whole]):
            nbytes -= len(pieces[whole])
            whole += 1
        del pieces[:whole]
        if nbytes:
            pieces[0] = memoryview(pieces[0])[nbytes:]

    def drop(self, id: int) -> bool | None:
        """Forget what has not gone yet of a large body, and what was to follow it.

        True where none of it has gone, so that the peer knows nothing of it; None where there was none.
        """
        bulk = self._bulk_by_id.pop(id, None)
        if bulk is None:
            return None
        self._bulk.remove(bulk)
        self.nbytes -= bulk.left + len(bulk.head) + sum(len(head) + n for head, _, n in bulk.then)
        return bool(bulk.head)

    def _take_chunk(self) -> None:
        """Move one piece of the large body whose turn it is to where the kernel takes it from."""
        bulk = self._bulk.popleft()
        nbytes = min(bulk.left, CHUNK_NBYTES)
        if bulk.head:
            self._pieces.append(bulk.head)
            bulk.head = b""
        else:
            head = pack_frame(DATA, bulk.id, body_nbytes=nbytes)
            self._pieces.append(head)
            self.nbytes += len(head)
        self._pieces += bulk.take(nbytes)
        if bulk.left:
            self._bulk.append(bulk)
            return
        del self._bulk_by_id[bulk.id]
        while bulk.then:
            self._add(bulk.id, *bulk.then.popleft())
            follower = self._bulk_by_id.get(bulk.id)
            if follower is not None:
                follower.then = bulk.then
                return
