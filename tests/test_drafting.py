"""Drafting changes the number of steps and nothing else: greedy, sampled, right, wrong and mixed drafts."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from splitinfer import AsyncEngine, Completion
from splitinfer.batching import Batcher
from splitinfer.draft_depth import MAX_DEPTH, Depth
from splitinfer.drafting import Decoder
from splitinfer.errors import UsageError
from splitinfer.model.drafter import Context
from splitinfer.model.native import kernels
from splitinfer.model.sampling import Sampler, SamplingParams
from splitinfer.timing import Timeline
from tests.checkpoints import tiny_config, write_checkpoint
from tests.model.test_assistant import all_layers_shared, assistant_checkpoint
from tests.test_split import addresses, running

__all__ = ["all_layers_shared"]

PROMPT = [2, *range(5, 40), *range(5, 30)]  # several windows of 8, and something to look up
TOKENS = 60
SAMPLED = [
    {},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.0, "seed": 1, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.5, "seed": 2, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.3},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config(vocab_size=132))


class Scripted:
    """Proposes the tokens that will come, with every `wrong`-th of them spoilt (0: none)."""

    def __init__(self, reply: Sequence[int], wrong: int) -> None:
        self.reply = reply
        self.wrong = wrong

    async def propose(self, context: Context, depth: int) -> list[int]:
        start = context.index + len(context.guesses)
        return [
            (token + 1) % 132 if self.wrong and number % self.wrong == 0 else token
            for number, token in enumerate(self.reply[start:][:depth], start=start)
        ]


async def reply(engine: AsyncEngine, **options: Any) -> Completion:
    return await engine.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, **options)


@pytest.mark.parametrize("options", SAMPLED, ids=str)
@pytest.mark.parametrize("depth", [1, 4, MAX_DEPTH, "auto"])
def test_the_tokens_of_plain_decoding(checkpoint: Path, options: dict[str, Any], depth: int | str) -> None:
    """With drafts that are all right, mostly right and all wrong, at each way of sampling."""

    async def both() -> None:
        async with AsyncEngine(checkpoint, draft="off") as engine:
            plain = await reply(engine, **options)
        assert plain.usage.drafted_tokens == plain.usage.accepted_tokens == 0
        async with AsyncEngine(checkpoint, draft_depth=depth) as engine:
            for wrong in (0, 5, 1):
                engine._new_drafter = lambda wrong=wrong: Scripted(plain.token_ids, wrong)
                drafted = await reply(engine, **options)
                assert drafted.token_ids == plain.token_ids
                usage = drafted.usage
                assert usage.drafted_tokens > 0
                if wrong == 0:
                    assert usage.accepted_tokens == usage.drafted_tokens
                if wrong == 1:
                    assert usage.accepted_tokens == 0

    asyncio.run(both())


@pytest.mark.skipif(kernels() is None, reason="PyTorch's bfloat16 products depend on the number of rows")
def test_the_tokens_of_plain_decoding_in_bfloat16(tmp_path: Path) -> None:
    """Bit for bit the same logits in a row of a verify step and alone, here and over nodes."""
    model = write_checkpoint(tmp_path, tiny_config(vocab_size=132, dtype="bfloat16"))

    async def run() -> None:
        async with running(model, [("0-5", None), ("6-10", None)]) as nodes:
            for where in (None, addresses(nodes)):
                async with AsyncEngine(model, where, draft="off") as engine:
                    plain = await reply(engine, temperature=0.8, seed=5)
                async with AsyncEngine(model, where, draft_depth=5) as engine:
                    engine._new_drafter = lambda plain=plain: Scripted(plain.token_ids, 4)
                    drafted = await reply(engine, temperature=0.8, seed=5)
                assert drafted.token_ids == plain.token_ids
                assert drafted.usage.accepted_tokens > TOKENS / 2

    asyncio.run(run())


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_every_drafter_gives_the_same_tokens(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    assistant_checkpoint(tmp_path / "assistant", ordered=True)
    small = write_checkpoint(tmp_path / "small", tiny_config(vocab_size=132, num_hidden_layers=2), seed=9)

    async def each() -> list[Completion]:
        completions = []
        for draft in ("off", "lookup", str(tmp_path / "assistant"), str(small), str(checkpoint)):
            async with AsyncEngine(checkpoint, draft=draft, draft_depth=3) as engine:
                completions.append(await reply(engine, **options))
        return completions

    plain, lookup, _, _, itself = completions = asyncio.run(each())
    assert [c.token_ids for c in completions] == [plain.token_ids] * 5
    assert itself.usage.accepted_tokens == itself.usage.drafted_tokens > 30  # its own best drafter
    assert all(c.usage.drafted_tokens > 0 for c in completions[1:] if c is not lookup)


class Eager(Depth):
    """Keeps four windows of a fixed depth under way, whatever it costs."""

    def choose(self, limit: int, *, alone: bool = False) -> tuple[int, int]:
        return min(self.fixed or 0, limit), 4 if alone else 1


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_windows_that_follow_change_no_token(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Over nodes, with every drafter: windows are dropped in any layer, beyond the sliding layers' window."""
    assistant_checkpoint(tmp_path / "assistant", ordered=False)

    async def each() -> None:
        async with running(checkpoint, [("0-5", None), ("6-10", None)]) as nodes:
            async with AsyncEngine(checkpoint, addresses(nodes), draft="off") as engine:
                plain = await reply(engine, **options)
            for draft in ("lookup", str(tmp_path / "assistant"), str(checkpoint)):
                async with AsyncEngine(checkpoint, addresses(nodes), draft=draft) as engine:
                    engine._depth = Eager(2)
                    assert (await reply(engine, **options)).token_ids == plain.token_ids
                    engine._new_drafter = lambda: Scripted(plain.token_ids, 7)
                    engine._depth = Eager(12)
                    assert (await reply(engine, **options)).token_ids == plain.token_ids
                    assert len(asyncio.all_tasks()) <= 1 + 2 * len(nodes)

    asyncio.run(each())


