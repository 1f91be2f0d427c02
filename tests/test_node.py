"""The expert node: what it refuses, what it holds in memory, how it starts and stops."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer import ExpertNode, transport
from splitinfer.errors import CapacityError, CheckpointError, SplitinferError, UsageError
from splitinfer.model.native import kernels
from splitinfer.model.sharding import plan_shard, write_shard
from splitinfer.model.weights import Checkpoint
from splitinfer.placement import Holding
from tests.checkpoints import tiny_config, write_checkpoint

HIDDEN, EXPERTS, LAYERS, TOP_K = 48, 11, 4, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def rows(n: int = 2, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
    """An expert call of `n` rows, and its meta, with some of it changed."""
    call = {
        "x": torch.randn(n, HIDDEN),
        "index": np.tile(np.array([0, 1, -1], np.int16), (n, 1)),
        "weights": np.ones((n, TOP_K), np.float32),
        "layer": 0,
        "out": "float32",
    } | changes
    return [call["x"], call["index"], call["weights"]], {"layer": call["layer"], "out": call["out"]}


REFUSED: dict[str, dict[str, Any]] = {
    "does not hold layer 9": {"layer": 9},
    "does not hold layer None": {"layer": None},
    "does not hold layer 'x'": {"layer": "x"},
    r"x is float32 \[2, 47\]": {"x": torch.randn(2, 47)},
    "x is float64": {"x": torch.randn(2, HIDDEN, dtype=torch.float64)},
    r"x is float32 \[48\]": {"x": torch.randn(HIDDEN)},
    "top_k_index is int64": {"index": np.zeros((2, TOP_K), np.int64)},
    r"top_k_index is int16 \[3, 3\]": {"index": np.zeros((3, TOP_K), np.int16)},
    "top_k_weights is float64": {"weights": np.ones((2, TOP_K))},
    r"top_k_weights is float32 \[2, 1\]": {"weights": np.ones((2, 1), np.float32)},
    "cannot answer float32 rows in 'int8'": {"out": "int8"},
    "cannot answer float32 rows in 'bfloat16'": {"out": "bfloat16"},
    "expert 7": {"index": np.full((2, TOP_K), 7, np.int16)},
    "expert 10000": {"index": np.full((2, TOP_K), 10000, np.int16)},
    "expert -2": {"index": np.full((2, TOP_K), -2, np.int16)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_call_is_refused_and_the_node_goes_on(checkpoint: Path, message: str) -> None:
    async def ask() -> None:
        async with (
            ExpertNode(checkpoint, "0-5", port=0) as node,
            await transport.connect(node.address) as channel,
        ):
            tensors, meta = rows(**REFUSED[message])
            with pytest.raises(SplitinferError, match=message):
                await channel.call("experts", tensors, meta, timeout=30.0)
            tensors, meta = rows()
            reply = await channel.call("experts", tensors, meta, timeout=30.0)
            assert reply.tensors[0].shape == (2, HIDDEN)

    asyncio.run(ask())


def test_many_rows_give_what_single_rows_give(checkpoint: Path) -> None:
    async def ask() -> None:
        async with ExpertNode(checkpoint, port=0) as node, await transport.connect(node.address) as channel:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(40, HIDDEN, generator=generator)
            index = torch.rand(40, EXPERTS, generator=generator).topk(TOP_K).indices.short().numpy()
            weights = torch.rand(40, TOP_K, generator=generator).numpy()
            meta = {"layer": 1, "out": "float32"}
            many = (await channel.call("experts", [x, index, weights], meta)).tensors[0].torch()
            for i in range(40):
                one = [x[i : i + 1], index[i : i + 1], weights[i : i + 1]]
                alone = (await channel.call("experts", one, meta)).tensors[0].torch()
                assert (alone[0] - many[i]).abs().max() < 1e-5

    asyncio.run(ask())


def test_the_handshake_says_what_it_holds(checkpoint: Path) -> None:
    async def ask() -> None:
        async with (
            ExpertNode(checkpoint, "8-10,0-1", "1,3", port=0) as node,
            await transport.connect(node.address) as channel,
        ):
            holding = Holding.from_info(channel.info, node.address)
            assert holding == node.holding
            assert holding.layers == (1, 3)
            assert holding.experts == (0, 1, 8, 9, 10)
            assert str(holding) == "layers 1,3, experts 0-1,8-10 (float32)"
            assert node.nbytes == 2 * 5 * 3 * 20 * HIDDEN * 4

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("experts", "layers", "message"),
    [
        ("0-11", None, "--experts"),
        ("5-2", None, "backwards"),
        ("x", None, "--experts"),
        (None, "0-4", "--layers"),
    ],
)
def test_ranges_outside_the_model(
    checkpoint: Path, experts: str | None, layers: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        asyncio.run(ExpertNode(checkpoint, experts, layers, port=0).start())


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        asyncio.run(ExpertNode(tmp_path / "nowhere", port=0).start())


def test_a_port_in_use(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises((CapacityError, UsageError), match=str(port)) as error:
            asyncio.run(ExpertNode(checkpoint, port=port).start())
    assert error.value.remedy


def test_an_address_that_others_reach_needs_a_token_and_tls(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"0\.0\.0\.0") as error:
        asyncio.run(ExpertNode(checkpoint, host="0.0.0.0", port=0).start())
    assert error.value.remedy


def test_stopping_lets_the_calls_in_flight_finish(checkpoint: Path) -> None:
    async def ask() -> None:
        node = ExpertNode(checkpoint, port=0)
        await node.start()
        async with await transport.connect(node.address) as channel:
            tensors, meta = rows(400)
            calls = [channel.start("experts", tensors, meta, timeout=30.0) for _ in range(8)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            await node.stop()
            replies = await asyncio.gather(*calls)
            assert all(reply.tensors[0].shape == (400, HIDDEN) for reply in replies)

    asyncio.run(ask())


RESIDENT = """
import asyncio, json, sys, psutil, torch
from splitinfer import ExpertNode
torch.set_num_threads(1)
torch.nn.functional.linear(torch.ones(2, 512), torch.ones(512, 512))  # the kernels' own memory
def resident():  # without program code, which is read in at its first use
    return sum(each.rss for each in psutil.Process().memory_maps() if ".so" not in each.path)
