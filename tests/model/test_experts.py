from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from splitinfer.errors import PlacementError, SplitinferError, UsageError
from splitinfer.fixed_point import from_fixed
from splitinfer.model.compute import INLINE_ROWS
from splitinfer.model.experts import ExpertBank, LocalExperts, expert_ids
from splitinfer.model.linear import matrix_of
from splitinfer.model.native import Matrix, kernels
from splitinfer.model.quantize import quantize
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline
from tests.checkpoints import tiny_config, write_checkpoint

LAYER, EXPERTS, HIDDEN = 2, 11, 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("experts") / "model"))


def routing(rows: int, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HIDDEN, generator=generator)
    index = torch.rand(rows, EXPERTS, generator=generator).topk(k, dim=-1).indices
    return x, index, torch.rand(rows, k, generator=generator)


def reference(checkpoint: Checkpoint, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One expert of one row at a time, in float64."""
    gate_up, down = (t.double() for t in checkpoint.expert_slice(LAYER, 0, EXPERTS))
    total = torch.zeros(x.shape, dtype=torch.float64)
    for row, (ids, factors) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for expert, factor in zip(ids, factors, strict=True):
            if expert != -1:
                gate, up = (gate_up[expert] @ x[row].double()).chunk(2)
                inner = torch.nn.functional.gelu(gate, approximate="tanh") * up
                total[row] += factor * (down[expert] @ inner)
    return total


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_weighted_sum(checkpoint: Checkpoint, rows: int, k: int) -> None:
    bank = ExpertBank(checkpoint, {LAYER: range(EXPERTS)})
    x, index, weights = routing(rows, k)
    found = bank.forward(LAYER, x, index, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(checkpoint, x, index, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("format", [None, "bfloat16", "int8", "int4"])
def test_slices_sum_to_the_whole(checkpoint: Checkpoint, rows: int, format: str | None) -> None:
    """Uneven slices of the intermediate dimension of 20; a slice's own scales may differ from the whole's."""
    x, index, weights = routing(rows)
    slices = [(0, 7), (7, 8), (8, 20)]
    banks = [ExpertBank(checkpoint, {LAYER: range(EXPERTS)}, format=format, columns=c) for c in slices]
    whole = ExpertBank(checkpoint, {LAYER: range(EXPERTS)}, format=format)
    found = sum(bank.forward(LAYER, x, index, weights) for bank in banks)
    expected = whole.forward(LAYER, x, index, weights)
    tolerance = {None: 1e-5, "bfloat16": 1e-5, "int8": 0.05, "int4": 0.5}[format]
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = tiny_config(moe_intermediate_size=104, hidden_size=72)
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("experts") / "wide", config))


@pytest.mark.parametrize("rows", [1, 2, 9, 60])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_fixed_point_sums_are_exact(wide: Checkpoint, rows: int, format: str) -> None:
    """Bit for bit, over parts by expert and by slice, whatever rows are beside."""
    _, index, weights = routing(rows, k=4)
    index[0] = index[0, 0]  # four times the same
    x = torch.randn(rows, 72, generator=torch.Generator().manual_seed(1))
    whole = ExpertBank(wide, {LAYER: range(EXPERTS)}, format=format)
    expected = whole.forward(LAYER, x, index, weights, torch.int64)
    near = whole.forward(LAYER, x, index, weights)
    # Activations are rounded with their weight here, without it there; without kernels PyTorch's int4 product
    # takes them in bfloat16 there.
    bound = 5e-5 if format != "int4" or kernels() is not None else 0.05
    torch.testing.assert_close(from_fixed(expected, torch.float32), near, atol=bound, rtol=bound)
    parts = [(range(5), (32, 104)), (range(5), (0, 32)), (range(5, 11), None)]
    total = torch.zeros_like(expected)
    for ids, columns in parts:
        bank = ExpertBank(wide, {LAYER: ids}, format=format, columns=columns)
        own = torch.where(torch.isin(index, torch.tensor(ids)), index, -1)
        total += bank.forward(LAYER, x, own, weights, torch.int64)
    assert torch.equal(total, expected)
    alone = [
        whole.forward(LAYER, x[i : i + 1], index[i : i + 1], weights[i : i + 1], torch.int64)
        for i in range(rows)
    ]
    assert torch.equal(torch.cat(alone), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e7])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_what_fixed_point_cannot_hold_raises(wide: Checkpoint, format: str, value: float) -> None:
    """One row of many, one channel of it."""
    x, index, weights = torch.randn(7, 72), *routing(7)[1:]
    x[5, 11] = value
    bank = ExpertBank(wide, {LAYER: range(EXPERTS)}, format=format)
    with pytest.raises(SplitinferError, match="too large to be added exactly"):
        bank.forward(LAYER, x, index, weights, torch.int64)
    bank.forward(LAYER, x[:5], index[:5], weights[:5], torch.int64)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int16])
def test_parts_sum_to_the_whole(checkpoint: Checkpoint, rows: int, index_dtype: torch.dtype) -> None:
    """Uneven, out of order, one part unused: each takes its own experts, -1 stands for the others'."""
    x, index, weights = routing(rows)
    whole = ExpertBank(checkpoint, {LAYER: range(EXPERTS)}).forward(LAYER, x, index, weights)
    total = torch.zeros_like(whole)
    for ids in ([10, 3, 4], [0, 1, 2, 5, 7], [6, 9], [8]):
        bank = ExpertBank(checkpoint, {LAYER: ids})
        own = torch.where(torch.isin(index, torch.tensor(ids)), index, -1).to(index_dtype)
        total += bank.forward(LAYER, x, own, weights)
    torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-5)


