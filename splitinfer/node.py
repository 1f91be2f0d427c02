"""Split execution, the server's half: an expert node holds a part of the experts and answers expert calls.

A node is stateless: a call carries rows, expert ids and weights, the answer is their weighted partial sum.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from time import perf_counter

from splitinfer import transport
from splitinfer.dispatch import EXPERT_CALL
from splitinfer.errors import UsageError
from splitinfer.expert_call import ExpertCalls, ReadyAnswer, Request
from splitinfer.model.compute import INLINE_ROWS, INLINE_SECONDS, submit, use_threads
from splitinfer.model.experts import ExpertBank
from splitinfer.model.hub import check_model, resolve_model
from splitinfer.model.native import arithmetic
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.weights import Checkpoint
from splitinfer.placement import Holding, parse_ranges, parse_slice

__all__ = ["ECHO_CALL", "ExpertNode", "echo"]

log = logging.getLogger(__name__)

ECHO_CALL = "echo"
MAX_PORT = 65535
_EXAMPLES = {"experts": "0-63", "layers": "0-14", "slice": "1/2", "host": "127.0.0.1"}
DRAIN_TIMEOUT = 10.0  # seconds that calls in flight get to finish when the node stops


class ExpertNode:
    """Serve some experts of some layers of a checkpoint.

    `model` is a path or hub id; `experts` and `layers` are range lists such as "0-31,64-95" (None: all that
    it has); `slice`, such as "1/2" or "0.3:0.7", is the part held of every expert's intermediate dimension.
    `quant` is the weight format to hold them in (None: as stored).
    `port` 0 takes a free one; `address` then names it. `threads` bounds the arithmetic (None: torch's
    choice). `config` holds the transport's limits and security.

        node = ExpertNode("path", experts="0-31")
        await node.start()
        await node.serve_forever()      # until cancelled, or until stop() is called

    `start` raises `CheckpointError` for a damaged model, `UsageError` for ranges outside it and
    `CapacityError` for a port in use; nothing is left open then.
    """

    def __init__(
        self,
        model: str | Path,
        experts: str | None = None,
        layers: str | None = None,
        *,
        slice: str | None = None,
        host: str = "127.0.0.1",
        port: int = 7077,
        threads: int | None = None,
        quant: str | None = None,
        config: transport.ServerConfig | None = None,
    ) -> None:
        check_model(model)
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= MAX_PORT:
            raise UsageError(f"port {port!r} does not exist", remedy=f"Choose 0 (any) to {MAX_PORT}.")
        for name, value in {"experts": experts, "layers": layers, "slice": slice, "host": host}.items():
            if not isinstance(value, str) and (value is not None or name == "host"):
                raise UsageError(f"{name}={value!r} is no text", remedy=f"Write {name}={_EXAMPLES[name]!r}.")
        self._model = model
        self._experts = experts
        self._layers = layers
        self._slice = slice
        self._bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._threads = threads
        self._quant = quant
        self._config = config
        self._bank: ExpertBank | None = None
        self._holding: Holding | None = None
        self._expert_calls: ExpertCalls | None = None
        self._last_seconds = math.inf  # what the last call's arithmetic took
        self._server: transport.Server | None = None
        self._stopped = asyncio.Event()
        self.calls = 0
        self.rows = 0

    @property
    def address(self) -> str:
        """Where the node listens, as a client would write it. Raises UsageError before `start`."""
        if self._server is None:
            raise _not_started()
        address: str = self._server.address
        return address

    @property
    def bank(self) -> ExpertBank:
        """The experts held. Raises UsageError before `start`."""
        if self._bank is None:
            raise _not_started()
        return self._bank

    @property
    def holding(self) -> Holding:
        """What the node holds, as its handshake tells. Raises UsageError before `start`."""
        if self._holding is None:
            raise _not_started()
        return self._holding

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held."""
        return self.bank.nbytes

    async def start(self) -> None:
        """Map the weights and listen. Returns once calls are answered."""
        loop = asyncio.get_running_loop()
        self._bank, self._holding = await loop.run_in_executor(None, self._load)
        self._expert_calls = ExpertCalls(self.bank.hidden_size, self.holding)
        self._server = await transport.serve(
            {EXPERT_CALL: self._answer, ECHO_CALL: echo},
            self._bind,
            info=self.holding.to_info(),
            config=self._config,
        )
        log.info("holds %s, listens on %s", self._holding, self._server.address)

    async def serve_forever(self) -> None:
        """Return after `stop` or SIGTERM; when cancelled, stop first."""
        # Only the main thread may handle signals; elsewhere the owner of the process does.
        with suppress(NotImplementedError, RuntimeError, ValueError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stopped.set)
        try:
            await self._stopped.wait()
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Refuse new calls, finish those in flight (for at most `DRAIN_TIMEOUT`), close. Safe to repeat."""
        server, self._server = self._server, None
        if server is not None:
            await server.drain(timeout=DRAIN_TIMEOUT)
            await server.close()
        self._stopped.set()

    async def __aenter__(self) -> ExpertNode:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def _load(self) -> tuple[ExpertBank, Holding]:
        use_threads(self._threads)
        checkpoint = Checkpoint.open(resolve_model(self._model))
        config = checkpoint.config
        checkpoint.check_experts()
        layers = _ids(self._layers, checkpoint.held_layers, config.num_hidden_layers, "--layers")
        experts = _ids(self._experts, checkpoint.held_experts, config.num_experts, "--experts")
        columns = checkpoint.held_columns
        if self._slice is not None:
            columns = parse_slice(self._slice, config.moe_intermediate_size, "--slice")
        format = QuantConfig.of(self._quant).experts
        bank = ExpertBank(checkpoint, dict.fromkeys(layers, experts), format=format, columns=columns)
        held = (layers, experts, bank.weight_format, columns, arithmetic())
        return bank, Holding(checkpoint.fingerprint, *held)

    def _answer(
        self, call: transport.Call
    ) -> transport.Posted | transport.Reply | Awaitable[transport.Reply]:
        """One expert call. Few rows are answered at once; many leave the loop free to move bytes."""
        assert self._expert_calls is not None
        request = self._expert_calls.read(call)
        rows = request.shape[0]
        self.calls += 1
        self.rows += rows
        # As `compute.runs_inline`, without an inference mode, which bytes do not need.
        if rows <= INLINE_ROWS and self._last_seconds <= INLINE_SECONDS:
            ready = self._expert_calls.ready_answer(call, request) if self.bank.sends else None
            return self._compute(request) if ready is None else self._compute_into(ready, request)
        return submit(self._compute, request)

    def _compute(self, request: Request) -> transport.Reply:
        start = perf_counter()
        sums = bytearray(request.nbytes)
        self.bank.forward_bytes(*request[:7], sums)
        self._last_seconds = seconds = perf_counter() - start
        answer = transport.Tensor(request.out, request.shape, memoryview(sums))
        return transport.Reply([answer], {"compute_us": int(seconds * 1e6)})

    def _compute_into(self, ready: ReadyAnswer, request: Request) -> transport.Posted:
        """`_compute`, with the answer on its way before Python has its turn again."""
        start = perf_counter()
        self.bank.forward_bytes(*request[:7], ready.out, ready.answer)
        self._last_seconds = perf_counter() - start
        return transport.Posted(ready.parcel, ready.answer.frame.sent)


def echo(call: transport.Call) -> transport.Reply:
    """What came, sent back: what `splitinfer bench --transport` measures a link with."""
    return transport.Reply(call.tensors, call.meta)


def _ids(ranges: str | None, held: tuple[int, ...], count: int, flag: str) -> tuple[int, ...]:
    return held if ranges is None else parse_ranges(ranges, count, flag)


def _not_started() -> UsageError:
    return UsageError("the node has not started", remedy="Await node.start() first.")
