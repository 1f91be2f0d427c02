"""Sequences in, tokens out: prefill, decode, sampling, and the model behind one object."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from splitinfer.batching import Batcher
from splitinfer.dispatch import NodeInfo, RemoteExperts
from splitinfer.draft_depth import Depth, check_depth
from splitinfer.drafting import Count, Decoder, choose_drafter
from splitinfer.engine_config import EngineConfig, addresses_of, known_options
from splitinfer.errors import UsageError
from splitinfer.generation import Completion, Piece, StopReason, StopStrings, Timings, Usage
from splitinfer.mixed import MixedExperts, local_layers
from splitinfer.model.cache import KVCache
from splitinfer.model.compute import compute, use_threads
from splitinfer.model.config import ModelConfig
from splitinfer.model.experts import Experts, LocalExperts
from splitinfer.model.gemma import Gemma
from splitinfer.model.hub import check_model, resolve_model
from splitinfer.model.native import arithmetic
from splitinfer.model.pipeline import IN_FLIGHT, PREFILL_ROWS, prefill
from splitinfer.model.sampling import Sampler, SamplingParams
from splitinfer.model.tokenizer import StreamDecoder, Tokenizer
from splitinfer.model.weights import Checkpoint
from splitinfer.prompt import Prompt, check_room, encode
from splitinfer.timing import Span, Timeline
from splitinfer.trace import check_trace, write_trace

__all__ = ["AsyncEngine", "EngineConfig", "Prompt"]

DEFAULT_MAX_TOKENS = 256
TURN_SECONDS = 5e-3  # of decoding alone, after which the event loop has a turn


class AsyncEngine:
    """A model, here or split over nodes.

    `model` is a path or hub id; `nodes` are addresses (empty or None: the experts run here too); `settings`
    are the fields of `EngineConfig`.

        async with AsyncEngine("path", nodes=["host:7077"]) as engine:
            async for piece in engine.stream("Once", max_tokens=64):
                print(piece.text, end="")

    Opening raises `CheckpointError`, `PlacementError`, `ConnectError`, ... before the first token; a
    generation raises `UsageError` for what was asked and `TransportError` or `PlacementError` for what
    failed. Generations may run side by side; each has its own cache.
    """

    def __init__(
        self,
        model: str | Path,
        nodes: Sequence[str] | None = None,
        *,
        config: EngineConfig | None = None,
        **settings: Any,
    ) -> None:
        check_model(model)
        self._model_name = model
        self._addresses = addresses_of(nodes)
        if config is not None and settings:
            raise UsageError(
                f"settings are given twice: config and {', '.join(settings)}",
                remedy="Put them all into config.",
            )
        self.settings = config or EngineConfig(**known_options(EngineConfig, settings))
        self._checkpoint: Checkpoint | None = None
        self.tokenizer: Tokenizer | None = None
        self.context = 0
        self._experts: RemoteExperts | None = None
        self._gemma: Gemma | None = None
        self._spans: list[Span] | None = None if self.settings.trace is None else []
        self._depth = Depth(check_depth(self.settings.draft_depth))
        self.replies = 0  # under way
        self._int8_cache = self.settings.int8_cache()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Read the checkpoint, connect to the nodes, check coverage, load this machine's half."""
        if self._gemma is not None:
            raise UsageError("the engine is open already", remedy="Open it once, or close it before.")
        loop = asyncio.get_running_loop()
        self._checkpoint = await loop.run_in_executor(
            None, lambda: Checkpoint.open(resolve_model(self._model_name))
        )
        if self.settings.trace is not None:
            check_trace(self.settings.trace)
        config = self.config
        self.context = self.settings.context_of(config)
        self.settings.check_exact(config)
        self.tokenizer = await loop.run_in_executor(None, Tokenizer.open, self.checkpoint.path)
        use_threads(self.settings.threads)
        device = self.settings.torch_device()
        if self._addresses and not config.enable_moe_block:
            raise UsageError(
                f"{self.checkpoint.path} is a dense model: it has no experts that nodes could hold",
                remedy="Leave out --nodes to run all of it here, or name a model with a mixture of experts.",
            )
        local, kept = await loop.run_in_executor(None, self._keep)
        if self._addresses:
            self._experts = await RemoteExperts.connect(
                self._addresses,
                layers=sorted(set(range(config.num_hidden_layers)) - set(kept)),
                num_experts=config.num_experts,
                columns=config.moe_intermediate_size,
                fingerprint=self.checkpoint.fingerprint,
                timeout=self.settings.timeout,
                config=self.settings.transport,
                exact=arithmetic() if self.settings.exact else None,
            )
        try:
            self._gemma = await loop.run_in_executor(None, self._load, local, kept, device)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the connections, forget the weights, write the trace if there is one. Safe to repeat."""
        if self.settings.trace is not None and self._spans:
            write_trace(self.settings.trace, self._spans, [node.address for node in self.nodes])
            self._spans = []
        experts, self._experts, self._gemma = self._experts, None, None
        if experts is not None:
            await experts.close()

    def _keep(self) -> tuple[LocalExperts | None, tuple[int, ...]]:
        """The experts that stay on this machine, and their layers; all of them where there are no nodes."""
        settings, ranges, memory = self.settings, self.settings.local_layers, self.settings.local_memory
        if not self._addresses:
            if ranges is not None or memory is not None:
                raise UsageError(
                    "--local-layers and --local-memory say what stays here beside nodes, and there are none",
                    remedy="Leave them out, or name nodes with --nodes.",
                )
            ranges = f"0-{self.config.num_hidden_layers - 1}"
        how = (settings.torch_dtype(), settings.quant_config().experts, settings.exact)
        return local_layers(self.checkpoint, ranges, memory, *how)

    def _load(self, local: LocalExperts | None, kept: tuple[int, ...], device: str) -> Gemma:
        experts: Experts | None = local or self._experts
        if local is not None and self._experts is not None:
            experts = MixedExperts(local, kept, self._experts)
        dtype, quant = self.settings.torch_dtype(), self.settings.quant_config()
        gemma = Gemma.load(self.checkpoint, experts, device=device, dtype=dtype, quant=quant)
        self._batcher = Batcher(gemma, self._spans)
        nodes = {node.address: node.holding.arithmetic for node in self.nodes}
        self._new_drafter = choose_drafter(self.settings.draft, gemma, self.checkpoint.path, nodes)
        return gemma

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self.checkpoint.config

    @property
    def nodes(self) -> list[NodeInfo]:
        """The nodes and what each holds; empty when the experts run here."""
        return self._experts.nodes if self._experts else []

    @property
    def model(self) -> Gemma:
        """This machine's half of the model. Raises `UsageError` before `open` and after `close`."""
        if self._gemma is None:
            raise _not_open()
        return self._gemma

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's files. Raises `UsageError` before `open`."""
        if self._checkpoint is None:
            raise _not_open()
        return self._checkpoint

    async def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """The whole completion of `prompt`, text or token ids. Options are those of `stream`."""
        async for piece in self.stream(prompt, **options):
            if piece.completion is not None:
                return piece.completion
        raise AssertionError("a stream ends with its completion")

    async def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> AsyncGenerator[Piece, None]:
        """Yield pieces as tokens come; the last piece carries the completion.

        `max_tokens` defaults to 256, or to what is left of the context; `stop` are strings that end the
        completion and are not part of it; `ignore_eos` goes on after an end-of-sequence token, for
        measurements; `sampling` are the fields of `SamplingParams` (temperature 0, the default, is greedy).
        """
        params = SamplingParams(**known_options(SamplingParams, sampling))
        run = _Generation(self, self.encode(prompt), max_tokens, stop, ignore_eos, params)
        self.replies += 1
        try:
            async with aclosing(run.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self.replies -= 1

    async def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The next-token logits after every position of `token_ids`, float32 [len(token_ids), vocab]."""
        ids = self.encode(token_ids)
        cache = self.new_cache()
        blocks = []
        async for hidden in self.prefill(ids, cache):
            logits = await compute(len(hidden), self.model.logits, hidden)
            blocks.append(logits.cpu().numpy())
        return np.concatenate(blocks)

    def encode(self, prompt: Prompt) -> list[int]:
        """`prompt` as token ids, checked. Raises `UsageError` for what this model cannot read."""
        return encode(prompt, self.checkpoint, self.tokenizer, self.context)

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        return self.model.new_cache(int8=self._int8_cache)

    @asynccontextmanager
    async def decoder(
        self, cache: KVCache, ids: list[int], hidden: torch.Tensor, sampler: Sampler, timeline: Timeline
    ) -> AsyncIterator[Decoder]:
        """Continues a sequence whose `ids` are in `cache`, beside the others, with this engine's drafter."""
        drafter = self._new_drafter() if self._new_drafter is not None else None
        seat = self._batcher.seat()
        decoder = Decoder(
            seat,
            cache,
            ids,
            hidden,
            sampler=sampler,
            timeline=timeline,
            drafter=drafter,
            depth=self._depth,
        )
        try:
            yield decoder
        finally:
            await decoder.close()
            seat.leave()

    def prefill(
        self, ids: Sequence[int], cache: KVCache, timeline: Timeline | None = None
    ) -> AsyncGenerator[torch.Tensor, None]:
        """Run `ids` through the model in chunks; yields each chunk's hidden states [rows, hidden].

        Over nodes the chunks follow each other down the layers; here they would only wait for each other.
        """
        in_flight = IN_FLIGHT if self._addresses else 1
        return prefill(self.model, ids, cache, rows=PREFILL_ROWS, in_flight=in_flight, timeline=timeline)

    def timeline(self) -> Timeline:
        """What adds up the times of a generation, and keeps them where a trace is wanted."""
        return Timeline(self._spans)

    def traffic(self) -> tuple[int, int, int]:
        """(bytes sent, bytes received, calls) since the engine opened."""
        return self._experts.traffic() if self._experts else (0, 0, 0)


class _Generation:
    """One prompt on its way to a completion."""

    def __init__(
        self,
        engine: AsyncEngine,
        prompt: list[int],
        max_tokens: int | None,
        stop: Sequence[str],
        ignore_eos: bool,
        params: SamplingParams,
    ) -> None:
        room = engine.context - len(prompt)
        if max_tokens is None:
            max_tokens = min(DEFAULT_MAX_TOKENS, room)
        check_room(len(prompt), max_tokens, engine.context)
        if stop and engine.tokenizer is None:
            raise UsageError(
                f"{engine.checkpoint.path} has no tokenizer, so stop strings cannot be found",
                remedy="Leave the stop strings out; --max-tokens and the model's end tokens still stop it.",
            )
        self._engine = engine
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._stops = StopStrings(stop)
        self._sampler = Sampler(params)
        self._text_of: StreamDecoder | None = engine.tokenizer.stream() if engine.tokenizer else None
        eos_ids = engine.tokenizer.eos_ids if engine.tokenizer else engine.config.eos_token_ids
        self._eos = frozenset(() if ignore_eos else eos_ids)
        self._prefill, self._decode = engine.timeline(), engine.timeline()
        self._ids: list[int] = []
        self._seen = list(prompt)
        self._text: list[str] = []

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The completion in pieces, one for each token, the last with everything."""
        engine, cache = self._engine, self._engine.new_cache()
        traffic, started = engine.traffic(), perf_counter()
        async with aclosing(engine.prefill(self._prompt, cache, self._prefill)) as chunks:
            async for chunk in chunks:
                hidden = chunk[-1:]
        logits = await compute(1, engine.model.logits, hidden, timeline=self._prefill)
        async with engine.decoder(cache, self._seen, hidden, self._sampler, self._decode) as decoder:
            tokens, first = [decoder.first(logits)], perf_counter()
            turned = first
            while True:
                for token in tokens:
                    text, reason = self._take(token)
                    self._text.append(text)
                    if reason is not None:
                        done = self._completion(reason, traffic, started, first, decoder.count)
                        yield Piece(text, (token,), done)
                        return
                    yield Piece(text, (token,))
                # A step may never wait: let others on this loop, and an interrupt, in.
                if engine.replies > 1 or perf_counter() - turned > TURN_SECONDS:
                    await asyncio.sleep(0)
                    turned = perf_counter()
                tokens = await decoder.step(self._max_tokens - len(self._ids))

    def _take(self, token: int) -> tuple[str, StopReason | None]:
        """Add a token: the text that can be shown because of it, and why to stop here (None: go on)."""
        self._ids.append(token)
        self._seen.append(token)
        reason: StopReason | None = None
        text = ""
        if token in self._eos:
            reason = "eos"
        elif self._text_of is not None:
            text = self._stops.feed(self._text_of.push(token))
        if self._stops.found:
            return text, "stop"
        if reason is None and len(self._ids) == self._max_tokens:
            reason = "length"
        if reason is not None and self._text_of is not None:
            text += self._stops.feed(self._text_of.flush())
            if self._stops.found:
                return text, "stop"
            text += self._stops.flush()
        return text, reason

    def _completion(
        self,
        reason: StopReason,
        traffic: tuple[int, int, int],
        started: float,
        first: float,
        drafts: Count,
    ) -> Completion:
        now = perf_counter()
        sent, received, calls = (b - a for a, b in zip(traffic, self._engine.traffic(), strict=True))
        decoded = len(self._ids) - 1
        phases = self._prefill.by_phase()
        for phase, seconds in self._decode.by_phase().items():
            phases[phase] = phases.get(phase, 0.0) + seconds
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._ids),
            stop_reason=reason,
            usage=Usage(
                len(self._prompt), len(self._ids), sent, received, calls, drafts.drafted, drafts.accepted
            ),
            timings=Timings(
                ttft=first - started,
                total=now - started,
                prefill_tokens_per_second=len(self._prompt) / (first - started),
                decode_tokens_per_second=decoded / (now - first) if decoded else 0.0,
                phases=phases,
                layers=tuple(
                    {phase: seconds / max(decoded, 1) for phase, seconds in layer.items()}
                    for layer in self._decode.by_layer()
                ),
            ),
        )


def _not_open() -> UsageError:
    return UsageError("the engine is not open", remedy="Use it as `with splitinfer.load(...) as engine:`.")
