from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.errors import LocalProtocolError
from splitinfer.transport.wire_dtypes import WIRE_DTYPES, narrow, narrows, widen, wire_nbytes


def through(tensor: torch.Tensor, wire: str) -> torch.Tensor:
    """What arrives of `tensor` when it travels as `wire`."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    source = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    encoded = narrow(memoryview(source), wire, dtype, tensor.shape)
    assert encoded.nbytes == wire_nbytes(wire, tensor.shape)
    out = torch.empty_like(tensor)
    widen(encoded, memoryview(out.view(torch.uint8).numpy().reshape(-1)), wire, dtype, tensor.shape)
    return out


def rows(spread: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal rows whose columns differ in scale by exp(spread * normal): 0 is plain, 1 has heavy outliers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2816, generator=generator)
    return (x * torch.exp(spread * torch.randn(2816, generator=generator))).to(dtype)


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_bfloat16_is_torchs_rounding_for_every_exponent_and_the_special_values() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint64).astype(np.uint32)
    special = np.array(
        [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1, 0x00008000, 0x3F808000, 0x3F818000]
    )
    x = torch.from_numpy(np.concatenate([bits, special.astype(np.uint32)]).view(np.float32))
    x = x[: len(x) // 64 * 64].reshape(-1, 64)
    want, got = x.bfloat16().float(), through(x, "bfloat16")
    assert torch.equal(torch.isnan(want), torch.isnan(got))
    assert torch.equal(torch.nan_to_num(want), torch.nan_to_num(got))


def test_float8_is_torchs_rounding_at_every_halfway_point() -> None:
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    halves = [(a + b) / 2 for a, b in pairwise(codes)]
    near = [np.nextafter(np.float32(h), np.float32(side)) for h in halves for side in (0.0, 1e9)]
    values = torch.tensor([*codes, *halves, *(float(v) for v in near)])
    values = torch.cat([values, -values])
    x = torch.zeros(len(values), 64)
    x[:, 0], x[:, 1] = values, 448.0  # a peak of 448 makes the scale 1
    assert torch.equal(through(x, "float8_e4m3fn")[:, 0], values.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("wire", "limit"), [("int8", 0.013), ("float8_e4m3fn", 0.030)])
def test_eight_bits_keep_plain_rows_within_their_error(wire: str, limit: float, dtype: torch.dtype) -> None:
    x = rows(0.0, dtype)
    assert relative_rms(through(x, wire), x) < limit


def test_float8_keeps_rows_with_outliers_that_int8_does_not() -> None:
    x = rows(1.5)
    assert relative_rms(through(x, "float8_e4m3fn"), x) < 0.030
    small = x.abs() < x.abs().median()
    assert relative_rms(through(x, "int8")[small], x[small]) > 0.3
    assert relative_rms(through(x, "float8_e4m3fn")[small], x[small]) < 0.1


def test_the_peak_of_a_row_arrives_whole() -> None:
    x = rows(0.5)
    for wire in ("int8", "float8_e4m3fn"):
        peak = x.abs().amax(dim=1)
        torch.testing.assert_close(through(x, wire).abs().amax(dim=1), peak, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wire", ["int8", "float8_e4m3fn"])
def test_zero_rows_stay_zero_and_broken_rows_arrive_as_nan(wire: str) -> None:
    x = torch.ones(4, 64)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 5] = float("-inf")
    got = through(x, wire)
    assert torch.equal(got[0], x[0])
    assert bool(got[1:3].isnan().all())
    torch.testing.assert_close(got[3], x[3])


@given(exponent=st.integers(-45, 38), wire=st.sampled_from(["int8", "float8_e4m3fn"]))
@settings(max_examples=100, deadline=None)
def test_any_scale_of_values_survives(exponent: int, wire: str) -> None:
    x = (torch.linspace(-1, 1, 128).double() * 10.0**exponent).float().reshape(2, 64)
    got = through(x, wire)
    assert bool(got.isfinite().all())
    bound = float(x.abs().max()) * (0.07 if wire == "float8_e4m3fn" else 0.005) + 1.2e-38
    assert float((got - x).abs().max()) <= bound


def test_what_does_not_travel_narrow() -> None:
    assert not narrows("bfloat16", "bfloat16", (4, 2816))  # nothing to save
    assert not narrows("int8", "float64", (4, 2816))
    assert not narrows("int8", "int32", (4, 2816))
    assert not narrows("int8", "float32", (4, 8))  # router weights
    assert not narrows("int8", "float32", ())
    assert not narrows("int8", "float32", (0, 2816))
    assert not narrows("int4", "float32", (4, 2816))
    assert all(narrows(wire, "float32", (4, 2816)) for wire in WIRE_DTYPES)
    with pytest.raises(LocalProtocolError, match="int32"):
        narrow(memoryview(bytes(1024)), "int8", "int32", (4, 64))


def test_the_bytes_that_a_row_takes() -> None:
    assert wire_nbytes("bfloat16", (3, 2816)) == 3 * 5632
    assert wire_nbytes("int8", (3, 2816)) == wire_nbytes("float8_e4m3fn", (3, 2816)) == 3 * 2820
