"""Drafters: they guess the next tokens of one sequence, for the model to verify in one step.

A guess is never trusted, so a drafter decides how fast text comes, not which text. It samples with the
sequence's own `Sampler`, whose randomness for the n-th token of a reply is fixed: drafter and model then draw
the same token wherever they nearly agree, at any temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from splitinfer.errors import CheckpointError, UsageError
from splitinfer.model.assistant import ASSISTANT, Assistant, KeysValues
from splitinfer.model.cache import KVCache
from splitinfer.model.config import read_json
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.sampling import Sampler
from splitinfer.model.weights import Checkpoint

__all__ = ["AssistantDrafter", "Context", "Drafter", "ModelDrafter", "PromptLookup", "open_drafter"]

LONGEST, SHORTEST = 4, 2  # n-grams that prompt lookup searches for, the longest first
PREFILL_ROWS = 512  # rows of one step of a drafting model


@dataclass(frozen=True, slots=True)
class Context:
    """A sequence as its drafter sees it.

    `ids` are all its tokens; the last one has not been through the model yet, as far as anybody knows.
    `hidden` [1, H] is the model's final hidden state of the token before, `cache` holds the model's keys and
    values of all but the last, and perhaps more behind them. `guesses` are tokens that are being verified:
    drafts go on behind them as if they were right. The token after `ids` is number `index` of the reply,
    chosen by `sampler`.
    """

    ids: Sequence[int]
    hidden: Tensor
    cache: KVCache
    sampler: Sampler
    index: int
    guesses: Sequence[int] = ()

    def choose(self, logits: Tensor, drafts: Sequence[int]) -> int:
        """The token that `logits` [V] give after `drafts`, by the randomness that will judge it."""
        penalised = self.sampler.params.repetition_penalty != 1
        seen = [*self.ids, *self.guesses, *drafts] if penalised else ()
        return self.sampler(logits, self.index + len(self.guesses) + len(drafts), seen)


class Drafter(Protocol):
    """Guesses for one sequence, from its first token to its last."""

    async def propose(self, context: Context, depth: int) -> list[int]:
        """At most `depth` (1 or more) tokens that may follow ids and guesses; none where there is no guess.

        Between two calls of one drafter, `context.ids` has only grown.
        """
        ...


class PromptLookup:
    """Copies what followed the last occurrence of the context's final n-gram.

    Costs nothing but a dictionary; right where a reply repeats its prompt or itself (code, quotations,
    summaries). Method: prompt lookup decoding (Saxena 2023).
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it last begins
        self._indexed = 0

    async def propose(self, context: Context, depth: int) -> list[int]:
        for end in range(max(self._indexed, SHORTEST), len(context.ids)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(context.ids[end - size : end])] = end
        self._indexed = len(context.ids)
        ids = [*context.ids, *context.guesses]
        for size in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
            start = self._after.get(tuple(ids[-size:]))
            if start is not None:
                drafts: list[int] = []
                for place in range(start, start + depth):  # past the end it goes on with its own copy
                    drafts.append(ids[place] if place < len(ids) else drafts[place - len(ids)])
                return drafts
        return []


class AssistantDrafter:
    """Drafts with an `Assistant` that reads the target's state; keeps none of its own."""

    def __init__(self, assistant: Assistant, target: Gemma) -> None:
        self._assistant = assistant
        self._target = target
        # The last layer of each type is the one whose keys and values an assistant was trained on.
        self._shared = {kind: layer for layer, kind in enumerate(target.config.layer_types)}

    async def propose(self, context: Context, depth: int) -> list[int]:
        assistant, drafts = self._assistant, list[int]()
        with torch.inference_mode():
            known = len(context.ids) - 1
            shared = self._keys_values(context.cache, known)
            rotations = assistant.rotations(known)
            hidden, token = context.hidden.to(assistant.device, assistant.dtype), context.ids[-1]
            for guess in context.guesses:
                _, hidden = assistant.states(self._embed(token), hidden, rotations, shared)
                token = guess
            for _ in range(depth):
                last, hidden = assistant.states(self._embed(token), hidden, rotations, shared)
                token = context.choose(assistant.logits(last), drafts)
                drafts.append(token)
        return drafts

    def _embed(self, token: int) -> Tensor:
        embedded = self._target.embed(torch.tensor([token]))
        return embedded.to(self._assistant.device, self._assistant.dtype)

    def _keys_values(self, cache: KVCache, length: int) -> KeysValues:
        shared: KeysValues = {}
        for kind, layer in self._shared.items():
            keys, values = cache.held(layer, length).widened(self._assistant.dtype)
            shared[kind] = keys.to(self._assistant.device), values.to(self._assistant.device)
        return shared


