from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest

from splitinfer.transport import eager


def test_what_need_not_wait_is_done_at_once_and_without_a_task() -> None:
    async def answer() -> int:
        return 7

    async def work() -> None:
        before = asyncio.all_tasks()
        assert eager.start(answer(), asyncio.get_running_loop()) == 7
        assert asyncio.all_tasks() == before

    asyncio.run(work())


def test_what_it_raises_at_once_is_raised_at_once() -> None:
    async def fail() -> None:
        raise KeyError("at once")

    async def work() -> None:
        with pytest.raises(KeyError):
            eager.start(fail(), asyncio.get_running_loop())

    asyncio.run(work())


def test_what_waits_goes_on_as_a_task() -> None:
    steps: list[str] = []

    async def slow(event: asyncio.Event) -> str:
        steps.append("first")
        await event.wait()
        steps.append("second")
        await asyncio.sleep(0)
        return "done"

    async def work() -> None:
        event = asyncio.Event()
        task = eager.start(slow(event), asyncio.get_running_loop())
        assert steps == ["first"]
        assert isinstance(task, asyncio.Task)
        event.set()
        assert await task == "done"
        assert steps == ["first", "second"]

    asyncio.run(work())


def test_an_exception_after_waiting() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("later")

    async def work() -> None:
        task: Any = eager.start(fail(), asyncio.get_running_loop())
        with pytest.raises(KeyError):
            await task

    asyncio.run(work())


@pytest.mark.parametrize("pause", [0, 0.02])
def test_cancelling_reaches_the_coroutine(pause: float) -> None:
    """Before the task had its own first step, too."""
    cleaned: list[bool] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            cleaned.append(True)
            raise

    async def work() -> None:
        task: Any = eager.start(slow(), asyncio.get_running_loop())
        if pause:
            await asyncio.sleep(pause)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned == [True]

    asyncio.run(work())


def test_a_timeout_set_in_the_first_step_works() -> None:
    async def slow() -> str:
        try:
            async with asyncio.timeout(0.02):
                await asyncio.sleep(10)
        except TimeoutError:
            return "late"
        return "in time"

    async def work() -> None:
        task: Any = eager.start(slow(), asyncio.get_running_loop())
        assert await task == "late"
        assert not task.cancelling()

    asyncio.run(work())


def test_a_group_of_tasks_made_in_the_first_step_works() -> None:
    async def part(number: int) -> int:
        await asyncio.sleep(0.001 * number)
        return number

    async def whole() -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part(number)) for number in range(3)]
        return [task.result() for task in tasks]

    async def failing() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(10))
            await asyncio.sleep(0.001)
            raise ValueError("in the group")

    async def work() -> None:
        loop = asyncio.get_running_loop()
        task: Any = eager.start(whole(), loop)
        assert await task == [0, 1, 2]
        task = eager.start(failing(), loop)
        with pytest.raises(ExceptionGroup):
            await task

    asyncio.run(work())


def test_the_callers_own_task_is_current_again_afterwards() -> None:
    seen: list[Any] = []

    async def look() -> None:
        seen.append(asyncio.current_task())

    async def work() -> None:
        mine = asyncio.current_task()
        eager.start(look(), asyncio.get_running_loop())
        assert asyncio.current_task() is mine
        assert seen[0] is not None
        assert seen[0] is not mine

    asyncio.run(work())


def test_context_variables_of_one_are_not_seen_by_the_next() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="nothing")
    seen: list[str] = []

    async def leave_a_trace(wait: bool) -> None:
        seen.append(variable.get())
        variable.set("mine")
        if wait:
            await asyncio.sleep(0)
        seen.append(variable.get())

    async def work() -> None:
        loop = asyncio.get_running_loop()
        for wait in (False, True):
            task = eager.start(leave_a_trace(wait), loop)
            if task is not None:
                await task
        assert variable.get() == "nothing"
        assert seen == ["nothing", "mine"] * 2

    asyncio.run(work())
