"""Who waits for a call, and when he goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.transport.calls import SingleCall


def test_a_task_that_waits_alone_goes_on_at_once() -> None:
    async def work() -> None:
        call = SingleCall(loop=asyncio.get_running_loop())
        steps: list[str] = []

        async def caller() -> None:
            reply = await call
            steps.append(reply.meta["step"])

        task = asyncio.create_task(caller())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(call.answer, transport.Reply(meta={"step": "reply"}))
        asyncio.get_running_loop().call_soon(steps.append, "after")
        await task
        assert steps == ["reply", "after"]

    asyncio.run(work())


def test_a_task_that_looks_for_answers_does_not_enter_another() -> None:
    async def work() -> None:
        async def handler(call: transport.Call) -> transport.Reply:
            return transport.Reply(meta=call.meta)

        async with await transport.serve(handler, "127.0.0.1:0") as server:
            channel = await transport.connect(server.address)
            steps: list[str] = []
            call = channel.start("m", (), {"name": "other"})

            async def caller() -> None:
                steps.append((await call).meta["name"])

            task = asyncio.create_task(caller())
            await asyncio.sleep(0)
            assert channel._session is not None
            channel._session.looking = True
            asyncio.get_running_loop().call_soon(steps.append, "turn")
            assert isinstance(call, SingleCall)
            call.answer(transport.Reply(meta={"name": "other"}))
            assert not steps
            channel._session.looking = False
            await task
            assert steps == ["turn", "other"]
            await channel.close()
            channel.look()

    asyncio.run(work())


def test_others_who_wait_too_come_in_their_order() -> None:
    async def work() -> None:
        call = SingleCall(loop=asyncio.get_running_loop())
        steps: list[str] = []

        async def caller(name: str) -> None:
            await call
            steps.append(name)

        call.add_done_callback(lambda _: steps.append("callback"))
        tasks = [asyncio.create_task(caller(name)) for name in ("one", "two")]
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(call.answer, transport.Reply())
        await asyncio.gather(*tasks)
        assert steps == ["callback", "one", "two"]

    asyncio.run(work())


def test_it_goes_on_in_its_own_context() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="elsewhere")

    async def work() -> None:
        call = SingleCall(loop=asyncio.get_running_loop())

        async def caller() -> str:
            variable.set("mine")
            await call
            assert asyncio.current_task() is task
            return variable.get()

        task = asyncio.create_task(caller())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(call.answer, transport.Reply())
        assert await task == "mine"
        assert variable.get() == "elsewhere"

    asyncio.run(work())


@pytest.mark.parametrize(
    "wait",
    [
        lambda call: call,
        lambda call: asyncio.wait_for(call, 10),
        asyncio.shield,
        lambda call: asyncio.gather(call),
        lambda call: asyncio.wait([call]),
    ],
    ids=["await", "wait_for", "shield", "gather", "wait"],
)
def test_a_call_is_a_future_like_any_other(wait: Callable[[asyncio.Future[Any]], Awaitable[Any]]) -> None:
    async def work() -> None:
        async with (
            await transport.serve(lambda call: transport.Reply(call.tensors), "memory:session") as server,
            await transport.connect(server.address) as channel,
        ):
            call = channel.start("any", [np.arange(3)])
            await wait(call)
            assert call.result().tensors[0].numpy().tolist() == [0, 1, 2]

    asyncio.run(asyncio.wait_for(work(), 20))
