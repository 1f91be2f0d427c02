"""A long prompt beside a reply that is being written: the reply goes on between the prompt's chunks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import splitinfer.engine
from splitinfer import AsyncEngine
from splitinfer.timing import Timeline
from tests.checkpoints import write_checkpoint
from tests.test_split import addresses, running

CHUNK = 24  # rows: more than run on the event loop
LONG = [5 + i % 40 for i in range(10 * CHUNK)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("split", [False, True], ids=["here", "over nodes"])
def test_a_long_prompt_holds_a_reply_up_for_no_more_than_a_chunk(
    checkpoint: Path, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By events, not by the clock: between two chunks of the prompt that end, the reply has gone on."""
    monkeypatch.setattr(splitinfer.engine, "PREFILL_ROWS", CHUNK)

    async def beside(engine: AsyncEngine) -> tuple[str, list[int]]:
        events: list[str] = []
        tokens: list[int] = []
        started = asyncio.Event()

        async def write() -> None:
            while True:  # this model is quick: one reply after the other
                tokens.clear()
                async for piece in engine.stream([2, 9], max_tokens=400, ignore_eos=True):
                    events.append("t")
                    tokens.extend(piece.token_ids)
                    started.set()

        writing = asyncio.create_task(write())
        await started.wait()
        async for _ in engine.prefill(LONG, engine.new_cache(), Timeline()):
            events.append("C")
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        return "".join(events), tokens

    async def run() -> None:
        async with (
            running(checkpoint, [(None, None)] if split else []) as nodes,
            AsyncEngine(checkpoint, addresses(nodes), draft="off") as engine,
        ):
            events, tokens = await beside(engine)
            alone = await engine.generate([2, 9], max_tokens=len(tokens), ignore_eos=True)
        assert events.count("C") == 10
        # Chunks that follow each other down the layers end close together: as many as are under way.
        in_flight = splitinfer.engine.IN_FLIGHT if split else 1
        assert "C" * (in_flight + 1) not in events
        assert tuple(tokens) == alone.token_ids
        assert events.count("t") > 10

    asyncio.run(run())
