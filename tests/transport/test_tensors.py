from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from splitinfer.errors import LocalProtocolError, RemoteProtocolError
from splitinfer.transport.tensors import (
    DTYPE_BY_CODE,
    DTYPES,
    Tensor,
    TensorSpec,
    data_of,
    is_plain,
    joinable,
    spec_of,
)


def test_the_table_agrees_with_numpy_and_torch() -> None:
    for row in DTYPES.values():
        assert DTYPE_BY_CODE[row.code] is row
        assert getattr(torch, row.name).itemsize == row.itemsize
        if row.numpy is not None:
            assert row.numpy.itemsize == row.itemsize
    assert len(DTYPE_BY_CODE) == len(DTYPES)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float16).reshape(2, 3),
        torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        torch.arange(6).view(2, 3).to(torch.float8_e5m2),
        np.array([True, False]),
    ],
)
def test_data_is_the_arrays_own_memory(array: Any) -> None:
    data = data_of(array)
    assert (data.format, data.ndim, data.nbytes) == ("B", 1, array.nbytes)
    there = array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data
    assert np.frombuffer(data, np.uint8).ctypes.data == there


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (np.arange(6).reshape(2, 3).T, [0, 3, 1, 4, 2, 5]),
        (np.arange(3, dtype=">i8"), [0, 1, 2]),
        (torch.arange(6).view(2, 3).t(), [0, 3, 1, 4, 2, 5]),
        (np.arange(9)[::-4], [8, 4, 0]),
    ],
)
def test_what_is_not_contiguous_or_foreign_is_made_so(array: Any, values: list[int]) -> None:
    assert np.frombuffer(data_of(array), "<i8").tolist() == values


def test_views_with_a_sign_or_conjugation_pending_are_resolved() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert np.frombuffer(data_of(z.conj()), np.complex64).tolist() == [1 - 2j, 3 + 4j]
    one = z.conj()[:1].imag
    assert one.is_neg()
    assert np.frombuffer(data_of(one), np.float32).tolist() == [-2]
    assert np.frombuffer(joinable(one), np.float32).tolist() == [-2]
    assert not is_plain(z)


def test_gradients_and_single_numbers() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert np.frombuffer(data_of(weight), np.float32).tolist() == [1, 1, 1]
    assert np.frombuffer(joinable(torch.tensor(2.5)), np.float32).tolist() == [2.5]
    assert spec_of(np.float32(1.5)) == TensorSpec(DTYPES["float32"], ())
    assert np.frombuffer(data_of(np.float32(1.5)), np.float32).tolist() == [1.5]


@pytest.mark.parametrize("array", [np.zeros((0, 3)), torch.zeros(2, 0), np.empty((3, 0, 2), ">f4")])
def test_empty_arrays_have_no_bytes(array: Any) -> None:
    assert data_of(array).nbytes == 0
    assert b"".join((joinable(array),)) == b""


@pytest.mark.parametrize(
    "array",
    [
        [1, 2],
        3.5,
        "text",
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        np.array(["a"]).tolist(),
    ],
)
def test_what_cannot_be_sent_is_named(array: Any) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        data_of(array)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "array", [np.array(["a"]), np.array([None]), np.zeros(2, "M8[s]"), np.zeros(2, "i4,f4")]
)
def test_dtypes_outside_the_table_are_named(array: Any) -> None:
    with pytest.raises(LocalProtocolError, match="not in the wire's table"):
        spec_of(array)


def test_numpy_refuses_what_it_lacks_and_says_the_way_out() -> None:
    for dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        with pytest.raises(LocalProtocolError, match=dtype) as caught:
            Tensor(dtype, (4,), memoryview(bytearray(8))).numpy()
        assert "torch()" in caught.value.remedy


def test_views_share_the_buffer() -> None:
    buffer = bytearray(16)
    tensor = Tensor("int16", (2, 4), memoryview(buffer))
    tensor.numpy()[0, 0] = 7
    assert tensor.torch()[0, 0] == 7
    tensor.torch()[1, 3] = -1
    assert buffer[0] == 7
    assert buffer[-1] == 255
    assert tensor.nbytes == 16
    half = Tensor("bfloat16", (8,), memoryview(buffer)).torch()
    half[0] = 1.0
    assert bytes(buffer[:2]) == b"\x80\x3f"


def test_a_readonly_tensor_is_not_written_through() -> None:
    data = bytes(4)
    tensor = Tensor("uint8", (4,), memoryview(data)).torch()
    tensor[0] = 1
    assert data == bytes(4)


def test_a_bool_is_zero_or_one() -> None:
    tensor = Tensor("bool", (3,), memoryview(bytearray(b"\0\1\2")))
    for view in (tensor.numpy, tensor.torch):
        with pytest.raises(RemoteProtocolError, match="bool"):
            view()
