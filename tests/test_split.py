"""The split: the same tokens wherever the experts are, and what happens when a node is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer import AsyncEngine, Completion, ExpertNode
from splitinfer.errors import ConnectError, PlacementError, SplitinferError
from tests.checkpoints import tiny_config, write_checkpoint

PROMPT = [2, *range(5, 60)]  # several times the sliding window of 8
TOKENS = 64

# (--experts, --layers) of each node; the model has 11 experts and 4 layers
PLACEMENTS = {
    "1 node": [("0-10", None)],
    "2 nodes by experts": [("0-5", None), ("6-10", None)],
    "4 nodes by experts": [("0-2", None), ("3-5", None), ("6-8", None), ("9-10", None)],
    "2 nodes by layers": [(None, "0-1"), (None, "2-3")],
    "experts x layers": [("0-5", "0-1"), ("6-10", "0-1"), ("0-5", "2-3"), ("6-10", "2-3")],
    "uneven": [("0", None), ("1-10", None)],
    "out of order": [("8-10,0-1", None), ("7,2", None), ("3-6", None)],
    "replicas": [("0-7", None), ("4-10", None), ("0-10", "1,3")],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


async def start(model: Path, parts: Sequence[tuple[str | None, str | None]]) -> list[ExpertNode]:
    nodes = [ExpertNode(model, experts, layers, port=0) for experts, layers in parts]
    for node in nodes:
        await node.start()
    return nodes


async def stop(nodes: Sequence[ExpertNode]) -> None:
    for node in nodes:
        await node.stop()


async def run(
    model: Path, parts: Sequence[tuple[str | None, str | None]], **settings: Any
) -> tuple[Completion, np.ndarray]:
    """64 greedy tokens and the prompt's logits, with the experts on such nodes (none: here)."""
    nodes = await start(model, parts)
    try:
        async with AsyncEngine(model, [node.address for node in nodes], **settings) as engine:
            completion = await engine.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)
            return completion, await engine.logits(PROMPT)
    finally:
        await stop(nodes)


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> tuple[Completion, np.ndarray]:
    return asyncio.run(run(checkpoint, []))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_same_tokens_for_every_placement(
    checkpoint: Path, local: tuple[Completion, np.ndarray], name: str
) -> None:
    completion, logits = asyncio.run(run(checkpoint, PLACEMENTS[name]))
    assert len(completion.token_ids) == TOKENS
    assert completion.token_ids == local[0].token_ids
    assert np.abs(logits - local[1]).max() < 1e-5


def test_the_order_of_the_addresses_does_not_matter(checkpoint: Path) -> None:
    """Bit for bit: the client adds partial sums in an order of its own."""

    async def both() -> tuple[np.ndarray, np.ndarray]:
        nodes = await start(checkpoint, PLACEMENTS["out of order"])
        addresses = [node.address for node in nodes]
        logits = []
        for order in (addresses, addresses[::-1]):
            async with AsyncEngine(checkpoint, order) as engine:
                logits.append(await engine.logits(PROMPT))
        await stop(nodes)
        return logits[0], logits[1]

    straight, reversed_ = asyncio.run(both())
    assert np.array_equal(straight, reversed_)


def test_one_call_per_node_per_layer_with_only_its_rows(checkpoint: Path) -> None:
    async def count() -> tuple[Completion, list[int], list[int]]:
        nodes = await start(checkpoint, PLACEMENTS["2 nodes by layers"])
        async with AsyncEngine(checkpoint, [node.address for node in nodes]) as engine:
            completion = await engine.generate(PROMPT, max_tokens=8)
        counted = completion, [node.calls for node in nodes], [node.rows for node in nodes]
        await stop(nodes)
        return counted

    completion, calls, rows = asyncio.run(count())
    steps = 8  # one prefill, seven decoded tokens
    assert calls == [2 * steps, 2 * steps]
    assert rows == [2 * (len(PROMPT) + 7)] * 2
    assert completion.usage.calls == sum(calls)


def test_a_node_is_sent_only_the_rows_it_has_work_for(tmp_path: Path) -> None:
    """With top-1 routing, two nodes together see every row of a layer exactly once."""
    model = write_checkpoint(tmp_path / "top1", tiny_config(top_k_experts=1))

    async def count() -> list[int]:
        nodes = await start(model, PLACEMENTS["2 nodes by experts"])
        async with AsyncEngine(model, [node.address for node in nodes]) as engine:
            await engine.logits(PROMPT)
        rows = [node.rows for node in nodes]
        await stop(nodes)
        return rows

    rows = asyncio.run(count())
    assert sum(rows) == 4 * len(PROMPT)
    assert all(rows)


def test_bfloat16_models_run_split(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "bf16", tiny_config(dtype="bfloat16"))
    alone, logits = asyncio.run(run(model, []))
    whole, whole_logits = asyncio.run(run(model, PLACEMENTS["1 node"]))
    assert whole.token_ids == alone.token_ids
    assert np.array_equal(whole_logits, logits)  # one node rounds once, as the local bank does
    _, halves = asyncio.run(run(model, PLACEMENTS["2 nodes by experts"]))
    assert np.abs(halves - logits).max() < 0.5  # a sum in another order, rounded to 8 bits of mantissa


