"""From settings to a running engine, and from a completion to figures for people and for programs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from splitinfer import __version__
from splitinfer.cli.console import busy, human_size, plain, screen
from splitinfer.config import Settings
from splitinfer.errors import UsageError

if TYPE_CHECKING:
    from splitinfer.engine import AsyncEngine
    from splitinfer.generation import Completion
    from splitinfer.transport import ClientConfig, ServerConfig
    from splitinfer.transport.link import LinkSpec

__all__ = [
    "Request",
    "as_json",
    "client_config",
    "engine_settings",
    "model_of",
    "name_of",
    "open_engine",
    "print_figures",
    "server_config",
]


@dataclass(frozen=True)
class Request:
    """How one answer is made: the arguments of `Engine.generate` beside the prompt."""

    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]

    def arguments(self) -> dict[str, Any]:
        return asdict(self)


def name_of(settings: Settings) -> str:
    """The model as a person knows it."""
    return settings.model or "the demo model"


def model_of(settings: Settings) -> str:
    """The model to open: the one that the settings name, else the demo model."""
    if settings.model:
        return settings.model
    from splitinfer import demo

    return str(demo.path())


def client_config(settings: Settings) -> ClientConfig:
    """How this machine talks to nodes. Raises `UsageError` for a token, certificate or link that is none.

    A certificate alone does not make a client use TLS: the same settings may serve a node.
    """
    from splitinfer.transport import ClientConfig
    from splitinfer.transport.certificates import TLSConfig
    from splitinfer.transport.security import load_token

    tls = None
    if settings.tls_ca or settings.tls_fingerprint:
        tls = TLSConfig(
            certificate=settings.tls_cert,
            key=settings.tls_key,
            authorities=None if settings.tls_ca == "system" else settings.tls_ca,
            fingerprints=settings.tls_fingerprint,
        )
    return ClientConfig(
        tls=tls,
        token=load_token(settings.token_file),
        compression=settings.compression,
        wire_dtype=settings.wire_dtype,
        link=_link(settings),
    )


def _link(settings: Settings) -> LinkSpec | None:
    """The link to emulate, None for the one at hand."""
    from splitinfer.transport.link import LinkSpec, parse_bandwidth, parse_duration

    rtt, jitter, bandwidth = settings.simulate_rtt, settings.simulate_jitter, settings.simulate_bandwidth
    given = ("rtt", rtt, parse_duration), ("bandwidth", bandwidth, parse_bandwidth)
    flag = ""
    try:
        for name, text, read in (*given, ("jitter", jitter, parse_duration)):
            flag = f"--simulate-{name}"
            if text is not None:
                read(text)
        # What is left to be wrong is the last: more of it than there is round trip.
        return LinkSpec.from_options(rtt=rtt, jitter=jitter, bandwidth=bandwidth)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}", remedy=error.remedy) from None


def server_config(settings: Settings) -> ServerConfig:
    """How this machine listens. Raises `UsageError` for a token or certificate that is none."""
    from splitinfer.transport import ServerConfig
    from splitinfer.transport.certificates import TLSConfig
    from splitinfer.transport.security import load_token

    tls = None
    if settings.tls_cert:
        tls = TLSConfig(settings.tls_cert, settings.tls_key, authorities=settings.tls_ca)
    return ServerConfig(
        insecure=settings.insecure,
        tls=tls,
        token=load_token(settings.token_file),
        compression=settings.compression,
    )


def engine_settings(settings: Settings) -> dict[str, Any]:
    """The fields of `EngineConfig` that these settings say. Raises as `client_config` does."""
    names = (
        "device", "dtype", "threads", "context", "timeout", "local_layers", "local_memory",
        "kv_cache", "exact", "draft", "draft_depth", "trace", "quant", "quant_attention", "quant_dense",
        "quant_embeddings", "quant_lm_head",
    )  # fmt: skip
    return {name: getattr(settings, name) for name in names} | {"transport": client_config(settings)}


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """Load this machine's half and connect to the nodes, with a spinner on a terminal."""
    async with AsyncExitStack() as stack:
        with busy(f"loading {name_of(settings)}"):
            from splitinfer.engine import AsyncEngine

            engine = AsyncEngine(model_of(settings), nodes=settings.nodes, **engine_settings(settings))
            await stack.enter_async_context(engine)
        yield engine


def print_figures(completion: Completion) -> None:
    """What the run took, on standard error: speed, traffic, and where the time went."""
    usage, timings = completion.usage, completion.timings
    lines = [
        f"{usage.completion_tokens} tokens at {timings.decode_tokens_per_second:.1f} tokens/s, "
        f"the first after {timings.ttft:.2f} s (prompt: {usage.prompt_tokens} tokens "
        f"at {timings.prefill_tokens_per_second:.0f} tokens/s); ended by {completion.stop_reason}"
    ]
    if usage.drafted_tokens:
        share = usage.accepted_tokens / usage.drafted_tokens
        lines.append(f"drafts: {usage.accepted_tokens} of {usage.drafted_tokens} tokens right ({share:.0%})")
    if usage.calls:
        lines.append(
            f"network: {usage.calls} calls, {human_size(usage.bytes_sent)} sent, "
            f"{human_size(usage.bytes_received)} received"
        )
    total = sum(timings.phases.values())
    if total > 0:
        shares = (f"{phase} {seconds / total:.0%}" for phase, seconds in timings.phases.items())
        lines.append(f"time: {', '.join(shares)}")
    console = screen()
    for line in lines:
        console.print(line, style="dim", markup=False, soft_wrap=True)


def as_json(completion: Completion, settings: Settings) -> dict[str, Any]:
    """A completion for programs, with what it was made by."""
    return {
        **plain(completion),
        "model": settings.model or None,
        "nodes": list(settings.nodes),
        "version": __version__,
    }
