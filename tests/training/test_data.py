from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.corpus import Document
from training.data import WindowStream, encode_documents, mixed_batch, scored_windows
from training.vocabulary import BOS, EOS, train_vocabulary


def _documents(*sizes: int) -> list[np.ndarray]:
    return [np.arange(size, dtype=np.uint16) for size in sizes]


@given(size=st.integers(2, 200), length=st.integers(2, 40))
def test_every_token_but_the_first_is_scored_once(size: int, length: int) -> None:
    scored: list[int] = []
    for window in scored_windows(np.arange(size, dtype=np.uint16), length):
        assert len(window.ids) <= length + 1
        scored += window.ids[len(window.ids) - window.scored :].tolist()
    assert scored == list(range(1, size))


def test_a_window_depends_on_its_number_only() -> None:
    documents = _documents(50, 70, 31)
    first, second = WindowStream(documents, seed=3), WindowStream(documents, seed=3)
    forward = [first.window(number, 8).tolist() for number in range(40)]
    backward = [second.window(number, 8).tolist() for number in reversed(range(40))]
    assert forward == backward[::-1]
    assert {len(window) for window in forward} == {9}
    assert forward != [WindowStream(documents, seed=4).window(number, 8).tolist() for number in range(40)]


def test_batches_take_their_rows_from_each_stream() -> None:
    low = WindowStream([np.zeros(100, dtype=np.uint16)], seed=0)
    high = WindowStream([np.ones(100, dtype=np.uint16)], seed=0)
    batch = mixed_batch([(low, 2), (high, 1)], step=1, length=8)
    assert batch.shape == (3, 9)
    assert batch.sum(dim=1).tolist() == [0, 0, 9]


def test_documents_are_framed() -> None:
    tokenizer = train_vocabulary(["def f(x):\n    return x\n"] * 3, 300)
    (encoded,) = encode_documents(tokenizer, [Document("a.py", "def f(x):\n    return x\n")])
    assert (encoded[0], encoded[-1]) == (BOS, EOS)
    assert tokenizer.decode(encoded.tolist()) == "def f(x):\n    return x\n"
