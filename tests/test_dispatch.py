"""RemoteExperts against servers that answer as told: what is said and what is left behind when calls fail."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import pytest
import torch

from splitinfer import transport
from splitinfer.dispatch import RemoteExperts
from splitinfer.errors import PlacementError, RemoteError, RemoteProtocolError
from splitinfer.placement import Holding, parse_ranges
from tests.patience import until

EXPERTS, HIDDEN = 4, 8
X = torch.ones(1, HIDDEN)
INDEX, WEIGHTS = torch.tensor([[0, 3]]), torch.ones(1, 2)

Handler = Callable[[transport.Call], Any]


async def never(call: transport.Call) -> transport.Reply:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits so long")


def ones(call: transport.Call) -> transport.Reply:
    return transport.Reply([torch.ones(1, HIDDEN)])


def fail(call: transport.Call) -> transport.Reply:
    raise RuntimeError("broken")


@asynccontextmanager
async def connected(
    *nodes: tuple[str, Handler], timeout: float = 30.0
) -> AsyncIterator[tuple[RemoteExperts, list[transport.Server]]]:
    """Experts held by one server for each (experts, what it does with a call)."""
    servers = []
    for experts, handler in nodes:
        info = Holding("f" * 64, (0,), parse_ranges(experts, EXPERTS, ""), "float32").to_info()
        servers.append(await transport.serve({"experts": handler}, "127.0.0.1:0", info=info))
    experts_ = await RemoteExperts.connect(
        [server.address for server in servers],
        layers=[0],
        num_experts=EXPERTS,
        columns=32,
        fingerprint="f" * 64,
        timeout=timeout,
    )
    try:
        yield experts_, servers
    finally:
        await experts_.close()
        for server in servers:
            await server.close()


async def ask(experts: RemoteExperts) -> torch.Tensor:
    return await experts.dispatch(0, X, INDEX, WEIGHTS)


def unheard(work: Callable[[], Awaitable[None]]) -> list[str]:
    """What the event loop complains of while `work` runs, at the latest when its rest is collected."""
    said: list[str] = []

    async def listen() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["message"]))
        await work()
        gc.collect()

    asyncio.run(listen())
    gc.collect()
    return said


def test_an_interrupt_gives_up_every_call() -> None:
    async def interrupt() -> None:
        async with connected(("0-1", never), ("2-3", never)) as (experts, _):
            asking = asyncio.ensure_future(ask(experts))
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.wait([asking])
            assert asking.cancelled()

    assert unheard(interrupt) == []


@pytest.mark.parametrize("other", [never, fail])
def test_an_error_gives_up_the_other_calls(other: Handler) -> None:
    async def broken() -> None:
        async with connected(("0-1", fail), ("2-3", other)) as (experts, _):
            with pytest.raises(RemoteError, match="broken"):
                await ask(experts)
            await asyncio.sleep(0.05)

    assert unheard(broken) == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (transport.Reply([]), "nothing, not float32"),
        (transport.Reply([torch.ones(2, HIDDEN)]), rf"\[2, {HIDDEN}\], not float32 \[1, {HIDDEN}\]"),
        (transport.Reply([torch.ones(1, HIDDEN, dtype=torch.int64)]), "int64"),
        (transport.Reply([torch.ones(1, HIDDEN)] * 2), "float32"),
        *(
            (transport.Reply([torch.ones(1, HIDDEN)], {"compute_us": wrong}), "no number of microseconds")
            for wrong in ("soon", -1, None, 0.5, True, [3] * 1000)
        ),
    ],
)
def test_a_node_that_answers_something_else_is_named(answer: transport.Reply, said: str) -> None:
    async def answered() -> None:
        async with connected(("0-3", lambda call: answer)) as (experts, servers):
            with pytest.raises(RemoteProtocolError, match=said) as error:
                await ask(experts)
            assert servers[0].address in str(error.value)
            assert error.value.remedy

    assert unheard(answered) == []


def test_a_connection_that_ended_between_two_calls_costs_no_time(caplog: pytest.LogCaptureFixture) -> None:
    """Above all not the half minute that a lost node may take to come back."""

    async def lose() -> float:
        async with connected(("0-3", ones), ("0-3", ones)) as (experts, servers):
            await ask(experts)
            await servers[0].close()
            await until(lambda: not all(channel.connected for channel in experts._channels))
            start = perf_counter()
            for _ in range(3):
                assert torch.equal(await ask(experts), torch.ones(1, HIDDEN))
            return perf_counter() - start

    with caplog.at_level(logging.WARNING, "splitinfer"):
        assert asyncio.run(lose()) < 15.0
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith("its replicas take over")


def test_a_node_that_stays_away_is_said_once_and_called_gone(caplog: pytest.LogCaptureFixture) -> None:
    async def lose() -> str:
        async with connected(("0-1", ones), ("2-3", ones), timeout=1.0) as (experts, servers):
            await servers[1].close()
            with pytest.raises(PlacementError, match="is gone and nobody else holds") as error:
                await ask(experts)
            assert error.value.gaps == ("layer 0: experts 3",)
            return servers[1].address

    with caplog.at_level(logging.WARNING, "splitinfer"):
        address = asyncio.run(lose())
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"node {address} is gone")
    assert caplog.messages[0].endswith("trying again for up to 1 s")
