"""Layers kept on the client: same tokens, no calls for them, and nodes need not hold them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from splitinfer import AsyncEngine, Completion
from splitinfer.errors import PlacementError, UsageError
from splitinfer.mixed import local_layers
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint
from tests.test_split import PROMPT, Part, addresses, running

LAYER = 11 * 3 * 20 * 48 * 4  # bytes of the experts of one layer, float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


async def reply(model: Path, parts: list[Part], **settings: Any) -> Completion:
    async with (
        running(model, parts) as nodes,
        AsyncEngine(model, addresses(nodes), draft="off", **settings) as engine,
    ):
        return await engine.generate(PROMPT, max_tokens=20, ignore_eos=True)


@pytest.mark.parametrize(
    ("settings", "layers", "held"),
    [
        ({"local_layers": "0"}, 1, "1-3"),
        ({"local_layers": "0,2-3"}, 3, "1"),
        ({"local_memory": f"{2 * LAYER / 1024:.0f}KiB"}, 2, "2-3"),
        ({"local_layers": "0-3"}, 4, "0"),
    ],
    ids=str,
)
def test_local_layers_make_no_calls_and_need_no_node(
    checkpoint: Path, settings: dict[str, str], layers: int, held: str
) -> None:
    async def run() -> tuple[Completion, Completion]:
        return await reply(checkpoint, []), await reply(checkpoint, [(None, held)], **settings)

    here, mixed = asyncio.run(run())
    assert mixed.token_ids == here.token_ids
    assert mixed.usage.calls == 20 * (4 - layers)


def test_coverage_is_checked_for_the_other_layers(checkpoint: Path) -> None:
    with pytest.raises(PlacementError, match="layer 2: experts 0-10") as caught:
        asyncio.run(reply(checkpoint, [(None, "3")], local_layers="0-1"))
    assert len(caught.value.gaps) == 1


@pytest.mark.parametrize(
    ("ranges", "memory", "message"),
    [
        ("0-4", None, "--local-layers '0-4': 4 is out of bounds"),
        ("x", None, "--local-layers 'x'"),
        (None, "many", "--local-memory 'many' is not a size"),
        (None, "1KiB", "holds no layer: the experts of one take 0.00 GiB"),
        ("0", "1GiB", "both choose layers"),
    ],
)
def test_what_cannot_be_kept(checkpoint: Path, ranges: str | None, memory: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        local_layers(Checkpoint.open(checkpoint), ranges, memory, None)


def test_without_experts_there_is_nothing_to_keep(tmp_path: Path) -> None:
    dense = Checkpoint.open(write_checkpoint(tmp_path, tiny_config(enable_moe_block=False)))
    assert local_layers(dense, "0", None, None) == (None, ())
