"""`--exact`: the bits of a result do not depend on which nodes hold what, or whether there are any."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer import AsyncEngine, transport
from splitinfer.errors import PlacementError, SplitinferError, UsageError
from splitinfer.model import native
from splitinfer.placement import format_ranges
from tests.checkpoints import tiny_config, write_checkpoint
from tests.test_split import Part, running

EXPERTS, LAYERS, COLUMNS = 11, 3, 96
PROMPT = [2, *range(5, 28)]
FORMATS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int4")]

Logits = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("exact")
    return {
        dtype: write_checkpoint(
            directory / dtype,
            tiny_config(dtype=dtype, num_hidden_layers=LAYERS, moe_intermediate_size=COLUMNS),
        )
        for dtype in ("float32", "bfloat16")
    }


async def logits_of(model: Path, parts: list[Part], prompt: list[int], **options: Any) -> Logits:
    options = {"exact": True, "draft": "off"} | options
    async with (
        running(model, parts, quant=options.get("quant")) as nodes,
        AsyncEngine(model, [node.address for node in nodes], **options) as engine,
    ):
        return await engine.logits(prompt)


@cache
def alone(model: Path, quant: str | None) -> Logits:
    """Without nodes, the whole prompt at once, by one thread."""
    return asyncio.run(logits_of(model, [], PROMPT, quant=quant, threads=1))


@st.composite
def placements(draw: st.DrawFn) -> list[Part]:
    """Nodes, at most four and maybe a replica, that hold the model between them: by layers, by experts or
    slices of all of them, or both; none now and then."""
    if draw(st.integers(0, 9)) == 0:
        return []
    cut = draw(st.integers(0, LAYERS - 1))
    parts: list[Part] = []
    for first, last in [(0, cut - 1), (cut, LAYERS - 1)] if cut else [(0, LAYERS - 1)]:
        layers = f"{first}-{last}"
        if draw(st.booleans()):
            owner = draw(st.lists(st.integers(0, 1), min_size=EXPERTS, max_size=EXPERTS))
            held = [[e for e in range(EXPERTS) if owner[e] == node] for node in (0, 1)]
            parts += [(format_ranges(ids), layers) for ids in held if ids]
        else:
            edge = draw(st.sampled_from(["0.333333", "0.666667"]))
            parts += [(None, layers, f"0:{edge}"), (None, layers, f"{edge}:1")]
    if draw(st.booleans()):
        parts.append(draw(st.sampled_from(parts)))
    return draw(st.permutations(parts))


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(native.kernels() is None, reason="PyTorch's products depend on the number of rows")
@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize(("dtype", "quant"), FORMATS)
def test_the_same_bits_for_every_placement(models: dict[str, Path], dtype: str, quant: str | None) -> None:
    @settings(max_examples=25, deadline=None)
    @given(
        parts=placements(),
        rows=st.integers(1, len(PROMPT)),
        threads=st.integers(1, 3),
        local=st.sampled_from([None, "0", "1-2"]),
    )
    def check(parts: list[Part], rows: int, threads: int, local: str | None) -> None:
        options: dict[str, Any] = {"quant": quant, "threads": threads}
        if parts:
            options["local_layers"] = local
        found = asyncio.run(logits_of(models[dtype], parts, PROMPT[:rows], **options))
        assert np.array_equal(found, alone(models[dtype], quant)[:rows])

    check()
    plain = asyncio.run(logits_of(models[dtype], [], PROMPT, quant=quant, exact=False))
    steps = 1e-3 if quant in ("int8", "int4") else 1e-4  # what a last bit becomes in 16 bits of activations
    assert np.abs(plain - alone(models[dtype], quant)).max() < (steps if dtype == "float32" else 1.0)


def test_without_the_kernels_too(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from splitinfer.model import experts

    monkeypatch.setattr(experts, "kernels", lambda: None)
    model = models["bfloat16"]
    here = asyncio.run(logits_of(model, [], PROMPT))
    for parts in (
        [("0-4", None), ("5-10", None)],
        [(None, None, "2/3"), (None, None, "1/3"), ("0-10", None, "3/3")],
    ):
        assert np.array_equal(asyncio.run(logits_of(model, parts, PROMPT)), here)
    assert np.abs(here - alone(model, None)).max() < 1.0


def test_a_lost_node_changes_no_bit(models: dict[str, Path]) -> None:
    """Its calls are sent again, to a replica that holds another part of the model beside."""

    async def lose_one() -> Logits:
        parts: list[Part] = [("0-5", None), ("0-8", None), ("4-10", None)]
        async with (
            running(models["bfloat16"], parts) as nodes,
            AsyncEngine(models["bfloat16"], [n.address for n in nodes], exact=True, draft="off") as engine,
        ):
            await engine.logits(PROMPT[:3])
            asking = asyncio.ensure_future(engine.logits(PROMPT))
            await asyncio.sleep(0.002)
            await nodes[0].stop()
            return await asking

    assert np.array_equal(asyncio.run(lose_one()), alone(models["bfloat16"], None))


def test_eight_bytes_a_value_come_back(models: dict[str, Path]) -> None:
    async def received(exact: bool) -> int:
        async with (
            running(models["bfloat16"], [(None, None)]) as nodes,
            AsyncEngine(models["bfloat16"], [nodes[0].address], exact=exact, draft="off") as engine,
        ):
            before = engine.traffic()[1]
            await engine.logits(PROMPT)
            return engine.traffic()[1] - before

    more = asyncio.run(received(True)) - asyncio.run(received(False))
    assert abs(more - (8 - 2) * LAYERS * len(PROMPT) * 48) < 100 * LAYERS


class TestRefused:
    """What would make bits depend on the placement is refused by name."""

    def test_a_lossy_wire(self, models: dict[str, Path]) -> None:
        config = transport.ClientConfig(wire_dtype="int8")
        with pytest.raises(UsageError, match="--exact and --wire-dtype int8"):
            asyncio.run(logits_of(models["float32"], [(None, None)], PROMPT, transport=config))

    def test_slices_that_divide_a_part(self, tmp_path: Path) -> None:
        model = write_checkpoint(tmp_path / "odd", tiny_config(moe_intermediate_size=72))
        with pytest.raises(PlacementError, match=r"columns 0-35.*columns 36-71") as caught:
            asyncio.run(logits_of(model, [(None, None, "1/2"), (None, None, "2/2")], PROMPT))
        assert "experts or layers" in caught.value.remedy
        whole = asyncio.run(logits_of(model, [], PROMPT))
        parts: list[Part] = [(None, None, "0:0.444444"), (None, None, "0.444444:1")]  # 32 and 40 columns
        assert np.array_equal(asyncio.run(logits_of(model, parts, PROMPT)), whole)

    def test_nodes_that_round_otherwise(
        self, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import splitinfer.node

        monkeypatch.setattr(splitinfer.node, "arithmetic", lambda: "c 01234567 avx512")
        here = native.arithmetic()
        with pytest.raises(PlacementError, match=f"here {re.escape(here)}, .* \\(c 01234567 avx512\\)"):
            asyncio.run(logits_of(models["float32"], [(None, None)], PROMPT))

    def test_more_columns_than_can_be_added(self, tmp_path: Path) -> None:
        model = write_checkpoint(tmp_path / "wide", tiny_config(moe_intermediate_size=8192, num_experts=3))
        with pytest.raises(UsageError, match="3 experts of 8192 columns"):
            asyncio.run(logits_of(model, [], PROMPT))

    @pytest.mark.parametrize("nodes", [0, 1, 2])
    def test_answers_out_of_range(self, tmp_path: Path, nodes: int) -> None:
        """Whoever adds: never a wrong sum, whatever cancels."""
        model = write_checkpoint(tmp_path / "loud")
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        for name in tensors:
            if name.endswith("down_proj"):
                tensors[name] *= 1e7
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        parts: list[Part] = [[], [("0-10", None)], [("0-4", None), ("5-10", None)]][nodes]
        with pytest.raises(SplitinferError, match="too large to be added exactly"):
            asyncio.run(logits_of(model, parts, PROMPT))
