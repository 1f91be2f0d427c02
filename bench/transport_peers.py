"""The peers of bench/transport.py: for each one a server and a client that move the same payloads.

Every server answers two things: a row comes back as it is, a large tensor is taken in and acknowledged.
`transport_processes.py` runs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

__all__ = ["BULK_NBYTES", "IN_FLIGHT", "PEERS", "ROW_NBYTES", "Peer", "RawSocket"]

ROW_NBYTES: Final = 5632
BULK_NBYTES: Final = 16 << 20
TIMEOUT: Final = 30.0
IN_FLIGHT: Final = 64
ROW: Final = bytes(range(256)) * (ROW_NBYTES // 256)


class Peer:
    """One way to move bytes. `serve` says where it listens by `ready(address)` and runs until it is ended."""

    name: ClassVar[str]

    async def serve(self, ready: Callable[[Any], None]) -> None:
        raise NotImplementedError

    async def connect(self, address: Any) -> None:
        raise NotImplementedError

    async def row(self) -> None:
        """One row there and back."""
        raise NotImplementedError

    async def bulk(self) -> None:
        """A large tensor there, an acknowledgement back."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go of the connection."""


class RawSocket(Peer):
    """Blocking `sendall` and `recv_into` without any protocol: what the kernel itself costs.

    Two connections, one for rows and one for large tensors, so that both ends know how much to expect.
    """

    name = "raw blocking socket"
    congestion_control = b""  # the system's own

    async def serve(self, ready: Callable[[Any], None]) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        ready(listener.getsockname()[1])
        rows, bulk = (self.tuned(listener.accept()[0]) for _ in range(2))
        threading.Thread(target=answer, args=(bulk, BULK_NBYTES, 1), daemon=True).start()
        answer(rows, ROW_NBYTES, ROW_NBYTES)

    async def connect(self, address: Any) -> None:
        self.rows, self.bulks = (
            self.tuned(socket.create_connection(("127.0.0.1", address))) for _ in range(2)
        )
        self.tensor = memoryview(bytearray(BULK_NBYTES))
        self.reply = memoryview(bytearray(ROW_NBYTES))

    def tuned(self, connection: socket.socket) -> socket.socket:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.congestion_control and hasattr(socket, "TCP_CONGESTION"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self.congestion_control)
        return connection

    async def row(self) -> None:
        self.rows.sendall(ROW)
        receive(self.rows, self.reply)

    async def bulk(self) -> None:
        self.bulks.sendall(self.tensor)
        receive(self.bulks, self.reply[:1])

    def rows_in_flight(self, rounds: int) -> float:
        """Calls per second with rows following each other: one thread writes, this one reads."""
        count = rounds * IN_FLIGHT

        def write() -> None:
            for _ in range(count):
                self.rows.sendall(ROW)

        writer = threading.Thread(target=write)
        start = time.perf_counter()
        writer.start()
        for _ in range(count):
            receive(self.rows, self.reply)
        elapsed = time.perf_counter() - start
        writer.join()
        return count / elapsed


class RawSocketUnpaced(RawSocket):
    """Where the system's congestion control paces packets (BBR): without that, as ours on loopback."""

    name = "the same, not paced"
    congestion_control = b"reno"


def answer(connection: socket.socket, nbytes: int, answer_nbytes: int) -> None:
    """Take `nbytes` bytes, send the first `answer_nbytes` of them back, until the stream ends."""
    body = memoryview(bytearray(nbytes))
    while receive(connection, body):
        connection.sendall(body[:answer_nbytes])


def receive(connection: socket.socket, into: memoryview) -> bool:
    """Fill `into`; False where the stream ended first."""
    while into:
        nbytes = connection.recv_into(into)
        if not nbytes:
            return False
        into = into[nbytes:]
    return True


