"""A long prompt in chunks that follow each other down the layers.

Chunk n + 1 needs of chunk n only its keys and values, layer by layer: it may enter a layer as soon as chunk n
has left that layer's attention, and computes while the other's rows are with the experts. So the round trips
of a prompt are those of one chunk, not of all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence

import torch
from torch import Tensor

from splitinfer.model.cache import KVCache
from splitinfer.model.front import Front
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.timing import Timeline

__all__ = ["IN_FLIGHT", "PREFILL_ROWS", "prefill"]

PREFILL_ROWS = 512  # rows of one prefill step: bounds memory and the size of an expert call
IN_FLIGHT = 4  # chunks at a time: bounds memory, and what waits at the nodes before other sequences' rows


async def prefill(
    model: Gemma,
    ids: Sequence[int],
    cache: KVCache,
    *,
    rows: int,
    in_flight: int = IN_FLIGHT,
    timeline: Timeline | None = None,
) -> AsyncGenerator[Tensor, None]:
    """Run `ids` through the model in chunks of `rows`; yields each chunk's final hidden states [rows, H].

    At most `in_flight` chunks are under way at once. Where one fails, all are given up and none of those
    under way stays in the cache. Raises as `Gemma.forward` does.
    """
    under_way: deque[asyncio.Task[Tensor]] = deque()
    front: Front | None = None
    try:
        for start in range(0, len(ids), rows):
            segment = Segment(torch.tensor(ids[start : start + rows]), cache)
            front = Front(front)
            # Tasks begin in the order they are made, so the cache hands out positions in order.
            under_way.append(asyncio.create_task(model.forward([segment], timeline=timeline, front=front)))
            if len(under_way) == in_flight:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
