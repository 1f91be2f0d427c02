from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer.errors import LimitExceeded, LocalProtocolError
from splitinfer.transport.frames import CHUNK_NBYTES, DATA, HEAD, PING, REPLY, REQUEST, Limits, pack_frame
from splitinfer.transport.outbox import JOIN_NBYTES, Outbox
from splitinfer.transport.tensors import Tensor


def drained(outbox: Outbox, step: int = 1 << 30) -> bytes:
    """Everything that waits, taken `step` bytes at a time."""
    data = bytearray()
    while pieces := outbox.pieces():
        joined = b"".join(pieces)[:step]
        outbox.sent(len(joined))
        data += joined
    assert outbox.nbytes == 0
    return bytes(data)


def kinds(data: bytes) -> list[tuple[int, int, int]]:
    """(kind, id, bytes of body) of each frame."""
    found, at = [], 0
    while at < len(data):
        _, kind, _, id, table, meta, body, _ = HEAD.unpack_from(data, at)
        found.append((kind, id, body))
        at += ((HEAD.size + table + meta + 63) & -64) + body
    assert at == len(data)
    return found


def bulk(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.arange(nbytes, dtype=np.uint32).astype(np.uint8)


def test_the_callers_own_memoryview_is_what_goes_to_the_kernel() -> None:
    outbox = Outbox(Limits())
    mine = memoryview(bytearray(100_000))
    outbox.send(REPLY, 1, "", [Tensor("uint8", (100_000,), mine)], {})
    assert any(piece is mine for piece in outbox.pieces())


@pytest.mark.parametrize("nbytes", [JOIN_NBYTES + 1, CHUNK_NBYTES, CHUNK_NBYTES + 1, 5_000_000])
def test_every_byte_of_a_large_tensor_goes_from_where_it_lies(nbytes: int) -> None:
    array = bulk(nbytes)
    outbox = Outbox(Limits())
    outbox.send(REPLY, 1, "", [array], {})
    first = array.ctypes.data
    covered = 0
    while pieces := outbox.pieces():
        for piece in pieces:
            at = np.frombuffer(piece, np.uint8).ctypes.data if len(piece) else 0
            if first <= at < first + nbytes:
                assert at == first + covered
                covered += len(piece)
        outbox.sent(sum(map(len, pieces)))
    assert covered == nbytes


def test_queueing_a_large_tensor_allocates_next_to_nothing() -> None:
    tensor = torch.zeros(64 << 20, dtype=torch.uint8)
    outbox = Outbox(Limits())
    tracemalloc.start()
    outbox.send(REPLY, 1, "", [tensor], {})
    while pieces := outbox.pieces():
        outbox.sent(sum(map(len, pieces)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_small_message_is_one_piece() -> None:
    outbox = Outbox(Limits())
    for _ in range(2):  # the first one of its shape goes the careful way
        outbox.send(REPLY, 1, "", [bulk(5632), np.float32(1), torch.ones(3, dtype=torch.bfloat16)], {"n": 1})
        assert len(outbox.pieces()) == 1
        drained(outbox)


def tensors_alike() -> list[list[Any]]:
    """Arrays of one shape and dtype, some of which cannot be taken as they lie."""
    base = np.arange(12, dtype=np.int32)
    return [
        [base.reshape(3, 4)],
        [base.reshape(4, 3).T],
        [torch.from_numpy(base.reshape(3, 4))],
        [torch.from_numpy(base.reshape(4, 3)).t()],
        [base.reshape(3, 4).astype(">i4")],
        [Tensor("int32", (3, 4), memoryview(base).cast("B"))],
        [np.ascontiguousarray(base.reshape(4, 3).T)],
    ]


def test_the_short_way_and_the_careful_one_send_the_same() -> None:
    """Whatever was sent before with the same dtype and shape."""
    fresh = []
    for tensors in tensors_alike():
        outbox = Outbox(Limits())
        outbox.send(REQUEST, 5, "m", tensors, {"layer": 1}, 77)
        fresh.append(drained(outbox))
    assert len(set(fresh)) == 2
    outbox = Outbox(Limits())
    for _ in range(2):
        for tensors, expected in zip(tensors_alike(), fresh, strict=True):
            outbox.send(REQUEST, 5, "m", tensors, {"layer": 1}, 77)
            assert drained(outbox) == expected


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("nbytes", [127, 129, 64, 0])
def test_a_tensor_whose_data_does_not_fit_its_shape_is_not_sent(first: bool, nbytes: int) -> None:
    outbox = Outbox(Limits())
    if not first:
        outbox.send(REPLY, 1, "", [Tensor("uint8", (128,), memoryview(bytes(128)))], {})
        drained(outbox)
    with pytest.raises(LocalProtocolError, match="size"):
        outbox.send(REPLY, 1, "", [Tensor("uint8", (128,), memoryview(bytes(nbytes)))], {})
    assert outbox.nbytes == 0
    assert outbox.pieces() == []


def test_small_messages_pass_between_the_pieces_of_large_ones() -> None:
    outbox = Outbox(Limits())
    outbox.send(REPLY, 1, "", [bulk(3 * CHUNK_NBYTES)], {})
    outbox.send(REPLY, 2, "", [bulk(2 * CHUNK_NBYTES)], {})
    data = bytearray()
    pings = iter((10, 11, 12))
    while pieces := outbox.pieces():
        joined = b"".join(pieces)
        assert len(joined) <= CHUNK_NBYTES + 128
        outbox.sent(len(joined))
        data += joined
        if len(joined) > 64 and (number := next(pings, 0)):
            outbox.add(0, pack_frame(PING, number))
    assert kinds(bytes(data)) == [
        (REPLY, 1, CHUNK_NBYTES),
        (PING, 10, 0),
        (REPLY, 2, CHUNK_NBYTES),
        (PING, 11, 0),
        (DATA, 1, CHUNK_NBYTES),
        (PING, 12, 0),
        (DATA, 2, CHUNK_NBYTES),
        (DATA, 1, CHUNK_NBYTES),
    ]


def test_messages_of_one_id_keep_their_order() -> None:
    outbox = Outbox(Limits())
    outbox.send(REPLY, 1, "", [bulk(CHUNK_NBYTES + 64)], {})
    outbox.send(REPLY, 1, "", [bulk(64)], {})
    outbox.send(REPLY, 1, "", [bulk(CHUNK_NBYTES + 128)], {})
    outbox.add(1, pack_frame(PING, 5))
    outbox.send(REPLY, 2, "", [bulk(640)], {})
    assert kinds(drained(outbox)) == [
        (REPLY, 2, 640),
        (REPLY, 1, CHUNK_NBYTES),
        (DATA, 1, 64),
        (REPLY, 1, 64),
        (REPLY, 1, CHUNK_NBYTES),
        (DATA, 1, 128),
        (PING, 5, 0),
    ]


@pytest.mark.parametrize("step", [1, 63, 64, 5000, 100_000])
def test_the_kernel_may_take_any_part(step: int) -> None:
    def filled() -> Outbox:
        outbox = Outbox(Limits())
        outbox.send(REPLY, 1, "", [bulk(20_000), bulk(0), bulk(7)], {})
        outbox.send(REPLY, 2, "", [bulk(CHUNK_NBYTES + 1 if step > 100 else 100)], {})
        outbox.add(0, pack_frame(PING))
        return outbox

    outbox = filled()
    assert drained(outbox, step) == drained(filled())
    assert outbox.sent_nbytes > 20_000


def test_what_waits_is_counted() -> None:
    outbox = Outbox(Limits())
    outbox.send(REPLY, 1, "", [bulk(CHUNK_NBYTES * 2)], {})
    outbox.send(REPLY, 1, "", [bulk(100)], {})
    outbox.send(REPLY, 2, "", [bulk(100)], {})
    expected = outbox.nbytes
    sent = 0
    while pieces := outbox.pieces():
        nbytes = len(pieces[0])
        outbox.sent(nbytes)
        sent += nbytes
    assert sent == expected + 64  # the head of the one DATA frame
    assert outbox.sent_nbytes == sent


def test_dropping_a_large_body() -> None:
    outbox = Outbox(Limits())
    outbox.send(REPLY, 1, "", [bulk(3 * CHUNK_NBYTES)], {})
    assert outbox.drop(1) is True
    assert outbox.drop(1) is None
    assert outbox.nbytes == 0
    outbox.send(REPLY, 2, "", [bulk(3 * CHUNK_NBYTES)], {})
    outbox.send(REPLY, 2, "", [bulk(10)], {})
    begun = b"".join(outbox.pieces())[:1000]
    outbox.sent(1000)
    assert outbox.drop(2) is False
    assert kinds(begun + drained(outbox)) == [(REPLY, 2, CHUNK_NBYTES)]


def test_more_than_the_peer_buffers_is_not_queued() -> None:
    outbox = Outbox(Limits(max_buffered=500_000))
    outbox.send(REPLY, 1, "", [bulk(300_000)], {})
    with pytest.raises(LimitExceeded) as caught:
        outbox.send(REPLY, 2, "", [bulk(300_000)], {})
    assert caught.value.limit_name == "max_buffered"
    drained(outbox)
    outbox.send(REPLY, 2, "", [bulk(300_000)], {})


def test_limits_hold_on_the_short_way_too() -> None:
    outbox = Outbox(Limits(max_meta=100))
    outbox.send(REPLY, 1, "", [bulk(10)], {"a": 1})
    drained(outbox)
    with pytest.raises(LimitExceeded, match="max_meta"):
        outbox.send(REPLY, 1, "", [bulk(10)], {"a": "x" * 200})
    with pytest.raises(LocalProtocolError, match="meta"):
        outbox.send(REPLY, 1, "", [bulk(10)], {"a": object()})
    assert outbox.nbytes == 0
