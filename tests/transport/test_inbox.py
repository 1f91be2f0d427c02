"""Every frame whole, byte by byte, and with a tail; bodies in pieces; nothing lands in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.errors import RemoteProtocolError, VersionMismatch
from splitinfer.transport.buffers import BufferPool
from splitinfer.transport.frames import (
    CANCEL,
    CHUNK_NBYTES,
    CREDIT,
    DATA,
    END,
    ERROR,
    GOAWAY,
    HEAD,
    HELLO,
    ITEM,
    LARGE_CHUNK_NBYTES,
    MAGIC,
    PING,
    PONG,
    REPLY,
    REQUEST,
    WELCOME,
    Limits,
    pack_frame,
    pack_map,
    pack_table,
)
from splitinfer.transport.inbox import SLAB_NBYTES, SMALL_NBYTES, Inbox
from splitinfer.transport.messages import Message
from splitinfer.transport.outbox import Outbox
from splitinfer.transport.tensors import DTYPES, TensorSpec

UINT8 = DTYPES["uint8"]


def frames_of(*sends: tuple[Any, ...]) -> bytes:
    """The bytes of messages, each (kind, id, method, tensors, meta)."""
    outbox = Outbox(Limits())
    data = bytearray()
    for send in sends:
        outbox.send(*send)
        while pieces := outbox.pieces():
            joined = b"".join(pieces)
            outbox.sent(len(joined))
            data += joined
    return bytes(data)


def inbox_of(admit: Callable[[Message], bool] = lambda message: True, **settings: Any) -> Inbox:
    return Inbox(settings.pop("limits", Limits()), admit, **settings)


def put(inbox: Inbox, data: bytes, steps: Iterator[int] | None = None) -> list[Message]:
    steps = steps or repeat(1 << 30)
    messages = []
    rest = memoryview(data)
    while rest:
        nbytes = min(next(steps), len(inbox.buffer()), len(rest))
        assert nbytes
        inbox.buffer()[:nbytes] = rest[:nbytes]
        rest = rest[nbytes:]
        messages += inbox.received(nbytes)
    return messages


def ramp(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.arange(nbytes, dtype=np.uint32).astype(np.uint8)


def shape_of(message: Message) -> tuple[Any, ...]:
    return message.kind, message.id, message.value, message.method, message.meta


CASES = {
    "hello": pack_frame(HELLO, meta=pack_map({"agent": "x"}, 100)),
    "welcome": pack_frame(WELCOME, meta=pack_map({"info": {}}, 100)),
    "error": pack_frame(ERROR, 3, meta=pack_map({"code": "failed"}, 100)),
    "goaway": pack_frame(GOAWAY),
    "ping": pack_frame(PING, 9),
    "pong": pack_frame(PONG, 9),
    "end": pack_frame(END, 4),
    "cancel": pack_frame(CANCEL, 5),
    "credit": pack_frame(CREDIT, 5, value=3),
    "empty reply": frames_of((REPLY, 1, "", [], {})),
    "request without tensors": frames_of((REQUEST, 1, "m", [], {"a": 1}, 500)),
    "row": frames_of((REQUEST, 2, "experts", [ramp(5632), ramp(16), ramp(32)], {"layer": 3}, 500)),
    "item": frames_of((ITEM, 2, "", [np.zeros((0, 3)), ramp(1)], {})),
    "as large as a small one": frames_of((REPLY, 2, "", [ramp(SMALL_NBYTES)], {})),
    "larger": frames_of((REPLY, 2, "", [ramp(SMALL_NBYTES + 1)], {"n": 1})),
    "much meta": frames_of((REPLY, 2, "", [ramp(3)], {"text": "x" * 200_000})),
    "two pieces": frames_of((REPLY, 2, "", [ramp(CHUNK_NBYTES + 1)], {})),
    "three tensors over pieces": frames_of((REPLY, 2, "", [ramp(200_001)] * 3, {})),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [1 << 30, 4093, 64, 1])
def test_every_frame_whole_in_parts_and_byte_by_byte(name: str, step: int) -> None:
    if step == 1 and len(CASES[name]) > 70_000:
        step = 7  # the same cuts, in a second less
    whole = put(inbox_of(), CASES[name])
    parts = put(inbox_of(), CASES[name], repeat(step))
    assert len(whole) == len(parts) == 1
    assert shape_of(whole[0]) == shape_of(parts[0])
    for one, other in zip(whole[0].tensors, parts[0].tensors, strict=True):
        assert one.shape == other.shape
        assert bytes(one.data) == bytes(other.data)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tail", [1, 31, 32, 63, 64, 100])
def test_every_frame_with_a_tail(name: str, tail: int) -> None:
    following = CASES["row"]
    inbox = inbox_of()
    messages = put(inbox, CASES[name] + following[:tail])
    assert len(messages) == 1
    assert inbox.unfinished
    (second,) = put(inbox, following[tail:])
    assert second.id == 2
    assert (second.tensors[0].numpy() == ramp(5632)).all()
    assert not inbox.unfinished


@pytest.mark.parametrize("name", CASES)
def test_a_frame_seen_before_is_the_same_again(name: str) -> None:
    inbox = inbox_of()
    first, second, third = put(inbox, CASES[name] * 3, repeat(len(CASES[name])))
    assert shape_of(first) == shape_of(second) == shape_of(third)
    assert [bytes(t.data) for t in first.tensors] == [bytes(t.data) for t in third.tensors]


@pytest.mark.parametrize("kind", [REQUEST, REPLY])
def test_metas_of_frames_alike_are_not_mixed_up(kind: int) -> None:
    inbox = inbox_of()
    for number in (1, 2, 100, 1000, 7, 70_000, 1, 2):
        (message,) = put(inbox, frames_of((kind, number, "", [ramp(64)], {"n": number}, number)))
        assert (message.id, message.meta, message.value) == (number, {"n": number}, number)
    for meta in ({"layer": 3}, {"layers": [3]}, {}):
        for message in put(inbox, frames_of((kind, 1, "", [ramp(64)], meta, 500)) * 5):
            assert message.meta == meta
            message.meta["layer"] = 99
            for values in message.meta.values():
                if isinstance(values, list):
                    values.append(99)


def test_frames_alike_in_one_read() -> None:
    one, other = CASES["row"], CASES["request without tensors"]
    kinds = [one, one, one, other, one, other, other, CASES["ping"], one, one]
    messages = put(inbox_of(), b"".join(kinds))
    assert [message.method for message in messages] == [
        {one: "experts", other: "m"}.get(frame, "") for frame in kinds
    ]
    for message in messages:
        assert not message.tensors or bytes(message.tensors[0].data) == ramp(5632).tobytes()


def test_a_damaged_frame_behind_frames_alike() -> None:
    row = bytearray(CASES["row"])
    row[2] ^= 0xFF  # the version
    with pytest.raises(VersionMismatch):
        put(inbox_of(), CASES["row"] * 2 + bytes(row))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [0, 1, 63, 5632, SMALL_NBYTES, SMALL_NBYTES + 1, SLAB_NBYTES, CHUNK_NBYTES, 600_000]
            ),
            st.integers(0, 3),
            st.dictionaries(st.sampled_from("abc"), st.integers(0, 1000)),
        ),
        min_size=1,
        max_size=12,
    ),
    st.lists(st.sampled_from([1, 32, 63, 64, 65, 1000, 1448, 8192, 65_536, 1 << 30]), min_size=1, max_size=5),
)
def test_any_messages_in_any_steps(sizes: list[tuple[int, int, dict[str, int]]], steps: list[int]) -> None:
    if sum(size for size, _, _ in sizes) > 200_000:
        steps = [max(step, 1000) for step in steps]
    inbox = inbox_of(pool=BufferPool())
    sends = [
        (REPLY, number, "", [ramp(size)] + [ramp(number)] * more, meta)
        for number, (size, more, meta) in enumerate(sizes)
    ]

    def endless() -> Iterator[int]:
        while True:
            yield from steps

    messages = put(inbox, frames_of(*sends), endless())
    assert [message.id for message in messages] == list(range(len(sends)))
    for message, (_, _, _, tensors, meta) in zip(messages, sends, strict=True):
        assert message.meta == meta
        for received, sent in zip(message.tensors, tensors, strict=True):
            assert (received.numpy() == sent).all()
            assert received.numpy().ctypes.data % 64 == 0 or not received.nbytes
    assert not inbox.unfinished


def test_a_large_body_is_read_into_its_own_buffer() -> None:
    """What the reader is given is the tensor's memory, except for what came with the head."""
    pool = BufferPool()
    inbox = inbox_of(pool=pool)
    data = memoryview(frames_of((REPLY, 1, "", [ramp(3 * CHUNK_NBYTES)], {})))
    through_slab = 0
    targets = []
    messages: list[Message] = []
    while data:
        buffer = inbox.buffer()
        nbytes = min(len(buffer), len(data))
        if nbytes > SLAB_NBYTES:
            targets.append(np.frombuffer(buffer, np.uint8).ctypes.data)
        else:
            through_slab += nbytes
        buffer[:nbytes] = data[:nbytes]
        data = data[nbytes:]
        messages += inbox.received(nbytes)
    first = messages[0].tensors[0].numpy().ctypes.data
    assert all(first < target < first + 3 * CHUNK_NBYTES for target in targets)
    assert len(targets) == 3
    assert through_slab <= SLAB_NBYTES + 3 * 64


