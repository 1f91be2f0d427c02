from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitinfer.errors import SplitinferError, UsageError
from splitinfer.fixed_point import LARGEST, MAX_PARTS, STEP_BITS, check_parts, from_fixed, to_fixed

PARTS = st.lists(st.floats(-8191, 8191, width=32), min_size=1, max_size=40)


@given(PARTS, st.randoms(use_true_random=False))
def test_sums_do_not_depend_on_order_or_grouping(parts: list[float], random: object) -> None:
    fixed = to_fixed(torch.tensor(parts, dtype=torch.float64))
    shuffled = fixed[torch.randperm(len(parts))]
    cut = len(parts) // 2
    assert shuffled[:cut].sum() + shuffled[cut:].sum() == fixed.sum()
    exact = torch.tensor(parts, dtype=torch.float64).sum()
    assert abs(from_fixed(fixed.sum(), torch.float64) - exact) <= len(parts) * 2.0 ** -(STEP_BITS + 1) + 1e-9


def test_rounds_once_to_what_is_asked_for() -> None:
    total = to_fixed(torch.tensor([1.0, 2.0**-9, 2.0**-20], dtype=torch.float64)).sum()
    assert from_fixed(total, torch.bfloat16).item() == 1.0
    assert from_fixed(total, torch.float32).item() == 1.0 + 2.0**-9 + 2.0**-20


@pytest.mark.parametrize("wrong", [LARGEST, -LARGEST, float("inf"), float("nan")])
def test_what_does_not_fit_raises(wrong: float) -> None:
    with pytest.raises(SplitinferError, match="8192 or more") as caught:
        to_fixed(torch.tensor([1.0, wrong], dtype=torch.float64))
    assert "--exact" in caught.value.remedy


def test_as_many_parts_as_fit() -> None:
    largest = to_fixed(torch.tensor([LARGEST - 2.0**-STEP_BITS], dtype=torch.float64))
    assert 0 < int(largest) * MAX_PARTS < 1 << 63
    check_parts(8, 2048)
    with pytest.raises(UsageError, match="8 experts of 2049 columns"):
        check_parts(8, 2049)
