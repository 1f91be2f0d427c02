from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.training.small import SMALL, small_target
from training.corpus import Document
from training.evaluate import measure
from training.vocabulary import BOS, EOS


@torch.no_grad()
def test_one_window_gives_the_plain_cross_entropy() -> None:
    target = small_target()
    ids = [BOS, *range(10, 40), EOS]
    hidden, _ = target(torch.tensor([ids[:-2]]))
    log_p = target.logits(hidden)[0].log_softmax(dim=-1)
    nats = -sum(log_p[place, token].item() for place, token in enumerate(ids[1:-1]))
    found = measure(target, [Document("a", "x" * 50)], [np.array(ids, dtype=np.uint16)], length=64)
    assert found.loss == pytest.approx(nats / 30, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 50, rel=1e-4)


def test_shares_are_relative_to_a_fair_one() -> None:
    ids = np.random.default_rng(0).integers(6, SMALL.vocab_size, 200).astype(np.uint16)
    found = measure(small_target(), [Document("a", "x")], [ids], length=32)
    assert found.shares.shape == (SMALL.num_hidden_layers, SMALL.num_experts)
    assert found.shares.mean(dim=1).tolist() == pytest.approx([1.0] * SMALL.num_hidden_layers)
