"""The model against transformers: equal logits in one prefill, in chunks and token by token, in float32.

Every configuration is odd in another way; every prompt is several windows long, one longer than the whole
sliding buffer. `test_layers` names the first layer that differs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitinfer.errors import UsageError
from splitinfer.model.cache import KVCache
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.native import kernels
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline
from tests.checkpoints import tiny_config, transformers_checkpoint, write_checkpoint

TOLERANCE = 1e-4
PROMPT = 100  # tokens, twelve windows

CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "three key/value heads, eleven experts": ({}, "text"),
    "one key/value head, top 8 of 13, 7 layers": (
        {"num_hidden_layers": 7, "num_key_value_heads": 1, "top_k_experts": 8, "num_experts": 13},
        "multimodal",
    ),
    "top 1, own values, untied": (
        {"top_k_experts": 1, "attention_k_eq_v": False, "tie_word_embeddings": False},
        "text",
    ),
    "one full layer, window of one never seen": ({"num_hidden_layers": 1, "sliding_window": 1}, "text"),
    "window of one": ({"sliding_window": 1, "num_global_key_value_heads": None}, "multimodal"),
    "no soft-cap, half of the pairs turn": (
        {
            "final_logit_softcapping": None,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.5,
                    "rope_theta": 5e5,
                    "rope_type": "proportional",
                    "factor": 2.0,
                },
                "sliding_attention": {"rope_theta": 1e3, "rope_type": "default"},
            },
        },
        "text",
    ),
    "dense only": ({"enable_moe_block": False}, "text"),
}


def load(path: Path) -> Gemma:
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    if not config.enable_moe_block:
        return Gemma.load(checkpoint, None)
    everything = {layer: range(config.num_experts) for layer in range(config.num_hidden_layers)}
    return Gemma.load(checkpoint, LocalExperts(ExpertBank(checkpoint, everything)))


def prompt(length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(seed))


async def run(model: Gemma, ids: Tensor, sizes: Sequence[int], kv: KVCache | None = None) -> Tensor:
    """Logits of every position, the prompt taken in steps of the given sizes."""
    kv = kv or model.new_cache()
    parts = [model.logits(await model.forward([Segment(step, kv)])) for step in ids.split(list(sizes))]
    return torch.cat(parts)


@pytest.fixture(params=CONFIGURATIONS, scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Gemma]:
    overrides, layout = CONFIGURATIONS[request.param]
    path = tmp_path_factory.mktemp("reference") / "model"
    return transformers_checkpoint(path, tiny_config(**overrides), layout=layout), load(path)


@pytest.mark.parametrize(
    "sizes",
    [[PROMPT], [1] * PROMPT, [37, 1, 2, 60], [90, 5, 5]],
    ids=["one prefill", "token by token", "chunks", "prefill, then verify windows"],
)
def test_logits_equal_transformers(models: tuple[Any, Gemma], sizes: list[int]) -> None:
    reference, model = models
    ids = prompt(PROMPT)
    with torch.no_grad():
        expected = reference(input_ids=ids[None]).logits[0]
    found = asyncio.run(run(model, ids, sizes))
    assert found.dtype == torch.float32
    worst = (found - expected).abs().amax(dim=-1)
    assert worst.max() < TOLERANCE, f"position {int(worst.argmax())} differs by {float(worst.max()):.2e}"


def test_layers(models: tuple[Any, Gemma], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states after every layer; the message names the first layer that differs."""
    reference, model = models
    ids = prompt(PROMPT)
    with torch.no_grad():
        expected = reference(input_ids=ids[None], output_hidden_states=True).hidden_states
    found: list[Tensor] = []
    original = Gemma._layer

    async def recorded(self: Gemma, *args: Any) -> Tensor:
        if not found:
            found.append(args[1])
        found.append(await original(self, *args))
        return found[-1]

    monkeypatch.setattr(Gemma, "_layer", recorded)
    last = asyncio.run(model.forward([Segment(ids, model.new_cache())]))
    found[-1] = last  # the reference reports the last layer after the final norm
    assert len(found) == len(expected)
    for layer, (ours, theirs) in enumerate(zip(found, expected, strict=True), start=-1):
        where = f"layer {layer} ({model.config.layer_types[layer]})" if layer >= 0 else "the embedding"
        assert (ours - theirs[0]).abs().max() < TOLERANCE, f"the first difference is in {where}"


