from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitinfer.errors import CheckpointError, UsageError
from splitinfer.model.quantize import (
    FORMATS,
    GROUP,
    QuantConfig,
    pack_int4,
    pack_int8,
    packed_nbytes,
    packed_shapes,
    quantize,
)

SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 100))


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, format=st.sampled_from(FORMATS), seed=st.integers(0, 9))
def test_widens_to_nearly_what_went_in(shape: tuple[int, int], format: str, seed: int) -> None:
    weight = matrix(shape, seed)
    found = quantize(weight, format).widen()
    columns = torch.nn.functional.pad(weight, (0, -shape[1] % GROUP)).view(shape[0], -1, GROUP)
    spread = columns.amax(-1) - columns.amin(-1)
    bound = {
        "float32": torch.zeros(shape),
        "bfloat16": weight.abs() * 2**-8,
        "int8": weight.abs().amax(1, keepdim=True).expand(shape) / 127 * 0.51,
        # half a step, and the offset's and factor's own rounding (float16: 11 bits)
        "int4": (spread / 15 * 0.51 + spread * 2**-10 + columns.abs().amax(-1) * 2**-10).repeat_interleave(
            GROUP, 1
        )[:, : shape[1]],
    }[format]
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    assert bool(((found - weight).abs() <= bound + 1e-7).all())


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, format=st.sampled_from(FORMATS))
def test_stored_as_announced(shape: tuple[int, int], format: str) -> None:
    packed = quantize(matrix(shape), format)
    stored = {"weight": packed.weight, "scales": packed.scales}
    announced = packed_shapes(format, *shape)
    for name, tensor in stored.items():
        if tensor is not None:
            assert announced.pop(name) == (tensor.dtype, tuple(tensor.shape))
            assert tensor.is_contiguous()
    assert not announced
    assert packed.nbytes == packed_nbytes(format, *shape)


@pytest.mark.parametrize("format", FORMATS)
def test_some_rows_widened(format: str) -> None:
    packed = quantize(matrix((37, 70)), format)
    rows = torch.tensor([36, 0, 16, 16, 5])
    torch.testing.assert_close(packed.widen(rows), packed.widen()[rows], rtol=0, atol=0)


def test_bytes_at_true_shapes() -> None:
    """Five bits a weight: four and the scales of every 32."""
    assert packed_nbytes("int4", 1408, 2816) == 1408 * 2816 * 5 // 8
    assert packed_nbytes("int8", 1408, 2816) == 1408 * (2816 + 2)


def test_layout_of_int4() -> None:
    """Column c of channel n: bits 4 (c % 8) of word [n // 16, c // 8, n % 16]."""
    nibbles = torch.arange(20 * 64).view(20, 64) % 16
    factors = torch.arange(40.0).view(20, 2)
    packed = pack_int4(nibbles, factors, -factors, 50)
    assert packed.weight.shape == (2, 8, 16)
    assert packed.scales is not None
    for n, c in ((0, 0), (3, 7), (17, 40), (19, 63)):
        word = int(packed.weight[n // 16, c // 8, n % 16])
        assert word >> 4 * (c % 8) & 15 == int(nibbles[n, c])
        assert packed.scales[n // 16, c // 32, :, n % 16].tolist() == [2.0 * n + c // 32, -2.0 * n - c // 32]
    assert packed.widen().shape == (20, 50)
    assert float(packed.widen()[19, 49]) == 39.0 * float(nibbles[19, 49]) - 39.0


def test_int4_centred() -> None:
    """Q4_0's form: factors only, half a bit a weight less."""
    nibbles = torch.randint(0, 16, (5, 96))
    factors = torch.rand(5, 3).half()
    packed = pack_int4(nibbles, factors, None, 90)
    assert packed.group == 32
    assert packed.nbytes == packed_nbytes("int4", 5, 90, 32) < packed_nbytes("int4", 5, 90)
    expected = (nibbles - 8) * factors.float().repeat_interleave(32, 1)
    torch.testing.assert_close(packed.widen(), expected[:, :90], rtol=0, atol=0)
    torch.testing.assert_close(packed.widen(torch.tensor([4, 0])), expected[[4, 0], :90], rtol=0, atol=0)


def test_int8_by_group() -> None:
    values = torch.randint(-128, 128, (5, 96))
    scales = torch.rand(5, 3).half()
    packed = pack_int8(values, scales)
    assert packed.group == 32
    expected = values * scales.float().repeat_interleave(32, 1)
    torch.testing.assert_close(packed.widen(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_constant_and_zero_rows_are_exact(format: str) -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.5
    torch.testing.assert_close(quantize(weight, format).widen()[0], weight[0], rtol=0, atol=0)
    torch.testing.assert_close(quantize(weight, format).widen()[1], weight[1], rtol=1e-3, atol=0)


def test_floating_point_shares_memory() -> None:
    weight = matrix((4, 8))
    assert quantize(weight, "float32").weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e8])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_weights_that_have_no_scale(format: str, value: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 3] = value
    with pytest.raises(CheckpointError, match="cannot be quantised"):
        quantize(weight, format)


def test_unknown_format() -> None:
    with pytest.raises(UsageError, match="int3"):
        quantize(torch.ones(1, 1), "int3")


def test_defaults_by_part() -> None:
    """What is small and matters keeps int8; embeddings follow lm_head, with which most models share them."""
    assert QuantConfig.of() == QuantConfig()
    assert QuantConfig.of("int4") == QuantConfig("int4", "int8", "int8", "int8", "int8")
    assert QuantConfig.of("bfloat16", attention="int8").attention == "int8"
    assert QuantConfig.of("int4", lm_head="bfloat16").embeddings == "bfloat16"
    assert QuantConfig.of(dense="int4") == QuantConfig(dense="int4")
    with pytest.raises(UsageError, match="int5"):
        QuantConfig.of("int4", dense="int5")
