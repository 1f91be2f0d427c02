"""The split: the same tokens wherever the experts are, and what happens when a node is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer import AsyncEngine, Completion, ExpertNode, demo
from splitinfer.errors import ConnectError, PlacementError, SplitinferError
from splitinfer.in_flight import Pending
from splitinfer.model.native import kernels
from tests.checkpoints import tiny_config, write_checkpoint
from tests.cli.conftest import listening

Part = tuple[str | None, ...]  # --experts, --layers and, where there are three, --slice of a node
PROMPT = [2, *range(5, 60)]  # several times the sliding window of 8
TOKENS = 64

# (--experts, --layers, --slice) of each node; the model has 11 experts and 4 layers
PLACEMENTS = {
    "1 node": [("0-10", None)],
    "2 nodes by experts": [("0-5", None), ("6-10", None)],
    "4 nodes by experts": [("0-2", None), ("3-5", None), ("6-8", None), ("9-10", None)],
    "2 nodes by layers": [(None, "0-1"), (None, "2-3")],
    "experts x layers": [("0-5", "0-1"), ("6-10", "0-1"), ("0-5", "2-3"), ("6-10", "2-3")],
    "uneven": [("0", None), ("1-10", None)],
    "out of order": [("8-10,0-1", None), ("7,2", None), ("3-6", None)],
    "halves of every expert": [(None, None, "1/2"), (None, None, "2/2")],
    "uneven slices": [(None, None, "0.7:1"), (None, None, "0:0.25"), (None, None, "0.25:0.7")],
    "experts x layers x slices": [
        ("0-5", "0-1", "1/2"),
        ("0-5", "0-1", "2/2"),
        ("6-10", "0-1"),
        (None, "2-3", "1/3"),
        (None, "2-3", "2/3"),
        ("0-9", "2-3", "3/3"),
        ("10", "2-3", "3/3"),
    ],
    "slices and replicas": [(None, None, "1/2"), (None, None, "2/2"), (None, None, "2/2"), ("3-7", None)],
    "replicas": [("0-7", None), ("4-10", None), ("0-10", "1,3")],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@asynccontextmanager
async def running(model: Path, parts: Sequence[Part], **settings: Any) -> AsyncIterator[list[ExpertNode]]:
    """Such nodes on free ports. The list may be changed; what is in it at the end is stopped."""
    nodes = [
        ExpertNode(model, experts, layers, slice=slice[0] if slice else None, port=0, **settings)
        for experts, layers, *slice in parts
    ]
    try:
        for node in nodes:
            await node.start()
        yield nodes
    finally:
        for node in nodes:
            await node.stop()


def addresses(nodes: Sequence[ExpertNode]) -> list[str]:
    return [node.address for node in nodes]


async def run(model: Path, parts: Sequence[Part], **settings: Any) -> tuple[Completion, np.ndarray]:
    """64 greedy tokens and the prompt's logits, with the experts on such nodes (none: here)."""
    async with running(model, parts) as nodes, AsyncEngine(model, addresses(nodes), **settings) as engine:
        completion = await engine.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)
        return completion, await engine.logits(PROMPT)


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
        logits = []
        async with running(checkpoint, PLACEMENTS["out of order"]) as nodes:
            for order in (addresses(nodes), addresses(nodes)[::-1]):
                async with AsyncEngine(checkpoint, order) as engine:
                    logits.append(await engine.logits(PROMPT))
        return logits[0], logits[1]

    straight, reversed_ = asyncio.run(both())
    assert np.array_equal(straight, reversed_)


def test_one_call_per_node_per_layer_with_only_its_rows(checkpoint: Path) -> None:
    async def count() -> tuple[Completion, list[int], list[int]]:
        async with running(checkpoint, PLACEMENTS["2 nodes by layers"]) as nodes:
            async with AsyncEngine(checkpoint, addresses(nodes)) as engine:
                completion = await engine.generate(PROMPT, max_tokens=8, ignore_eos=True)
            return completion, [node.calls for node in nodes], [node.rows for node in nodes]

    completion, calls, rows = asyncio.run(count())
    steps = 8  # one prefill, seven decoded tokens
    assert calls == [2 * steps, 2 * steps]
    assert rows == [2 * (len(PROMPT) + 7)] * 2
    assert completion.usage.calls == sum(calls)


