"""Messages that lie ready: filled in place, sent by somebody else in part or whole, answered the same way."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
import pytest
import torch

from splitinfer import transport
from splitinfer.errors import ConnectionLost, LimitExceeded, LocalProtocolError
from splitinfer.transport import NUMBER, PARCEL_NBYTES, Limits, Parcel, Posted, Reply, sockets
from splitinfer.transport.codec import TensorCodec
from splitinfer.transport.compression import MIN_NBYTES
from splitinfer.transport.frames import REPLY
from tests.patience import run, until
from tests.transport.wire import feed, move, pair, taken

SPECS = [("bfloat16", (2, 40)), ("int16", (2, 3)), ("float32", (0, 3))]
META = {"layer": 3, "out": "bfloat16"}


def values(seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 40, generator=draw).bfloat16(),
        torch.randint(-1, 9, (2, 3), generator=draw, dtype=torch.int16),
        torch.empty(0, 3),
    ]


def fill(parcel: Parcel, tensors: list[torch.Tensor]) -> None:
    for place, tensor in zip(parcel.tensors, tensors, strict=True):
        place.data[:] = tensor.view(torch.uint8).numpy().tobytes()


def test_a_parcel_is_byte_for_byte_what_a_call_sends() -> None:
    (client, _), (other, _) = pair(), pair()
    parcel = Parcel("experts", SPECS, META)
    for seed in range(3):  # the second one goes the short way of a message like the one before
        client.request("experts", values(seed), META, 1234)
        assert other.stamp(parcel, 1234)
        fill(parcel, values(seed))
        other.post(parcel, 0)
        assert taken(client) == taken(other) == bytes(parcel.frame)


@pytest.mark.parametrize("sent", [0, 1, 32, 200, None])
def test_what_has_not_gone_yet_follows(sent: int | None) -> None:
    client, server = pair()
    parcel = Parcel("experts", SPECS, META)
    for seed in range(2):
        assert client.stamp(parcel, 1000)
        fill(parcel, values(seed))
        whole = bytes(parcel.frame)
        gone = len(whole) if sent is None else sent
        before = client.outbox.sent_nbytes
        client.adopt(client.post(parcel, gone), "caller")
        fill(parcel, values(9))  # it is free again
        (call,) = feed(server, whole[:gone] + taken(client))
        assert client.outbox.sent_nbytes - before == len(whole)
        assert (call.method, call.meta, call.value) == ("experts", META, 1000)
        for tensor, expected in zip(call.tensors, values(seed), strict=True):
            assert torch.equal(tensor.torch(), expected)
        server.reply(call.id, [], {})
        (reply,) = move(server, client)
        assert reply.caller == "caller"
    assert client.made == 2


def test_an_answer_may_lie_ready_too() -> None:
    client, server = pair()
    parcel = Parcel("", [("float32", (3,))], {"first": "x", "number": NUMBER})
    for number in (7, 1 << 31):
        client.request("m", [], {}, 0)
        (call,) = move(client, server)
        assert server.stamp_answer(call.id, parcel)
        parcel.tensors[0].numpy()[:] = [1, 2, number]
        parcel.number[:] = number.to_bytes(4, "big")
        frame = bytes(parcel.frame)
        server.post_answer(call.id, parcel, 100)
        (reply,) = feed(client, frame[:100] + taken(server))
        assert (reply.kind, reply.id, reply.meta) == (REPLY, call.id, {"first": "x", "number": number})
        assert reply.tensors[0].numpy().tolist() == [1, 2, number]
        assert server.calls == 0
        assert not server.stamp_answer(call.id, parcel)  # it is answered


def test_what_cannot_go_as_it_lies_is_left_to_others() -> None:
    parcel = Parcel("m", [("uint8", (MIN_NBYTES,))])
    client, server = pair({}, {"limits": Limits(max_calls=1)})
    assert client.stamp(parcel, 0)
    client.post(parcel, 0)
    assert not client.stamp(parcel, 0)  # one call at a time
    server.goaway()
    client, server = pair()
    server.goaway()
    move(server, client)
    assert not client.stamp(parcel, 0)
    parcel = Parcel("m", [("uint8", (1, MIN_NBYTES))])
    for limits in (Limits(max_body=MIN_NBYTES - 64), Limits(max_rank=1), Limits(max_buffered=64)):
        client, _ = pair({}, {"limits": limits})
        assert not client.stamp(parcel, 0)
    assert not pair({}, {"limits": Limits(max_meta=3)})[0].stamp(Parcel("m", [], {"some": 1}), 0)


def test_what_may_be_compressed_goes_through_the_codec() -> None:
    codecs = {role: TensorCodec(role, "on", loopback=False) for role in ("client", "server")}
    client, _ = pair({"codec": codecs["client"]}, {"codec": codecs["server"]})
    assert client.stamp(Parcel("m", [("uint8", (64,))]), 0)
    assert not client.stamp(Parcel("m", [("uint8", (PARCEL_NBYTES,))]), 0)


def test_an_id_that_may_have_gone_is_not_given_again() -> None:
    client, server = pair()
    parcel = Parcel("m", [])
    assert client.stamp(parcel, 0)
    lost = bytes(parcel.frame)  # it went, and nobody said so
    assert client.request("m", [], {}, 0) == parcel.id + 1
    assert [call.id for call in feed(server, lost + taken(client))] == [1, 2]
    assert client.made == 1


def test_what_is_no_parcel_is_refused() -> None:
    with pytest.raises(LimitExceeded, match="32,768 bytes, not 32,832"):
        Parcel("m", [("uint8", (PARCEL_NBYTES + 1,))])
    with pytest.raises(LocalProtocolError, match="float12"):
        Parcel("m", [("float12", (1,))])
    with pytest.raises(LocalProtocolError, match="meta"):
        Parcel("m", [], {"a": object()})


# ---- on a channel


def double(call: transport.Call) -> Posted:
    """Answers with twice the first tensor, and sends half of that itself."""
    parcel = Parcel("", [("float32", call.tensors[0].shape)], {"number": NUMBER})
    file = call.stamp(parcel)
    assert file is not None
    parcel.tensors[0].numpy()[:] = call.tensors[0].numpy() * 2
    parcel.number[:] = (5).to_bytes(4, "big")
    return Posted(parcel, 0 if file < 0 else os.write(file, parcel.frame[: len(parcel.frame) // 2]))


class Exchange:
    """A server of `double`, a channel to it, and a parcel for three numbers."""

    def __init__(self, **config: Any) -> None:
        self.config = transport.ClientConfig(**config)

    async def __aenter__(self) -> Exchange:
        self.server = await transport.serve({"double": double}, "127.0.0.1:0")
        self.channel = await transport.connect(self.server.address, config=self.config)
        self.parcel = Parcel("double", [("float32", (3,))])
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.channel.close()
        await self.server.close()

    def send(self, numbers: list[float], nbytes: int | None = None) -> int:
        """Writes so much of the parcel (all) to the channel's own descriptor; returns how much that was."""
        assert self.channel.stamp(self.parcel, 10.0)
        file = self.channel.direct(self.parcel)
        assert file is not None
        assert file >= 0
        self.parcel.tensors[0].numpy()[:] = numbers
        return os.write(file, self.parcel.frame[:nbytes])

    async def ask(self, numbers: list[float], nbytes: int | None = None) -> Reply:
        return await self.channel.post(self.parcel, self.send(numbers, nbytes), timeout=10.0)

    async def read(self, room: memoryview) -> int:
        """What has come, read by whoever waits for it."""
        file = self.channel.direct(self.parcel)
        assert file is not None
        while True:
            try:
                return os.readv(file, [room])
            except BlockingIOError:
                await asyncio.sleep(0)

    async def answered(self) -> bytes:
        """The server has answered, but the loop of this side has not looked."""
        peer = next(iter(self.server.peers))
        sent = peer.connection.outbox.sent_nbytes
        room = self.channel.room(192)
        assert room is not None
        asyncio.get_running_loop().remove_reader(self.channel.file)
        await until(lambda: peer.connection.outbox.sent_nbytes > sent)
        return bytes(room[: await self.read(room)])