def test_rows_that_chose_nobody_here_are_zero(checkpoint: Checkpoint) -> None:
    bank = ExpertBank(checkpoint, {LAYER: [4]})
    x, index, weights = routing(3)
    index = torch.tensor([[-1, -1, -1], [-1, 4, -1], [-1, -1, -1]])
    found = bank.forward(LAYER, x, index, weights)
    assert not found[0].any()
    assert found[1].any()
    assert not bank.forward(LAYER, x[:1], index[:1], weights[:1]).any()
    assert bank.forward(LAYER, x[:0], index[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_not_held_is_refused(checkpoint: Checkpoint, rows: int) -> None:
    bank = ExpertBank(checkpoint, {LAYER: range(5)})
    x, index, weights = routing(rows)
    for wrong in (5, 11, -2, 1 << 20):
        with pytest.raises(PlacementError, match=f"expert {wrong} of layer 2 is not held here"):
            bank.forward(LAYER, x, torch.full_like(index, wrong), weights)
    with pytest.raises(PlacementError, match="layer 0 is not held here"):
        bank.forward(0, x, index, weights)
    with pytest.raises(UsageError, match="experts 11-11"):
        ExpertBank(checkpoint, {LAYER: [11]})


def test_one_rounding(tmp_path: Path) -> None:
    """In bfloat16 each expert's output is rounded by its product, the sum once: not once per expert."""
    path = write_checkpoint(tmp_path / "model", tiny_config(dtype="bfloat16"))
    bank = ExpertBank(Checkpoint.open(path), {LAYER: range(EXPERTS)})
    x, index, weights = routing(5, k=8)
    x = x.bfloat16()
    wide = bank.forward(LAYER, x, index, weights, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    narrow = bank.forward(LAYER, x, index, weights)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())
    assert not torch.equal(narrow.float(), wide)


def test_dtype_converts_the_weights(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", tiny_config(dtype="bfloat16")))
    x, index, weights = routing(4)
    found = ExpertBank(checkpoint, {LAYER: range(EXPERTS)}, dtype=torch.float32)
    expected = reference(checkpoint, x, index, weights)
    torch.testing.assert_close(
        found.forward(LAYER, x, index, weights).double(), expected, atol=1e-5, rtol=1e-5
    )


def test_a_bank_holds_no_more_than_its_experts(tmp_path: Path) -> None:
    """Resident after every expert held was used: its own shard, not its neighbours' pages."""
    config = tiny_config(num_experts=64, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=2)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", config))
    process = psutil.Process()
    before = process.memory_info().rss
    bank = ExpertBank(checkpoint, {0: range(16, 32), 1: range(16, 32)})
    assert bank.nbytes == 2 * 16 * 3 * 256 * 512 * 4
    x, weights = torch.randn(16, 512), torch.ones(16, 1)
    for layer in range(2):
        bank.forward(layer, x, torch.arange(16, 32).unsqueeze(1), weights)
    resident = process.memory_info().rss - before
    assert 0.9 * bank.nbytes < resident < 1.1 * bank.nbytes + (4 << 20)


@pytest.mark.parametrize("rows", [1, INLINE_ROWS + 1])
def test_local_experts(checkpoint: Checkpoint, rows: int) -> None:
    timeline = Timeline()
    bank = ExpertBank(checkpoint, {LAYER: range(EXPERTS)})
    experts = LocalExperts(bank)
    x, index, weights = routing(rows)

    async def call() -> Tensor:
        return await experts.dispatch(LAYER, x, index, weights, timeline)

    # PyTorch's products may round otherwise on another thread.
    tolerance = 0.0 if kernels() is not None else 1e-5
    torch.testing.assert_close(
        asyncio.run(call()), bank.forward(LAYER, x, index, weights), rtol=tolerance, atol=tolerance
    )
    assert list(timeline.seconds) == [("experts", LAYER)]


@pytest.mark.skipif(kernels() is None, reason="the kernels could not be built here")
@pytest.mark.parametrize("format", ["float32", "int8", "int4"])
def test_neither_rows_nor_threads_change_a_row(format: str) -> None:
    """Large enough for threads to share the work; up to 16 rows they take longer strips of channels."""
    built = kernels()
    assert built is not None
    generator = torch.Generator().manual_seed(3)
    packed = [
        [quantize(torch.randn(shape, generator=generator), format) for shape in ((140, 330), (330, 70))]
        for _ in range(5)
    ]
    gate_up, down = ((Matrix * 5)(*(matrix_of(pair[i]) for pair in packed)) for i in (0, 1))
    x = torch.randn(20, 330, generator=generator)
    index = expert_ids(torch.rand(20, 5, generator=generator).topk(3, dim=-1).indices, 0)
    index[0] = 4  # one row may meet an expert more often than there are rows
    weights = torch.rand(20, 3, generator=generator)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 4, 16, 17, 20):
                out = torch.empty(rows, 330)
                found.append(built.experts(gate_up, down, x[:rows], index[:rows], weights[:rows], out))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, found[-1][: len(out)]) for out in found)


