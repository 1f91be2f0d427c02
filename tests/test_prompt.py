"""Prompts: what is read as token ids, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from splitinfer import demo
from splitinfer.errors import UsageError
from splitinfer.model.tokenizer import Tokenizer
from splitinfer.model.weights import Checkpoint
from splitinfer.prompt import encode
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("models") / "ids"))


@pytest.mark.parametrize("ids", [[2, 5], (2, 5), np.array([2, 5]), torch.tensor([2, 5])])
def test_whole_numbers_of_any_kind(checkpoint: Checkpoint, ids: Any) -> None:
    assert encode(ids, checkpoint, None, 2) == [2, 5]


def test_text_that_is_not_unicode() -> None:
    """What a terminal of another encoding hands over."""
    model = Checkpoint.open(demo.path())
    with pytest.raises(UsageError, match="character 3 is half of a pair or a stray byte"):
        encode("hi" + "\udcff", model, Tokenizer.open(model.path), 9)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("hi", "has no tokenizer"),
        ([], "is empty"),
        ([131], "131 is not in the vocabulary of 131"),
        ([-1], "-1 is not in the vocabulary"),
        ([1, 2, 3, 4], "4 tokens, the context holds 3"),
        (None, "a NoneType, neither text nor a list"),
        (5, "a int, neither"),
        (b"hi", "a bytes, neither"),
        ([2.7], "a list, neither"),
        (["a"], "a list, neither"),
    ],
)
def test_what_no_model_can_read(checkpoint: Checkpoint, prompt: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        encode(prompt, checkpoint, None, 3)
    assert error.value.remedy