@pytest.mark.parametrize("nbytes", [0, 1, 100, None])
def test_a_channel_goes_on_with_what_somebody_began(nbytes: int | None) -> None:
    async def work() -> None:
        async with Exchange() as on:
            for n in range(3):
                reply = await on.ask([n, 1, 2], nbytes)
                assert reply.tensors[0].numpy().tolist() == [2 * n, 2, 4]
                assert reply.meta == {"number": 5}
                ordinary = await on.channel.call("double", [np.ones(3, np.float32)])
                assert ordinary.tensors[0].numpy().tolist() == [2, 2, 2]
            assert on.channel.stats.calls == 6

    run(work())


def test_nobody_writes_in_between() -> None:
    async def work() -> None:
        async with Exchange() as on:
            assert on.channel.stamp(on.parcel, 10.0)
            assert on.channel._session is not None
            outbox = on.channel._session.connection.outbox
            outbox.add(0, b"x")
            assert on.channel.direct(on.parcel) == -1
            outbox.ready.clear()
            outbox.nbytes = 0
            assert on.channel.direct(on.parcel) == on.channel.file

    run(work())


def test_a_parcel_of_a_connection_that_ended_is_stamped_anew() -> None:
    async def work() -> None:
        async with Exchange() as on:
            assert on.channel.stamp(on.parcel, 10.0)
            assert on.channel._session is not None
            on.channel._session.close("for a test")
            assert on.channel.direct(on.parcel) is None
            assert on.channel.room(64) is None
            assert not on.channel.stamp(on.parcel, 10.0)
            with pytest.raises(ConnectionLost):
                await on.channel.post(on.parcel, timeout=10.0)
            await on.channel.ping()
            assert on.channel.direct(on.parcel) is None
            assert (await on.ask([1, 2, 3])).tensors[0].numpy().tolist() == [2, 4, 6]

    run(work())


