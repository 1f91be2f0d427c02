"""What a person asks, text or token ids, as the token ids that a model can read."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

from splitinfer.errors import UsageError
from splitinfer.model.tokenizer import Tokenizer
from splitinfer.model.weights import Checkpoint

__all__ = ["Prompt", "check_room", "encode"]

Prompt = str | Sequence[int]


def encode(prompt: Prompt, checkpoint: Checkpoint, tokenizer: Tokenizer | None, context: int) -> list[int]:
    """`prompt` as token ids of the checkpoint's vocabulary, 1 to `context` of them.

    Raises UsageError for what is neither text nor ids, for text without a tokenizer, for an empty prompt, an
    id outside the vocabulary and more than the context holds.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError(
                f"{checkpoint.path} has no tokenizer",
                remedy="Give the prompt as token ids (--token-ids).",
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the prompt is no text: character {error.start + 1} is half of a pair or a stray byte",
                remedy="Give it in UTF-8.",
            ) from None
        ids = tokenizer.encode(prompt) if prompt else []
    else:
        ids = _ids(prompt)
    if not ids:
        raise UsageError("the prompt is empty", remedy="Give at least one token of text.")
    vocab = checkpoint.config.vocab_size
    for token in ids:
        if not 0 <= token < vocab:
            raise UsageError(
                f"token id {token} is not in the vocabulary of {vocab}", remedy=f"Use 0-{vocab - 1}."
            )
    if len(ids) > context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens, the context holds {context}",
            remedy="Shorten the prompt, or raise --context as far as the model and memory allow.",
        )
    return ids


def check_room(prompt_tokens: int, max_tokens: int, context: int) -> None:
    """Raises UsageError where so many new tokens do not fit the context after the prompt, or are none."""
    room = context - prompt_tokens
    if not isinstance(max_tokens, int) or (max_tokens < 1 and room >= 1):
        raise UsageError(f"max_tokens is {max_tokens!r}", remedy="Ask for at least one token.")
    if max_tokens > room or room < 1:
        raise UsageError(
            f"{prompt_tokens} prompt tokens and {max_tokens} new ones do not fit the context of {context}",
            remedy="Shorten the prompt, lower --max-tokens, or raise --context.",
        )


def _ids(prompt: Sequence[int]) -> list[int]:
    """Whole numbers of any kind. Bytes are some too, and never meant as token ids."""
    try:
        if isinstance(prompt, (bytes, bytearray)):
            raise TypeError
        return [index(token) for token in prompt]
    except TypeError:
        raise UsageError(
            f"the prompt is a {type(prompt).__name__}, neither text nor a list of token ids",
            remedy='Write "Once" or [2, 5, 7].',
        ) from None
