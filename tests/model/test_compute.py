from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from splitinfer.errors import UsageError
from splitinfer.model.compute import INLINE_ROWS, compute, submit, use_threads


def where() -> tuple[str, bool]:
    return threading.current_thread().name, torch.is_inference_mode_enabled()


def test_few_rows_run_here_and_many_on_the_compute_thread() -> None:
    async def both() -> list[tuple[str, bool]]:
        await compute(1, where)  # the first of its kind goes to the thread: nobody knows how long it takes
        return [await compute(INLINE_ROWS, where), await compute(INLINE_ROWS + 1, where)]

    here, beside = asyncio.run(both())
    assert here == (threading.current_thread().name, True)
    assert beside[0].startswith("splitinfer-compute")
    assert beside[1]


def test_the_loop_moves_while_many_rows_compute() -> None:
    moved = threading.Event()

    async def main() -> bool:
        job = asyncio.ensure_future(compute(INLINE_ROWS + 1, moved.wait, 30))
        for _ in range(5):
            await asyncio.sleep(0.001)
        moved.set()
        return await job

    assert asyncio.run(main())


def test_jobs_keep_their_order() -> None:
    done: list[int] = []

    async def main() -> None:
        await asyncio.gather(*(submit(done.append, i) for i in range(50)))

    asyncio.run(main())
    assert done == list(range(50))


def test_a_cancelled_caller_waits_for_the_job() -> None:
    """However often it is cancelled: the job may be writing to the caller's cache."""
    finished: list[bool] = []
    end = threading.Event()

    def job() -> None:
        finished.append(end.wait(30))

    async def main() -> None:
        task = asyncio.create_task(compute(INLINE_ROWS + 1, job))
        for _ in range(3):
            await asyncio.sleep(0.01)
            task.cancel()
        assert not task.done()
        end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert finished == [True]

    asyncio.run(main())


def test_errors_arrive() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(compute(1000, lambda: 1 // 0))


def test_a_kind_of_job_that_was_slow_leaves_the_loop_until_it_is_quick_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, takes = 0.0, 0.15
    monkeypatch.setattr("splitinfer.model.compute.perf_counter", lambda: now)

    def slow_read() -> int:
        nonlocal now
        now += takes
        return threading.get_ident()

    async def ask() -> list[bool]:
        nonlocal takes
        here = threading.get_ident()
        threads = [await compute(1, slow_read), await compute(1, slow_read)]
        takes = 0.0
        threads += [await compute(1, slow_read), await compute(1, slow_read), await compute(17, slow_read)]
        return [thread == here for thread in threads]

    assert asyncio.run(ask()) == [False, False, False, True, False]


def test_threads_are_at_least_one() -> None:
    before = torch.get_num_threads()
    use_threads(None)
    for none in (0, "two"):
        with pytest.raises(UsageError, match=f"{none!r} threads"):
            use_threads(none)  # type: ignore[arg-type]
    assert torch.get_num_threads() == before