def test_whoever_waits_may_read_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_TURN_SECONDS", 60.0)

    async def work() -> None:
        async with Exchange() as on:
            await on.ask([1, 2, 3])
            first = on.channel.stats
            for n in range(3):
                sent = on.send([n, 0, 0])
                answer = await on.answered()
                if n < 2:
                    assert np.frombuffer(answer[-64:-52], np.float32).tolist() == [2 * n, 0, 0]
                    on.channel.settle(sent, len(answer))
                else:  # it was not what he wanted: it comes as others do
                    answering = on.channel.post(on.parcel, sent, len(answer), timeout=10.0)
                    assert (await answering).tensors[0].numpy().tolist() == [4, 0, 0]
            stats = on.channel.stats
            assert stats.calls - first.calls == 3
            assert stats.sent_nbytes - first.sent_nbytes == 3 * len(on.parcel.frame)
            assert stats.received_nbytes - first.received_nbytes == 3 * len(answer)

    run(work())


def test_there_is_no_room_for_ever_nor_in_the_middle_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with Exchange() as on:
            await on.ask([1, 2, 3])
            assert on.channel.room(1 << 20) is None
            assert on.channel.room(64) is not None
            sent = on.send([1, 0, 0])
            answer = await on.answered()
            answering = on.channel.post(on.parcel, sent, len(answer) - 10, timeout=10.0)
            assert on.channel.room(64) is None
            answering.cancel()
        async with Exchange() as on:
            monkeypatch.setattr(sockets, "_TURN_SECONDS", -1.0)
            assert on.channel.room(64) is None  # others have their turn

    monkeypatch.setattr(sockets, "_TURN_SECONDS", 60.0)
    run(work())


@pytest.mark.parametrize("coroutine", [False, True])
def test_any_handler_may_answer_with_a_parcel(coroutine: bool) -> None:
    async def doubled(call: transport.Call) -> Posted:
        await asyncio.sleep(0)
        return double(call)

    async def work() -> None:
        server = await transport.serve({"double": doubled if coroutine else double}, "127.0.0.1:0")
        channel = await transport.connect(server.address)
        for n in range(3):
            reply = await channel.call("double", [np.full(3, n, np.float32)])
            assert reply.tensors[0].numpy().tolist() == [2 * n] * 3
        await channel.close()
        await server.close()

    run(work())


def test_the_next_answer_goes_behind_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a task that goes on within the very read that brought the last one."""
    monkeypatch.setattr(sockets, "_TURN_SECONDS", 60.0)

    async def work() -> None:
        async with Exchange() as on:
            for _ in range(3):
                reply = await on.ask([1, 2, 3])
                room = on.channel.room(64)
                assert room is not None
                start, last = np.frombuffer(room, np.uint8).ctypes.data, reply.tensors[0].numpy().ctypes.data
                assert not start <= last < start + room.nbytes

    run(work())


def test_a_handler_that_stamped_may_still_fail() -> None:
    def fail(call: transport.Call) -> Posted:
        assert call.stamp(Parcel("", [])) is not None
        raise ValueError("no luck")

    async def work() -> None:
        server = await transport.serve({"fail": fail}, "127.0.0.1:0")
        channel = await transport.connect(server.address)
        with pytest.raises(Exception, match="no luck"):
            await channel.call("fail")
        await channel.close()
        await server.close()

    run(work())
