from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from training.vocabulary import BOS, SPECIAL_TOKENS, train_vocabulary


@cache
def _tokenizer() -> Tokenizer:
    return train_vocabulary(["class A:\n    def run(self):\n        return self.value\n"] * 4, 320)


@given(st.text(max_size=60))
def test_any_text_comes_back(text: str) -> None:
    ids = _tokenizer().encode(text, add_special_tokens=False).ids
    if not any(token in text for token in SPECIAL_TOKENS):
        assert _tokenizer().decode(ids) == text


def test_special_tokens_come_first_and_a_prompt_begins_with_bos() -> None:
    tokenizer = _tokenizer()
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.encode("class").ids[0] == BOS


def test_indentation_is_one_token_with_the_line_end() -> None:
    pieces = _tokenizer().encode("\n        return", add_special_tokens=False).tokens
    assert len(pieces) == 2
