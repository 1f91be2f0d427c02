"""The settings of a client's channel and of a server, one frozen dataclass each."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitinfer.transport.certificates import TLSConfig
from splitinfer.transport.compression import Mode
from splitinfer.transport.frames import Limits
from splitinfer.transport.link import LinkSpec
from splitinfer.transport.security import Token
from splitinfer.transport.wire_dtypes import WireDtype

__all__ = ["ClientConfig", "ServerConfig"]


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """How a channel behaves. Times in seconds.

    `reconnect_timeout`: for how long a call on a lost channel goes on trying to reach the server before it
    fails; 0 is one attempt. `compression` is lossless and for both directions; `wire_dtype` is not: float
    tensors with rows of 64 or more travel in it, both ways. `link` puts an emulated link in between.

    `busy_poll`: for how long at most the loop looks for an answer without sleeping, where answers lately came
    within that time; 0 is never. It takes two wake-ups out of a round trip, and a core that has nothing else
    to do (docs/transport.md).
    """

    connect_timeout: float = 10.0
    call_timeout: float = 60.0
    reconnect_timeout: float = 5.0
    limits: Limits = field(default_factory=Limits)
    tls: TLSConfig | None = None
    token: Token | None = None
    compression: Mode = "auto"
    wire_dtype: WireDtype | None = None
    link: LinkSpec | None = None
    busy_poll: float = 200e-6


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How a server behaves. Times in seconds.

    `call_timeout` is the longest that any call may take. `insecure` allows an address that other machines can
    reach without a token and TLS. `compression`, unless off, is what a client asks for. `busy_poll` is for
    how long at most the loop looks for the next call without sleeping, as a client's does for its answer.
    """

    call_timeout: float = 600.0
    max_connections: int = 256
    insecure: bool = False
    limits: Limits = field(default_factory=Limits)
    tls: TLSConfig | None = None
    token: Token | None = None
    compression: Mode = "auto"
    busy_poll: float = 200e-6
