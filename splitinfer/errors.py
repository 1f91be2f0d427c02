"""Every exception of splitinfer, in one tree. The branch says whose fault it is.

    SplitinferError
    ├── UsageError              your mistake: an argument, a flag, a prompt (exit code 2)
    │   └── ConfigError         your mistake in a setting: splitinfer.toml, an environment variable
    ├── CheckpointError         a model file on this machine: missing, cut short, damaged
    │   ├── UnsupportedModelError   the file is whole, the architecture is not implemented here
    │   └── TokenizerError      the tokenizer file is missing, unknown or damaged
    ├── CapacityError           this machine has no room: memory, a port, a file handle
    ├── PlacementError          the nodes together do not hold the model, or hold different ones
    └── TransportError          anything between two machines; names the peer
        ├── LocalProtocolError  we were about to break the wire's rules; nothing was sent
        │   └── LimitExceeded   a size, a count or a rank over its limit; nothing was allocated
        ├── LinkError           the link failed: trying again, or another replica, may help
        │   ├── ConnectError    nobody answered at that address
        │   ├── ConnectionLost  the connection broke with the call in flight
        │   └── DeadlineExceeded    no answer in time (is a TimeoutError too)
        └── PeerError           the peer's fault, or its decision
            ├── RemoteProtocolError     it sent what the wire does not allow
            ├── VersionMismatch     it speaks another version of the wire
            ├── AuthenticationError     wrong or missing token, or a certificate not trusted
            ├── Overloaded          it refused for lack of room, or is draining
            └── RemoteError         its handler failed; carries the peer's code and message

Every exception has a `remedy`: one imperative sentence for a person, with its full stop, or "". The command
line prints `error: <message>` and the remedy, without a traceback, and leaves with `exit_code`.
"""

from __future__ import annotations

__all__ = [
    "AuthenticationError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "LimitExceeded",
    "LinkError",
    "LocalProtocolError",
    "Overloaded",
    "PeerError",
    "PlacementError",
    "RemoteError",
    "RemoteProtocolError",
    "SplitinferError",
    "TokenizerError",
    "TransportError",
    "UnsupportedModelError",
    "UsageError",
    "VersionMismatch",
]


class SplitinferError(Exception):
    """Root of the tree. `str(error)` is one line; `remedy` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class UsageError(SplitinferError, ValueError):
    """An argument, flag or prompt that cannot be right."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting that cannot be read or does not exist."""


class CheckpointError(SplitinferError):
    """A model file that is missing, cut short or damaged. `path` names it."""

    def __init__(self, message: str, *, path: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.path = path


class UnsupportedModelError(CheckpointError):
    """A whole checkpoint of an architecture, or with an option, not implemented here. `feature` names it."""

    def __init__(self, message: str, *, feature: str, path: str = "", remedy: str = "") -> None:
        super().__init__(message, path=path, remedy=remedy)
        self.feature = feature


class TokenizerError(CheckpointError):
    """A tokenizer that is missing, of unknown kind, or damaged."""


class CapacityError(SplitinferError):
    """This machine has no room for what was asked."""


class PlacementError(SplitinferError):
    """The nodes together do not serve the model.

    `gaps` lists what nobody holds, `conflicts` what is held by nodes that disagree; both as readable lines.
    """

    def __init__(
        self, message: str, *, gaps: tuple[str, ...] = (), conflicts: tuple[str, ...] = (), remedy: str = ""
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.gaps = gaps
        self.conflicts = conflicts


class TransportError(SplitinferError):
    """Anything between two machines. `peer` is the address as the user wrote it, or ""."""

    def __init__(self, message: str, *, peer: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.peer = peer


class LocalProtocolError(TransportError):
    """We were about to send what the wire does not allow. Nothing was sent."""


class LimitExceeded(LocalProtocolError):
    """A size, count or rank is over its limit: `value` (bytes or a count) over `limit`, of `limit_name`."""

    def __init__(
        self,
        message: str,
        *,
        limit_name: str = "",
        value: int = 0,
        limit: int = 0,
        peer: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(message, peer=peer, remedy=remedy)
        self.limit_name = limit_name
        self.value = value
        self.limit = limit


class LinkError(TransportError):
    """The link failed. The call may be tried again: nodes keep no state."""


class ConnectError(LinkError):
    """Nobody answered at that address."""


class ConnectionLost(LinkError):
    """The connection broke while calls were in flight."""


class DeadlineExceeded(LinkError, TimeoutError):
    """No answer in time. `timeout` is in seconds."""

    def __init__(self, message: str, *, timeout: float = 0.0, peer: str = "", remedy: str = "") -> None:
        super().__init__(message, peer=peer, remedy=remedy)
        self.timeout = timeout


class PeerError(TransportError):
    """The peer's fault, or the peer's decision."""


class RemoteProtocolError(PeerError):
    """The peer sent what the wire does not allow. The connection is gone: its position is unknown."""


class VersionMismatch(PeerError):
    """The peer speaks another version of the wire. `ours` and `theirs` are version numbers."""

    def __init__(self, message: str, *, ours: int, theirs: int, peer: str = "", remedy: str = "") -> None:
        super().__init__(message, peer=peer, remedy=remedy)
        self.ours = ours
        self.theirs = theirs


class AuthenticationError(PeerError):
    """Wrong or missing token, or a certificate that is not trusted."""


class Overloaded(PeerError):
    """The peer refused for lack of room, or because it is draining. Another replica may take the call."""


class RemoteError(PeerError):
    """The peer's handler failed. `code` is one of the wire's error codes (docs/protocol.md)."""

    def __init__(self, message: str, *, code: str, peer: str = "", remedy: str = "") -> None:
        super().__init__(message, peer=peer, remedy=remedy)
        self.code = code
