"""The byte-level BPE vocabulary: trained on the training documents, written as `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = ["BOS", "EOS", "PAD", "SPECIAL_TOKENS", "train_vocabulary"]

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
PAD, EOS, BOS = 0, 1, 2

# Line ends keep the next line's indentation, and words the character that leads into them (a space, an
# attribute's dot, an opening bracket): one token then covers what always comes together in source text.
_PIECES = r"(?:\r?\n)+[ \t]*|[ .(]?[A-Za-z_]+|[0-9]{1,2}| ?[^\sA-Za-z0-9_]+|[ \t]+(?=[ \t])|\s"


def train_vocabulary(texts: Iterable[str], size: int) -> Tokenizer:
    """Train `size` tokens, the special ones first; every byte has a token, so any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer
