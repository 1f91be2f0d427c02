"""Documents as token windows: an endless, seeded, resumable stream for training and scored windows for
measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import Document
from training.vocabulary import BOS, EOS

__all__ = ["Window", "WindowStream", "encode_documents", "mixed_batch", "scored_windows"]

_ENCODE_BATCH = 64  # documents at a time, so that encoding needs little memory


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[np.ndarray]:
    """Each document as `<bos> text <eos>`, uint16."""
    encoded: list[np.ndarray] = []
    for start in range(0, len(documents), _ENCODE_BATCH):
        texts = [document.text for document in documents[start : start + _ENCODE_BATCH]]
        for one in tokenizer.encode_batch(texts, add_special_tokens=False):
            encoded.append(np.array([BOS, *one.ids, EOS], dtype=np.uint16))
    return encoded


class WindowStream:
    """Windows of `length` + 1 tokens from documents shuffled anew in each pass; window `n` depends on `n`
    only.
    """

    def __init__(self, documents: Sequence[np.ndarray], seed: int) -> None:
        self.documents = documents
        self.seed = seed
        self.tokens = sum(len(document) for document in documents)
        self._pass = -1
        self._text = np.empty(0, dtype=np.uint16)
        self._starts = np.empty(0, dtype=np.int64)

    def window(self, number: int, length: int) -> np.ndarray:
        per_pass = self.tokens // length - 1
        turn, index = divmod(number, per_pass)
        if turn != self._pass or len(self._starts) != per_pass:
            self._shuffle(turn, per_pass, length)
        start = self._starts[index]
        return self._text[start : start + length + 1]

    def _shuffle(self, turn: int, per_pass: int, length: int) -> None:
        random = np.random.default_rng((self.seed, turn))
        order = random.permutation(len(self.documents))
        self._text = np.concatenate([self.documents[index] for index in order])
        offset = random.integers(length)
        self._starts = random.permutation(per_pass) * length + offset
        self._pass = turn


def mixed_batch(streams: Sequence[tuple[WindowStream, int]], step: int, length: int) -> Tensor:
    """Step `step`'s batch [rows, length + 1] int64: so many rows from each stream."""
    rows = [
        stream.window(step * count + row, length).astype(np.int64)
        for stream, count in streams
        for row in range(count)
    ]
    return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class Window:
    """`ids` [length + 1]; the last `scored` of its predictions count, the others are context."""

    ids: np.ndarray
    scored: int


def scored_windows(document: np.ndarray, length: int) -> Iterator[Window]:
    """Windows that score every token of the document but the first once, each with half a window of context
    or all that comes before it.
    """
    end = min(len(document), length + 1)
    yield Window(document[:end], end - 1)
    while end < len(document):
        following = min(len(document), end + length // 2)
        yield Window(document[max(0, following - length - 1) : following], following - end)
        end = following