def test_pieces_of_two_bodies_and_small_frames_interleave() -> None:
    outbox = Outbox(Limits())
    outbox.send(REPLY, 1, "", [ramp(CHUNK_NBYTES * 2 + 5)], {})
    outbox.send(REPLY, 2, "", [ramp(CHUNK_NBYTES + 9)], {})
    data = bytearray()
    while pieces := outbox.pieces():
        joined = b"".join(pieces)
        outbox.sent(len(joined))
        data += joined + CASES["ping"]
    for step in (1 << 30, 1000):
        messages = put(inbox_of(), bytes(data), repeat(step))
        assert [message.kind for message in messages] == [PING, PING, PING, REPLY, PING, REPLY, PING]
        bodies = {message.id: message.tensors[0] for message in messages if message.kind == REPLY}
        assert (bodies[1].numpy() == ramp(CHUNK_NBYTES * 2 + 5)).all()
        assert (bodies[2].numpy() == ramp(CHUNK_NBYTES + 9)).all()


def test_pieces_are_long_only_while_the_kernel_takes_them_whole() -> None:
    outbox = Outbox(Limits())
    body = ramp(22 * CHUNK_NBYTES)
    outbox.send(REPLY, 1, "", [body], {})
    sizes, data = [], bytearray()
    while pieces := outbox.pieces():
        joined = b"".join(pieces)
        sizes.append(len(joined) // CHUNK_NBYTES)
        taken = len(joined)
        if len(sizes) == 6:
            taken //= 2  # the rest of this piece goes later
        if len(sizes) == 10:
            outbox.flow = 0  # the kernel took nothing at first
        outbox.sent(taken)
        data += joined[:taken]
    # The sixth is half of a long one, the seventh its other half.
    assert sizes == [1] * 4 + [4, 4, 2] + [1] * 3 + [1] * 4 + [3]
    for step in (1 << 30, 100_000):
        (message,) = put(inbox_of(), bytes(data), repeat(step))
        assert (message.tensors[0].numpy() == body).all()


@pytest.mark.parametrize("nbytes", [64, CHUNK_NBYTES - 64, CHUNK_NBYTES + 64, LARGE_CHUNK_NBYTES - 64])
def test_a_piece_of_another_size_is_refused(nbytes: int) -> None:
    """Many small ones would cost more than they bring, and each is a promise of what comes next."""
    data = frames_of((REPLY, 1, "", [ramp(4 * CHUNK_NBYTES)], {}))
    announced = len(data) - 3 * (64 + CHUNK_NBYTES)
    with pytest.raises(RemoteProtocolError, match=f"a piece of {nbytes} bytes"):
        put(inbox_of(), data[:announced] + pack_frame(DATA, 1, body_nbytes=nbytes))


def test_a_body_that_is_not_admitted_takes_no_memory_and_is_skipped() -> None:
    pool = BufferPool()
    inbox = inbox_of(lambda message: message.id != 1, pool=pool)
    before = pool.lent
    messages = put(inbox, frames_of((REQUEST, 1, "m", [ramp(5_000_000)], {})) + CASES["row"])
    assert [message.admitted for message in messages] == [False, None]
    assert messages[0].tensors == ()
    assert (messages[1].tensors[0].numpy() == ramp(5632)).all()
    del messages
    assert pool.lent == before


def test_skipping_does_not_write_over_tensors_alive() -> None:
    inbox = inbox_of(lambda message: message.id != 1)
    (row,) = put(inbox, CASES["row"])
    put(inbox, frames_of((REQUEST, 1, "m", [np.full(300_000, 255, np.uint8)], {})), repeat(7000))
    assert (row.tensors[0].numpy() == ramp(5632)).all()


@pytest.mark.parametrize("cut", [CHUNK_NBYTES // 2, CHUNK_NBYTES + 64, 2 * CHUNK_NBYTES + 100])
def test_a_body_that_is_dropped_half_way(cut: int) -> None:
    inbox = inbox_of()
    data = frames_of((REPLY, 1, "", [ramp(3 * CHUNK_NBYTES)], {}))
    assert put(inbox, data[:cut]) == []
    assert inbox.drop(1)
    assert not inbox.drop(2)
    # The piece under way is still to come; after it, anything but more of that body.
    start = len(
        pack_frame(
            REPLY,
            1,
            pack_table("", [(TensorSpec(UINT8, (3 * CHUNK_NBYTES,)), 0, 3 * CHUNK_NBYTES)], Limits()),
        )
    )
    piece_end = start + CHUNK_NBYTES
    while piece_end < cut:
        piece_end += 64 + CHUNK_NBYTES
    messages = put(inbox, data[cut:piece_end] + CASES["row"])
    assert [message.id for message in messages] == [2]
    assert not inbox.unfinished
    with pytest.raises(RemoteProtocolError, match="nothing announced"):
        put(inbox, pack_frame(DATA, 1, body_nbytes=64))


def head(
    kind: int = REQUEST, *, table: int = 0, meta: int = 0, body: int = 0, zero: int = 0, id: int = 1
) -> bytes:
    return HEAD.pack(MAGIC, kind, 0, id, table, meta, body, zero).ljust(64, b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".ljust(64),
        bytes(64),
        b"\xff" * 64,
        head(0),
        head(15),
        head(255),
        head(zero=1),
        head(table=(16 << 10) + 1),
        head(meta=(256 << 10) + 1),
        head(body=63),
        head(body=CHUNK_NBYTES + 64),
        head(body=64),  # with no table
        head(PING, table=1),
        head(PING, body=64),
        head(DATA, body=64),
        head(DATA, body=64, meta=1),
        head(table=1),  # a table that is no list
        pack_frame(
            REQUEST, 1, pack_table("m", [(TensorSpec(UINT8, (640,)), 0, 640)], Limits()), body_nbytes=64
        ),
        pack_frame(
            REQUEST, 1, pack_table("m", [(TensorSpec(UINT8, (64,)), 0, 64)], Limits()), body_nbytes=128
        ),
        pack_frame(REQUEST, 1, meta=b"\x01"),
        pack_frame(PING, 1, meta=b"\x90"),
    ],
)
def test_frames_that_break_a_rule(data: bytes) -> None:
    for step in (1 << 30, 1):
        inbox = inbox_of()
        with pytest.raises(RemoteProtocolError):
            put(inbox, data + bytes(4096), repeat(step))


def test_pieces_of_the_wrong_size() -> None:
    data = frames_of((REPLY, 1, "", [ramp(CHUNK_NBYTES + 640)], {}))
    inbox = inbox_of()
    put(inbox, data[: -(64 + 640)])
    with pytest.raises(RemoteProtocolError, match="640 are missing"):
        put(inbox, pack_frame(DATA, 1, body_nbytes=576))


@pytest.mark.parametrize("second", ["small", "large"])
def test_a_second_message_of_an_id_whose_body_is_under_way(second: str) -> None:
    inbox = inbox_of()
    put(inbox, frames_of((REPLY, 1, "", [ramp(CHUNK_NBYTES + 640)], {}))[: -(64 + 640)])
    with pytest.raises(RemoteProtocolError, match="before the one of the same id"):
        put(inbox, frames_of((REPLY, 1, "", [ramp(10 if second == "small" else 100_000)], {})))


def test_another_version_is_told_from_the_head_alone() -> None:
    data = bytearray(CASES["hello"])
    data[2] = 7
    for step in (1 << 30, 1):
        with pytest.raises(VersionMismatch) as caught:
            put(inbox_of(), bytes(data), repeat(step))
        assert (caught.value.ours, caught.value.theirs) == (1, 7)


def test_before_the_handshake_is_done_nothing_else_is_looked_at() -> None:
    for kind in range(5, 15):
        inbox = inbox_of()
        inbox.allow(Limits(max_meta=100), handshake_only=True)
        with pytest.raises(RemoteProtocolError, match=f"kind {kind}"):
            put(inbox, head(kind))


def test_an_encoded_tensor_without_a_codec() -> None:
    table = pack_table("", [(TensorSpec(UINT8, (640,)), 1, 64)], Limits())
    with pytest.raises(RemoteProtocolError, match="not agreed"):
        put(inbox_of(), pack_frame(REPLY, 1, table, body_nbytes=64) + bytes(64))


def test_slabs_go_back_to_the_pool() -> None:
    pool = BufferPool()
    inbox = inbox_of(pool=pool)
    kept = put(inbox, CASES["row"] * 100)[::25]
    assert pool.lent == 1 + len(kept)
    del kept
    assert pool.lent == 1
