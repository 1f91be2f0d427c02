"""Where a server listens: `host:port`, `[::1]:port`, `unix:/path`, `memory:name`. Parsed in one place."""

from __future__ import annotations

from typing import Literal, NamedTuple

from splitinfer.errors import UsageError
from splitinfer.transport.security import is_loopback

__all__ = ["Address"]

_REMEDY = "Write host:port, [::1]:port, unix:/path or memory:name."


class Address(NamedTuple):
    """One parsed address. `name` is a host, a path or a name; `port` counts for tcp only."""

    scheme: Literal["tcp", "unix", "memory"]
    name: str
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises UsageError for what is not an address."""
        for scheme in ("unix", "memory"):
            if text.startswith(f"{scheme}:"):
                name = text[len(scheme) + 1 :]
                if not name or "\0" in name:
                    raise UsageError(f"{text!r} names no {scheme} address", remedy=_REMEDY)
                return cls("unix" if scheme == "unix" else "memory", name)
        host, colon, port = text.removeprefix("tcp://").rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host and not any(map(str.isspace, host)):
            raise UsageError(f"{text!r}: an IPv6 address needs brackets", remedy=_REMEDY)
        spaced = any(map(str.isspace, host))
        if not colon or not host or spaced or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise UsageError(f"{text!r} is no address", remedy=_REMEDY)
        return cls("tcp", host, int(port))

    def __str__(self) -> str:
        if self.scheme != "tcp":
            return f"{self.scheme}:{self.name}"
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"

    @property
    def is_local(self) -> bool:
        """True where the bytes do not leave this machine, as far as the address itself tells."""
        return self.scheme != "tcp" or is_loopback(self.name)
