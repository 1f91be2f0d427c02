from __future__ import annotations

from typing import Any

import pytest

from splitinfer.errors import (
    AuthenticationError,
    DeadlineExceeded,
    Overloaded,
    RemoteError,
    RemoteProtocolError,
    UsageError,
    VersionMismatch,
)
from splitinfer.transport.frames import AUTH, HELLO, WELCOME, Limits, pack_frame, pack_map
from splitinfer.transport.handshake import Hello, error_from, error_map
from splitinfer.transport.protocol import Connection
from splitinfer.transport.security import Token, TokenAuthenticator
from tests.transport.wire import feed, move, pair, taken

TOKEN, OTHER = (TokenAuthenticator(Token(letter * 32)) for letter in "ab")


def test_a_hello_comes_back() -> None:
    hello = Hello(bytes(range(32)), Limits(max_body=5), "me/1", frozenset((1, 4)), True, 7)
    assert Hello.from_map({**hello.to_map(), "something new": 1}) == hello


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": bytes(31)},
        {"nonce": "x" * 32},
        {"agent": 5},
        {"auth": 1},
        {"encodings": [1, "lz4"]},
        {"encodings": [256]},
        {"encodings": 1},
        {"link_rate": -1},
        {"link_rate": 1.5},
        {"limits": None},
        {"limits": {"max_body": 1}},
        {"limits": {**Hello(bytes(32), Limits()).to_map()["limits"], "max_rank": 0}},
        {"limits": {**Hello(bytes(32), Limits()).to_map()["limits"], "max_body": 1 << 63}},
        {"limits": {**Hello(bytes(32), Limits()).to_map()["limits"], "max_body": True}},
    ],
)
def test_a_hello_that_breaks_a_rule(change: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        Hello.from_map({**Hello(bytes(32), Limits()).to_map(), **change})


def test_info_and_limits_arrive() -> None:
    client, server = pair(
        {"limits": Limits(max_body=1)}, {"limits": Limits(max_body=2), "info": lambda: {"a": [1]}}
    )
    assert client.info == {"a": [1]}
    assert client.outbox.limits.max_body == 2
    assert server.outbox.limits.max_body == 1


def test_both_prove_the_token() -> None:
    client, server = pair(
        {"authenticator": TOKEN, "binding": b"tls"},
        {"authenticator": TOKEN, "binding": b"tls", "info": lambda: {"secret": 1}},
    )
    assert client.info == {"secret": 1}
    assert server.open


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"authenticator": OTHER}, {"authenticator": TOKEN}),
        ({"authenticator": TOKEN, "binding": b"one"}, {"authenticator": TOKEN, "binding": b"other"}),
    ],
)
def test_a_wrong_token_or_channel_is_refused_by_the_server_which_says_nothing_of_itself(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    client, server = Connection("client", **one), Connection("server", info=lambda: {"secret": 1}, **other)
    move(client, server)
    move(server, client)
    with pytest.raises(AuthenticationError):
        move(client, server)
    assert not server.open
    assert b"secret" not in taken(server)


def test_a_client_wants_the_servers_proof_too() -> None:
    client, server = Connection("client", authenticator=TOKEN), Connection("server", authenticator=TOKEN)
    move(client, server)
    move(server, client)
    move(client, server)
    welcome = bytearray(taken(server))
    welcome[welcome.index(b"proof") + 10] ^= 1
    with pytest.raises(AuthenticationError):
        feed(client, bytes(welcome))
    assert not client.open


def test_nobody_in_between_can_change_a_hello() -> None:
    client, server = Connection("client", authenticator=TOKEN), Connection("server", authenticator=TOKEN)
    hello = taken(client)
    assert hello.count(b"max_rank\x08") == 1
    feed(server, hello.replace(b"max_rank\x08", b"max_rank\x07"))
    move(server, client)
    with pytest.raises(AuthenticationError):
        move(client, server)


@pytest.mark.parametrize(("mine", "yours"), [(None, TOKEN), (TOKEN, None)])
def test_a_token_on_one_side_only(mine: Any, yours: Any) -> None:
    client, server = Connection("client", authenticator=mine), Connection("server", authenticator=yours)
    move(client, server)
    with pytest.raises(AuthenticationError) as caught:
        move(server, client)
    assert caught.value.remedy


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("kinds", [(AUTH,), (WELCOME,), (HELLO, HELLO), (HELLO, HELLO, AUTH)])
def test_frames_out_of_their_turn(role: Any, kinds: tuple[int, ...]) -> None:
    end = Connection(role)
    hello = pack_map(Hello(bytes(32), Limits()).to_map(), 4096)
    with pytest.raises(RemoteProtocolError, match="out of its turn"):
        feed(end, b"".join(pack_frame(kind, meta=hello) for kind in kinds))


@pytest.mark.parametrize("kind", [HELLO, AUTH, WELCOME])
def test_no_second_handshake(kind: int) -> None:
    for end in pair():
        with pytest.raises(RemoteProtocolError, match="no place here"):
            feed(end, pack_frame(kind))


@pytest.mark.parametrize(
    ("error", "code", "back"),
    [
        (ValueError("a"), "failed", RemoteError),
        (UsageError("a", remedy="b"), "failed", RemoteError),
        (Overloaded("a", remedy="b"), "overloaded", Overloaded),
        (AuthenticationError("a"), "authentication", AuthenticationError),
        (DeadlineExceeded("a"), "deadline", DeadlineExceeded),
        (RemoteProtocolError("a"), "protocol", RemoteProtocolError),
        (VersionMismatch("a", ours=1, theirs=2), "version", RemoteError),
        (RemoteError("a", code="own"), "own", RemoteError),
    ],
)
def test_errors_travel(error: Exception, code: str, back: type[Exception]) -> None:
    content = error_map(error)
    assert content["code"] == code
    raised = error_from(content, "host:1")
    assert type(raised) is back
    assert "host:1: " in str(raised)
    assert str(error) in str(raised)
    assert raised.remedy == getattr(error, "remedy", "")
    assert raised.peer == "host:1"


def test_an_errors_text_is_bounded_and_of_any_kind() -> None:
    assert len(error_map(ValueError("x" * 10**6))["message"]) <= 2000
    assert type(error_from({"code": 5, "message": b"\xff", "more": 1}, "")) is RemoteError
    assert str(error_from({}, "host:1")) == "host:1: "
