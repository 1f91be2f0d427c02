"""How far a step has come down the layers, so that the next step of the same sequence stays behind it."""

from __future__ import annotations

import asyncio

__all__ = ["Front"]


class Front:
    """One step's place in a row of steps that share a cache. Belongs to one event loop."""

    def __init__(self, ahead: Front | None = None) -> None:
        self._ahead = ahead
        self._left = -1  # the last layer whose keys and values are in the cache
        self._moved = asyncio.Event()

    async def enter(self, layer: int) -> None:
        """Wait until the step ahead has left the attention of `layer`."""
        while self._ahead is not None and self._ahead._left < layer:
            await self._ahead._moved.wait()

    def leave(self, layer: int) -> None:
        """Let the step behind enter `layer`."""
        self._left = layer
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
