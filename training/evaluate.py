"""What the target is worth on documents it has never seen: bits per byte, and how evenly its experts are
used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.corpus import Document
from training.data import Window, scored_windows
from training.network import Decoder
from training.vocabulary import EOS

__all__ = ["HeldOut", "measure"]


class HeldOut(NamedTuple):
    """`shares` [layers, experts]: each expert's part of the assignments relative to a fair one (1.0 is
    fair).
    """

    bits_per_byte: float
    loss: float  # nats per token
    bytes: int
    shares: Tensor


@torch.no_grad()
def measure(
    model: Decoder, documents: Sequence[Document], encoded: Sequence[np.ndarray], length: int, rows: int = 16
) -> HeldOut:
    """Score every document; bytes are those of the UTF-8 text, and predicting the end of the text is not
    counted.
    """
    device = model.embed_tokens.weight.device
    windows = [window for document in encoded for window in scored_windows(document, length)]
    windows.sort(key=lambda window: len(window.ids))
    loss, tokens, loads = 0.0, 0, []
    for start in range(0, len(windows), rows):
        batch = windows[start : start + rows]
        ids, scored = _pad(batch)
        hidden, states = model(ids[:, :-1].to(device))
        targets = ids[:, 1:].masked_fill(~scored, -100).to(device)
        logits = model.logits(hidden).float().flatten(0, 1)
        loss += F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum").item()
        tokens += int((targets >= 0).sum())
        if all(len(window.ids) == length + 1 for window in batch):  # padding would route too
            loads.append(torch.stack([state.load for state in states]).cpu())
    size = sum(len(document.text.encode()) for document in documents)
    shares = torch.stack(loads).mean(0) if loads else torch.zeros(0)
    return HeldOut(loss / math.log(2) / size, loss / tokens, size, shares * shares.shape[-1])


def _pad(batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
    longest = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    scored = torch.zeros(len(batch), longest - 1, dtype=torch.bool)
    for row, window in enumerate(batch):
        size = len(window.ids)
        ids[row, :size] = torch.from_numpy(window.ids.astype(np.int64))
        scored[row, size - 1 - window.scored : size - 1] = True
    return ids, scored & (ids[:, 1:] != EOS)
