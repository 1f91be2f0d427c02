from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer import transport
from splitinfer.errors import RemoteProtocolError, UsageError
from splitinfer.transport import ClientConfig, Reply, ServerConfig
from splitinfer.transport.codec import BFLOAT16, FLOAT8, INT8, LOSSLESS, TensorCodec
from splitinfer.transport.compression import LZ4, LZ4_PLANES
from splitinfer.transport.link import LinkSpec
from splitinfer.transport.tensors import DTYPES, TensorSpec
from tests.transport.wire import pair

LOSSY = {"bfloat16": BFLOAT16, "float8_e4m3fn": FLOAT8, "int8": INT8}
ROWS = TensorSpec(DTYPES["float32"], (4, 128))


def test_a_client_lists_what_it_asks_for_and_a_server_what_it_can() -> None:
    assert TensorCodec("client", "auto").encodings == LOSSLESS
    assert TensorCodec("client", "auto", loopback=True).encodings == frozenset()
    assert TensorCodec("client", "off").encodings == frozenset()
    assert TensorCodec("client", "off", wire_dtype="int8").encodings == {INT8}
    assert TensorCodec("server", "auto").encodings == LOSSLESS | set(LOSSY.values())
    assert TensorCodec("server", "off").encodings == set(LOSSY.values())
    with pytest.raises(UsageError, match="int4"):
        TensorCodec("client", "off", wire_dtype="int4")


@pytest.mark.parametrize("wire", LOSSY)
def test_a_lossy_form_is_used_only_where_both_ends_list_it(wire: str) -> None:
    client, server = TensorCodec("client", "off", wire_dtype=wire), TensorCodec("server", "off")
    data = memoryview(np.ones(512, np.float32)).cast("B")
    encoded = client.encode(ROWS, data, server.encodings)
    assert encoded is not None
    assert encoded[0] == LOSSY[wire]
    assert encoded[2] < ROWS.nbytes
    assert client.encode(ROWS, data, frozenset()) is None
    assert server.encode(ROWS, data, client.encodings) is not None
    assert server.encode(ROWS, data, frozenset()) is None
    out = bytearray(ROWS.nbytes)
    server.decode(encoded[0], ROWS, memoryview(b"".join(encoded[1])), memoryview(out))
    np.testing.assert_allclose(np.frombuffer(out, np.float32), 1, rtol=1e-3)


@pytest.mark.parametrize(
    ("compression", "wire", "tried"), [("auto", None, False), ("on", None, True), ("auto", "int8", True)]
)
def test_a_decoded_row_is_not_worth_an_attempt(compression: Any, wire: str | None, tried: bool) -> None:
    client = TensorCodec("client", compression, wire_dtype=wire)
    server = TensorCodec("server", compression)
    client.agree(server.encodings, 0)
    server.agree(client.encodings, 0)
    for codec in (client, server):
        assert (codec.min_nbytes <= 5632) == tried
        assert codec.min_nbytes <= 16384


def test_what_was_not_agreed_on_is_refused() -> None:
    client, out = TensorCodec("client", "auto"), memoryview(bytearray(ROWS.nbytes))
    for encoding in (INT8, FLOAT8, BFLOAT16, 6, 255):
        with pytest.raises(RemoteProtocolError, match="agreed"):
            client.decode(encoding, ROWS, memoryview(bytes(4 * 132)), out)


def test_a_lossy_form_of_the_wrong_size_or_dtype_is_refused() -> None:
    server, out = TensorCodec("server", "off"), memoryview(bytearray(ROWS.nbytes))
    for nbytes in (0, 527, 529):
        with pytest.raises(RemoteProtocolError, match="for a float32"):
            server.decode(INT8, ROWS, memoryview(bytes(nbytes)), out)
    for spec in (TensorSpec(DTYPES["int32"], (4, 128)), TensorSpec(DTYPES["float32"], (64, 8))):
        with pytest.raises(RemoteProtocolError):
            server.decode(INT8, spec, memoryview(bytes(528)), out)


def test_a_rate_that_is_known_is_not_measured_again() -> None:
    known, unknown = TensorCodec("client", "auto", link_rate=1e6), TensorCodec("client", "auto")
    for codec in (known, unknown):
        codec.link_rate = 5e9
    assert (known.link_rate, unknown.link_rate) == (1e6, 5e9)


def test_a_client_tells_its_server_what_it_knows_of_the_link() -> None:
    for known, told in ((12.5e6, 12.5e6), (None, 5e9)):
        codecs = TensorCodec("client", "auto", link_rate=known), TensorCodec("server", "auto")
        pair({"codec": codecs[0]}, {"codec": codecs[1]})
        codecs[1].link_rate = 5e9  # the kernel's figure, which counts where nobody knew better
        assert codecs[1].link_rate == told


def exchange(tensors: list[Any], client: ClientConfig, server: ServerConfig) -> tuple[list[Any], int, int]:
    """The echo of `tensors`, and the bytes that the call took each way."""

    async def work() -> tuple[list[Any], int, int]:
        def echo(call: transport.Call) -> Reply:
            return Reply(call.tensors)

        async with (
            asyncio.timeout(20),
            await transport.serve(echo, "127.0.0.1:0", config=server) as served,
            await transport.connect(served.address, config=client) as channel,
        ):
            before = channel.stats
            reply = await channel.call("echo", tensors)
            after = channel.stats
            sent = after.sent_nbytes - before.sent_nbytes
            return [t.torch() for t in reply.tensors], sent, after.received_nbytes - before.received_nbytes

    return asyncio.run(work())


def block() -> torch.Tensor:
    return torch.randn(64, 2816, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize(
    ("client", "server", "shrinks"),
    [("on", "on", True), ("on", "off", False), ("off", "on", False), ("auto", "auto", False)],
)
def test_compression_is_agreed_on_and_lossless(client: Any, server: Any, shrinks: bool) -> None:
    x = block()
    (back,), sent, received = exchange(
        [x], ClientConfig(compression=client), ServerConfig(compression=server)
    )
    assert torch.equal(back, x)
    for nbytes in (sent, received):
        assert (nbytes < 0.9 * x.nbytes) == shrinks


def test_auto_compresses_what_goes_over_a_slow_link() -> None:
    x = torch.zeros(64, 2816)
    slow = ClientConfig(link=LinkSpec(bandwidth=100e6))
    (back,), sent, _ = exchange([x], slow, ServerConfig())
    assert torch.equal(back, x)
    assert sent < 0.1 * x.nbytes


@pytest.mark.parametrize(("wire", "limit"), [("int8", 0.013), ("float8_e4m3fn", 0.038)])
def test_a_wire_dtype_halves_the_bytes_both_ways_and_spares_narrow_tensors(wire: Any, limit: float) -> None:
    x, weights = block(), torch.rand(64, 8)
    (back, same), sent, received = exchange([x, weights], ClientConfig(wire_dtype=wire), ServerConfig())
    assert torch.equal(same, weights)
    assert 0 < float((back.float() - x.float()).norm() / x.float().norm()) < limit
    for nbytes in (sent, received):
        assert nbytes < 0.53 * x.nbytes + weights.nbytes


def test_without_a_wire_dtype_nothing_is_rounded() -> None:
    x = torch.randn(8, 256)
    (back,), _, _ = exchange([x], ClientConfig(compression="on"), ServerConfig())
    assert torch.equal(back, x)
    assert {LZ4, LZ4_PLANES} == LOSSLESS