def test_prompt_longer_than_the_sliding_buffer(tmp_path: Path) -> None:
    config = tiny_config(max_position_embeddings=4096)
    reference = transformers_checkpoint(tmp_path / "model", config)
    model = load(tmp_path / "model")
    ids = prompt(1200)
    with torch.no_grad():
        expected = reference(input_ids=ids[None]).logits[0]
    for sizes in ([1200], [500, 200, 3, 497], [100] * 12, [700] + [1] * 500):
        found = asyncio.run(run(model, ids, sizes))
        assert (found - expected).abs().max() < TOLERANCE, sizes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Gemma:
    return load(write_checkpoint(tmp_path_factory.mktemp("tiny") / "model"))


def test_sequences_share_a_step(tiny: Gemma) -> None:
    """Rows of several sequences at different positions, in one forward, as if each were alone."""
    sequences = [prompt(n, seed=n) for n in (30, 5, 17)]
    alone = [asyncio.run(run(tiny, ids, [len(ids) - 2, 2])) for ids in sequences]

    async def together() -> list[Tensor]:
        caches = [tiny.new_cache() for _ in sequences]
        first = await tiny.forward([Segment(s[:-2], c) for s, c in zip(sequences, caches, strict=True)])
        last = await tiny.forward([Segment(s[-2:], c) for s, c in zip(sequences, caches, strict=True)])
        firsts = tiny.logits(first).split([len(s) - 2 for s in sequences])
        return [torch.cat(parts) for parts in zip(firsts, tiny.logits(last).split([2, 2, 2]), strict=True)]

    for expected, found in zip(alone, asyncio.run(together()), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_chunks_follow_each_other_down_the_layers(tiny: Gemma) -> None:
    """A second chunk may begin while the first is still under way: positions are taken when a step begins."""
    ids = prompt(60)
    expected = asyncio.run(run(tiny, ids, [60]))

    async def pipelined() -> Tensor:
        kv = tiny.new_cache()
        chunks = [tiny.forward([Segment(chunk, kv)]) for chunk in ids.split(30)]
        return tiny.logits(torch.cat(await asyncio.gather(*chunks)))

    torch.testing.assert_close(asyncio.run(pipelined()), expected, atol=1e-5, rtol=0)


def test_rollback_gives_the_same_continuation(tiny: Gemma) -> None:
    """Rejected rows leave no trace, in sliding layers too."""
    ids, wrong = prompt(400), prompt(20, seed=9)
    expected = asyncio.run(run(tiny, ids, [380, 20]))[380:]

    async def rolled_back() -> Tensor:
        kv = tiny.new_cache()
        await tiny.forward([Segment(ids[:380], kv)])
        for n in (20, 3):
            await tiny.forward([Segment(wrong[:n], kv)])
            kv.truncate(380)
        return await run(tiny, ids[380:], [20], kv)

    assert torch.equal(asyncio.run(rolled_back()), expected)


class Failing:
    """Experts that fail in one layer."""

    def __init__(self, experts: Any, layer: int) -> None:
        self.experts, self.layer = experts, layer

    def where(self, layer: int) -> str:
        return "away"  # so that the dense network has begun

    def dispatch(self, layer: int, *args: Any) -> Any:
        if layer == self.layer:
            raise ConnectionError("gone")
        return self.experts.dispatch(layer, *args)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_failed_step_takes_its_rows_back(tmp_path: Path, rows: int) -> None:
    model = load(write_checkpoint(tmp_path / "model"))
    ids = prompt(60 + rows)
    expected = asyncio.run(run(model, ids, [60, rows]))[60:]

    async def fail_then_repeat() -> Tensor:
        kv, good = model.new_cache(), model.experts
        await model.forward([Segment(ids[:60], kv)])
        model.experts = Failing(good, layer=2)
        with pytest.raises(ConnectionError):
            await model.forward([Segment(ids[60:], kv)])
        model.experts = good
        assert kv.length == 60
        return await run(model, ids[60:], [rows], kv)

    assert torch.equal(asyncio.run(fail_then_repeat()), expected)


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01])
def test_a_cancelled_step_takes_its_rows_back(tiny: Gemma, delay: float) -> None:
    ids = prompt(200)

    async def cancel_then_repeat() -> Tensor:
        kv = tiny.new_cache()
        step = asyncio.create_task(tiny.forward([Segment(ids, kv)]))
        await asyncio.sleep(delay)
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)
        kv.truncate(0)
        return await run(tiny, ids, [200], kv)

    assert torch.equal(asyncio.run(cancel_then_repeat()), asyncio.run(run(tiny, ids, [200])))


