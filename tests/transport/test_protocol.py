"""The state machine without a link: what each end may say when, and what happens if it says other things."""

from __future__ import annotations

import ast
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.errors import LimitExceeded, Overloaded, RemoteProtocolError, TransportError
from splitinfer.transport import protocol
from splitinfer.transport.frames import (
    CANCEL,
    CHUNK_NBYTES,
    CREDIT,
    END,
    ERROR,
    GOAWAY,
    ITEM,
    PING,
    PONG,
    REPLY,
    REQUEST,
    Limits,
    pack_frame,
    pack_map,
)
from splitinfer.transport.protocol import STREAM_WINDOW, Connection
from tests.transport.wire import LARGE, call, feed, move, pair, taken


@pytest.mark.parametrize(
    "name",
    [
        "protocol",
        "refusals",
        "inbox",
        "outbox",
        "frames",
        "handshake",
        "messages",
        "buffers",
        "parcel",
        "vitals",
    ],
)
def test_no_event_loop_no_socket_no_torch(name: str) -> None:
    """The floor of the transport, held by what its files import outside of type checking."""
    path = Path(protocol.__file__).with_name(f"{name}.py")
    tree = ast.parse(path.read_text("utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {module.split(".")[0] for module in imported}
    assert not tops & {"asyncio", "socket", "ssl", "selectors", "threading", "torch", "uvloop"}
    assert not imported & {"splitinfer.transport.sockets", "splitinfer.transport.endpoints"}


def test_a_call_and_its_answer() -> None:
    client, server = pair()
    request = call(client, server, np.arange(4), layer=1)
    assert (request.kind, request.id, request.value, request.method, request.meta) == (
        REQUEST,
        1,
        1000,
        "m",
        {"layer": 1},
    )
    assert (client.calls, server.calls) == (1, 1)
    server.reply(1, request.tensors, {"n": 2})
    (reply,) = move(server, client)
    assert (reply.kind, reply.caller, reply.meta) == (REPLY, ("caller", {"layer": 1}), {"n": 2})
    assert reply.tensors[0].numpy().tolist() == [0, 1, 2, 3]
    assert (client.calls, server.calls) == (0, 0)


def test_answers_in_any_order_find_their_callers() -> None:
    client, server = pair()
    for number in range(5):
        client.request("m", (), {}, 0, caller=number)
    requests = move(client, server)
    for request in reversed(requests):
        server.reply(request.id, (), {})
    assert [reply.caller for reply in move(server, client)] == [4, 3, 2, 1, 0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 400_000), st.sampled_from(["reply", "error", "stream", "cancel"])),
        max_size=8,
    ),
    st.lists(st.sampled_from([500, 4096, 65_536, 1 << 20]), min_size=1, max_size=4),
)
def test_any_calls_in_any_steps_leave_nothing_behind(calls: list[tuple[int, str]], steps: list[int]) -> None:
    client, server = pair()
    answers = {}
    for nbytes, way in calls:
        answers[client.request("m", [np.full(nbytes, nbytes % 251, np.uint8)], {}, 0)] = way
    for id, way in answers.items():
        if way == "cancel":
            client.cancel(id)
    done = {}
    for request in move(client, server, cycle(steps)):
        way = answers[request.id]
        if request.kind == CANCEL:
            server.error(request.id, ValueError("cancelled"))
        elif way == "reply":
            server.reply(request.id, request.tensors, {})
        elif way == "error":
            server.error(request.id, ValueError("failed"))
        elif way == "stream":
            for _ in range(3):
                server.item(request.id, request.tensors, {})
            server.end(request.id)
    for answer in move(server, client, cycle(steps)):
        done.setdefault(answer.id, []).append(answer.kind)
        for tensor in answer.tensors:
            assert (tensor.numpy() == tensor.nbytes % 251).all()
    expected = {"reply": [REPLY], "error": [ERROR], "stream": [ITEM] * 3 + [END]}
    assert done == {id: expected[way] for id, way in answers.items() if way != "cancel"}
    move(client, server)
    for end in (client, server):
        assert end.calls == 0
        assert not end.inbox.unfinished
        assert end.outbox.nbytes == 0


