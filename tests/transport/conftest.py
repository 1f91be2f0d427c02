"""The pair of ends that the conformance suite runs on, for every way to connect.

What holds for one has to hold for all: tcp, IPv6, unix, memory, TLS, through an emulated link, compressed.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitinfer import transport
from splitinfer.transport import ClientConfig, ServerConfig
from splitinfer.transport.certificates import Certificate, TLSConfig, make_certificate
from splitinfer.transport.link import LinkSpec
from splitinfer.transport.security import Token
from tests.transport.conformance import Pair


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(params=["127.0.0.1:0", "[::1]:0", "unix", "memory:conformance", "tls", "link", "lz4"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, certificate: Certificate) -> Pair:
    """A server and a channel to it, both closed at the end."""
    address: str = request.param
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    if address.startswith("[") and not _has_ipv6():
        pytest.skip("no IPv6 loopback on this machine")
    if address == "unix":
        address = f"unix:{tmp_path}/socket"
    elif address == "tls":
        token = Token("the token of this suite")
        ours = {"tls": TLSConfig(fingerprints=(certificate.fingerprint,)), "token": token}
        theirs = {"tls": TLSConfig(certificate=certificate.certificate, key=certificate.key), "token": token}
    elif address == "link":
        ours = {"link": LinkSpec(rtt=0.001)}
    elif address == "lz4":
        ours = theirs = {"compression": "on"}
    if ours:
        address = "127.0.0.1:0"

    @contextlib.asynccontextmanager
    async def open_pair(
        handler: Any, *, info: Any = None, server: Any = None, client: Any = None
    ) -> AsyncIterator[tuple[transport.Server, transport.Channel]]:
        serving = replace(server or ServerConfig(), **theirs)
        calling = replace(client or ClientConfig(), **ours)
        async with (
            await transport.serve(handler, address, info=info, config=serving) as served,
            await transport.connect(served.address, config=calling) as channel,
        ):
            yield served, channel

    return open_pair
