from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitinfer.errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from splitinfer.transport.frames import (
    HEAD_NBYTES,
    MAGIC,
    PING,
    REQUEST,
    VERSION,
    Limits,
    pack_frame,
    pack_map,
    pack_table,
    unpack_map,
    unpack_table,
)
from splitinfer.transport.tensors import DTYPES, TensorSpec

LIMITS = Limits()
FLOAT32 = DTYPES["float32"].code


def test_the_head_is_as_documented() -> None:
    assert HEAD_NBYTES == 32
    frame = pack_frame(REQUEST, 0x0102030405060708, b"table", b"meta", 64, 0x0A0B0C0D)
    assert frame[:4] == b"SI\x01\x08"
    assert MAGIC[2] == VERSION == 1
    assert frame[4:8] == bytes.fromhex("0d0c0b0a")
    assert frame[8:16] == bytes.fromhex("0807060504030201")
    assert [int.from_bytes(frame[at : at + 4], "little") for at in (16, 20, 24, 28)] == [5, 4, 64, 0]
    assert frame[32:41] == b"tablemeta"
    assert frame[41:] == bytes(23)


@pytest.mark.parametrize("extra", range(66))
def test_every_frame_is_a_multiple_of_64_bytes(extra: int) -> None:
    assert len(pack_frame(PING, 1, meta=bytes(extra))) % 64 == 0


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=10), values, max_size=6))
def test_maps_come_back(content: dict[str, Any]) -> None:
    packed = pack_map(content, 1 << 20)
    assert unpack_map(memoryview(packed or b"\x80")) == content


specs = st.builds(
    TensorSpec,
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 9), max_size=8).map(tuple),
)


@given(st.text(max_size=30), st.lists(specs, max_size=6))
def test_tables_come_back(method: str, tensors: list[TensorSpec]) -> None:
    limits = Limits(max_body=1 << 40)
    packed = pack_table(method, [(spec, 0, spec.nbytes) for spec in tensors], limits)
    if not packed:
        assert method == ""
        assert tensors == []
        return
    table = unpack_table(memoryview(packed), limits)
    assert table.method == method
    assert [entry.spec for entry in table.entries] == tensors
    assert table.raw
    assert table.body_nbytes == table.nbytes
    end = 0
    for entry in table.entries:
        assert entry.start % 64 == 0
        assert entry.start >= end
        end = entry.start + entry.nbytes
    assert end <= table.body_nbytes < end + 64


@pytest.mark.parametrize(
    "content",
    [
        {"a": object()},
        {"a": 1 << 64},
        {"a": {1, 2}},
        {"a": "\ud800"},
    ],
)
def test_what_msgpack_lacks_cannot_be_in_a_map(content: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        pack_map(content, 1000)
    assert caught.value.remedy
    assert pack_map({"a": 1}, 1000) == msgpack.packb({"a": 1})


def test_a_map_over_its_limit() -> None:
    with pytest.raises(LimitExceeded) as caught:
        pack_map({"a": "x" * 100}, 50)
    assert (caught.value.limit_name, caught.value.limit) == ("max_meta", 50)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\x01",
        b"\x90",
        b"\x81\x01\x02",  # a number as a key
        b"\x81\xa1a",  # cut short
        b"\x80\x80",  # one too many
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"a": msgpack.Timestamp(1, 2)}),
        b"\x81\xa1a\xc7\x00\x05",  # an extension of no bytes
        b"\x81\xa1a\xa1\xff",  # not UTF-8
        b"\x91" * 2000 + b"\x90",  # too deep
        b"\xdf\xff\xff\xff\xff",  # four billion entries
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\xc1",
    ],
)
def test_damaged_maps_are_refused(packed: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack_map(memoryview(packed))


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        ["m"],
        ["m", {}],
        [b"m", []],
        ["m", [], 1],
        ["m", [5]],
        ["m", [[FLOAT32, 0]]],
        ["m", [[99, 0, 4, 1]]],
        ["m", [[FLOAT32, 0, 4.0, 1]]],
        ["m", [[FLOAT32, 0, True, 1]]],
        ["m", [[FLOAT32, 0, -4, 1]]],
        ["m", [[FLOAT32, 0, 5, 1]]],  # not the tensor's own size
        ["m", [[FLOAT32, 1, 5, 1]]],  # encoded, and larger than raw
        ["m", [[FLOAT32, 0, 4, *[1] * 9]]],  # rank 9
        ["m", [[FLOAT32, 0, 4, 1]] * 65],
        ["m", [[FLOAT32, 0, 1 << 31, 1 << 29]]],  # 2 GiB
        ["m", [[FLOAT32, 0, 1 << 30, 1 << 28], [FLOAT32, 0, 4, 1]]],  # 1 GiB and a little
        ["m", [[FLOAT32, 1, 10, 1 << 40]]],  # little on the wire, huge when decoded
        ["m", [[FLOAT32, 0, 0, 0, 1 << 62]]],  # nothing, with a dimension that numpy cannot hold
    ],
)
def test_tables_that_break_a_rule_or_a_limit_are_refused(content: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        unpack_table(memoryview(msgpack.packb(content)), LIMITS)


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ([TensorSpec(DTYPES["uint8"], (1,))] * 65, "max_tensors"),
        ([TensorSpec(DTYPES["uint8"], (1,) * 9)], "max_rank"),
        ([TensorSpec(DTYPES["uint8"], ((1 << 30) + 1,))], "max_body"),
    ],
)
def test_tables_over_a_limit_are_not_made(tensors: list[TensorSpec], name: str) -> None:
    with pytest.raises(LimitExceeded) as caught:
        pack_table("m", [(spec, 0, spec.nbytes) for spec in tensors], LIMITS)
    assert caught.value.limit_name == name
    assert caught.value.value > caught.value.limit