async def main():
    before = resident()
    async with ExpertNode(sys.argv[1], sys.argv[2], port=0) as node:
        bank, held = node.bank, node.holding
        for expert in held.experts:
            bank.forward(0, torch.ones(1, 512), torch.tensor([[expert]]), torch.ones(1, 1))
        print(json.dumps([resident() - before, node.nbytes]))
asyncio.run(main())
"""


@pytest.mark.skipif(kernels() is None, reason="PyTorch's products keep memory of their own")
@pytest.mark.parametrize("experts", ["0-15", "8-31", "0-31"])
def test_resident_size_is_that_of_the_shard(tmp_path: Path, experts: str) -> None:
    """Within 10%, after every expert has been used: no copy, and no page of what others hold."""
    # Experts of 6 MB: the kernel may map up to 2 MiB around a page that is touched.
    sizes = {"hidden_size": 512, "moe_intermediate_size": 2048, "num_experts": 32, "num_hidden_layers": 1}
    model = write_checkpoint(tmp_path / "model", tiny_config(dtype="bfloat16", **sizes))
    command = [sys.executable, "-c", RESIDENT, str(model), experts]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    grown, nbytes = json.loads(output)
    assert 0.9 * nbytes < grown < 1.1 * nbytes


@pytest.mark.parametrize("port", [99999, -1, "7077", True, None])
def test_a_port_that_does_not_exist(checkpoint: Path, port: Any) -> None:
    with pytest.raises(UsageError, match="does not exist") as caught:
        ExpertNode(checkpoint, port=port)
    assert "65535" in caught.value.remedy


@pytest.mark.parametrize("what", [{"experts": 5}, {"layers": [1]}, {"slice": 0.5}, {"host": None}], ids=str)
def test_what_is_no_text(checkpoint: Path, what: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is no text") as caught:
        ExpertNode(checkpoint, **what)
    assert next(iter(what)) in caught.value.remedy


def test_a_node_of_no_model() -> None:
    with pytest.raises(UsageError, match="model is None"):
        ExpertNode(None)  # type: ignore[arg-type]


def test_a_node_on_the_shard_of_a_slice_knows_its_slice(checkpoint: Path, tmp_path: Path) -> None:
    write_shard(plan_shard(Checkpoint.open(checkpoint), experts=range(6), columns=(0, 8)), tmp_path / "s")

    async def start() -> Holding:
        async with ExpertNode(tmp_path / "s", port=0) as node:
            return node.holding

    assert asyncio.run(start()).columns == (0, 8)
