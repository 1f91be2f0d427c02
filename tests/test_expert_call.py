"""Expert calls as they arrive: read once with care, and afterwards at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from splitinfer.errors import UsageError
from splitinfer.expert_call import ExpertCalls
from splitinfer.placement import Holding
from splitinfer.transport import Tensor
from splitinfer.transport.frames import REQUEST
from splitinfer.transport.messages import Call

HIDDEN, TOP_K = 8, 3


def call(layer: Any = 1, out: Any = "float32", rows: int = 2, width: int = HIDDEN) -> Call:
    x = np.arange(rows * width, dtype=np.float32)
    index = np.full((rows, TOP_K), 2, np.int16)
    weights = np.ones((rows, TOP_K), np.float32)
    tensors = [
        Tensor("float32", (rows, width), memoryview(bytearray(x.tobytes()))),
        Tensor("int16", index.shape, memoryview(bytearray(index.tobytes()))),
        Tensor("float32", weights.shape, memoryview(bytearray(weights.tobytes()))),
    ]
    return Call(REQUEST, 1, 0, {"layer": layer, "out": out}, tensors, "experts", 0)


def calls() -> ExpertCalls:
    return ExpertCalls(HIDDEN, Holding("f" * 64, (0, 1), (0, 1, 2), "float32"))


def test_what_is_read_is_what_came() -> None:
    given, reader = call(), calls()
    for _ in range(2):  # with care, and as one like one before
        request = reader.read(given)
        assert (request.layer, request.out, request.shape) == (1, "float32", (2, HIDDEN))
        assert (request.dtype, request.out_dtype) == (torch.float32, torch.float32)
        assert request.x is given.tensors[0].data
        assert request.weights is given.tensors[2].data
        assert request.top_k_index is given.tensors[1].data
        assert request.places == (2, TOP_K)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layer": 2}, "does not hold layer 2"),
        ({"layer": [1]}, r"does not hold layer \[1\]"),
        ({"out": "int8"}, "in 'int8'"),
        ({"out": ["float32"]}, "cannot answer"),
        ({"width": HIDDEN + 1}, "x is float32"),
    ],
)
def test_what_is_wrong_is_refused_every_time(wrong: dict[str, Any], message: str) -> None:
    reader = calls()
    reader.read(call())
    for _ in range(2):
        with pytest.raises(UsageError, match=message):
            reader.read(call(**wrong))


def test_a_missing_tensor_is_refused() -> None:
    given, reader = call(), calls()
    reader.read(given)
    given.tensors = given.tensors[:2]
    with pytest.raises(UsageError, match="3 tensors, not 2"):
        reader.read(given)


def test_many_kinds_of_calls_take_no_more_memory() -> None:
    reader = calls()
    for rows in range(1, 1000):
        assert reader.read(call(rows=rows)).shape == (rows, HIDDEN)
    assert len(reader._known) <= 256
