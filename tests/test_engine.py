"""The engine as users meet it: text and token ids, stopping, sampling, refusals, with and without await."""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import splitinfer
from splitinfer.errors import CheckpointError, UsageError
from tests.checkpoints import tiny_config, write_checkpoint
from tests.model.test_tokenizer import gemma_like

PROMPT = "hello world"


@pytest.fixture(scope="module")
def with_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer; `<eos>` is 1."""
    core = gemma_like()
    path = tmp_path_factory.mktemp("models") / "text"
    write_checkpoint(path, tiny_config(vocab_size=core.get_vocab_size()))
    core.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def without_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "ids")


@pytest.fixture
def engine(with_text: Path) -> Iterator[splitinfer.Engine]:
    with splitinfer.load(with_text) as opened:
        yield opened


def test_generate_gives_text_ids_usage_and_timings(engine: splitinfer.Engine) -> None:
    completion = engine.generate(PROMPT, max_tokens=12, ignore_eos=True)
    assert len(completion.token_ids) == 12
    assert completion.stop_reason == "length"
    assert engine.tokenizer is not None
    assert completion.text
    assert completion.usage.prompt_tokens == len(engine.tokenizer.encode(PROMPT))
    assert completion.usage.completion_tokens == 12
    assert completion.usage.bytes_sent == completion.usage.calls == 0
    timings = completion.timings
    assert 0 < timings.ttft < timings.total
    assert {"attention", "dense", "experts", "head", "sampling"} <= set(timings.phases)
    assert sum(timings.phases.values()) <= timings.total
    assert len(timings.layers) == 4


def test_a_stream_is_the_completion_in_pieces(engine: splitinfer.Engine) -> None:
    pieces = list(engine.stream(PROMPT, max_tokens=20, ignore_eos=True))
    completion = pieces[-1].completion
    assert completion is not None
    assert [piece.completion for piece in pieces[:-1]] == [None] * 19
    assert "".join(piece.text for piece in pieces) == completion.text
    assert tuple(itertools.chain(*(piece.token_ids for piece in pieces))) == completion.token_ids
    assert completion.token_ids == engine.generate(PROMPT, max_tokens=20, ignore_eos=True).token_ids


def test_text_and_its_ids_are_the_same_prompt(engine: splitinfer.Engine) -> None:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(PROMPT)
    assert engine.generate(ids, max_tokens=8).token_ids == engine.generate(PROMPT, max_tokens=8).token_ids


def test_a_stop_string_ends_the_text_before_itself(engine: splitinfer.Engine) -> None:
    text = engine.generate(PROMPT, max_tokens=40, ignore_eos=True).text
    stop = text[10:12]
    stopped = engine.generate(PROMPT, max_tokens=40, ignore_eos=True, stop=[stop])
    assert stopped.stop_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


def test_an_end_of_sequence_token_ends_it_and_is_not_in_the_text(
    with_text: Path, tmp_path: Path, engine: splitinfer.Engine
) -> None:
    ids = engine.generate(PROMPT, max_tokens=10, ignore_eos=True).token_ids
    end = next(i for i in range(3, 10) if ids[i] not in ids[:i])
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{ids[end]}]}}')
    for file in with_text.iterdir():
        (tmp_path / file.name).symlink_to(file)
    with splitinfer.load(tmp_path) as other:
        completion = other.generate(PROMPT, max_tokens=10)
    assert completion.stop_reason == "eos"
    assert completion.token_ids == ids[: end + 1]
    assert engine.tokenizer is not None
    assert completion.text == engine.tokenizer.decode(ids[:end])


def test_the_seed_decides_what_is_sampled(engine: splitinfer.Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.95, "ignore_eos": True}
    first = engine.generate(PROMPT, seed=1, **options).token_ids
    assert first == engine.generate(PROMPT, seed=1, **options).token_ids
    assert first != engine.generate(PROMPT, seed=2, **options).token_ids


def test_logits_agree_with_generation(engine: splitinfer.Engine) -> None:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(PROMPT)
    logits = engine.logits(ids)
    assert logits.dtype == np.float32
    assert logits.shape == (len(ids), engine.config.vocab_size)
    assert int(logits[-1].argmax()) == engine.generate(ids, max_tokens=1).token_ids[0]


def test_a_long_prompt_in_blocks_gives_the_logits_of_single_tokens(engine: splitinfer.Engine) -> None:
    """512 positions are one block here; blocks and cache meet in the model's own tests."""
    ids = np.random.default_rng(0).integers(3, 250, 500).tolist()
    logits = engine.logits(ids)
    assert np.abs(logits[:20] - engine.logits(ids[:20])).max() < 1e-4


