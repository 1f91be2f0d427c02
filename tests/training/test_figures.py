from __future__ import annotations

import numpy as np
import pytest

from tests.training.small import SMALL, small_assistant, small_target
from training import figures
from training.corpus import Document
from training.figures import compression, draft_table, held_out_prompts


def _encoded() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(6, SMALL.vocab_size, size).astype(np.uint16) for size in (300, 500)]


def test_compression_puts_xz_beside_the_model() -> None:
    documents = [Document("a", "import os\n" * 200), Document("b", "import re\n" * 200)]
    found = compression(small_target(), documents, _encoded(), 64)
    assert found["bytes"] == 4000
    assert 0 < found["xz_bits_per_byte"] < 1 < found["bits_per_byte"]
    assert len(found["shares"]) == SMALL.num_hidden_layers


def test_the_table_has_a_row_for_each_drafter_temperature_and_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_NEW", 6)
    target = small_target()
    rows = draft_table(target, small_assistant(target), _encoded(), prompts=1, depths=(2, 4))
    assert len({(row.drafter, row.temperature, row.depth) for row in rows}) == 8
    for row in rows:
        assert 1.0 <= row.tokens_per_step <= row.depth + 1
        assert len(row.rates) == row.depth


def test_prompts_are_always_the_same() -> None:
    assert held_out_prompts(_encoded(), 3) == held_out_prompts(_encoded(), 3)
