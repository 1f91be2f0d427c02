"""How an engine runs a model: its settings as one dataclass, checked against the model they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any

import torch

from splitinfer import transport
from splitinfer.errors import UsageError
from splitinfer.fixed_point import check_parts
from splitinfer.model.config import ModelConfig
from splitinfer.model.quantize import QuantConfig

__all__ = ["EngineConfig", "addresses_of", "known_options"]

DEFAULT_CONTEXT = 8192  # tokens; a checkpoint may promise 262,144, whose cache few machines hold


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model. `context` is in tokens (None: what the model allows, at most `DEFAULT_CONTEXT`),
    `timeout` is the deadline of one expert call in seconds.

    `quant` and `quant_*` are weight formats ("float32", "bfloat16", "int8", "int4") that the checkpoint's
    weights are converted to when they are loaded: of the experts that run here, and of the other parts, which
    keep int8 where `quant` is int8 or int4. None keeps what is stored.

    `draft` guesses tokens that the model then verifies several at a time, which changes the speed and not the
    tokens: "off", "lookup", a drafter's directory, or "auto" (the model's own drafter, else lookup).
    `draft_depth` is the number of guesses at a time, 1 to 15, or "auto".

    With nodes, `local_layers` ("0-9") keeps the experts of these layers here, or `local_memory` ("6GiB")
    those of as many layers as fit; the nodes need not hold them.

    `kv_cache` "int8" keeps keys and values in half of the memory, lossy (docs/formats.md); None keeps them in
    the dtype that the model computes in.

    `exact` adds up the experts' answers so that the bits of a result do not depend on which nodes hold what,
    or whether there are any: 8 bytes a value come back instead of 2 or 4 (docs/experts.md).

    `trace` names a file that gets, when the engine closes, a time line of all it did (see
    `splitinfer.trace`); every stretch is kept in memory until then, some 300 bytes each.
    """

    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    quant: str | None = None
    quant_attention: str | None = None
    quant_dense: str | None = None
    quant_embeddings: str | None = None
    quant_lm_head: str | None = None
    context: int | None = None
    timeout: float = 60.0
    local_layers: str | None = None
    local_memory: str | None = None
    kv_cache: str | None = None
    exact: bool = False
    trace: str | None = None
    draft: str = "auto"
    draft_depth: int | str = "auto"
    transport: transport.ClientConfig | None = None

    def __post_init__(self) -> None:
        seconds = self.timeout
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < inf:
            raise UsageError(
                f"timeout={seconds!r} is no time to answer in", remedy="Give a number of seconds above 0."
            )
        if not isinstance(self.transport, transport.ClientConfig | None):
            raise UsageError(
                f"transport={self.transport!r} sets no connection",
                remedy="Write transport=ClientConfig(...), of splitinfer.transport.",
            )
        if not isinstance(self.draft, str | Path):
            raise UsageError(
                f"draft={self.draft!r} names no drafter",
                remedy='Write draft="off" for none, "auto", "lookup", or a drafter\'s directory.',
            )

    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` for torch. Raises UsageError for one that nobody computes in."""
        if self.dtype is None:
            return None
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"cannot compute in dtype {self.dtype!r}", remedy="Choose float32 or bfloat16.")
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def torch_device(self) -> str:
        """`device`, if this machine has it. Raises UsageError where it has not."""
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            words = (str(error).splitlines() or [""])[0][:100].removesuffix(".")
            raise UsageError(
                f"device {self.device!r} cannot be used: {words}", remedy="Choose another with --device: cpu."
            ) from None
        return self.device

    def quant_config(self) -> QuantConfig:
        """The formats by part. Raises UsageError for an unknown one."""
        return QuantConfig.of(
            self.quant,
            attention=self.quant_attention,
            dense=self.quant_dense,
            embeddings=self.quant_embeddings,
            lm_head=self.quant_lm_head,
        )

    def int8_cache(self) -> bool:
        """Whether keys and values are kept in int8. Raises UsageError for another format."""
        if self.kv_cache not in (None, "int8"):
            raise UsageError(
                f"keys and values cannot be kept in {self.kv_cache!r}", remedy="Choose int8, or leave it out."
            )
        return self.kv_cache == "int8"

    def check_exact(self, config: ModelConfig) -> None:
        """Raises UsageError where `exact` is asked for and cannot be had."""
        if not self.exact:
            return
        if self.transport is not None and self.transport.wire_dtype is not None:
            raise UsageError(
                f"--exact and --wire-dtype {self.transport.wire_dtype}: rounded rows give other results",
                remedy="Leave one of them out.",
            )
        if config.enable_moe_block:
            check_parts(config.top_k_experts, config.moe_intermediate_size)

    def context_of(self, config: ModelConfig) -> int:
        """The context in tokens. Raises UsageError for more than the model was made for."""
        limit = config.max_position_embeddings
        if self.context is None:
            return min(limit, DEFAULT_CONTEXT)
        if not 1 <= self.context <= limit:
            raise UsageError(
                f"a context of {self.context} tokens is not possible",
                remedy=f"This model takes 1 to {limit}.",
            )
        return self.context


def addresses_of(nodes: Sequence[str] | None) -> tuple[str, ...]:
    """The addresses that `nodes` lists. Raises UsageError for what is no list of texts."""
    if isinstance(nodes, str):
        raise UsageError("nodes takes a list of addresses", remedy=f"Write nodes=[{nodes!r}].")
    if not isinstance(nodes, Sequence | None) or not all(isinstance(node, str) for node in nodes or ()):
        raise UsageError(
            f"nodes is {nodes!r}, no list of addresses", remedy='Write it like nodes=["host:7077"].'
        )
    return tuple(nodes or ())


def known_options(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """`options`, or a `UsageError` naming the one that `kind` (a dataclass) does not have."""
    names = [field.name for field in fields(kind)]
    for name in options:
        if name not in names:
            raise UsageError(f"there is no option {name!r}", remedy=f"Choose among {', '.join(names)}.")
    return options