def test_a_checkpoint_without_a_tokenizer_serves_token_ids(without_text: Path) -> None:
    with splitinfer.load(without_text) as engine:
        completion = engine.generate([2, 5, 7], max_tokens=5, ignore_eos=True)
        assert completion.text == ""
        assert len(completion.token_ids) == 5
        with pytest.raises(UsageError, match="has no tokenizer"):
            engine.generate("Once")
        with pytest.raises(UsageError, match="has no tokenizer"):
            engine.generate([2], stop=["x"])


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "prompt is empty"),
    ([], {}, "prompt is empty"),
    ([3, 100_000], {}, "100000 is not in the vocabulary"),
    ([3, -1], {}, "-1 is not in the vocabulary"),
    ([3] * 600, {}, "600 tokens, the context holds 512"),
    ([3] * 500, {"max_tokens": 13}, "do not fit"),
    ([3], {"max_tokens": 0}, "max_tokens is 0"),
    ([3], {"max_tokens": 1.5}, "max_tokens is 1.5"),
    ([3], {"temprature": 1.0}, "no option 'temprature'"),
    ([3], {"temperature": -1.0}, "temperature"),
    ([3], {"stop": "\n"}, "stop takes a list"),
    ([3], {"stop": None}, "stop takes a list"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_what_cannot_be_done_is_refused(
    engine: splitinfer.Engine, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        engine.generate(prompt, **options)
    assert engine.generate([3], max_tokens=1).token_ids  # and the engine goes on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nodes": "host:7077"}, "nodes takes a list"),
        ({"context": 513}, "context of 513"),
        ({"context": 0}, "context of 0"),
        ({"dtype": "float16"}, "float16"),
        ({"colour": "red"}, "no option 'colour'"),
        ({"draft": "nonsense"}, "--draft 'nonsense'"),
        ({"local_layers": "0-1"}, "there are none"),
        ({"local_memory": "1GiB"}, "there are none"),
    ],
)
def test_settings_are_checked(with_text: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        splitinfer.load(with_text, **settings)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        splitinfer.load(tmp_path / "nowhere")


def test_leaving_a_stream_early_leaves_nothing_behind(engine: splitinfer.Engine) -> None:
    for piece in engine.stream(PROMPT, max_tokens=50, ignore_eos=True):
        assert piece.token_ids
        break
    assert engine.generate(PROMPT, max_tokens=2, ignore_eos=True).usage.completion_tokens == 2


def test_closing_ends_the_thread_and_forbids_use(with_text: Path) -> None:
    before = threading.active_count()
    engine = splitinfer.load(with_text)
    engine.close()
    engine.close()
    assert "splitinfer" not in [thread.name for thread in threading.enumerate()]
    assert threading.active_count() <= before + 2  # executors of the loop may linger
    with pytest.raises(UsageError, match="closed"):
        engine.generate(PROMPT)


def test_an_engine_may_be_shared_between_threads(engine: splitinfer.Engine) -> None:
    expected = engine.generate(PROMPT, max_tokens=10, ignore_eos=True).token_ids
    found: list[tuple[int, ...]] = []

    def ask() -> None:
        found.append(engine.generate(PROMPT, max_tokens=10, ignore_eos=True).token_ids)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [expected] * 4


def test_the_async_engine_is_the_same(with_text: Path, engine: splitinfer.Engine) -> None:
    async def ask() -> splitinfer.Completion:
        async with splitinfer.AsyncEngine(with_text) as other:
            return await other.generate(PROMPT, max_tokens=10, ignore_eos=True)

    assert asyncio.run(ask()).token_ids == engine.generate(PROMPT, max_tokens=10, ignore_eos=True).token_ids


def test_an_engine_that_is_not_open_says_so(with_text: Path) -> None:
    with pytest.raises(UsageError, match="not open"):
        asyncio.run(splitinfer.AsyncEngine(with_text).generate([3]))


def test_settings_are_given_once(without_text: Path) -> None:
    with pytest.raises(UsageError, match="given twice: config and context"):
        splitinfer.load(without_text, config=splitinfer.EngineConfig(), context=5)


def test_an_open_engine_is_not_opened_again(without_text: Path) -> None:
    async def twice() -> None:
        async with splitinfer.AsyncEngine(without_text) as engine:
            await engine.open()

    with pytest.raises(UsageError, match="open already"):
        asyncio.run(twice())


def test_arguments_of_the_wrong_kind_are_named(without_text: Path) -> None:
    with pytest.raises(UsageError, match=r"nodes is \[5\]") as caught:
        splitinfer.load(without_text, nodes=[5])  # type: ignore[list-item]
    assert "host:7077" in caught.value.remedy
    with pytest.raises(UsageError, match="model is None"):
        splitinfer.load(None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="draft=None"):
        splitinfer.load(without_text, draft=None)
    with pytest.raises(UsageError, match="timeout=0"):
        splitinfer.load(without_text, timeout=0)


def test_a_forgotten_engine_ends(without_text: Path) -> None:
    engine = splitinfer.load(without_text)
    thread = engine._thread
    assert thread is not None
    del engine
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_an_engine_that_nobody_closes_ends_with_the_program(without_text: Path) -> None:
    script = (
        "import atexit, sys, threading; "
        "atexit.register(lambda: print(*(thread.name for thread in threading.enumerate()))); "  # runs last
        'import splitinfer; engine = splitinfer.load(sys.argv[1], draft="off"); '
        "engine.generate([3, 4], max_tokens=3); "
        "print(*(thread.name for thread in threading.enumerate()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(without_text)], timeout=60, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    before, after = (line.split() for line in ran.stdout.splitlines())
    assert "splitinfer" in before
    assert "splitinfer" not in after


@pytest.mark.parametrize("often", [True, False])
def test_decoding_alone_gives_the_loop_a_turn_now_and_then(
    without_text: Path, monkeypatch: pytest.MonkeyPatch, often: bool
) -> None:
    """With the experts here no step ever waits: others on the loop would starve."""
    monkeypatch.setattr("splitinfer.engine.TURN_SECONDS", 0.0 if often else 3600.0)
    monkeypatch.setattr("splitinfer.model.compute.INLINE_SECONDS", 3600.0)

    async def turns() -> int:
        counted = 0

        async def others() -> None:
            nonlocal counted
            while True:
                await asyncio.sleep(0)
                counted += 1

        config = splitinfer.EngineConfig(draft="off")
        async with splitinfer.AsyncEngine(without_text, config=config) as engine:
            beside = asyncio.create_task(others())
            first = 0
            async for piece in engine.stream([2, 5, 7], max_tokens=22, ignore_eos=True):
                first = first or counted
                assert piece.token_ids
            beside.cancel()
            return counted - first

    assert (asyncio.run(turns()) >= 20) == often
