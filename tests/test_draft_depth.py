"""What depth and how many windows are chosen, on machines and links of known costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from splitinfer.draft_depth import MAX_DEPTH, Depth, Step, check_depth
from splitinfer.errors import UsageError


@pytest.mark.parametrize("depth", [0, 16, "deep", 2.0, True])
def test_a_depth_that_cannot_be(depth: Any) -> None:
    with pytest.raises(UsageError, match="draft depth"):
        check_depth(depth)


def settled(step: float, row: float, draft: float, right: float, network: float = 0.0) -> int:
    """The depth chosen after many steps of a machine with such costs (seconds) and such a drafter."""
    depth, draw = Depth(), torch.Generator().manual_seed(0)
    chosen = 0
    for _ in range(300):
        chosen, _ = depth.choose(64)
        luck = torch.rand(chosen, generator=draw) < right
        accepted = int(luck.long().cumprod(0).sum())
        depth.record(Step(chosen, accepted, chosen * draft, step + chosen * row, network))
    return chosen


def test_depth_follows_the_link_the_rows_and_the_drafter() -> None:
    """An expensive round trip makes it deep, expensive rows or a poor drafter make it shallow."""
    far = settled(step=0.6, row=0.01, draft=0.001, right=0.8, network=0.58)
    near = settled(step=0.04, row=0.012, draft=0.001, right=0.8)
    assert far >= 6 > near >= 1
    assert settled(step=0.6, row=0.01, draft=0.001, right=0.95, network=0.58) >= 12
    assert settled(step=0.02, row=0.02, draft=0.001, right=0.5) <= 1
    assert settled(step=0.6, row=0.01, draft=0.0, right=0.02, network=0.58) <= 2
    assert settled(step=0.02, row=0.001, draft=0.02, right=0.8) <= 1


def test_depth_gives_a_drafter_another_try() -> None:
    depth = Depth()
    for _ in range(50):
        chosen, _ = depth.choose(10)
        depth.record(Step(chosen, 0, 0.0, 0.02 * (chosen + 1), 0.0))
    tries = []
    for _ in range(300):
        chosen, _ = depth.choose(10)
        tries.append(chosen)
        depth.record(Step(chosen, chosen, 0.0, 0.02 if chosen == 0 else 0.021, 0.0))
    assert 0 in tries
    assert tries[-1] > 4


def windows(right: float, *, step: float, row: float, network: float, alone: bool = True) -> tuple[int, int]:
    """Depth and windows mostly chosen, where every draft is right as often, however far ahead."""
    depth, draw, choices = Depth(), torch.Generator().manual_seed(0), Counter[tuple[int, int]]()
    chosen, under_way, follows = (0, 1), 1, False
    for _ in range(400):
        if not follows:
            chosen = depth.choose(64, alone=alone)
            under_way = chosen[1]
            choices[chosen] += 1
        luck = (torch.rand(chosen[0] + 1, generator=draw) < right).long().cumprod(0)
        accepted, whole = int(luck[: chosen[0]].sum()), bool(luck[: chosen[0]].all())
        followed = bool(luck[-1]) if whole and under_way > 1 else None
        seconds = step + chosen[0] * row
        depth.record(Step(chosen[0], accepted, 0.0, seconds, network, follows, followed))
        follows = bool(followed)
    return choices.most_common(1)[0][0]


def test_windows_follow_where_the_link_is_slow_and_drafts_are_right() -> None:
    far = {"step": 0.13, "row": 0.001, "network": 0.12}
    depth, under_way = windows(0.99, **far)
    assert depth >= MAX_DEPTH - 3
    assert under_way == 4
    assert windows(0.98, **far, alone=False)[1] == 1
    near: dict[str, Any] = {"step": 0.02, "row": 0.004, "network": 0.0}
    assert windows(0.98, **near)[1] == 1


def test_a_fixed_depth_still_has_windows() -> None:
    depth = Depth(3)
    assert depth.choose(64, alone=True) == (3, 1)
    for _ in range(20):
        depth.record(Step(3, 3, 0.0, 0.13, 0.12))
    assert depth.choose(64, alone=True) == (3, 4)
    assert depth.choose(2, alone=True)[0] == 2
