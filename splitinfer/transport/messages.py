"""What goes to and fro: the Reply of a handler, and the Message that everything off the wire is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitinfer.transport.parcel import Parcel

__all__ = ["Call", "Message", "Reply"]


@dataclass(slots=True)
class Reply:
    """An answer: tensors, and a map of plain values beside them. Received ones hold `Tensor`s."""

    tensors: Sequence[Any] = ()
    meta: dict[str, Any] = field(default_factory=dict)


class Message(Reply):
    """One message off the wire, whole. A REPLY is handed to its caller as it is.

    `caller` is whose call a client's message answers. `value` is the head's: milliseconds left, or credit.
    `nbytes` is the memory that its tensors take, with padding. `admitted` was decided before its body came,
    if it has one of its own; where that was not wanted it has been skipped. `packed_meta` is kept of
    handshake frames only, because the proofs cover it byte by byte.
    """

    caller: Any
    packed_meta: bytes
    __slots__ = ("admitted", "caller", "id", "kind", "method", "nbytes", "packed_meta", "value")

    def __init__(
        self,
        kind: int,
        id: int,
        value: int,
        meta: dict[str, Any],
        tensors: Sequence[Any],
        method: str,
        nbytes: int,
    ) -> None:
        self.kind = kind
        self.id = id
        self.value = value
        self.meta = meta
        self.method = method
        self.nbytes = nbytes
        self.tensors = tensors
        self.admitted: bool | None = None

    def __repr__(self) -> str:
        return f"Reply({list(self.tensors)}, {self.meta})"


class Call(Message):
    """One call, as its handler sees it: `method`, `meta`, `tensors`, and who asks.

    `deadline` is in seconds of the monotonic clock.
    """

    __slots__ = ("deadline", "peer", "stamps")
    deadline: float
    peer: str
    stamps: Callable[[int, Parcel], int | None]

    def time_left(self) -> float:
        """Seconds until the caller has no more use for an answer; never negative."""
        return max(0.0, self.deadline - monotonic())

    def stamp(self, parcel: Parcel) -> int | None:
        """Make a parcel the answer: fill it then, without awaiting anything, and answer with `Posted`.

        Returns the descriptor to which it may be written before that, -1 where it may not; None where nothing
        can be made of it, and an ordinary `Reply` is needed.
        """
        return self.stamps(self.id, parcel)

    def __repr__(self) -> str:
        return f"Call({self.method!r}, {list(self.tensors)}, {self.meta})"