class ModelDrafter:
    """Drafts with a smaller model of the same vocabulary, which reads the whole sequence itself."""

    def __init__(self, model: Gemma) -> None:
        self._model = model
        self._cache = model.new_cache()
        self._fed: list[int] = []  # the tokens in the cache
        self._agreed = 0  # that many of them were in the last context

    async def propose(self, context: Context, depth: int) -> list[int]:
        ids = [*context.ids, *context.guesses]
        depth = min(depth, self._model.config.max_position_embeddings - len(ids))
        if depth < 1:
            return []
        shared = min(self._agreed, len(self._fed))
        while shared < min(len(self._fed), len(ids) - 1) and self._fed[shared] == ids[shared]:
            shared += 1
        self._cache.truncate(shared)
        del self._fed[shared:]
        self._agreed = shared
        drafts: list[int] = []
        for start in range(shared, len(ids), PREFILL_ROWS):
            hidden = await self._feed(ids[start : start + PREFILL_ROWS])
        self._agreed = len(context.ids)
        while True:
            drafts.append(context.choose(self._model.logits(hidden[-1:])[0], drafts))
            if len(drafts) == depth:
                return drafts
            hidden = await self._feed(drafts[-1:])

    async def _feed(self, ids: Sequence[int]) -> Tensor:
        hidden = await self._model.forward([Segment(torch.tensor(ids), self._cache)])
        self._fed += ids
        return hidden


def open_drafter(path: str | Path, target: Gemma) -> Callable[[], Drafter]:
    """Load the drafter in directory `path`: an assistant, or a smaller Gemma; gives one drafter per sequence.

    Raises CheckpointError for a damaged checkpoint and UsageError for one that does not fit `target`.
    """
    directory = Path(path)
    if read_json(directory / "config.json").get("model_type") == ASSISTANT:
        with torch.inference_mode():
            assistant = Assistant(directory, device=target.device, dtype=target.dtype)
        _check_assistant(assistant, target, directory)
        return lambda: AssistantDrafter(assistant, target)
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    _same("vocabulary", config.vocab_size, target.config.vocab_size, directory)
    experts = None
    if config.enable_moe_block:
        everything = dict.fromkeys(range(config.num_hidden_layers), range(config.num_experts))
        experts = LocalExperts(ExpertBank(checkpoint, everything))
    model = Gemma.load(checkpoint, experts, device=target.device)
    return lambda: ModelDrafter(model)


def _check_assistant(assistant: Assistant, target: Gemma, path: Path) -> None:
    config = assistant.config
    _same("vocabulary", config.text.vocab_size, target.config.vocab_size, path)
    _same("backbone_hidden_size", config.backbone_hidden_size, target.config.hidden_size, path)
    theirs = {attention.layer_type: attention for attention in target.config.attention}
    for attention in config.text.attention:
        of_target = theirs.get(attention.layer_type)
        if of_target is None:
            raise CheckpointError(
                f"{path} reads {attention.layer_type} layers and the model has none", path=str(path)
            )
        _same(f"head_dim of {attention.layer_type}", attention.head_dim, of_target.head_dim, path)
        if config.text.num_attention_heads % of_target.num_key_value_heads:
            raise CheckpointError(
                f"{path} has {config.text.num_attention_heads} query heads for the model's "
                f"{of_target.num_key_value_heads} key/value heads",
                path=str(path),
            )


def _same(what: str, found: int, wanted: int, path: Path) -> None:
    if found != wanted:
        raise UsageError(
            f"{path} cannot draft for this model: its {what} is {found}, the model's {wanted}",
            remedy="Give --draft the drafter that belongs to this model, or --draft lookup.",
        )