def test_leaving_early_leaves_no_window_behind(checkpoint: Path) -> None:
    """Left early, a generation gives its windows up; the next one on the same engine is as it should be."""

    async def run() -> None:
        async with (
            running(checkpoint, [(None, None)]) as nodes,
            AsyncEngine(checkpoint, addresses(nodes), draft=str(checkpoint)) as engine,
        ):
            engine._depth = Eager(2)
            whole = await reply(engine)
            before = asyncio.all_tasks()
            async with aclosing(engine.stream(PROMPT, max_tokens=40, ignore_eos=True)) as pieces:
                for _ in range(3):
                    await anext(pieces)
            assert asyncio.all_tasks() == before
            assert engine._batcher.members == 0
            assert (await reply(engine)).token_ids == whole.token_ids

    asyncio.run(run())


def test_over_nodes_a_step_costs_one_call_for_each_layer(checkpoint: Path) -> None:
    async def run() -> tuple[Completion, Completion]:
        async with running(checkpoint, [(None, "0-1"), (None, "2-3")]) as nodes:
            async with AsyncEngine(checkpoint, addresses(nodes), draft="off") as engine:
                plain = await reply(engine)
            async with AsyncEngine(
                checkpoint, addresses(nodes), draft=str(checkpoint), draft_depth=3
            ) as engine:
                return plain, await reply(engine)

    plain, drafted = asyncio.run(run())
    assert drafted.token_ids == plain.token_ids
    assert plain.usage.calls == 4 * TOKENS
    assert drafted.usage.calls == 4 * (1 + -(-(TOKENS - 1) // 4))


def test_drafts_end_where_the_reply_ends(checkpoint: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(checkpoint, draft=str(checkpoint), draft_depth=8) as engine:
            whole = await engine.generate(PROMPT, max_tokens=40, ignore_eos=True)
            for length in range(1, 12):
                part = await engine.generate(PROMPT, max_tokens=length, ignore_eos=True)
                assert part.token_ids == whole.token_ids[:length]
                assert part.stop_reason == "length"
            # up to the last position of the context of 512
            full = await engine.generate([5] * 500, max_tokens=12, ignore_eos=True)
            assert len(full.token_ids) == 12

    asyncio.run(run())


@pytest.mark.skipif(kernels() is None, reason="drafts are off where rows are not invariant")
def test_a_model_comes_with_its_drafter(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tiny_config(vocab_size=132))
    assistant_checkpoint(model / "assistant", ordered=False)

    async def drafted(**settings: Any) -> int:
        async with AsyncEngine(model, draft_depth=2, **settings) as engine:
            return (await engine.generate([2, 3], max_tokens=9, ignore_eos=True)).usage.drafted_tokens

    assert asyncio.run(drafted()) > 0
    assert asyncio.run(drafted(draft="off")) == 0
    with pytest.raises(UsageError, match="nowhere"):
        asyncio.run(drafted(draft="nowhere"))


def test_sampled_frequencies_follow_the_distribution(checkpoint: Path) -> None:
    """The second token of many seeds, drafted by a poor drafter, against the model's own probabilities."""
    draws, params = 400, {"temperature": 1.2, "top_k": 6}

    async def run() -> tuple[Counter[int], torch.Tensor]:
        found: Counter[int] = Counter()
        async with AsyncEngine(checkpoint) as engine:
            cache, ids = engine.new_cache(), [2, 9, 4]
            async for hidden in engine.prefill(ids, cache):
                state = hidden[-1:]
            for seed in range(draws):
                sampler = Sampler(SamplingParams(seed=seed, **params))
                decoder = Decoder(
                    Batcher(engine.model).seat(), cache, [*ids], state,
                    sampler=sampler, timeline=Timeline(), drafter=Scripted([0, 1, 2], 0), depth=Depth(1),
                )  # fmt: skip
                decoder._ids.append(11)
                found[(await decoder.step(2))[0]] += 1
                cache.truncate(3)
            hidden = await engine.model.forward([*_rows(11, cache)])
            expected = Sampler(SamplingParams(**params)).distribution(engine.model.logits(hidden)[0])
        return found, expected * draws

    found, expected = asyncio.run(run())
    assert set(found) <= set(expected.nonzero().flatten().tolist())
    likely = (expected > 5).nonzero().flatten().tolist()
    chi2 = sum((found[t] - float(expected[t])) ** 2 / float(expected[t]) for t in likely)
    assert len(likely) > 2
    assert chi2 < 20.5  # six tokens at most: p < 0.001; the seeds are fixed


def _rows(token: int, cache: Any) -> list[Any]:
    from splitinfer.model.gemma import Segment

    return [Segment(torch.tensor([token]), cache)]


@pytest.mark.parametrize("where", ["this machine", "node"])
@pytest.mark.parametrize("draft", ["auto", "lookup"])
def test_drafts_where_rows_are_not_invariant(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    draft: str,
) -> None:
    """Off by themselves, and said once; on by request, with a warning."""
    from splitinfer import node
    from splitinfer.model.gemma import Gemma

    if where == "this machine":
        monkeypatch.setattr(Gemma, "row_invariant", False)
    else:
        monkeypatch.setattr(node, "arithmetic", lambda: "torch 2.13.0 AVX2")

    async def run() -> Completion:
        async with (
            running(checkpoint, [(None, None)]) as nodes,
            AsyncEngine(checkpoint, addresses(nodes), draft=draft, draft_depth=3) as engine,
        ):
            await reply(engine)
            return await reply(engine)

    with caplog.at_level(logging.WARNING, "splitinfer"):
        drafted = asyncio.run(run()).usage.drafted_tokens
    (said,) = caplog.messages
    assert where in said
    assert said.startswith("drafts are off" if draft == "auto" else "drafts may change tokens")
    assert (drafted == 0) == (draft == "auto")


@pytest.mark.skipif(kernels() is None, reason="here rows are not invariant")
def test_where_rows_are_invariant_nothing_is_said(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with (
            running(checkpoint, [(None, None)]) as nodes,
            AsyncEngine(checkpoint, addresses(nodes)) as engine,
        ):
            assert engine._new_drafter is not None

    asyncio.run(run())
    assert not caplog.messages
