"""What one session does for all of its calls."""

from __future__ import annotations

import asyncio

import numpy as np

from splitinfer import transport
from splitinfer.errors import ConnectionLost


def test_a_caller_may_close_the_channel_while_other_answers_of_the_same_read_wait() -> None:
    async def work() -> None:
        async with (
            await transport.serve(lambda call: transport.Reply(call.tensors), "memory:close") as server,
            await transport.connect(server.address) as channel,
        ):

            async def closer() -> None:
                await channel.call("any", [np.arange(3)])
                await channel.close()

            others = (channel.call("any", [np.arange(3)]) for _ in range(3))
            results = await asyncio.gather(closer(), *others, return_exceptions=True)
            assert [type(result) for result in results] == [type(None), *[ConnectionLost] * 3]

    asyncio.run(asyncio.wait_for(work(), 20))
