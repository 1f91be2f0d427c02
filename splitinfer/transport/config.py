"""The settings of a client's channel and of a server, one frozen dataclass each."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from socket import socket

from splitinfer.transport.frames import Limits
from splitinfer.transport.handshake import Authenticator
from splitinfer.transport.protocol import Codec

__all__ = ["ClientConfig", "ServerConfig"]


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How a channel behaves. Times in seconds.

    `reconnect_timeout`: for how long a call on a lost channel goes on trying to reach the server before it
    fails; 0 is one attempt. `shape`, given the connected socket, returns the one to use in its place: the
    link emulator's hook.
    """

    connect_timeout: float = 10.0
    call_timeout: float = 60.0
    reconnect_timeout: float = 5.0
    limits: Limits = field(default_factory=Limits)
    tls: ssl.SSLContext | None = None
    server_name: str | None = None
    authenticator: Authenticator | None = None
    codec: Callable[[], Codec] | None = None
    shape: Callable[[socket], Awaitable[socket]] | None = None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How a server behaves. Times in seconds.

    `call_timeout` is the longest that any call may take. `insecure` allows an address that other machines can
    reach without a token and TLS.
    """

    call_timeout: float = 600.0
    max_connections: int = 256
    insecure: bool = False
    limits: Limits = field(default_factory=Limits)
    tls: ssl.SSLContext | None = None
    authenticator: Authenticator | None = None
    codec: Callable[[], Codec] | None = None
