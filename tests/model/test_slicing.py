from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitinfer.errors import UsageError
from splitinfer.model.experts import ExpertBank
from splitinfer.model.native import kernels
from splitinfer.model.quantize import FORMATS, Packed, QuantConfig, quantize
from splitinfer.model.sharding import plan_shard, write_shard
from splitinfer.model.slicing import column_slice, sliced
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint
from tests.model.gguf_files import Type, write_gguf

HIDDEN, INNER = 40, 96
CUTS = [(0, 32), (32, 96), (64, 96), (0, 96)]


def pair(format: str) -> tuple[Packed, Packed]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2 * INNER, HIDDEN, generator=generator)
    down = torch.randn(HIDDEN, INNER, generator=generator)
    return quantize(gate_up, format), quantize(down, format)


@pytest.mark.parametrize("columns", CUTS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_slice_has_the_weights_of_the_whole(format: str, columns: tuple[int, int]) -> None:
    gate_up, down = pair(format)
    low, high = columns
    found = sliced(gate_up, down, columns)
    gate, up = gate_up.widen().chunk(2)
    assert torch.equal(found[0].widen(), torch.cat((gate[low:high], up[low:high])))
    assert torch.equal(found[1].widen(), down.widen()[:, low:high])
    assert found[0].weight.is_contiguous()
    assert found[1].weight.is_contiguous()


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_where_nothing_shares_a_scale_every_cut_will_do(format: str) -> None:
    _, down = pair(format)
    assert torch.equal(column_slice(down, 5, 41).widen(), down.widen()[:, 5:41])


def test_rows_of_int4_may_be_cut_between_blocks() -> None:
    """Channels lie in blocks of 16: the second half need not begin with one."""
    gate_up = quantize(torch.randn(2 * 21, 64), "int4")
    down = quantize(torch.randn(8, 21), "int4")
    found, _ = sliced(gate_up, down, (0, 21))
    assert torch.equal(found.widen(), gate_up.widen())


def test_a_cut_between_columns_that_share_a_scale() -> None:
    _, down = pair("int4")
    with pytest.raises(UsageError, match="columns 0-47 of 96 divide the 32") as caught:
        column_slice(down, 0, 48)
    assert caught.value.remedy == "Cut before column 32 (0.333333) or before column 64 (0.666667)."
    small = quantize(torch.randn(8, 20), "int4")
    with pytest.raises(UsageError) as caught:
        column_slice(small, 0, 16)
    assert "whole" in caught.value.remedy


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = tiny_config(hidden_size=64, moe_intermediate_size=96, num_hidden_layers=2)
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("model") / "m", config))


def answers(checkpoint: Checkpoint, format: str | None, columns: tuple[int, int] | None) -> torch.Tensor:
    bank = ExpertBank(checkpoint, {1: range(11)}, format=format, columns=columns)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 64, generator=generator)
    index = torch.randint(0, 11, (7, 3), generator=generator)
    with torch.inference_mode():
        return bank.forward(1, x, index, torch.rand(7, 3, generator=generator))


def close(found: torch.Tensor | int, expected: torch.Tensor, int4: bool) -> None:
    """Where PyTorch stands in for the kernels, its int4 product takes rows in bfloat16."""
    bound = 0.05 if int4 and kernels() is None else 1e-4
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("format", FORMATS)
def test_slices_of_a_shard(model: Checkpoint, tmp_path: Path, format: str) -> None:
    """They add up to the whole, and are those of the checkpoint to the bit: replicas may differ in kind."""
    write_shard(plan_shard(model, experts=range(11), quant=QuantConfig(experts=format)), tmp_path)
    shard = Checkpoint.open(tmp_path)
    parts = [answers(shard, None, columns) for columns in ((0, 32), (32, 96))]
    assert torch.equal(parts[1], answers(model, format, (32, 96)))
    close(sum(parts), answers(shard, None, None), format == "int4")


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_slices_of_a_gguf_file(model: Checkpoint, tmp_path: Path, kind: Type) -> None:
    file = Checkpoint.open(write_gguf(model, tmp_path / "m.gguf", kind))
    parts = [answers(file, None, columns) for columns in ((0, 32), (32, 64), (64, 96))]
    close(sum(parts), answers(file, None, None), kind in (Type.Q4_0, Type.Q4_1))


def test_a_cut_of_a_shard_that_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    write_shard(plan_shard(model, experts=range(11), quant=QuantConfig(experts="int4")), tmp_path)
    with pytest.raises(UsageError, match="divide the 32 that share a scale in int4"):
        ExpertBank(Checkpoint.open(tmp_path), {0: (0,)}, columns=(0, 16))
