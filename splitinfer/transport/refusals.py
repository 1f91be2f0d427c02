"""What one end of a connection says to a call, an answer or a frame that it does not take."""

from __future__ import annotations

from splitinfer.errors import LimitExceeded, Overloaded, RemoteError, RemoteProtocolError, TransportError

__all__ = ["cancelled", "misplaced", "no_room_here", "no_room_there", "unasked"]


def no_room_here(draining: bool, max_calls: int, calls: int, held_nbytes: int) -> Overloaded:
    """A server's answer to a call for which it has no room."""
    if draining:
        why = "the node is draining"
    elif calls >= max_calls:
        why = f"{max_calls} calls are in flight on this connection"
    else:
        why = f"calls in flight on this connection hold {held_nbytes:,} bytes"
    return Overloaded(why, remedy="Try again later, or another node.")


def no_room_there(draining: bool, max_calls: int, peer: str) -> TransportError:
    """A client does not send the call for which the server would have no room."""
    if draining:
        return Overloaded(f"{peer} is draining", peer=peer, remedy="Use another node.")
    return LimitExceeded(
        f"{max_calls} calls are in flight to {peer}",
        limit_name="max_calls",
        value=max_calls + 1,
        limit=max_calls,
        peer=peer,
        remedy="Wait for answers before making more calls.",
    )


def cancelled() -> RemoteError:
    """The answer to a call whose caller has no more use for it."""
    return RemoteError("the call was cancelled", code="cancelled")


def unasked(peer: str) -> RemoteProtocolError:
    """An answer has come for which no call waits."""
    return RemoteProtocolError("an answer to a call that was not made", peer=peer)


def misplaced(kind: int, peer: str) -> RemoteProtocolError:
    """A frame has come that this end takes from nobody, or not now."""
    return RemoteProtocolError(f"a frame of kind {kind} has no place here", peer=peer)
