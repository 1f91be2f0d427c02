from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitinfer.model import linear
from splitinfer.model.linear import Linear
from splitinfer.model.native import kernels
from splitinfer.model.quantize import FORMATS, GROUP, Packed, pack_int4, pack_int8, quantize

KINDS = (*FORMATS, "int8 by group", "int4 centred")
ROWS = (2, 3, 4, 5, 6, 7, 8, 13, 48, 49, 61)  # every tile of the kernels, and the edges of a chunk
needs_kernels = pytest.mark.skipif(kernels() is None, reason="the kernels could not be built here")


def packed(kind: str, out_features: int, in_features: int, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    if kind == "int8 by group":
        columns = -(-in_features // 32) * 32
        values = torch.randint(-128, 128, (out_features, columns), generator=generator)
        return pack_int8(values, torch.rand(out_features, columns // 32, generator=generator) / 100)
    if kind == "int4 centred":
        columns = -(-in_features // 32) * 32
        nibbles = torch.randint(0, 16, (out_features, columns), generator=generator)
        scales = torch.rand(out_features, columns // 32, generator=generator) / 10
        return pack_int4(nibbles, scales, None, in_features)
    return quantize(torch.randn(out_features, in_features, generator=generator), kind)


def activations(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "kernels", lambda: None)


def check(kind: str, shape: tuple[int, int], dtype: torch.dtype, tolerance: float, rows: int = 5) -> None:
    matrix = packed(kind, *shape)
    x = activations(rows, matrix.in_features, dtype)
    found = Linear(matrix)(x)
    weight = matrix.widen().double()
    size = x.double().abs() @ weight.abs().T  # of the terms: a sum may cancel
    bound = tolerance * size
    if kind.startswith("int"):
        bound += fixed_point_steps(x) @ weight.abs().T / 2
    assert found.dtype == dtype
    assert bool(((found.double() - x.double() @ weight.T).abs() <= bound).all())


def fixed_point_steps(x: Tensor) -> Tensor:
    """What the kernels for int8 and int4 round activations to: 1 / 32639 of the largest of 32 columns."""
    padded = F.pad(x.double(), (0, -x.shape[1] % GROUP))
    largest = padded.view(len(x), -1, GROUP).abs().amax(-1)
    return largest.repeat_interleave(GROUP, dim=1)[:, : x.shape[1]] / 32639


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    rows=st.integers(1, 20),
)
def test_equals_the_widened_product(kind: str, shape: tuple[int, int], rows: int) -> None:
    check(kind, shape, torch.float32, 4e-6, rows)
    check(kind, shape, torch.bfloat16, 2**-8, rows)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (37, 70), (1, 1), (130, 33)])
def test_equals_the_widened_product_without_kernels(kind: str, shape: tuple[int, int]) -> None:
    """PyTorch's int4 takes bfloat16 activations and scales, whose rounding shows in small sums."""
    check(kind, shape, torch.float32, 2**-7 if kind.startswith("int4") else 4e-6)
    check(kind, shape, torch.bfloat16, 2**-6)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 150), st.integers(1, 200)),
    rows=st.sampled_from(ROWS),
    start=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_see_its_neighbours(
    kind: str, shape: tuple[int, int], rows: int, start: int, dtype: torch.dtype
) -> None:
    product = Linear(packed(kind, *shape))
    x = activations(start + rows, product.parts[0].in_features, dtype)
    alone = torch.cat([product(x[i : i + 1]) for i in range(start, start + rows)])
    assert torch.equal(product(x[start:]), alone)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_seen_there(kind: str, wrong: float) -> None:
    product = Linear(packed(kind, 40, 70))
    x = activations(6, product.parts[0].in_features, torch.float32)
    x[2, 40] = wrong
    found = product(x)
    assert not found[2].isfinite().any()
    assert torch.equal(found[3:], product(x[3:]))
    assert found[3:].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e30])
def test_rows_of_any_size(kind: str, size: float) -> None:
    """Groups of zeros, and of numbers too small to be told from them, add nothing."""
    product = Linear(packed(kind, 40, 70))
    x = activations(2, product.parts[0].in_features, torch.float32)
    torch.testing.assert_close(product(x * size), product(x) * size, rtol=2e-4, atol=1e-30)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: str) -> None:
    """Large enough for the kernels to share the work."""
    product = Linear(packed(kind, 300, 640))
    x = activations(3, 640, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(product(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_stay_apart_without_kernels(kind: str) -> None:
    product = Linear(packed(kind, 64, 96))
    x = activations(17, 96, torch.bfloat16)
    assert torch.equal(product(x), torch.cat([product(x[i : i + 1]) for i in range(17)]))


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_matrices_side_by_side(kind: str, kernel: str, request: pytest.FixtureRequest) -> None:
    if kernel == "torch":
        request.getfixturevalue("without_kernels")
    parts = [packed(kind, n, 96, seed=n) for n in (48, 5, 64)]
    x = activations(3, 96, torch.bfloat16)
    whole = Linear(*parts)
    assert whole.out_features == 117
    assert whole.nbytes == sum(part.nbytes for part in parts)
    assert torch.equal(whole(x), torch.cat([Linear(part)(x) for part in parts], -1))


@pytest.mark.parametrize("change", [lambda x: x.half(), lambda x: x.t().contiguous().t()])
def test_other_layouts_and_dtypes(change: Callable[[Tensor], Tensor]) -> None:
    product = Linear(packed("int8", 16, 32))
    x = activations(4, 32, torch.float32)
    found = product(change(x))
    torch.testing.assert_close(found.float(), product(x), atol=2e-2, rtol=1e-2)
    assert found.dtype == change(x).dtype


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_formats_side_by_side(kernel: str, request: pytest.FixtureRequest) -> None:
    if kernel == "torch":
        request.getfixturevalue("without_kernels")
    parts = [packed(kind, 16, 96) for kind in ("int4", "int8", "bfloat16", "int4")]
    x = activations(3, 96, torch.bfloat16)
    assert torch.equal(Linear(*parts)(x), torch.cat([Linear(part)(x) for part in parts], -1))
