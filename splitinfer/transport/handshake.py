"""The four frames before any call: who is there, what each accepts, proof of the token, the server's info.

    client  HELLO    {agent, nonce, limits, encodings}
    server  HELLO    {agent, nonce, limits, encodings, auth}
    client  AUTH     {proof}
    server  WELCOME  {proof, info}

The client proves first, so that a server tells a stranger nothing. Each proof covers both HELLOs as they were
sent, and the TLS channel where there is one: nobody in between can change a limit or take an encoding away.
No I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from secrets import token_bytes
from typing import Any, Final, Literal, Protocol

from splitinfer import __version__
from splitinfer.errors import (
    AuthenticationError,
    DeadlineExceeded,
    Overloaded,
    RemoteError,
    RemoteProtocolError,
    TransportError,
    VersionMismatch,
)
from splitinfer.transport.frames import AUTH, HELLO, WELCOME, Limits, pack_frame, pack_map
from splitinfer.transport.messages import Message

__all__ = ["MAX_HELLO", "Authenticator", "Handshake", "Hello", "Role", "error_from", "error_map"]

Role = Literal["client", "server"]
_NONCE_NBYTES: Final = 32
MAX_HELLO: Final = 4096  # bytes of meta from a stranger
_MAX_TEXT: Final = 2000


class Authenticator(Protocol):
    """Knows the token. `transcript` is both HELLO metas and the channel binding, in this order."""

    def prove(self, role: Role, transcript: bytes) -> bytes:
        """The proof that this side, in this role, knows the token."""

    def verify(self, role: Role, transcript: bytes, proof: bytes) -> bool:
        """True where `proof` is what the other side, in `role`, had to send; compared in constant time."""


@dataclass(frozen=True, slots=True)
class Hello:
    """One side's first frame. `encodings` are those that it can decode; 0, the bytes as they are, always.

    `link_rate` is what a client knows beforehand of the link's throughput, in bytes/s; 0 is nothing.
    """

    nonce: bytes
    limits: Limits
    agent: str = ""
    encodings: frozenset[int] = field(default_factory=frozenset)
    auth: bool = False
    link_rate: int = 0

    def to_map(self) -> dict[str, Any]:
        return {
            "agent": self.agent,
            "nonce": self.nonce,
            "limits": asdict(self.limits),
            "encodings": sorted(self.encodings),
            "auth": self.auth,
            "link_rate": self.link_rate,
        }

    @classmethod
    def from_map(cls, content: dict[str, Any]) -> Hello:
        """Unknown keys are ignored, so that some can be added. Raises RemoteProtocolError."""
        agent, nonce = content.get("agent", ""), content.get("nonce")
        encodings, auth = content.get("encodings", []), content.get("auth", False)
        if type(nonce) is not bytes or len(nonce) != _NONCE_NBYTES:
            raise RemoteProtocolError(f"the peer's HELLO has no nonce of {_NONCE_NBYTES} bytes")
        if type(agent) is not str or type(auth) is not bool:
            raise RemoteProtocolError("the peer's HELLO is not as the protocol says")
        if type(encodings) is not list or not all(
            type(code) is int and 0 <= code < 256 for code in encodings
        ):
            raise RemoteProtocolError("the peer's HELLO lists encodings that are no numbers below 256")
        rate = content.get("link_rate", 0)
        if type(rate) is not int or not 0 <= rate < 1 << 63:
            raise RemoteProtocolError("the peer's HELLO has a link rate that is no number of bytes")
        return cls(nonce, _limits(content.get("limits")), agent, frozenset(encodings), auth, rate)


def _limits(content: Any) -> Limits:
    if type(content) is not dict:
        raise RemoteProtocolError("the peer's HELLO has no limits")
    values: dict[str, int] = {}
    for name in (entry.name for entry in fields(Limits)):
        value = content.get(name)
        if type(value) is not int or not 0 < value < 1 << 63:
            raise RemoteProtocolError(f"the peer's HELLO has no {name}")
        values[name] = value
    return Limits(**values)


class Handshake:
    """One side's part. `start` and `receive` return frames to send; `done` says that calls may follow.

    `hello` is the peer's, once it came; `info` what the server says of itself, once done.
    """

    def __init__(
        self,
        role: Role,
        *,
        limits: Limits,
        encodings: frozenset[int] = frozenset(),
        make_info: Callable[[], dict[str, Any]] | None = None,
        authenticator: Authenticator | None = None,
        binding: bytes = b"",
        link_rate: int = 0,
        peer: str = "",
    ) -> None:
        self.done = False
        self.hello: Hello | None = None
        self.info: dict[str, Any] = {}
        self._role: Role = role
        self._peer = peer
        self._make_info = make_info
        self._authenticator = authenticator
        self._binding = binding
        auth = role == "server" and authenticator is not None
        agent = f"splitinfer/{__version__}"
        own = Hello(token_bytes(_NONCE_NBYTES), limits, agent, encodings, auth, link_rate)
        self._own = pack_map(own.to_map(), MAX_HELLO)
        self._transcript = b""

    def start(self) -> list[bytes]:
        """A client's first frame; a server waits for it."""
        return [pack_frame(HELLO, meta=self._own)] if self._role == "client" else []

    def receive(self, message: Message) -> list[bytes]:
        """Take one frame, each of which has one place. Raises AuthenticationError, RemoteProtocolError."""
        client = self._role == "client"
        if message.kind == HELLO and self.hello is None:
            self.hello = Hello.from_map(message.meta)
            if client:
                self._transcript = self._own + message.packed_meta + self._binding
                self._check_auth(self.hello)
                return [pack_frame(AUTH, meta=pack_map({"proof": self._prove()}, MAX_HELLO))]
            self._transcript = message.packed_meta + self._own + self._binding
            return [pack_frame(HELLO, meta=self._own)]
        if self.hello is None or self.done or message.kind != (WELCOME if client else AUTH):
            raise RemoteProtocolError(f"a handshake frame of kind {message.kind} out of its turn")
        self._check_proof("server" if client else "client", message.meta.get("proof"))
        self.done = True
        if client:
            info = message.meta.get("info")
            if type(info) is not dict:
                raise RemoteProtocolError("the server's info is not a map")
            self.info = info
            return []
        self.info = self._make_info() if self._make_info else {}
        meta = pack_map({"proof": self._prove(), "info": self.info}, self.hello.limits.max_meta)
        return [pack_frame(WELCOME, meta=meta)]

    def _check_auth(self, server: Hello) -> None:
        if server.auth and self._authenticator is None:
            raise AuthenticationError(
                f"{self._peer} asks for a token",
                peer=self._peer,
                remedy="Give the file that the token is in, with --token-file.",
            )
        if self._authenticator is not None and not server.auth:
            raise AuthenticationError(
                f"{self._peer} asks for no token, so it cannot prove that it is yours",
                peer=self._peer,
                remedy="Start the node with the token, or connect without one.",
            )

    def _prove(self) -> bytes:
        return self._authenticator.prove(self._role, self._transcript) if self._authenticator else b""

    def _check_proof(self, role: Role, proof: Any) -> None:
        if self._authenticator is None:
            return
        if type(proof) is not bytes or not self._authenticator.verify(role, self._transcript, proof):
            # A client reads what its server says of it: its own port would tell it nothing.
            who = "this client" if role == "client" else self._peer
            raise AuthenticationError(
                f"{who} does not know the token",
                peer=self._peer,
                remedy="Use one token on both sides.",
            )


