from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.errors import UsageError
from splitinfer.model.cache import CHUNK, MARGIN, ROLLBACK, KVCache
from splitinfer.model.config import ModelConfig, load_config
from tests.checkpoints import tiny_config, write_checkpoint

WINDOW, SLIDING, FULL = 8, 0, 3
BUFFER = WINDOW - 1 + ROLLBACK + MARGIN


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory: Path = tmp_path_factory.mktemp("cache") / "model"
    return load_config(write_checkpoint(directory, tiny_config(max_position_embeddings=5000)))


def step(cache: KVCache, rows: int, marks: list[int], mark: int) -> None:
    """Appends rows whose keys are their mark, values its negative, and checks all that they see."""
    start = cache.begin(rows)
    marks[start:] = [mark] * rows
    for layer, reach in ((SLIDING, WINDOW - 1), (FULL, None)):
        heads, dim = (3, 8) if layer == SLIDING else (1, 16)
        new = torch.full((heads, rows, dim), float(mark))
        keys, values, *_ = cache.append(layer, start, new, -new)
        first = 0 if reach is None else max(0, start - reach)
        assert keys.shape == (heads, start + rows - first, dim)
        assert keys[0, :, 0].tolist() == marks[first:]
        assert torch.equal(values, -keys)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 5, 30, 100, MARGIN, BUFFER, 700]), st.integers(0, ROLLBACK)),
        min_size=1,
        max_size=25,
    )
)
def test_any_sequence_of_steps_and_rollbacks(config: ModelConfig, steps: list[tuple[int, int]]) -> None:
    cache, marks = KVCache(config), []
    for mark, (rows, back) in enumerate(steps, start=1):
        if cache.length + rows > 5000:
            return
        step(cache, rows, marks, mark)
        cache.truncate(cache.length - min(back, rows))
        del marks[cache.length :]


def test_memory_of_sliding_layers_is_bounded(config: ModelConfig) -> None:
    cache = KVCache(config)
    marks: list[int] = []
    assert cache.nbytes == 0
    for mark in range(40):
        step(cache, 100, marks, mark)
    sliding = 2 * 3 * 8 * BUFFER * 4
    full = 2 * 1 * 16 * 4 * 4000
    assert cache.nbytes <= sliding + full * 1.3


def test_short_sequences_take_little(config: ModelConfig) -> None:
    cache = KVCache(config)
    step(cache, 3, [], 1)
    assert cache.nbytes <= 2 * 4 * 256 * (3 * 8 + 16)


def test_rollback_beyond_the_margin_is_refused_and_changes_nothing(config: ModelConfig) -> None:
    cache, marks = KVCache(config), []
    step(cache, 1000, marks, 1)
    with pytest.raises(UsageError, match="no longer holds what position 900 needs") as caught:
        cache.truncate(900)
    assert str(ROLLBACK) in caught.value.remedy
    assert cache.length == 1000
    step(cache, 1, marks, 2)


@pytest.mark.parametrize("length", [-1, 11])
def test_truncate_only_shortens(config: ModelConfig, length: int) -> None:
    cache = KVCache(config)
    step(cache, 10, [], 1)
    with pytest.raises(UsageError, match=f"cannot keep {length} of 10"):
        cache.truncate(length)


def test_truncate_to_nothing_always_works(config: ModelConfig) -> None:
    cache = KVCache(config)
    step(cache, 2000, [], 1)
    cache.truncate(0)
    step(cache, 50, [], 2)


def test_an_interrupted_prefill_cannot_be_continued_unnoticed(config: ModelConfig) -> None:
    """A large block has replaced the window of one layer when the step fails: the rows before it are gone."""
    cache, marks = KVCache(config), []
    step(cache, 20, marks, 1)
    start = cache.begin(1000)
    new = torch.zeros(3, 1000, 8)
    cache.append(SLIDING, start, new, new)
    cache.abandon(start)
    assert cache.length == 20
    with pytest.raises(UsageError, match="position 20"):
        cache.begin(1)


def test_a_layer_that_missed_rows_is_noticed(config: ModelConfig) -> None:
    cache = KVCache(config)
    cache.begin(4)
    start = cache.begin(1)
    with pytest.raises(UsageError, match="rows 0-3 were never computed"):
        cache.append(FULL, start, torch.zeros(1, 1, 16), torch.zeros(1, 1, 16))


def test_the_context_is_a_limit(config: ModelConfig) -> None:
    cache = KVCache(config)
    cache.begin(4999)
    with pytest.raises(UsageError, match="5001 tokens are more than the model's context of 5000"):
        cache.begin(2)
    assert cache.length == 4999


