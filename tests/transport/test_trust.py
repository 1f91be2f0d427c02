"""Who gets in, over real sockets: tokens, certificates, and what each refusal says."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitinfer import transport
from splitinfer.errors import AuthenticationError, ConnectError, LinkError, RemoteProtocolError, UsageError
from splitinfer.transport import ClientConfig, ServerConfig
from splitinfer.transport.certificates import Certificate, TLSConfig, make_certificate
from splitinfer.transport.frames import HELLO, REQUEST, pack_frame, pack_map
from splitinfer.transport.security import Token
from tests.patience import run

OURS, OTHER = Token("a token that both ends know"), Token("a token that nobody knows")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("other"))


def serving(made: Certificate, **more: Any) -> TLSConfig:
    return TLSConfig(certificate=made.certificate, key=made.key, **more)


def pinning(made: Certificate, **more: Any) -> TLSConfig:
    return TLSConfig(fingerprints=(made.fingerprint,), **more)


def echo(call: transport.Call) -> list[Any]:
    return list(call.tensors)


async def attempt(server: ServerConfig, client: ClientConfig) -> list[str]:
    """Connect and call; the methods that the handler has seen by then."""
    seen: list[str] = []

    def handler(call: transport.Call) -> list[Any]:
        seen.append(call.method)
        return echo(call)

    async with await transport.serve(handler, "127.0.0.1:0", info={"secret": 1}, config=server) as served:
        try:
            async with await transport.connect(served.address, config=client) as channel:
                assert channel.info == {"secret": 1}
                await channel.call("echo", [np.arange(4)])
        except BaseException:
            assert not seen
            raise
    return seen


def test_the_right_token_and_certificate(made: Certificate, other: Certificate) -> None:
    assert run(attempt(ServerConfig(token=OURS), ClientConfig(token=OURS))) == ["echo"]
    tls = ServerConfig(tls=serving(made)), ClientConfig(tls=pinning(made))
    assert run(attempt(*tls)) == ["echo"]
    both = (
        ServerConfig(tls=serving(made, authorities=other.certificate), token=OURS),
        ClientConfig(tls=pinning(made, certificate=other.certificate, key=other.key), token=OURS),
    )
    assert run(attempt(*both)) == ["echo"]
    by_name = ClientConfig(tls=TLSConfig(authorities=made.certificate))
    assert run(attempt(ServerConfig(tls=serving(made)), by_name)) == ["echo"]


@pytest.mark.parametrize(
    ("server", "client", "message"),
    [
        (OURS, OTHER, "this client does not know the token"),
        (OURS, None, "asks for a token"),
        (None, OURS, "asks for no token"),
    ],
)
@pytest.mark.parametrize("with_tls", [False, True])
def test_wrong_tokens(
    server: Token | None,
    client: Token | None,
    message: str,
    with_tls: bool,
    made: Certificate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(AuthenticationError, match=message) as refusal:
        run(
            attempt(
                ServerConfig(token=server, tls=serving(made) if with_tls else None),
                ClientConfig(token=client, tls=pinning(made) if with_tls else None),
            )
        )
    assert refusal.value.remedy
    if client is OTHER:  # whoever runs the server reads which machine it was
        assert re.search(r"refused 127\.0\.0\.1:\d+: this client does not know", caplog.text)


def test_several_nodes_with_certificates_of_their_own(made: Certificate, other: Certificate) -> None:
    pins = TLSConfig(fingerprints=(made.fingerprint, other.fingerprint))
    for server in (made, other):
        assert run(attempt(ServerConfig(tls=serving(server)), ClientConfig(tls=pins))) == ["echo"]


def test_another_certificate_than_the_pinned_one(made: Certificate, other: Certificate) -> None:
    with pytest.raises(AuthenticationError, match="another certificate"):
        run(attempt(ServerConfig(tls=serving(made)), ClientConfig(tls=pinning(other))))


def test_a_certificate_that_no_authority_signed(made: Certificate, other: Certificate) -> None:
    with pytest.raises(AuthenticationError, match="not trusted"):
        run(
            attempt(
                ServerConfig(tls=serving(made)), ClientConfig(tls=TLSConfig(authorities=other.certificate))
            )
        )


def test_a_certificate_for_another_name(made: Certificate) -> None:
    named = TLSConfig(authorities=made.certificate, server_name="elsewhere.example.org")
    with pytest.raises(AuthenticationError, match="not trusted"):
        run(attempt(ServerConfig(tls=serving(made)), ClientConfig(tls=named)))


def test_mutual_tls_without_a_certificate_or_with_a_strange_one(
    made: Certificate, other: Certificate
) -> None:
    demanding = ServerConfig(tls=serving(made, authorities=other.certificate))
    for client in (pinning(made), pinning(made, certificate=made.certificate, key=made.key)):
        with pytest.raises(AuthenticationError, match="does not accept our certificate"):
            run(attempt(demanding, ClientConfig(tls=client)))


def test_tls_on_one_end_only(made: Certificate) -> None:
    with pytest.raises((ConnectError, RemoteProtocolError, LinkError)) as plain:
        run(attempt(ServerConfig(tls=serving(made)), ClientConfig(connect_timeout=15)))
    assert not isinstance(plain.value, AuthenticationError)
    with pytest.raises((ConnectError, RemoteProtocolError)):
        run(attempt(ServerConfig(), ClientConfig(tls=pinning(made), connect_timeout=15)))


def test_a_man_in_the_middle_with_a_certificate_of_its_own_cannot_pass_the_proof_on(
    made: Certificate, other: Certificate, tmp_path: Path
) -> None:
    """The client trusts both servers; the one in between shows its own certificate and relays the rest."""
    both = tmp_path / "both.pem"
    both.write_bytes(made.certificate.read_bytes() + other.certificate.read_bytes())

    async def work() -> None:
        from splitinfer.transport.certificates import client_context, server_context

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection("127.0.0.1", port, ssl=client_context(pinning(made)))
            await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(4096):
                writer.write(data)
                await writer.drain()
            writer.close()

        server = ServerConfig(tls=serving(made), token=OURS)
        async with await transport.serve(echo, "127.0.0.1:0", config=server) as served:
            port = int(served.address.rpartition(":")[2])
            middle = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=server_context(serving(other)))
            address = "127.0.0.1:" + str(middle.sockets[0].getsockname()[1])
            client = ClientConfig(tls=TLSConfig(authorities=both), token=OURS)
            try:
                with pytest.raises(AuthenticationError, match="does not know the token"):
                    await transport.connect(address, config=client)
            finally:
                middle.close()

    run(work())


@pytest.mark.parametrize(
    "sent",
    [
        pack_frame(REQUEST, 1),
        pack_frame(HELLO, meta=pack_map({"nonce": bytes(1 << 16)}, 1 << 20)),
        b"GET / HTTP/1.1\r\n\r\n" + bytes(64),
    ],
    ids=["a call", "a large frame", "another protocol"],
)
def test_a_stranger_is_refused_by_the_head_of_what_it_sends(sent: bytes) -> None:
    async def work() -> None:
        config = ServerConfig(token=OURS)
        async with await transport.serve(echo, "127.0.0.1:0", info={"secret": 1}, config=config) as served:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", int(served.address.rpartition(":")[2])
            )
            writer.write(sent)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while data := await reader.read(1 << 16):
                    answer += data
            assert b"secret" not in answer
            assert len(answer) < 1024
            writer.close()

    run(work())


def test_the_port_of_a_server_beyond_this_machine_needs_both(made: Certificate) -> None:
    async def listen(**settings: Any) -> None:
        async with await transport.serve(echo, "0.0.0.0:0", config=ServerConfig(**settings)):
            pass

    for settings in ({}, {"token": OURS}, {"tls": serving(made)}):
        with pytest.raises(UsageError, match="other machines"):
            run(listen(**settings))
    run(listen(token=OURS, tls=serving(made)))
    run(listen(insecure=True))


def test_bad_files_are_said_before_the_port_is_taken(tmp_path: Path) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = "127.0.0.1:" + str(taken.getsockname()[1])
            config = ServerConfig(tls=TLSConfig(certificate=tmp_path / "absent.pem"))
            with pytest.raises(UsageError, match=r"absent\.pem"):
                await transport.serve(echo, address, config=config)

    run(work())
