"""Sockets made: reach an address, listen on one, and what the operating system is told about each."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import sys
from contextlib import suppress
from typing import Final

from splitinfer.errors import CapacityError, ConnectError, UsageError
from splitinfer.transport import memory
from splitinfer.transport.addresses import Address
from splitinfer.transport.security import is_loopback

__all__ = ["dial", "listen", "tune"]

_BACKLOG: Final = 256
_DEAD_AFTER_SECONDS: Final = 5
# Unsent bytes that the kernel may hold: what a small message can find before it, whatever the send buffer is.
_NOTSENT_NBYTES: Final = 256 * 1024
# macOS: its names for what Linux calls TCP_KEEPIDLE and (in seconds) TCP_USER_TIMEOUT (netinet/tcp.h).
_DARWIN_TCP_KEEPALIVE: Final = 0x10
_DARWIN_TCP_RXT_CONNDROPTIME: Final = 0x80


async def dial(address: Address, name: str = "") -> socket.socket:
    """A connected, non-blocking socket. Raises ConnectError; the caller sets the time limit.

    `name` is what errors call it, where that is not its address: the node behind an emulated link.
    """
    name = name or str(address)
    loop = asyncio.get_running_loop()
    if address.scheme == "memory":
        return memory.dial(address.name)
    if address.scheme == "unix":
        return await _connect(loop, name, socket.AF_UNIX, address.name)
    try:
        found = await loop.getaddrinfo(address.name, address.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectError(
            f"{name}: no such host ({error.strerror})", peer=name, remedy="Check the host's name."
        ) from None
    failure: ConnectError | None = None
    for family, _, _, _, target in found:
        try:
            return await _connect(loop, name, family, target)
        except ConnectError as error:
            failure = failure or error
    raise failure or ConnectError(f"{name}: the name has no address", peer=name)


async def _connect(
    loop: asyncio.AbstractEventLoop, name: str, family: int, target: str | tuple[object, ...]
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, target)
        tune(sock)
    except OSError as error:
        sock.close()
        raise ConnectError(
            f"nobody answers at {name}: {_words(error)}",
            peer=name,
            remedy="Check that the node runs there: splitinfer node.",
        ) from None
    except BaseException:
        sock.close()
        raise
    return sock


def _words(error: OSError) -> str:
    """What the operating system calls it: event loops put their own words in its place."""
    return (os.strerror(error.errno) if error.errno else str(error)).lower()


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening, non-blocking socket and the address that it got.

    Raises CapacityError where the port or path is taken, UsageError where this machine has no such address.
    """
    if address.scheme == "unix":
        _remove_stale(address.name)
        family, target = socket.AF_UNIX, address.name
    else:
        try:
            found = socket.getaddrinfo(
                address.name, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise UsageError(
                f"{address}: no such host ({error.strerror})", remedy="Check the host's name."
            ) from None
        family, _, _, _, target = found[0]  # type: ignore[assignment]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)
        if family == socket.AF_UNIX:
            os.chmod(address.name, 0o600)  # before anybody can connect: only this user may
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise CapacityError(
                f"cannot listen on {address}: {(error.strerror or '').lower()}",
                remedy="Choose another port, or stop what listens there.",
            ) from None
        raise UsageError(
            f"cannot listen on {address}: {(error.strerror or str(error)).lower()}",
            remedy="Name an address of this machine.",
        ) from None
    if address.scheme == "tcp":
        address = Address("tcp", address.name, sock.getsockname()[1])
    return sock, address


def _remove_stale(path: str) -> None:
    """A socket file whose server is gone stays behind; one that answers is left alone and bind will fail."""
    with suppress(OSError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)


def tune(sock: socket.socket) -> None:
    """No Nagle, little unsent data in the kernel, a dead peer found within five seconds.

    On loopback no pacing either.
    """
    sock.setblocking(False)
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    wanted: list[tuple[int, int | None, int | bytes]] = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", _DARWIN_TCP_KEEPALIVE), 2),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", None), 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", None), 3),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_USER_TIMEOUT", None), _DEAD_AFTER_SECONDS * 1000),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", None), _NOTSENT_NBYTES),
    ]
    if sys.platform == "darwin":
        wanted.append((socket.IPPROTO_TCP, _DARWIN_TCP_RXT_CONNDROPTIME, _DEAD_AFTER_SECONDS))
    with suppress(OSError):  # a peer that is gone already
        if is_loopback(sock.getpeername()[0]):
            # Nothing is lost between two processes, and BBR, where that is the system's choice, would pace
            # them: a timer for every few packets, and a fraction of the throughput.
            wanted.append((socket.IPPROTO_TCP, getattr(socket, "TCP_CONGESTION", None), b"reno"))
    for level, option, value in wanted:
        if option is not None:
            with suppress(OSError):
                sock.setsockopt(level, option, value)