@pytest.mark.parametrize("held", [range(EXPERTS), range(4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_bytes_give_what_tensors_give(
    checkpoint: Checkpoint, rows: int, dtype: torch.dtype, held: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = ExpertBank(checkpoint, {LAYER: held})
    x, index, weights = routing(rows)
    x, index = x.to(dtype), torch.where(index < len(held), index, -1).to(torch.int16)
    given = [
        memoryview(bytearray(bytes(t.contiguous().view(torch.uint8).numpy()))) for t in (x, index, weights)
    ]
    for out in (dtype, torch.float32, torch.int64):
        expected = bank.forward(LAYER, x, index, weights, out)
        for bank_kernels in (bank._kernels, None):
            monkeypatch.setattr(bank, "_kernels", bank_kernels)
            found = bytearray(expected.nbytes)
            bank.forward_bytes(LAYER, *given, tuple(index.shape), dtype, out, found)
            sums = torch.frombuffer(found, dtype=out) if rows else torch.empty(0, dtype=out)
            close = (1e-2, 1e-2) if bank_kernels is None and out is not torch.int64 else (0.0, 0.0)
            if bank_kernels is not None or out is not torch.int64:
                torch.testing.assert_close(sums.view(x.shape), expected, rtol=close[0], atol=close[1])
        monkeypatch.undo()


def test_bytes_that_name_what_is_not_held_are_refused(checkpoint: Checkpoint) -> None:
    bank = ExpertBank(checkpoint, {LAYER: range(4)})
    x, weights = (memoryview(bytearray(4 * n)) for n in (HIDDEN, 1))
    seventh = memoryview(bytearray(b"\7\0"))
    with pytest.raises(PlacementError, match="expert 7 of layer 2"):
        bank.forward_bytes(
            LAYER, x, seventh, weights, (1, 1), torch.float32, torch.float32, bytearray(4 * HIDDEN)
        )
    with pytest.raises(PlacementError, match="layer 3"):
        bank.forward_bytes(
            3, x, seventh, weights, (1, 1), torch.float32, torch.float32, bytearray(4 * HIDDEN)
        )


def test_ids_that_are_no_experts_are_refused() -> None:
    for wrong in (1 << 15, -40_000, 1 << 32):
        with pytest.raises(PlacementError, match=f"expert {wrong} of layer 3"):
            expert_ids(torch.tensor([[0, wrong]]), 3)
    assert expert_ids(torch.tensor([[0, -1, 127]]), 3).dtype == torch.int16