@pytest.mark.skipif(kernels() is None, reason="no compiler: no kernels")
def test_an_answer_is_taken_while_the_dense_network_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense network that two threads share, and takes longer than the experts of a node on a thread of its
    own."""
    config = tiny_config(hidden_size=256, intermediate_size=4096)
    path, early = write_checkpoint(tmp_path / "model", config), list[bool]()
    look = Pending.look

    def counted(self: Pending) -> bool:
        over = look(self)
        early.append(self._total is not None)
        return over

    monkeypatch.setattr(Pending, "look", counted)
    with listening(path) as (_, address, _):
        ran = asyncio.run(_complete(path, address))
    assert ran.token_ids == asyncio.run(_complete(path)).token_ids
    assert any(early)


async def _complete(path: Path, *nodes: str) -> Completion:
    async with AsyncEngine(path, nodes, threads=2) as engine:
        return await engine.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True)


def test_a_node_is_sent_only_the_rows_it_has_work_for(tmp_path: Path) -> None:
    """With top-1 routing, two nodes together see every row of a layer exactly once."""
    model = write_checkpoint(tmp_path / "top1", tiny_config(top_k_experts=1))

    async def count() -> list[int]:
        async with running(model, PLACEMENTS["2 nodes by experts"]) as nodes:
            async with AsyncEngine(model, addresses(nodes)) as engine:
                await engine.logits(PROMPT)
            return [node.rows for node in nodes]

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
        options: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
        async with (
            running(checkpoint, PLACEMENTS["2 nodes by experts"]) as nodes,
            AsyncEngine(checkpoint, addresses(nodes)) as engine,
        ):
            alone = [await engine.generate(prompt, **options) for prompt in prompts]
            return alone, await asyncio.gather(*(engine.generate(prompt, **options) for prompt in prompts))

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
            async with running(other, [(None, None)]) as nodes, AsyncEngine(checkpoint, addresses(nodes)):
                pass

        with pytest.raises(PlacementError, match="holds another model"):
            asyncio.run(mixed())

    def test_nobody_listens(self, checkpoint: Path) -> None:
        async def dial() -> None:
            async with AsyncEngine(checkpoint, ["127.0.0.1:9"]):
                pass

        with pytest.raises(ConnectError, match=r"127\.0\.0\.1:9") as error:
            asyncio.run(dial())
        assert error.value.remedy

    @pytest.mark.parametrize(
        "parts",
        [
            [(None, None), (None, None)],
            [(None, None, "2/2"), (None, None, "1/2"), (None, None, "2/2")],
            [(None, None), (None, None, "2/2"), (None, None, "1/2")],
        ],
        ids=["whole", "a slice", "slices for the whole"],
    )
    def test_a_replica_takes_over(
        self, checkpoint: Path, local: tuple[Completion, np.ndarray], parts: list[Part]
    ) -> None:
        async def lose_one() -> tuple[int, ...]:
            ids: list[int] = []
            async with (
                running(checkpoint, parts) as nodes,
                AsyncEngine(checkpoint, addresses(nodes)) as engine,
            ):
                async for piece in engine.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                    ids += piece.token_ids
                    if len(ids) == 10:
                        await nodes[0].stop()
            return tuple(ids)

        assert asyncio.run(lose_one()) == local[0].token_ids

    def test_a_restarted_node_is_found_again(
        self, checkpoint: Path, local: tuple[Completion, np.ndarray]
    ) -> None:
        async def restart() -> tuple[int, ...]:
            ids: list[int] = []
            async with (
                running(checkpoint, [(None, None)]) as nodes,
                AsyncEngine(checkpoint, addresses(nodes)) as engine,
            ):
                port = int(nodes[0].address.rpartition(":")[2])
                async for piece in engine.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                    ids += piece.token_ids
                    if len(ids) == 10:
                        await nodes[0].stop()
                        nodes[0] = ExpertNode(checkpoint, port=port)
                        await nodes[0].start()
            return tuple(ids)

        assert asyncio.run(restart()) == local[0].token_ids

    def test_a_node_that_stays_away_is_named(self, checkpoint: Path) -> None:
        async def lose() -> None:
            async with (
                running(checkpoint, PLACEMENTS["2 nodes by experts"]) as nodes,
                AsyncEngine(checkpoint, addresses(nodes), timeout=1.0) as engine,
            ):
                async for _ in engine.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True):
                    await nodes[1].stop()

        with pytest.raises(SplitinferError, match=r"127\.0\.0\.1") as error:
            asyncio.run(lose())
        assert error.value.remedy

    def test_a_node_restarted_on_another_model_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", seed=7)

        async def swap() -> None:
            async with (
                running(checkpoint, [(None, None)]) as nodes,
                AsyncEngine(checkpoint, addresses(nodes), timeout=30.0) as engine,
            ):
                port = int(nodes[0].address.rpartition(":")[2])
                await nodes[0].stop()
                nodes[0] = ExpertNode(other, port=port)
                await nodes[0].start()
                await engine.generate(PROMPT, max_tokens=4)

        with pytest.raises(SplitinferError, match="another model"):
            asyncio.run(swap())


def test_a_missing_answer_is_never_zeros(checkpoint: Path) -> None:
    """An expert that a node does not hold is refused there, even when a client asks for it."""
    from splitinfer import transport

    async def ask() -> None:
        tensors = [torch.zeros(1, 48), np.array([[7, -1, -1]], np.int16), np.ones((1, 3), np.float32)]
        async with (
            running(checkpoint, [("0-5", None)]) as nodes,
            await transport.connect(nodes[0].address) as channel,
        ):
            await channel.call("experts", tensors, {"layer": 0, "out": "float32"}, timeout=30.0)

    with pytest.raises(SplitinferError, match="7"):
        asyncio.run(ask())


def test_a_prompt_costs_its_rows_and_little_more() -> None:
    """Bytes on the wire within 5% of what rows there and back take, one call for each layer and chunk."""
    rows = 512

    async def traffic() -> tuple[int, int, int, int]:
        async with (
            running(demo.path(), [(None, None)]) as nodes,
            AsyncEngine(demo.path(), addresses(nodes), draft="off") as engine,
        ):
            config, before = engine.config, engine.traffic()
            async for _ in engine.prefill([5 + i % 1000 for i in range(rows)], engine.new_cache()):
                pass
            sent, received, calls = (b - a for a, b in zip(before, engine.traffic(), strict=True))
            return sent + received, calls, config.num_hidden_layers, config.hidden_size

    nbytes, calls, layers, hidden = asyncio.run(traffic())
    least = 2 * layers * rows * hidden * 2  # bfloat16, both ways
    assert least < nbytes < 1.05 * least
    assert calls == layers
