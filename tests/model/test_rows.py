from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from splitinfer.errors import CapacityError
from splitinfer.model.linear import Linear
from splitinfer.model.native import kernels
from splitinfer.model.quantize import quantize
from splitinfer.model.row_kernels import done, row_ops
from splitinfer.model.rows import Dense, Routing, TorchRows

BUILT = kernels()
needs_kernels = pytest.mark.skipif(BUILT is None, reason="the kernels could not be built here")
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture(params=["kernels", "torch"])
def ops(request: pytest.FixtureRequest) -> TorchRows:
    if request.param == "torch":
        return TorchRows()
    if BUILT is None:
        pytest.skip("the kernels could not be built here")
    return row_ops(torch.device("cpu"), torch.float32)


def norm(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def close(found: Tensor, expected: Tensor) -> None:
    bound = 1e-5 if found.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("n", [5, 16, 48, 70])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(ops: TorchRows, rows: int, n: int, dtype: torch.dtype) -> None:
    x, y, moe = (draw(rows, n, seed=s).to(dtype) for s in range(3))
    a, b, c = (draw(n, seed=s) for s in range(3, 6))
    close(ops.norm(x, a, EPS, torch.float32), norm(x, a))
    assert ops.norm(x, None, EPS, dtype).dtype == dtype
    total, first, second, third = ops.residual(x, y, a, EPS, b, c, a)
    close(total, x.double() + norm(y, a))
    assert third.dtype == torch.float32
    close(third, norm(total, a))
    close(first, norm(total, b))
    assert second is not None
    close(second, norm(total, c))
    plain = ops.residual(x, y, a, EPS, b, None, None)
    assert plain[2] is None
    close(plain[3], norm(total))
    close(ops.combine(x, y, moe, a, b, EPS, 0.5), (x.double() + norm(y.double() + norm(moe, a), b)) * 0.5)
    close(ops.combine(x, y, None, None, b, EPS, 2.0), (x.double() + norm(y, b)) * 2)


@pytest.mark.parametrize(("k_eq_v", "value_norm"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("size", [6, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads(ops: TorchRows, size: int, k_eq_v: bool, value_norm: bool, dtype: torch.dtype) -> None:
    rows, queries, keys = 3, 4, 2
    projected = draw(rows, (queries + keys * (1 if k_eq_v else 2)) * size)
    weight, angles = draw(queries + keys, size), draw(rows, size // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1).unsqueeze(1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).unsqueeze(1)
    turned, values = ops.heads(projected, weight, keys, value_norm, cos, sin, EPS, dtype)
    plain = projected.view(rows, -1, size)
    heads = norm(plain)
    scaled = heads[:, : queries + keys] * weight
    left, right = scaled.chunk(2, -1)
    c, s = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    close(turned, torch.cat((left * c - right * s, right * c + left * s), -1))
    close(values, (heads if value_norm else plain.double())[:, -keys:])
    assert turned.dtype == values.dtype == dtype


@pytest.mark.parametrize("n", [3, 16, 45])
def test_gated(ops: TorchRows, n: int) -> None:
    x = 4 * draw(5, 2 * n)
    gate, up = x.double().chunk(2, -1)
    close(ops.gated(x), torch.nn.functional.gelu(gate, approximate="tanh") * up)


def test_gelu_at_its_ends(ops: TorchRows) -> None:
    """No overflow on the way: 0 far below, x far above."""
    gate = torch.tensor([[-1e4, -50.0, -10.0, 0.0, 10.0, 50.0, 1e4, 1e10]])
    found = ops.gated(torch.cat((gate, torch.ones_like(gate)), -1))
    close(found[:, :4], torch.zeros(1, 4, dtype=torch.float64))
    assert torch.equal(found[:, 4:], gate[:, 4:])


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (11, 3), (128, 8), (5, 5)])
def test_choose(ops: TorchRows, experts: int, k: int) -> None:
    scores, scale = draw(6, experts), draw(experts)
    index, weights = ops.choose(scores, k, scale)
    best, expected = scores.double().topk(k)
    assert torch.equal(index, expected)
    close(weights, torch.softmax(best, -1) * scale[expected])


@needs_kernels
def test_choose_takes_the_first_of_equals_and_numbers_before_nan() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0], [torch.nan, 0.0, torch.nan, -1.0]])
    assert row_ops(torch.device("cpu"), torch.float32).choose(scores, 3, torch.ones(4))[0].tolist() == [
        [1, 2, 0],
        [1, 3, 0],
    ]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_see_their_neighbours(dtype: torch.dtype) -> None:
    ops = row_ops(torch.device("cpu"), dtype)
    x, y, a = draw(40, 70).to(dtype), draw(40, 70, seed=1).to(dtype), draw(70)
    whole = ops.residual(x, y, a, EPS, a, a, a)
    for row in (0, 17, 39):
        part = slice(row, row + 1)
        alone = ops.residual(x[part], y[part], a, EPS, a, a, a)
        for one, many in zip(alone, whole, strict=True):
            assert one is not None
            assert many is not None
            assert torch.equal(one[0], many[row])
        assert torch.equal(ops.norm(x[part], a, EPS, dtype)[0], ops.norm(x, a, EPS, dtype)[row])


def test_where_the_kernels_are_used() -> None:
    assert type(row_ops(torch.device("meta"), torch.float32)) is TorchRows
    assert type(row_ops(torch.device("cpu"), torch.float16)) is TorchRows
    assert (type(row_ops(torch.device("cpu"), torch.bfloat16)) is TorchRows) is (BUILT is None)


def linear(out_features: int, in_features: int, format: str, seed: int = 0) -> Linear:
    return Linear(quantize(draw(out_features, in_features, seed=seed) / in_features**0.5, format))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("formats", [("int4", "int4"), ("int8", "bfloat16"), ("int4", "int8")])
@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stretches_of_a_layer(
    rows: int, formats: tuple[str, str], value_norm: bool, dtype: torch.dtype
) -> None:
    """In one call what the single steps give; formats that do not go together take the single steps."""
    fast, slow = row_ops(torch.device("cpu"), dtype), TorchRows()
    hidden, size, queries, keys = 70, 16, 4, 2
    parts = [linear((queries, keys, keys)[i] * size, hidden, formats[i % 2], i).parts[0] for i in range(3)]
    projections, output = Linear(*parts), linear(hidden, queries * size, formats[0])
    routing = Routing(draw(hidden), linear(11, hidden, "float32"), 3, draw(11))
    x, attended = draw(rows, hidden).to(dtype), draw(rows, queries * size).to(dtype)
    a, b, c, weight = draw(hidden), draw(hidden, seed=1), draw(hidden, seed=2), draw(queries + keys, size)
    cos, sin = draw(rows, 1, size), draw(rows, 1, size, seed=1)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
    for found, expected in zip(
        fast.attention_in(x, a, EPS, projections, weight, keys, value_norm, cos, sin),
        slow.attention_in(x, a, EPS, projections, weight, keys, value_norm, cos, sin),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, **tolerance)
    *sums, chosen, _ = fast.attention_out(attended, output, x, a, EPS, b, c, routing)
    *expected_sums, expected_chosen, _ = slow.attention_out(attended, output, x, a, EPS, b, c, routing)
    for found, expected in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
    assert chosen is not None
    assert expected_chosen is not None
    if dtype == torch.float32:
        assert torch.equal(chosen[0], expected_chosen[0])
        torch.testing.assert_close(chosen[1], expected_chosen[1], atol=1e-4, rtol=1e-4)
    assert fast.attention_out(attended, output, x, a, EPS, b, None, None)[2:] == (None, None, None)
    gate_up, down = linear(2 * 45, hidden, formats[0]), linear(hidden, 45, formats[1])
    for norm in (a, None):
        dense = Dense(gate_up, down, norm, EPS)
        whole = fast.mlp(x, dense)
        torch.testing.assert_close(whole, slow.mlp(x, dense), **tolerance)
        for gives_way in (False, True):
            *_, choice, begun = fast.attention_out(
                attended, output, x, a, EPS, b, c, routing, dense, gives_way
            )
            assert torch.equal(choice[0], chosen[0])
            if not dense.fuses:
                assert begun is None
                continue
            again = fast.mlp(x, dense)  # meanwhile the team is taken
            assert torch.equal(again, whole)
            assert torch.equal(fast.end_mlp(begun), fast.mlp(sums[1], dense))


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_a_dense_network_begun_beside_gives_the_same(rows: int, threads: int) -> None:
    """Large enough for threads to share it."""
    ops, before = row_ops(torch.device("cpu"), torch.float32), torch.get_num_threads()
    hidden = 512
    output, down = linear(hidden, 64, "int4"), linear(hidden, 512, "int8")
    dense = Dense(linear(1024, hidden, "int8"), down, draw(hidden), EPS)
    x, attended, scale = draw(rows, hidden), draw(rows, 64), draw(hidden)
    torch.set_num_threads(threads)
    try:
        for gives_way in (False, True):
            _, given, _, _, begun = ops.attention_out(
                attended, output, x, scale, EPS, scale, None, None, dense, gives_way
            )
            assert begun is not None
            assert torch.equal(ops.end_mlp(begun), ops.mlp(given, dense))
    finally:
        torch.set_num_threads(before)


def test_missing_memory_is_told_with_the_rows_that_wanted_it() -> None:
    done(0, 512)
    with pytest.raises(CapacityError, match="512 rows"):
        done(-1, 512)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_others_go_on_while_an_answer_is_read(rows: int, threads: int) -> None:
    ops, before = row_ops(torch.device("cpu"), torch.float32), torch.get_num_threads()
    hidden, (file, other) = 512, os.pipe()
    output, x, attended, scale = linear(hidden, 64, "int4"), draw(rows, hidden), draw(rows, 64), draw(hidden)
    dense = Dense(linear(1024, hidden, "int8"), linear(hidden, 512, "int8"), scale, EPS)
    torch.set_num_threads(threads)
    try:
        for come in (False, True):
            if come:
                os.write(other, b"x")
            _, given, _, _, begun = ops.attention_out(
                attended, output, x, scale, EPS, scale, None, None, dense
            )
            assert begun is not None
            assert ops.mlp_until(begun, file) is (come and threads > 1)
            assert torch.equal(ops.end_mlp(begun), ops.mlp(given, dense))
    finally:
        torch.set_num_threads(before)
        os.close(file)
        os.close(other)
