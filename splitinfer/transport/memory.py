"""`memory:name`: a connection inside one process, under the same contract as one to another machine.

It is a socket pair that has no address outside the process, so everything above it is the code that tcp runs,
and the two ends may live on event loops of different threads.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from splitinfer.errors import CapacityError, ConnectError

__all__ = ["dial", "listen", "unlisten"]

_servers: dict[str, tuple[asyncio.AbstractEventLoop, Callable[[socket.socket], None]]] = {}


def listen(name: str, accept: Callable[[socket.socket], None]) -> None:
    """`accept` gets the server's end of each new pair, on the running loop. Raises CapacityError if taken."""
    if _servers.setdefault(name, (asyncio.get_running_loop(), accept))[1] is not accept:
        raise CapacityError(f"cannot listen on memory:{name}: address in use", remedy="Choose another name.")


def unlisten(name: str) -> None:
    _servers.pop(name, None)


def dial(name: str) -> socket.socket:
    """The client's end of a new pair. Raises ConnectError where nobody listens under that name."""
    loop, accept = _servers.get(name, (None, None))
    if loop is None or accept is None or loop.is_closed():
        raise ConnectError(
            f"memory:{name}: nobody listens",
            peer=f"memory:{name}",
            remedy="Serve that name in this process first.",
        )
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    loop.call_soon_threadsafe(accept, theirs)
    return ours