def test_a_cancelled_call_stays_counted_until_its_answer() -> None:
    client, server = pair()
    call(client, server)
    client.cancel(1)
    (cancel,) = move(client, server)
    assert (cancel.kind, cancel.id) == (CANCEL, 1)
    assert client.calls == 1
    server.reply(1, (), {})
    assert move(server, client) == []
    assert client.calls == 0
    client.cancel(1)
    assert taken(client) == b""


def test_a_call_cancelled_before_any_of_it_left_was_never_made() -> None:
    client, server = pair()
    client.request("m", [LARGE], {}, 0)
    client.cancel(1)
    assert client.calls == 0
    assert move(client, server) == []


def test_a_request_cancelled_half_way_is_answered_by_the_protocol_itself() -> None:
    client, server = pair()
    client.request("m", [LARGE], {}, 0)
    pieces = b"".join(client.outbox.pieces())
    client.outbox.sent(len(pieces))
    client.cancel(1)
    assert feed(server, pieces) == []
    assert server.calls == 1
    assert move(client, server) == []
    assert server.calls == 0
    assert move(server, client) == []
    assert client.calls == 0


def test_an_answer_cancelled_half_way() -> None:
    client, server = pair()
    call(client, server)
    server.reply(1, [LARGE], {})
    pieces = b"".join(server.outbox.pieces())
    server.outbox.sent(len(pieces))
    feed(client, pieces)
    client.cancel(1)
    assert move(client, server) == []
    assert server.outbox.nbytes < CHUNK_NBYTES
    assert move(server, client) == []
    assert client.calls == 0
    assert not client.inbox.unfinished


def test_a_request_refused_while_its_body_is_on_the_way() -> None:
    client, server = pair(server={"limits": Limits(max_buffered=CHUNK_NBYTES)})
    client.outbox.limits = Limits()
    client.request("m", [LARGE], {}, 0, caller="me")
    pieces = b"".join(client.outbox.pieces())
    client.outbox.sent(len(pieces))
    assert feed(server, pieces) == []
    (error,) = move(server, client)
    assert (error.kind, error.caller, error.meta["code"]) == (ERROR, "me", "overloaded")
    assert client.outbox.nbytes == 64  # the CANCEL
    assert move(client, server) == []
    assert not server.inbox.unfinished


def test_streams_carry_credit() -> None:
    client, server = pair()
    call(client, server)
    for number in range(STREAM_WINDOW):
        server.item(1, (), {"n": number})
    assert [item.meta["n"] for item in move(server, client)] == list(range(STREAM_WINDOW))
    client.credit(1, 2)
    (credit,) = move(client, server)
    assert (credit.kind, credit.id, credit.value) == (CREDIT, 1, 2)
    for _ in range(3):
        server.item(1, (), {})
    with pytest.raises(RemoteProtocolError, match="more items"):
        move(server, client)


def test_pings_are_answered_and_those_of_the_caller_reported() -> None:
    client, server = pair()
    client.ping(7)
    client.ping()
    assert move(client, server) == []
    (pong,) = move(server, client)
    assert (pong.kind, pong.id) == (PONG, 7)


def test_after_goaway_no_new_call_is_taken_and_old_ones_are_answered() -> None:
    client, server = pair()
    call(client, server)
    client.request("m", (), {}, 0, caller="crossing")
    server.goaway()
    assert move(client, server) == []
    server.reply(1, (), {})
    kinds = [(message.kind, message.id) for message in move(server, client)]
    assert kinds == [(GOAWAY, 0), (ERROR, 2), (REPLY, 1)]
    with pytest.raises(Overloaded, match="draining"):
        client.request("m", (), {}, 0)


