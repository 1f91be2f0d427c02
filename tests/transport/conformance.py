"""What the parts of the conformance suite share: handlers, and what a server is busy with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from splitinfer import transport
from splitinfer.transport import Reply

__all__ = ["Pair", "echo", "running", "sleeper"]

Pair = Callable[..., contextlib.AbstractAsyncContextManager[tuple[transport.Server, transport.Channel]]]


def echo(call: transport.Call) -> Reply:
    return Reply(call.tensors, call.meta)


def running(server: transport.Server) -> list[asyncio.Future[Any]]:
    """What the server does for its clients at the moment."""
    return [entry.task for peer in server.peers for entry in peer.running.values() if entry.task is not None]


async def sleeper(call: transport.Call) -> Reply:
    await asyncio.sleep(call.meta["seconds"])
    return Reply(call.tensors, {"slept": call.meta["seconds"]})
