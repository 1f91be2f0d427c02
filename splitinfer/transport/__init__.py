"""Tensors between Python processes: calls with numpy and torch arrays, close to the bare socket.

    async def double(call):
        return [call.tensors[0].numpy() * 2]

    server = await transport.serve({"double": double}, "127.0.0.1:7077")
    channel = await transport.connect("127.0.0.1:7077")
    reply = await channel.call("double", [numpy.arange(4.0)])
    reply.tensors[0].numpy()            # a view on the receive buffer

Knows nothing of models and stands alone. docs/protocol.md is the wire byte by byte, docs/transport.md what
was measured.
"""

from __future__ import annotations

from splitinfer.transport.addresses import Address
from splitinfer.transport.certificates import TLSConfig
from splitinfer.transport.client import Channel, connect
from splitinfer.transport.config import ClientConfig, ServerConfig
from splitinfer.transport.frames import Limits
from splitinfer.transport.messages import Call, Reply
from splitinfer.transport.parcel import NUMBER, PARCEL_NBYTES, Parcel, Posted
from splitinfer.transport.security import Token, load_token
from splitinfer.transport.server import Answer, Handler, Server, serve
from splitinfer.transport.session import Stats
from splitinfer.transport.tensors import Array, Tensor

__all__ = [
    "NUMBER",
    "PARCEL_NBYTES",
    "Address",
    "Answer",
    "Array",
    "Call",
    "Channel",
    "ClientConfig",
    "Handler",
    "Limits",
    "Parcel",
    "Posted",
    "Reply",
    "Server",
    "ServerConfig",
    "Stats",
    "TLSConfig",
    "Tensor",
    "Token",
    "connect",
    "load_token",
    "serve",
]
