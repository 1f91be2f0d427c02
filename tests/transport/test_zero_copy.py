"""Large tensors are not copied in user space: counted by allocations, and seen by addresses."""

from __future__ import annotations

import asyncio
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.transport.buffers import POOL
from splitinfer.transport.certificates import TLSConfig, make_certificate
from splitinfer.transport.config import ClientConfig, ServerConfig
from splitinfer.transport.sockets import Link

MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [16 * MIB, pytest.param(256 * MIB, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["tcp", "unix", "tls"])
def test_memory_beyond_the_receive_buffer_stays_under_a_mebibyte(
    nbytes: int, way: str, tmp_path: Path
) -> None:
    """Sending and receiving in one process, both counted; the buffer itself is the only large thing made."""
    ours, theirs = ClientConfig(), ServerConfig()
    if way == "tls":
        made = make_certificate(tmp_path)
        ours = ClientConfig(tls=TLSConfig(fingerprints=(made.fingerprint,)))
        theirs = ServerConfig(tls=TLSConfig(certificate=made.certificate, key=made.key))
    address = f"unix:{tmp_path}/socket" if way == "unix" else "127.0.0.1:0"
    sent = np.ones(nbytes, np.uint8)
    peaks = []

    def take(call: transport.Call) -> transport.Reply:
        peaks.append(tracemalloc.get_traced_memory()[1])
        assert call.tensors[0].nbytes == nbytes
        assert call.tensors[0].numpy()[:: MIB // 2].all()
        return transport.Reply()

    def give(call: transport.Call) -> transport.Reply:
        return transport.Reply([sent])

    async def work() -> None:
        async with (
            await transport.serve({"take": take, "give": give}, address, config=theirs) as server,
            await transport.connect(server.address, config=ours) as channel,
        ):
            for method, tensors in (("take", [sent]), ("give", [])):
                await channel.call("give" if method == "take" else "take", [] if method == "take" else [sent])
                POOL._free.clear()
                tracemalloc.start()
                reply = await channel.call(method, tensors, timeout=60)
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
                del reply

    asyncio.run(work())
    assert max(peaks) >= nbytes
    # The buffer is rounded up by 64 bytes here: its size is a power of two.
    assert max(peaks) < nbytes + MIB


def test_the_memory_of_the_caller_is_what_the_socket_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    init = Link.__init__

    def spying(self: Link, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        sendmsg = self._sendmsg

        def spy(buffers: Any) -> int:
            given.extend(buffers)
            return sendmsg(buffers)

        self._sendmsg = spy

    monkeypatch.setattr(Link, "__init__", spying)
    mine = memoryview(bytearray(100_000))

    async def work() -> None:
        async with (
            await transport.serve(lambda call: transport.Reply(), "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            await channel.call("any", [transport.Tensor("uint8", (100_000,), mine)])

    asyncio.run(work())
    assert any(piece is mine for piece in given)


def test_receive_buffers_come_back_when_their_tensors_die() -> None:
    async def work() -> None:
        async with (
            await transport.serve(lambda call: transport.Reply(call.tensors), "127.0.0.1:0") as server,
            await transport.connect(server.address) as channel,
        ):
            places = set()
            lent = POOL.lent
            for _ in range(6):
                reply = await channel.call("any", [np.zeros(3 * MIB, np.uint8)])
                places.add(reply.tensors[0].numpy().ctypes.data)
                del reply
            assert len(places) <= 2
            kept = (await channel.call("any", [np.full(3 * MIB, 7, np.uint8)])).tensors[0].numpy()[5:6]
            await channel.call("any", [np.zeros(3 * MIB, np.uint8)])
            assert kept == 7
            del kept
            await asyncio.sleep(0)
            assert POOL.lent <= lent + 2

    asyncio.run(work())