class Splitinfer(Peer):
    """A full call as an expert call makes it: method, meta, deadline, one tensor each way."""

    name = "splitinfer, TCP"
    address = "127.0.0.1:0"

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(server's, client's) part of the configuration."""
        return {}, {}

    async def serve(self, ready: Callable[[Any], None]) -> None:
        from splitinfer import transport

        # Plain functions, as a node's own handlers: what does not wait need not be a coroutine.
        def echo(call: transport.Call) -> transport.Reply:
            return transport.Reply(call.tensors)

        def sink(call: transport.Call) -> transport.Reply:
            return transport.Reply()

        ours, theirs = self.settings()
        server = await transport.serve(
            {"experts": echo, "sink": sink}, self.address, config=transport.ServerConfig(**ours)
        )
        ready((server.address, theirs))
        await asyncio.Event().wait()

    async def connect(self, address: Any) -> None:
        from splitinfer import transport

        where, settings = address
        self.channel = await transport.connect(where, config=transport.ClientConfig(**settings))
        self.tensor = np.frombuffer(ROW, np.uint16)
        self.large = np.zeros(BULK_NBYTES // 2, np.uint16)

    async def row(self) -> None:
        await self.channel.call("experts", [self.tensor], {"layer": 3, "out": "bfloat16"}, timeout=TIMEOUT)

    async def bulk(self) -> None:
        await self.channel.call("sink", [self.large], timeout=TIMEOUT)

    async def close(self) -> None:
        await self.channel.close()


class SplitinferUnix(Splitinfer):
    name = "splitinfer, Unix socket"

    @property
    def address(self) -> str:  # type: ignore[override]
        return f"unix:{tempfile.mkdtemp()}/bench.sock"


class SplitinferSleeping(Splitinfer):
    """What the wake-ups cost: the loop sleeps in the kernel, as those of the peers do."""

    name = "splitinfer, TCP, no busy polling"

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"busy_poll": 0.0}, {"busy_poll": 0.0}


class SplitinferTLS(Splitinfer):
    name = "splitinfer, TLS 1.3 and token"

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from splitinfer.transport.certificates import TLSConfig, make_certificate
        from splitinfer.transport.security import Token

        made = make_certificate(Path(tempfile.mkdtemp()))
        token = Token.generate()[1]
        server = {"tls": TLSConfig(certificate=made.certificate, key=made.key), "token": Token(token)}
        return server, {"tls": TLSConfig(fingerprints=(made.fingerprint,)), "token": token}

    async def connect(self, address: Any) -> None:
        from splitinfer.transport.security import Token

        where, settings = address
        await super().connect((where, {**settings, "token": Token(settings["token"])}))


class Http(Peer):
    """HTTP/1.1 keep-alive: aiohttp's client, uvicorn with httptools."""

    name = "HTTP/1.1, aiohttp to uvicorn"

    async def serve(self, ready: Callable[[Any], None]) -> None:
        import uvicorn

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body = bytearray()
            more = True
            while more:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
            answer = bytes(body) if len(body) == ROW_NBYTES else b"!"
            headers = [(b"content-length", str(len(answer)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            app, log_level="error", http="httptools", lifespan="off", timeout_keep_alive=int(TIMEOUT)
        )
        server = uvicorn.Server(config)
        ready(listener.getsockname()[1])
        await server.serve(sockets=[listener])

    async def connect(self, address: Any) -> None:
        import aiohttp

        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=IN_FLIGHT))
        self.url = f"http://127.0.0.1:{address}/experts"
        self.timeout = aiohttp.ClientTimeout(total=TIMEOUT)
        self.tensor = bytes(BULK_NBYTES)

    async def post(self, body: Any) -> None:
        async with self.session.post(
            self.url, data=body, timeout=self.timeout, headers={"layer": "3"}
        ) as reply:
            await reply.read()

    async def row(self) -> None:
        await self.post(ROW)

    async def bulk(self) -> None:
        await self.post(memoryview(self.tensor))

    async def close(self) -> None:
        await self.session.close()


class Zmq(Peer):
    """pyzmq's asyncio sockets, DEALER to ROUTER: an id, a header and a body."""

    name = "pyzmq asyncio"

    async def serve(self, ready: Callable[[Any], None]) -> None:
        import zmq
        import zmq.asyncio

        listener = zmq.asyncio.Context().socket(zmq.ROUTER)
        ready(listener.bind_to_random_port("tcp://127.0.0.1"))
        while True:
            client, number, header, body = await listener.recv_multipart(copy=False)
            answer = body if len(body) == ROW_NBYTES else b"!"
            await listener.send_multipart([client, number, header, answer], copy=False)

    async def connect(self, address: Any) -> None:
        import zmq
        import zmq.asyncio

        self.dealer = zmq.asyncio.Context().socket(zmq.DEALER)
        self.dealer.connect(f"tcp://127.0.0.1:{address}")
        self.tensor = bytes(BULK_NBYTES)
        self.waiting: dict[bytes, asyncio.Future[None]] = {}
        self.number = 0
        self.reader = asyncio.create_task(self.read())

    async def read(self) -> None:
        while True:
            number, _, _ = await self.dealer.recv_multipart()
            self.waiting.pop(number).set_result(None)

    async def call(self, body: bytes) -> None:
        self.number += 1
        number = self.number.to_bytes(8, "little")
        done = self.waiting[number] = asyncio.get_running_loop().create_future()
        await self.dealer.send_multipart([number, b'{"layer":3}', body], copy=len(body) == ROW_NBYTES)
        await done

    async def row(self) -> None:
        await self.call(ROW)

    async def bulk(self) -> None:
        await self.call(self.tensor)

    async def close(self) -> None:
        self.reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.reader
        self.dealer.close(linger=0)


class Grpc(Peer):
    """grpc.aio, unary, bytes as they are (no protobuf on top)."""

    name = "grpc.aio"
    options: ClassVar = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

    async def serve(self, ready: Callable[[Any], None]) -> None:
        import grpc

        async def answer(request: bytes, _context: Any) -> bytes:
            return request if len(request) == ROW_NBYTES else b"!"

        server = grpc.aio.server(options=self.options)
        method = grpc.unary_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", {"Experts": method}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready(port)
        await server.wait_for_termination()

    async def connect(self, address: Any) -> None:
        import grpc

        self.grpc_channel = grpc.aio.insecure_channel(f"127.0.0.1:{address}", options=self.options)
        self.method: Callable[..., Awaitable[bytes]] = self.grpc_channel.unary_unary("/bench/Experts")
        self.tensor = bytes(BULK_NBYTES)

    async def row(self) -> None:
        await self.method(ROW, timeout=TIMEOUT, metadata=(("layer", "3"),))

    async def bulk(self) -> None:
        await self.method(self.tensor, timeout=TIMEOUT)

    async def close(self) -> None:
        await self.grpc_channel.close()


PEERS: Final = {
    "raw": RawSocket,
    "raw-unpaced": RawSocketUnpaced,
    "tcp": Splitinfer,
    "tcp-sleeping": SplitinferSleeping,
    "unix": SplitinferUnix,
    "tls": SplitinferTLS,
    "http": Http,
    "zmq": Zmq,
    "grpc": Grpc,
}