def error_map(error: BaseException) -> dict[str, str]:
    """What an ERROR frame says of an exception: `code`, `message`, `remedy`.

    Anything that is not of splitinfer's own tree is told by type and text, without a traceback.
    """
    code, remedy = "failed", getattr(error, "remedy", "")
    if isinstance(error, RemoteError):
        code = error.code
    for kind, name in _CODES.items():
        if isinstance(error, kind):
            code = name
    message = str(error) if hasattr(error, "remedy") else f"{type(error).__name__}: {error}"
    return {"code": code[:64], "message": message[:_MAX_TEXT], "remedy": remedy[:_MAX_TEXT]}


def error_from(content: dict[str, Any], peer: str) -> TransportError:
    """The exception for an ERROR frame's map."""
    code, message, remedy = (str(content.get(key, ""))[:_MAX_TEXT] for key in ("code", "message", "remedy"))
    kind = {name: kind for kind, name in _CODES.items()}.get(code)
    text = f"{peer}: {message or code}" if peer else message or code
    if kind is None or kind is VersionMismatch:
        return RemoteError(text, code=code, peer=peer, remedy=remedy)
    return kind(text, peer=peer, remedy=remedy)


_CODES: Final[dict[type[TransportError], str]] = {
    Overloaded: "overloaded",
    AuthenticationError: "authentication",
    DeadlineExceeded: "deadline",
    RemoteProtocolError: "protocol",
    VersionMismatch: "version",
}