def test_several_sequences_at_once_get_the_tokens_they_would_have_alone(checkpoint: Path) -> None:
    prompts = [PROMPT, PROMPT[:7], [2, 100, 3, 50], [9]]

    async def together() -> tuple[list[Completion], list[Completion]]:
        nodes = await start(checkpoint, PLACEMENTS["2 nodes by experts"])
        async with AsyncEngine(checkpoint, [node.address for node in nodes]) as engine:
            alone = [await engine.generate(prompt, max_tokens=20) for prompt in prompts]
            at_once = await asyncio.gather(*(engine.generate(p, max_tokens=20) for p in prompts))
        await stop(nodes)
        return alone, list(at_once)

    alone, at_once = asyncio.run(together())
    assert [c.token_ids for c in alone] == [c.token_ids for c in at_once]


class TestTrouble:
    """Nodes that are missing, wrong, or gone."""

    def test_missing_experts_are_listed(self, checkpoint: Path) -> None:
        with pytest.raises(PlacementError, match="layers 0-3: experts 6-10"):
            asyncio.run(run(checkpoint, [("0-5", None)]))

    def test_another_model_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", seed=7)

        async def mixed() -> None:
            nodes = await start(other, [(None, None)])
            try:
                async with AsyncEngine(checkpoint, [nodes[0].address]):
                    pass
            finally:
                await stop(nodes)

        with pytest.raises(PlacementError, match="holds another model"):
            asyncio.run(mixed())

    def test_nobody_listens(self, checkpoint: Path) -> None:
        async def dial() -> None:
            async with AsyncEngine(checkpoint, ["127.0.0.1:9"]):
                pass

        with pytest.raises(ConnectError, match=r"127\.0\.0\.1:9") as error:
            asyncio.run(dial())
        assert error.value.remedy

    def test_a_replica_takes_over(self, checkpoint: Path, local: tuple[Completion, np.ndarray]) -> None:
        async def lose_one() -> tuple[int, ...]:
            nodes = await start(checkpoint, [(None, None), (None, None)])
            ids: list[int] = []
            async with AsyncEngine(checkpoint, [node.address for node in nodes]) as engine:
                async for piece in engine.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                    ids += piece.token_ids
                    if len(ids) == 10:
                        await nodes[0].stop()
            await nodes[1].stop()
            return tuple(ids)

        assert asyncio.run(lose_one()) == local[0].token_ids

    def test_a_restarted_node_is_found_again(
        self, checkpoint: Path, local: tuple[Completion, np.ndarray]
    ) -> None:
        async def restart() -> tuple[int, ...]:
            nodes = await start(checkpoint, [(None, None)])
            port = int(nodes[0].address.rpartition(":")[2])
            ids: list[int] = []
            async with AsyncEngine(checkpoint, [nodes[0].address]) as engine:
                async for piece in engine.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                    ids += piece.token_ids
                    if len(ids) == 10:
                        await nodes[0].stop()
                        nodes[0] = ExpertNode(checkpoint, port=port)
                        await nodes[0].start()
            await stop(nodes)
            return tuple(ids)

        assert asyncio.run(restart()) == local[0].token_ids

    def test_a_node_that_stays_away_is_named(self, checkpoint: Path) -> None:
        async def lose() -> None:
            nodes = await start(checkpoint, PLACEMENTS["2 nodes by experts"])
            async with AsyncEngine(checkpoint, [node.address for node in nodes], timeout=1.0) as engine:
                gone = nodes[1].address
                async for _ in engine.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                    await nodes[1].stop()
            await stop(nodes)
            raise AssertionError(gone)

        with pytest.raises(SplitinferError, match=r"127\.0\.0\.1") as error:
            asyncio.run(lose())
        assert error.value.remedy

    def test_a_node_restarted_on_another_model_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", seed=7)

        async def swap() -> None:
            node = (await start(checkpoint, [(None, None)]))[0]
            port = int(node.address.rpartition(":")[2])
            async with AsyncEngine(checkpoint, [node.address], timeout=5.0) as engine:
                await node.stop()
                node = ExpertNode(other, port=port)
                await node.start()
                try:
                    await engine.generate(PROMPT, max_tokens=4)
                finally:
                    await node.stop()

        with pytest.raises(SplitinferError, match="another model"):
            asyncio.run(swap())


def test_a_missing_answer_is_never_zeros(checkpoint: Path) -> None:
    """An expert that a node does not hold is refused there, even when a client asks for it."""
    from splitinfer import transport

    async def ask() -> None:
        node = (await start(checkpoint, [("0-5", None)]))[0]
        channel = await transport.connect(node.address)
        x = torch.zeros(1, 48)
        meta = {"layer": 0, "out": "float32"}
        try:
            await channel.call(
                "experts",
                [x, np.array([[7, -1, -1]], np.int16), np.ones((1, 3), np.float32)],
                meta,
                timeout=5.0,
            )
        finally:
            await channel.close()
            await node.stop()

    with pytest.raises(SplitinferError, match="7"):
        asyncio.run(ask())