def test_growing_copies_one_buffer_at_a_time(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never twice the memory: at most a quarter (or a chunk) more than is needed, and one buffer's copy."""
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0.0
    original = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: object) -> torch.Tensor:
        nonlocal most
        larger: torch.Tensor = original(self, *args)
        made.append(weakref.ref(larger))
        alive = sum(buffer.nbytes for ref in made if (buffer := ref()) is not None)
        needed = 2 * 16 * 4 * cache.length
        most = max(most, alive / (needed * 1.25 + 2 * 16 * 4 * CHUNK))
        return larger

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    cache = KVCache(config)
    for _ in range(40):
        start = cache.begin(100)
        new = torch.zeros(1, 100, 16)
        cache.append(FULL, start, new, new)
    assert len(made) > 10
    assert most < 1.5  # keys and values of one layer: a copy of either is half as much again


Rows = list[tuple[int, int]]


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from([1, 3, 40, 300, 700]), st.integers(0, 40)), max_size=8))
def test_int8_rows_depend_on_nothing_but_themselves(config: ModelConfig, steps: Rows) -> None:
    """However rows came and whatever was taken back: the same codes and scales as row by row."""
    tokens = torch.randn(2, 5000, 3, 8, generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, int8=True)
    for rows, back in steps:
        start = cache.begin(rows)
        keys, values = (part[start : start + rows].transpose(0, 1) for part in tokens)
        found = cache.append(SLIDING, start, keys, values)
        seen = found.keys.shape[1]
        assert seen == rows + min(start, WINDOW - 1)
        for part, wide in zip(tokens, found.widened(torch.float32), strict=True):
            expected = part[start + rows - seen : start + rows].transpose(0, 1)
            limit = expected.abs().amax(-1, keepdim=True) / 127 * 0.51
            assert ((wide - expected).abs() <= limit).all()
        alone = KVCache(config, int8=True)
        alone.begin(1)
        last = alone.append(SLIDING, 0, keys[:, -1:], values[:, -1:])
        assert all(torch.equal(one[:, 0], many[:, -1]) for one, many in zip(last, found, strict=True))
        cache.truncate(cache.length - min(back, rows))


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e30])
def test_int8_of_extreme_rows(config: ModelConfig, value: float) -> None:
    cache = KVCache(config, int8=True)
    rows = torch.full((1, 1, 16), value)
    keys, _ = cache.append(FULL, cache.begin(1), rows, rows).widened(torch.float32)
    assert keys.isfinite().all()
    assert torch.allclose(keys, rows.clamp(max=127 * 65504.0), atol=1e-7)


def test_int8_takes_half_of_the_memory() -> None:
    """At true shapes: 256 and 512 columns a head, 8,192 tokens."""
    shapes = {"head_dim": 256, "global_head_dim": 512, "num_key_value_heads": 8}
    shapes |= {"num_global_key_value_heads": 2, "sliding_window": 1024, "num_attention_heads": 16}
    with tempfile.TemporaryDirectory() as directory:
        file = tiny_config(max_position_embeddings=8192, num_hidden_layers=2, **shapes)
        config = load_config(write_checkpoint(Path(directory) / "true", file))
    nbytes = {}
    for int8 in (False, True):
        cache = KVCache(config, dtype=torch.bfloat16, int8=int8)
        for start in range(0, 8192, 512):
            cache.begin(512)
            for layer, attention in enumerate(config.attention):
                new = torch.zeros(
                    attention.num_key_value_heads, 512, attention.head_dim, dtype=torch.bfloat16
                )
                cache.append(layer, start, new, new)
        nbytes[int8] = cache.nbytes
    assert 0.5 < nbytes[True] / nbytes[False] < 0.51


class Scarce:
    """A buffer that there is no memory to grow."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.shape = buffer.shape

    def __len__(self) -> int:
        return self.shape[0]

    def new_empty(self, shape: object) -> torch.Tensor:
        raise MemoryError


def test_a_growth_that_fails_leaves_no_address_behind(config: ModelConfig) -> None:
    cache = KVCache(config)
    cache.begin(1)
    assert cache.place(FULL, 0, 1, torch.float32) is not None
    buffers = cache._stores[FULL].buffers
    values, buffers[1] = buffers[1], cast(torch.Tensor, Scarce(buffers[1]))
    with pytest.raises(MemoryError):
        cache.place(FULL, 0, CHUNK + 1, torch.float32)
    buffers[1] = values
    for rows in (CHUNK + 1, 1):
        place = cache.place(FULL, 0, rows, torch.float32)
        assert place is not None
        assert (place.keys, place.values) == (buffers[0].data_ptr(), buffers[1].data_ptr())
        assert {buffer.shape[1] for buffer in buffers} == {place.capacity}
