"""What drafters propose: copies of the context, the assistant's guesses, a smaller model's continuation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from splitinfer.errors import UsageError
from splitinfer.model.drafter import Context, Drafter, ModelDrafter, PromptLookup, open_drafter
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.sampling import Sampler, SamplingParams
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint
from tests.model.test_assistant import all_layers_shared, assistant_checkpoint

__all__ = ["all_layers_shared"]


def load(path: Path) -> Gemma:
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    everything = dict.fromkeys(range(config.num_hidden_layers), range(config.num_experts))
    return Gemma.load(checkpoint, LocalExperts(ExpertBank(checkpoint, everything)))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Gemma:
    return load(write_checkpoint(tmp_path_factory.mktemp("models") / "target", tiny_config(vocab_size=132)))


def proposals(drafter: Drafter, target: Gemma, ids: Sequence[int], depth: int, seen: int = 0) -> list[int]:
    """What `drafter` says after `ids`, all but the last of which go through the model first."""

    async def ask() -> list[int]:
        cache = target.new_cache()
        hidden = await target.forward([Segment(torch.tensor(ids[:-1]), cache)])
        context = Context(ids, hidden[-1:], cache, Sampler(SamplingParams()), seen)
        return await drafter.propose(context, depth)

    return asyncio.run(ask())


def test_lookup_copies_what_followed_the_longest_match_last(target: Gemma) -> None:
    drafter = PromptLookup()
    assert proposals(drafter, target, [1, 2, 3], 4) == []
    assert proposals(drafter, target, [1, 2, 3, 9, 1, 2], 2) == [3, 9]
    # [3, 1, 2] was followed by 8, the shorter [1, 2] later by 7
    ids = [1, 2, 3, 9, 1, 2, 3, 1, 2, 8, 1, 2, 7, 3, 1, 2]
    assert proposals(drafter, target, ids, 3) == [8, 1, 2]
    assert proposals(drafter, target, [*ids, 7], 2) == [3, 1]


def test_lookup_goes_on_with_its_own_copy(target: Gemma) -> None:
    assert proposals(PromptLookup(), target, [5, 6, 7, 5, 6], 7) == [7, 5, 6, 7, 5, 6, 7]


def test_a_model_drafts_its_own_continuation(target: Gemma) -> None:
    """The target as its own drafter: what it proposes is what it generates, also after being wrong."""
    drafter = ModelDrafter(target)
    ids = [2, 30, 31, 32]
    first = proposals(drafter, target, ids, 5)
    assert proposals(ModelDrafter(target), target, [*ids, *first[:3]], 2) == first[3:]
    assert proposals(drafter, target, [*ids, *first[:3]], 2) == first[3:]
    other = [*ids, *first[:3], (first[3] + 1) % 100, 7]
    assert proposals(drafter, target, other, 4) == proposals(ModelDrafter(target), target, other, 4)


def test_a_model_stops_at_its_own_context(target: Gemma, tmp_path: Path) -> None:
    small = load(write_checkpoint(tmp_path, tiny_config(vocab_size=132, max_position_embeddings=6)))
    drafter = ModelDrafter(small)
    assert len(proposals(drafter, target, [2, 3, 4, 5], 5)) == 2
    assert proposals(drafter, target, [2, 3, 4, 5, 6, 7], 5) == []


@pytest.mark.parametrize("length", [3, 40])
def test_the_assistant_reads_the_target_as_the_reference_does(
    target: Gemma, tmp_path: Path, length: int
) -> None:
    """Greedy drafts against transformers' assistant, given what the target computed."""
    reference = assistant_checkpoint(tmp_path, ordered=False)
    ids = [2, *range(50, 50 + length)]
    drafts = proposals(open_drafter(tmp_path, target)(), target, ids, 4)
    cache = target.new_cache()
    hidden = asyncio.run(target.forward([Segment(torch.tensor(ids[:-1]), cache)]))[-1:]
    kinds = {kind: layer for layer, kind in enumerate(target.config.layer_types)}
    shared = {
        kind: tuple(part[None].contiguous() for part in cache.held(layer, cache.length)[:2])
        for kind, layer in kinds.items()
    }
    expected, token = [], ids[-1]
    with torch.inference_mode():
        for _ in range(4):
            embedded = target.embed(torch.tensor([token]))
            output = reference(
                inputs_embeds=torch.cat((embedded, hidden), -1).unsqueeze(0),
                position_ids=torch.tensor([[len(ids) - 1]]),
                shared_kv_states=shared,
            )
            token, hidden = int(output.logits.argmax()), output.last_hidden_state[0]
            expected.append(token)
    assert drafts == expected


def test_a_drafter_of_another_model_is_refused(target: Gemma, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small", tiny_config(vocab_size=99))
    with pytest.raises(UsageError, match="vocabulary is 99, the model's 132"):
        open_drafter(tmp_path / "small", target)
    assistant_checkpoint(tmp_path / "heads", ordered=False, head_dim=4)
    with pytest.raises(UsageError, match="head_dim of sliding_attention is 4, the model's 8"):
        open_drafter(tmp_path / "heads", target)