def test_room_for_calls_and_bytes_is_given_back() -> None:
    client, server = pair(server={"limits": Limits(max_calls=2, max_buffered=100_000)})
    for _ in range(5):
        ids = [client.request("m", [np.zeros(40_000, np.uint8)], {}, 0) for _ in range(2)]
        with pytest.raises(LimitExceeded, match="in flight"):
            client.request("m", (), {}, 0)
        move(client, server)
        server.reply(ids[0], (), {})
        server.error(ids[1], ValueError())
        move(server, client)
    client.outbox.limits = Limits()
    for _ in range(3):
        client.request("m", (), {}, 0)
    assert len(move(client, server)) == 2
    (refused,) = move(server, client)
    assert "2 calls are in flight" in refused.meta["message"]
    client.request("m", [np.zeros(100_001, np.uint8)], {}, 0)


def test_bytes_of_calls_in_flight_are_bounded() -> None:
    client, server = pair(server={"limits": Limits(max_buffered=100_000)})
    client.outbox.limits = Limits()
    for _ in range(3):
        client.request("m", [np.zeros(40_000, np.uint8)], {}, 0)
    assert len(move(client, server)) == 2
    (refused,) = move(server, client)
    assert "hold 80" in refused.meta["message"]


@pytest.mark.parametrize("kind", [REPLY, ITEM, END, ERROR])
def test_a_client_takes_no_answer_to_what_it_did_not_ask(kind: int) -> None:
    client, _ = pair()
    with pytest.raises(TransportError):
        feed(client, pack_frame(kind, 5))


def test_an_answer_comes_once() -> None:
    client, server = pair()
    call(client, server)
    feed(client, pack_frame(REPLY, 1))
    with pytest.raises(RemoteProtocolError, match="not made"):
        feed(client, pack_frame(REPLY, 1))


@pytest.mark.parametrize("kind", [REQUEST, CANCEL, CREDIT])
def test_a_client_is_asked_nothing(kind: int) -> None:
    client, _ = pair()
    with pytest.raises(RemoteProtocolError):
        feed(client, pack_frame(kind, 5))


@pytest.mark.parametrize("kind", [REPLY, ITEM, END, GOAWAY])
def test_a_server_is_told_nothing(kind: int) -> None:
    client, server = pair()
    call(client, server)
    with pytest.raises(RemoteProtocolError):
        feed(server, pack_frame(kind, 1))
    assert server.calls == 1


@pytest.mark.parametrize("large", [True, False])
def test_request_ids_are_unique_among_those_in_flight(large: bool) -> None:
    client, server = pair()
    call(client, server)
    client._last_id = 0
    client.request("m", [LARGE] if large else [], {}, 0)
    with pytest.raises(RemoteProtocolError, match="not free"):
        move(client, server)
    _, server = pair()
    with pytest.raises(RemoteProtocolError, match="not free"):
        feed(server, pack_frame(REQUEST, 0))


def test_cancel_and_credit_for_calls_long_gone_are_ignored() -> None:
    client, server = pair()
    assert feed(server, pack_frame(CANCEL, 99) + pack_frame(CREDIT, 99, value=5)) == []
    server.reply(99, (), {})
    server.item(99, (), {})
    server.end(99)
    server.error(99, ValueError())
    assert taken(server) == b""
    del client


def test_an_error_of_the_connection_ends_it() -> None:
    client, server = pair()
    server.error(0, Overloaded("too many"))
    with pytest.raises(Overloaded, match="too many"):
        move(server, client)


def test_how_it_ended() -> None:
    client, server = pair()
    assert str(client.eof()) == "server closed the connection"
    feed(server, pack_frame(PING)[:10])
    assert "middle of a frame" in str(server.eof())
    early = Connection("client", peer="host:1").eof()
    assert "without a word" in str(early)
    assert early.remedy


def test_meta_of_the_wrong_kind_from_a_peer() -> None:
    client, _ = pair()
    with pytest.raises(RemoteProtocolError):
        feed(client, pack_frame(PING, 1, meta=pack_map({"a": 1}, 100)[:-1]))
