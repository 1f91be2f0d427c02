from __future__ import annotations

import pytest

from splitinfer.planning.cost import CallCost, ClientCost, Curve, Setup, drafted, plain, tokens_per_step
from splitinfer.planning.weigh import ACCEPTANCE, weigh


def setup(round_trip: float, row: float = 0.1) -> Setup:
    def curve(first: float) -> Curve:
        return Curve.of({1: first, 2: first * (1 + row)})

    client = ClientCost(curve(1e-3), curve(3e-4), curve(2e-3), curve(5e-3), draft=1e-3)
    return Setup(client, ((6, CallCost(round_trip, curve(1e-3))),))


def test_the_depth_is_the_one_that_gives_most() -> None:
    slow = weigh(setup(0.02))
    assert slow.depth >= 4
    rates = [
        drafted(setup(0.02), depth, tokens_per_step(ACCEPTANCE, depth)).tokens_per_second
        for depth in range(1, 9)
    ]
    assert slow.drafted.tokens_per_second == max(rates)
    assert slow.drafted.tokens_per_second > 2 * slow.plain.tokens_per_second


def test_drafts_that_cost_more_than_they_give_are_left_out() -> None:
    never = weigh(setup(0.0, row=1.0))
    assert (never.depth, never.drafted) == (0, never.plain)


def test_no_acceptance_means_no_drafts() -> None:
    found = weigh(setup(0.02), acceptance=())
    assert found.depth == 0
    assert found.plain == plain(setup(0.02))


def test_streams() -> None:
    found = weigh(setup(0.02), streams=4)
    assert found.batched.tokens_per_second == pytest.approx(4 * found.plain.tokens_per_second, rel=0.25)
