"""`serve`: accept connections, run handlers, answer: within the same read where a handler need not wait."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from types import CoroutineType, TracebackType
from typing import Any, Final, Self, TypeAlias

from splitinfer.errors import (
    AuthenticationError,
    ConnectionLost,
    DeadlineExceeded,
    Overloaded,
    RemoteError,
    SplitinferError,
    TransportError,
)
from splitinfer.transport import eager, memory
from splitinfer.transport.addresses import Address
from splitinfer.transport.certificates import server_binding, server_context
from splitinfer.transport.codec import TensorCodec
from splitinfer.transport.config import ServerConfig
from splitinfer.transport.deadlines import Deadlines
from splitinfer.transport.endpoints import listen, tune
from splitinfer.transport.frames import CANCEL, CREDIT, ERROR, REQUEST, pack_frame, pack_map
from splitinfer.transport.handshake import error_map
from splitinfer.transport.messages import Call, Reply
from splitinfer.transport.parcel import Parcel, Posted
from splitinfer.transport.protocol import STREAM_WINDOW, Connection
from splitinfer.transport.security import TokenAuthenticator, check_exposure
from splitinfer.transport.sockets import Link
from splitinfer.transport.tensors import Array
from splitinfer.transport.tls import TlsStream

__all__ = ["Answer", "Call", "Handler", "Server", "serve"]

log = logging.getLogger("splitinfer.transport")

Answer: TypeAlias = "Reply | Posted | Sequence[Array] | AsyncIterator[Reply] | None"
Handler: TypeAlias = "Callable[[Call], Answer | Awaitable[Answer]]"
Info: TypeAlias = "Mapping[str, Any] | Callable[[], Mapping[str, Any]]"

_TLS_SECONDS: Final = 10.0
_ACCEPTS_PER_EVENT: Final = 64
_NO_FILES_PAUSE_SECONDS: Final = 1.0


async def serve(
    handler: Handler | Mapping[str, Handler],
    address: str,
    *,
    info: Info | None = None,
    config: ServerConfig | None = None,
) -> Server:
    """Listen on `address` and answer calls until the server is closed; `server.address` is where.

    A handler takes a Call and answers with a Reply, a sequence of arrays, or an async iterator of Replies; it
    may be a plain function, for what never waits, or a coroutine function. What it raises reaches the caller
    as RemoteError, or Overloaded. `info` is what each client reads as `channel.info`.

    Raises UsageError for an address that is none, or reachable from other machines without a token and TLS;
    CapacityError where the address is taken.
    """
    server = Server(handler, info or {}, config or ServerConfig())
    server._listen(Address.parse(address))
    return server


class Server:
    """A listening socket and its connections. Use as a context manager, or `drain` and `close`."""

    def __init__(self, handler: Handler | Mapping[str, Handler], info: Info, config: ServerConfig) -> None:
        self.config = config
        self.address = ""
        self.handler = _dispatcher(handler) if isinstance(handler, Mapping) else handler
        self.peers: set[_Peer] = set()
        self.tls_binding = b""
        self._tls: ssl.SSLContext | None = None
        self._info = info
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._bound: Address | None = None
        self._arriving: set[asyncio.Task[None]] = set()
        self._draining = False

    def _listen(self, address: Address) -> None:
        config = self.config
        check_exposure(str(address), token=config.token, tls=config.tls, insecure=config.insecure)
        if config.tls is not None:
            self._tls = server_context(config.tls)
            self.tls_binding = server_binding(config.tls)
        if address.scheme == "memory":
            memory.listen(address.name, self._welcome)
        else:
            self._socket, address = listen(address)
            self._loop.add_reader(self._socket.fileno(), self._accept)
        self._bound = address
        self.address = str(address)

    def info(self) -> dict[str, Any]:
        return dict(self._info() if callable(self._info) else self._info)

    def _accept(self) -> None:
        assert self._socket is not None
        for _ in range(_ACCEPTS_PER_EVENT):
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # Out of file handles: the listener would report the same client again and again.
                log.warning("cannot accept a connection: %s", error)
                self._loop.remove_reader(self._socket.fileno())
                self._loop.call_later(_NO_FILES_PAUSE_SECONDS, self._accept_again)
                return
            self._welcome(sock)

    def _accept_again(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def _welcome(self, sock: socket.socket) -> None:
        """A client is there."""
        tune(sock)
        if len(self.peers) + len(self._arriving) >= self.config.max_connections or self._draining:
            why = Overloaded(
                "the node is draining" if self._draining else "the node has too many connections"
            )
            with suppress(OSError):
                sock.send(pack_frame(ERROR, meta=pack_map(error_map(why), 1 << 16)))
            sock.close()
        elif self._tls is not None:
            task = self._loop.create_task(self._welcome_tls(sock, self._tls))
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)
        else:
            self.peers.add(_Peer(self, sock, None, self._loop))

    async def _welcome_tls(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        stream = TlsStream(sock, context, server_side=True)
        try:
            async with asyncio.timeout(_TLS_SECONDS):
                await stream.handshake(self._loop)
        except (OSError, TimeoutError) as error:
            log.info("no TLS connection with %s: %s", _name_of(sock, self.address), error)
            await stream.leave(self._loop)
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            self.peers.add(_Peer(self, sock, stream, self._loop))

    def _stop_listening(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        if self._bound is not None and self._bound.scheme == "memory":
            memory.unlisten(self._bound.name)
        elif self._bound is not None and self._bound.scheme == "unix":
            with suppress(OSError):
                os.unlink(self._bound.name)
        self._bound = None

    async def drain(self, *, timeout: float = 30.0) -> bool:
        """Take no new connection and no new call, and wait for those in flight to be answered.

        True where all were, False where `timeout` seconds did not suffice. `close` comes after it.
        """
        self._draining = True
        self._stop_listening()
        for peer in self.peers:
            peer.connection.goaway()
            peer.link.flush()
        until = monotonic() + timeout
        while any(peer.connection.calls or peer.connection.outbox.nbytes for peer in self.peers):
            if monotonic() >= until:
                return False
            await asyncio.sleep(0.01)
        return True

    async def close(self) -> None:
        """Close every connection and cancel what still runs."""
        self._stop_listening()
        tasks: list[asyncio.Future[Any]] = list(self._arriving)
        for task in self._arriving:
            task.cancel()
        for peer in list(self.peers):
            tasks += [running.task for running in peer.running.values()]
            peer.link.abort(ConnectionLost("the server was closed", peer=peer.connection.peer))
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _dispatcher(handlers: Mapping[str, Handler]) -> Handler:
    def dispatch(call: Call) -> Answer | Awaitable[Answer]:
        handler = handlers.get(call.method)
        if handler is None:
            raise RemoteError(f"there is no method {call.method!r}", code="no_method")
        return handler(call)

    return dispatch


class _Running:
    """A handler that has to wait: the task that runs it, and how many more items its caller takes."""

    __slots__ = ("allowed", "credit", "deadline", "task", "timed_out")

    def __init__(self, task: Any, deadline: float) -> None:
        self.task: asyncio.Future[Any] = task
        self.deadline = deadline
        self.timed_out = False
        self.credit = STREAM_WINDOW
        self.allowed: asyncio.Event | None = None


class _Peer:
    """One client's connection."""

    def __init__(
        self, server: Server, sock: socket.socket, tls: TlsStream | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        config = server.config
        self.running: dict[int, _Running] = {}
        self._server = server
        self._loop = loop
        self._deadlines = Deadlines(loop, self._sweep)
        self._handler, self._call_timeout = server.handler, config.call_timeout
        self.connection = Connection(
            "server",
            limits=config.limits,
            info=server.info,
            authenticator=TokenAuthenticator(config.token) if config.token else None,
            binding=server.tls_binding,
            codec=TensorCodec("server", config.compression),
            peer=_name_of(sock, server.address),
        )
        self.link = Link(loop, sock, self.connection, self, tls, busy_poll=config.busy_poll)
        self.stamps = self._stamp

    # ---- what the link tells

    def on_message(self, message: Call) -> None:
        id, connection = message.id, self.connection
        if message.kind == REQUEST:
            if not connection.admit(message):
                return
            left = message.value / 1000
            message.deadline = monotonic() + (left if 0 < left < self._call_timeout else self._call_timeout)
            message.peer, message.stamps = connection.peer, self.stamps
            try:
                self._answer(id, self._handler(message), message.deadline)
            except asyncio.CancelledError:  # of something that the handler waited for: nobody cancels us here
                self._fail(id, RemoteError("the handler was cancelled", code="cancelled"))
            except Exception as error:
                self._fail(id, error)
        elif connection.accept(message) and id in self.running:
            running = self.running[id]
            if message.kind == CANCEL:
                running.task.cancel()
            elif message.kind == CREDIT:
                running.credit += message.value
                if running.allowed is not None:
                    running.allowed.set()

    def on_lost(self, error: TransportError) -> None:
        self._server.peers.discard(self)
        self._deadlines.close()
        for running in self.running.values():
            running.task.cancel()
        if isinstance(error, AuthenticationError):
            log.warning("refused %s: %s", error.peer or "a client", error)
        elif not isinstance(error, ConnectionLost):
            log.info("dropped: %s", error)

    # ---- calls

    def _stamp(self, id: int, parcel: Parcel) -> int | None:
        """See `Call.stamp`."""
        return self.link.direct if self.connection.stamp_answer(id, parcel) else None

    def _wait_for(self, id: int, running: _Running) -> None:
        self.running[id] = running
        self._deadlines.watch(running.deadline)
        running.task.add_done_callback(partial(self._done, id, running.deadline))

    def _done(self, id: int, deadline: float, task: asyncio.Future[Any]) -> None:
        """A handler that had to wait has come to its end."""
        running = self.running.pop(id)
        if self.link.closed:
            if not task.cancelled():
                task.exception()
            return
        try:
            self._answer(id, task.result(), deadline)
        except asyncio.CancelledError:
            if running.timed_out:
                self.connection.error(id, DeadlineExceeded("the call's time was over"))
            else:
                self.connection.error(id, RemoteError("the call was cancelled", code="cancelled"))
        except Exception as error:
            self._fail(id, error)
        self.link.flush()

    def _answer(self, id: int, answer: Any, deadline: float) -> None:
        """What a handler gave: an answer, or something that will become one."""
        kind = type(answer)
        if (
            kind is not Posted
            and kind is not Reply
            and (kind is CoroutineType or asyncio.iscoroutine(answer))
        ):
            answer = eager.start(answer, self._loop)
        if type(answer) is Posted:
            self.connection.post_answer(id, answer.parcel, answer.sent)
            self.link.flush()
        elif type(answer) is Reply:
            self.connection.reply(id, answer.tensors, answer.meta)
        elif type(answer) is list:
            self.connection.reply(id, answer, {})
        elif asyncio.isfuture(answer):
            self._wait_for(id, _Running(answer, deadline))
        elif hasattr(answer, "__aiter__"):
            running = _Running(None, deadline)
            running.task = self._loop.create_task(self._stream(id, answer, running))
            self._wait_for(id, running)
        else:
            self.connection.reply(id, answer or (), {})

    async def _stream(self, id: int, items: AsyncIterator[Reply], running: _Running) -> None:
        """Send items as they come, no more of them than the caller allows."""
        running.allowed = asyncio.Event()
        try:
            async for item in items:
                while not running.credit:
                    running.allowed.clear()
                    await running.allowed.wait()
                running.credit -= 1
                self.connection.item(id, item.tensors, item.meta)
                self.link.flush()
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()
        self.connection.end(id)
        self.link.flush()

    def _fail(self, id: int, error: Exception) -> None:
        if not isinstance(error, SplitinferError):
            log.error("a handler failed for %s", self.connection.peer, exc_info=error)
        self.connection.error(id, error)

    def _sweep(self, now: float) -> float:
        earliest = inf
        for running in list(self.running.values()):
            if running.deadline <= now:
                running.timed_out = True
                running.deadline = inf
                running.task.cancel()
            earliest = min(earliest, running.deadline)
        return earliest


def _name_of(sock: socket.socket, address: str) -> str:
    """The other end by name: its address, or for a nameless one where it came in."""
    with suppress(OSError):
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            host, port = sock.getpeername()[:2]
            return str(Address("tcp", host, port))
    return address
