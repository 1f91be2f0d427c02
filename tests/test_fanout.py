"""Rows divided among nodes: every expert asked for exactly once in every slice; sums put together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitinfer import transport
from splitinfer.fanout import Owner, Partial, Rows, add_partials, divide, divide_by

EXPERTS, HIDDEN = 9, 4


def block(rows: int, k: int, seed: int) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    index = torch.rand(rows, EXPERTS, generator=draw).topk(k).indices.to(torch.int16)
    return Rows(torch.randn(rows, HIDDEN, generator=draw), index, torch.rand(rows, k, generator=draw))


def read(array: object) -> torch.Tensor:
    return array.torch() if isinstance(array, transport.Tensor) else torch.as_tensor(array)


def sums(values: torch.Tensor) -> transport.Tensor:
    data = memoryview(bytearray(bytes(values.contiguous().view(torch.uint8).numpy())))
    return transport.Tensor(str(values.dtype).removeprefix("torch."), tuple(values.shape), data)


owners = st.lists(
    st.lists(st.integers(0, 3), min_size=EXPERTS, max_size=EXPERTS), min_size=1, max_size=2
).map(
    lambda slices: np.array([[node + 4 * n for node in row] for n, row in enumerate(slices)], dtype=np.int16)
)


@given(owners, st.integers(1, 5), st.integers(1, 4), st.integers(0, 100))
def test_every_expert_is_asked_for_once_in_every_slice(
    table: np.ndarray, rows: int, k: int, seed: int
) -> None:
    wire = block(rows, k, seed)
    shares = divide(Owner(table), wire)
    assert [share.node for share in shares] == sorted({share.node for share in shares})
    asked = np.full((len(table), rows, k), -1)
    for share in shares:
        places = np.arange(rows) if share.rows is None else share.rows
        assert share.experts.dtype == np.int16
        assert (share.experts >= 0).any(axis=1).all() or share.rows is None
        for at, row in enumerate(places):
            assert torch.equal(read(share.tensors[0])[at], wire.x[row])
            assert torch.equal(read(share.tensors[2])[at], torch.from_numpy(wire.weights[row]))
            for place, expert in enumerate(share.experts[at]):
                if expert >= 0:
                    slice_ = table[:, expert].tolist().index(share.node)
                    assert asked[slice_, row, place] == -1
                    asked[slice_, row, place] = expert
    assert (asked == wire.top_k_index).all()


@given(owners, st.integers(1, 4), st.integers(0, 100))
def test_one_row_is_divided_as_many_are(table: np.ndarray, k: int, seed: int) -> None:
    wire = block(1, k, seed)
    quick, general = divide(Owner(table), wire), divide_by(table[:, wire.top_k_index], wire)
    assert [(s.node, s.experts.tolist()) for s in quick] == [(s.node, s.experts.tolist()) for s in general]


def test_nobody_to_ask_is_left_out() -> None:
    wire = block(2, 3, 0)
    nobody = np.full((1, EXPERTS), -1, dtype=np.int16)
    assert divide(Owner(nobody), wire) == []
    assert divide_by(nobody[:, wire.top_k_index], wire) == []


def test_partial_sums_are_added_in_node_order_and_rounded_once() -> None:
    x = torch.zeros(3, HIDDEN, dtype=torch.bfloat16)
    a, b = torch.randn(3, HIDDEN), torch.randn(2, HIDDEN)
    c = torch.randn(3, HIDDEN)
    rows = np.array([0, 2])
    expected = a.clone()
    expected[[0, 2]] += b
    expected += c
    partials = [Partial(7, None, sums(c)), Partial(1, None, sums(a)), Partial(3, rows, sums(b))]
    assert torch.equal(add_partials(partials, x), expected.to(torch.bfloat16))
    some = add_partials([Partial(1, rows, sums(b))], x)
    assert torch.equal(some[[0, 2]], b.to(torch.bfloat16))
    assert not some[1].any()
    assert torch.equal(add_partials([Partial(1, None, sums(a))], a.float()), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_kernel_adds_as_pytorch_does(
    rows: int, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [torch.randn(rows, 70) * 10.0**n for n in range(count)]
    x = torch.empty(rows, 70, dtype=dtype)
    partials = [Partial(node, None, sums(part)) for node, part in reversed(list(enumerate(parts)))]
    found = add_partials(partials, x)
    monkeypatch.setattr("splitinfer.fanout.row_kernels", lambda: None)
    assert torch.equal(found, add_partials(partials, x))


@pytest.mark.parametrize("hidden", [4, 40_000])  # copied, and as it lies
def test_an_answer_that_is_whole_is_taken_as_it_is(hidden: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        answer = torch.randn(1, hidden).to(dtype)
        assert torch.equal(add_partials([Partial(0, None, sums(answer))], answer), answer)
