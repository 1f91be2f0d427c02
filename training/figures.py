"""Measures finished checkpoints on held-out documents: compression, expert balance, drafting."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from training.corpus import Document
from training.decode import DraftCount, draft_and_verify
from training.drafter import Assistant
from training.evaluate import measure
from training.network import Decoder

__all__ = ["DraftRow", "compression", "draft_table", "round_weights"]

_PROMPT = 96  # tokens of a held-out document before the first generated one
_NEW = 96  # tokens generated after each prompt


class DraftRow(NamedTuple):
    """One line of the draft table; rates by depth are conditional on all earlier drafts having been
    accepted.
    """

    drafter: str
    temperature: float
    depth: int
    tokens_per_step: float
    rates: tuple[float, ...]


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Round every parameter to bfloat16, as the checkpoint stores it; arithmetic stays in float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))


def compression(
    model: Decoder, documents: Sequence[Document], encoded: Sequence[np.ndarray], length: int
) -> dict[str, Any]:
    """Bits per byte beside xz's on the same bytes, and each expert's share relative to a fair one."""
    found = measure(model, documents, encoded, length)
    text = b"".join(document.text.encode() for document in documents)
    packed = lzma.compress(text, format=lzma.FORMAT_XZ, preset=9)
    return {
        "documents": len(documents),
        "bytes": found.bytes,
        "bits_per_byte": found.bits_per_byte,
        "xz_bits_per_byte": 8 * len(packed) / len(text),
        "shares": found.shares.tolist(),
    }


def draft_table(
    target: Decoder,
    assistant: Assistant,
    encoded: Sequence[np.ndarray],
    *,
    prompts: int,
    depths: Sequence[int],
) -> list[DraftRow]:
    """Tokens per verify step for the trained drafter and for prompt lookup, greedy and at temperature 0.7.
    Depth 4 runs on three times as many prompts as the others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # single rows: handing work to a second thread costs more than it saves
    rows = []
    for temperature in (0.0, 0.7):
        for name, drafter in (("drafter", assistant), ("lookup", None)):
            for depth in depths:
                starts = held_out_prompts(encoded, prompts * 3 if depth == 4 else prompts)
                count = _run(target, drafter, starts, depth, temperature)
                rates = tuple(a / r if r else 0.0 for a, r in zip(count.accepted, count.reached, strict=True))
                rows.append(DraftRow(name, temperature, depth, count.tokens_per_step, rates))
    torch.set_num_threads(threads)
    return rows


def held_out_prompts(encoded: Sequence[np.ndarray], count: int) -> list[list[int]]:
    """`count` stretches of held-out text, spread over the documents by their length, always the same."""
    random = np.random.default_rng(7)
    long = [document for document in encoded if len(document) > 2 * _PROMPT]
    lengths = np.array([len(document) for document in long], dtype=np.float64)
    chosen = random.choice(len(long), size=count, p=lengths / lengths.sum())
    prompts = []
    for index in chosen:
        start = int(random.integers(len(long[index]) - _PROMPT))
        prompts.append([int(token) for token in long[index][start : start + _PROMPT]])
    return prompts


def _run(
    target: Decoder, assistant: Assistant | None, prompts: Sequence[list[int]], depth: int, temperature: float
) -> DraftCount:
    generator = torch.Generator().manual_seed(11)
    steps, tokens, reached, accepted = 0, 0, [0] * depth, [0] * depth
    for prompt in prompts:
        _, count = draft_and_verify(
            target, assistant, prompt, _NEW, depth=depth, temperature=temperature, generator=generator
        )
        steps, tokens = steps + count.steps, tokens + count.tokens
        reached = [a + b for a, b in zip(reached, count.reached, strict=True)]
        accepted = [a + b for a, b in zip(accepted, count.accepted, strict=True)]
    return DraftCount(steps, tokens, reached, accepted)