def test_timeline_has_every_phase_of_every_layer(tiny: Gemma) -> None:
    timeline = Timeline(spans=[])
    hidden = asyncio.run(tiny.forward([Segment(prompt(3), tiny.new_cache())], timeline=timeline))
    tiny.logits(hidden, timeline=timeline)
    phases = ("attention", "dense", "experts", "combine")
    layers = range(tiny.config.num_hidden_layers)
    assert set(timeline.seconds) == {(p, n) for p in phases for n in layers} | {("head", -1)}
    assert all(span.end >= span.start for span in timeline.spans or [])


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    """The same weights in the dtype of real checkpoints: no dtype mismatch anywhere, and the same answer."""
    path = write_checkpoint(tmp_path / "model", tiny_config(dtype="bfloat16"), seed=1)
    half, ids = load(path), prompt(40)
    checkpoint = Checkpoint.open(path)
    everything = {layer: range(11) for layer in range(4)}
    bank = ExpertBank(checkpoint, everything, dtype=torch.float32)
    full = Gemma.load(checkpoint, LocalExperts(bank), dtype=torch.float32)
    assert half.dtype == torch.bfloat16
    found, expected = asyncio.run(run(half, ids, [39, 1])), asyncio.run(run(full, ids, [39, 1]))
    assert found.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
    assert cosine.median() > 0.99


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ([], "at least one token"),
        ([5, 131], "token id 131"),
        ([-1], "token id -1"),
        ([0] * 513, "context of 512"),
    ],
)
def test_refuses_rows_that_cannot_be(tiny: Gemma, ids: list[int], what: str) -> None:
    kv = tiny.new_cache()
    with pytest.raises(UsageError, match=what):
        asyncio.run(tiny.forward([Segment(torch.tensor(ids, dtype=torch.int64), kv)]))
    assert kv.length == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(tiny: Gemma, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model"))
    bank = ExpertBank(checkpoint, {layer: range(11) for layer in range(4)})
    model = Gemma.load(checkpoint, LocalExperts(bank), device="cuda")
    ids = prompt(60)
    found = asyncio.run(run(model, ids, [50, 1, 9])).cpu()
    torch.testing.assert_close(found, asyncio.run(run(tiny, ids, [50, 1, 9])), atol=1e-3, rtol=0)


def load_as(path: Path, format: str | None) -> Gemma:
    """All parts in one format."""
    checkpoint = Checkpoint.open(path)
    everything = {layer: range(11) for layer in range(checkpoint.config.num_hidden_layers)}
    bank = ExpertBank(checkpoint, everything, format=format)
    quant = QuantConfig(format, format, format, format, format)
    return Gemma.load(checkpoint, LocalExperts(bank), quant=quant)


@pytest.mark.skipif(kernels() is None, reason="the kernels could not be built here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", [None, "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("int8_cache", [False, True], ids=["cache", "int8 cache"])
def test_rows_do_not_see_their_neighbours(
    tmp_path: Path, dtype: str, format: str | None, int8_cache: bool
) -> None:
    """Bit for bit: one prefill, tokens one by one, verify windows, rejected drafts, other sequences beside,
    more threads."""
    model = load_as(write_checkpoint(tmp_path / "model", tiny_config(dtype=dtype)), format)
    ids = prompt(70)

    def in_steps(sizes: Sequence[int]) -> Tensor:
        return asyncio.run(run(model, ids, sizes, model.new_cache(int8=int8_cache)))

    alone = in_steps([1] * 70)
    assert torch.equal(in_steps([70]), alone)
    assert torch.equal(in_steps([53, 1, 2, 3, 4, 7]), alone)

    async def after_wrong_drafts() -> Tensor:
        kv = model.new_cache(int8=int8_cache)
        await model.forward([Segment(ids[:60], kv)])
        await model.forward([Segment(prompt(9, seed=5), kv)])
        kv.truncate(60)
        return await run(model, ids[60:], [4, 6], kv)

    assert torch.equal(asyncio.run(after_wrong_drafts()), alone[60:])

    async def beside_another() -> Tensor:
        kv = model.new_cache(int8=int8_cache)
        segments = [Segment(prompt(9, seed=2), model.new_cache()), Segment(ids, kv)]
        return model.logits(await model.forward(segments))[9:]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(asyncio.run(beside_another()), alone)
    finally:
        torch.set_num_threads(threads)
