from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer.transport.buffers import BufferPool, aligned
from splitinfer.transport.tensors import Tensor


def address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


@pytest.mark.parametrize(("nbytes", "rounded"), [(0, 0), (1, 64), (63, 64), (64, 64), (65, 128)])
def test_rounding(nbytes: int, rounded: int) -> None:
    assert aligned(nbytes) == rounded


@pytest.mark.parametrize("nbytes", [0, 1, 64, 4096, 4097, 65536, 1_000_003])
def test_what_is_lent_is_aligned_writable_and_of_the_size_asked_for(nbytes: int) -> None:
    view = BufferPool().take(nbytes)
    assert view.nbytes == nbytes
    assert not view.readonly
    assert nbytes == 0 or address(view) % 64 == 0


MAKERS: dict[str, Callable[[memoryview], Any]] = {
    "memoryview": lambda view: view[10:20].cast("h"),
    "frombuffer": lambda view: np.frombuffer(view, np.uint8)[5:],
    "ndarray": lambda view: np.ndarray((10, 10), np.int16, view)[3:, 2:],
    "asarray": lambda view: np.asarray(view).reshape(2, -1).T,
    "torch": lambda view: torch.from_numpy(np.ndarray((50,), np.int16, view)).view(torch.bfloat16)[7:],
    "frombuffer of torch": lambda view: torch.frombuffer(view, dtype=torch.int16).view(10, -1)[4],
    "Tensor": lambda view: Tensor("int16", (view.nbytes // 2,), view),
}


@pytest.mark.parametrize("make", MAKERS)
def test_whatever_is_made_from_a_buffer_keeps_it(make: str) -> None:
    pool = BufferPool()
    made = MAKERS[make](pool.take(4000))
    assert pool.lent == 1
    assert pool.free_nbytes == 0
    del made
    gc.collect()
    assert pool.lent == 0
    assert pool.free_nbytes >= 4000


def test_a_buffer_comes_back_when_the_last_view_dies() -> None:
    pool = BufferPool()
    view = pool.take(100_000)
    place = address(view)
    part = view[64:128]
    array = np.frombuffer(part, np.int16)
    tensor = torch.from_numpy(array)[2:]
    del view, part, array
    assert pool.lent == 1
    assert pool.free_nbytes == 0
    del tensor
    gc.collect()
    assert pool.lent == 0
    assert pool.free_nbytes >= 100_000
    assert address(pool.take(99_000)) == place


def test_two_at_once_do_not_share_memory() -> None:
    pool = BufferPool()
    first, second = pool.take(1000), pool.take(1000)
    first[:] = b"a" * 1000
    second[:] = b"b" * 1000
    assert bytes(first) == b"a" * 1000


def test_no_more_is_kept_than_allowed_and_old_sizes_make_way() -> None:
    pool = BufferPool(keep_nbytes=300_000)
    views = [pool.take(131_072) for _ in range(2)]
    del views
    assert pool.free_nbytes == 262_144
    del_me = pool.take(65_536)
    del del_me
    assert pool.free_nbytes == 65_536
    del_me = pool.take(1_000_000)
    del del_me
    assert pool.free_nbytes == 65_536


def test_rounding_up_wastes_a_quarter_at_most() -> None:
    pool = BufferPool()
    for nbytes in (5000, 65_537, 300_000, 5_000_000):
        before = pool.free_nbytes
        view = pool.take(nbytes)
        del view
        assert nbytes <= pool.free_nbytes - before <= 1.25 * nbytes
