"""The tokenizer and chat template in a GGUF file's metadata, as the files a checkpoint directory would have.

Gemma's tokenizer is a byte-pair encoding over "▁" for spaces, with bytes for what it does not know. Files of
model "gemma4" carry its merges; those of model "llama" only scores, from which the merges follow: the pair
that makes the best-scored piece is merged first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from splitinfer.errors import TokenizerError
from splitinfer.model.gguf_file import GgufFile

__all__ = ["tokenizer_files"]

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "▁"


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json; nothing where the file has no tokenizer.

    Raises TokenizerError for one of another kind, or damaged.
    """
    metadata = file.metadata
    kind, tokens = metadata.get(KEY + "model"), metadata.get(KEY + "tokens")
    if kind is None or kind in ("none", "no_vocab"):
        return {}
    if kind not in ("gemma4", "llama"):
        raise _wrong(file.path, f"tokenizer model {kind!r} is not implemented")
    types = metadata.get(KEY + "token_type")
    if (
        not isinstance(tokens, list)
        or not _texts(tokens)
        or not isinstance(types, list)
        or len(types) != len(tokens)
    ):
        raise _wrong(file.path, "the tokenizer's tokens and their types are missing or do not match")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = metadata.get(KEY + "merges")
    if isinstance(merges, list) and _texts(merges):
        pairs = [_split(merge) for merge in merges]
    else:
        scores = metadata.get(KEY + "scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise _wrong(file.path, "the tokenizer has neither merges nor scores")
        pairs = _merges(vocabulary, types, scores)
    try:
        core = _core(vocabulary, types, [p for p in pairs if p[0] + p[1] in vocabulary])
    except Exception as error:  # the library raises bare Exception
        raise _wrong(file.path, f"the tokenizer cannot be used: {error}") from None
    return {
        "tokenizer.json": core.to_str().encode(),
        "tokenizer_config.json": json.dumps(_settings(metadata, tokens)).encode(),
    }


def _wrong(path: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: {what}",
        path=str(path),
        remedy="Convert the model again, or use its Hugging Face files.",
    )


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _split(merge: str) -> tuple[str, str]:
    """Two pieces with a space between them; neither has one, for spaces are written "▁"."""
    left, _, right = merge.partition(" ")
    return left, right


def _merges(
    vocabulary: dict[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    found = []
    for piece, i in vocabulary.items():
        if types[i] not in (NORMAL, USER_DEFINED):
            continue
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right, piece[:cut], piece[cut:]))
    return [(left, right) for *_, left, right in sorted(found)]


def _core(
    vocabulary: dict[str, int], types: Sequence[int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
    by_id = list(vocabulary)
    unknown = next((by_id[i] for i, kind in enumerate(types) if kind == UNKNOWN), None)
    core = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types)
    )
    core.normalizer = normalizers.Replace(" ", SPACE)
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(by_id[i], normalized=False) for i, kind in enumerate(types) if kind == CONTROL]
    visible = [AddedToken(by_id[i], normalized=False) for i, kind in enumerate(types) if kind == USER_DEFINED]
    core.add_special_tokens(special)
    core.add_tokens(visible)
    return core


def _settings(metadata: dict[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    settings = {"add_bos_token": metadata.get(KEY + "add_bos_token", True)}
    for name in ("bos", "eos"):
        i = metadata.get(f"{KEY}{name}_token_id")
        if isinstance(i, int) and i < len(tokens):
            settings[f"{name}_token"] = tokens[i]
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return settings
