from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitinfer.planning.cost import (
    Alone,
    CallCost,
    ClientCost,
    Curve,
    Setup,
    batched,
    drafted,
    plain,
    step_terms,
    tokens_per_step,
)

MS = 1e-3
CLIENT = ClientCost(
    attention=Curve.of({1: 0.3 * MS, 5: 0.5 * MS}),
    dense=Curve.of({1: 0.1 * MS, 5: 0.2 * MS}),
    experts=Curve.of({1: 0.8 * MS, 5: 2 * MS}),
    head=Curve.of({1: 2 * MS, 5: 3 * MS}),
    step=Curve.constant(0.5 * MS),
    sequence=0.05 * MS,
    token=Curve.constant(0.2 * MS),
    draft=0.4 * MS,
)
CALL = CallCost(
    2 * MS,
    experts=Curve.of({1: 0.5 * MS, 5: 1 * MS}),
    send=Curve.constant(0.1 * MS),
    combine=Curve.constant(0.05 * MS),
    handling=Curve.constant(0.15 * MS),
    nbytes=10_000,
)


def setup(layers: int = 6, local: int = 0, call: CallCost = CALL, client: ClientCost = CLIENT) -> Setup:
    return Setup(client, ((local, None), (layers - local, call)))


def test_a_curve_is_straight_between_its_points_and_goes_on_beyond() -> None:
    curve = Curve.of({8: 5.0, 1: 1.0, 4: 2.0})
    assert [curve.at(rows) for rows in (0, 1, 2.5, 4, 6, 8, 10)] == [1, 1, 1.5, 2, 3.5, 5, 6.5]
    assert Curve.constant(3.0).at(100) == 3


def test_plain_is_the_bound() -> None:
    layer = 0.3 + 0.1 + 2 + 0.15 + 0.5 + 0.05  # the dense network is hidden behind the call
    found = plain(setup())
    assert found.step_seconds == pytest.approx((6 * layer + 2 + 0.5 + 0.2) * MS)
    assert found.tokens_per_second == pytest.approx(1 / found.step_seconds)
    assert found.binds == "round trip"
    assert found.terms["round trip"] == pytest.approx(12 * MS)
    assert found.terms["dense network"] == 0
    assert sum(found.terms.values()) == pytest.approx(found.step_seconds)


def test_a_dense_network_longer_than_the_call_is_waited_for() -> None:
    call = replace(CALL, round_trip=0.0, handling=Curve.constant(0), experts=Curve.constant(0.03 * MS))
    found = plain(setup(call=call))
    assert found.terms["dense network"] == pytest.approx(6 * 0.07 * MS)
    assert found.terms["node experts"] == pytest.approx(6 * 0.03 * MS)


def test_a_sequence_that_is_alone_has_calls_of_its_own_up_to_a_wait() -> None:
    """0.1 ms less than an empty message beside the link, in place of 0.15 more."""
    alone = Alone(
        longest=2.5 * MS,
        send=Curve.constant(0.02 * MS),
        combine=Curve.constant(0.01 * MS),
        handling=Curve.constant(-0.1 * MS),
    )
    call = replace(CALL, alone=alone)
    saved = 0.1 + 0.05 + 0.15 - (0.02 + 0.01 - 0.1)
    assert plain(setup()).step_seconds - plain(setup(call=call)).step_seconds == pytest.approx(6 * saved * MS)
    assert drafted(setup(call=call), 1, 1.5).step_seconds < drafted(setup(), 1, 1.5).step_seconds
    assert batched(setup(call=call), 8) == batched(setup(), 8)
    longer = replace(call, round_trip=2.2 * MS)  # 2.2 + 0.5 - 0.1 is too long
    assert plain(setup(call=longer)) == plain(setup(call=replace(CALL, round_trip=2.2 * MS)))


def test_a_local_layer_has_no_round_trip() -> None:
    one, none = plain(setup(local=1)), plain(setup())
    assert none.step_seconds - one.step_seconds == pytest.approx((2.8 - 0.8 - 0.1) * MS)
    everything = plain(Setup(CLIENT, ((6, None),)))
    assert everything.step_seconds == pytest.approx((6 * (0.3 + 0.1 + 0.8) + 2.7) * MS)
    assert everything.binds == "local experts"


def test_bytes_pass_at_the_links_bandwidth() -> None:
    found = plain(setup(call=replace(CALL, bandwidth=1e6)))
    assert found.terms["link bandwidth"] == pytest.approx(6 * 10 * MS)
    assert found.binds == "link bandwidth"


def test_drafts_cost_their_rows_and_guesses() -> None:
    found = drafted(setup(), 4, 3.1)
    layer = 0.5 + 0.1 + 2 + 0.15 + 1 + 0.05
    assert found.step_seconds == pytest.approx((6 * layer + 3 + 0.5 + 3.1 * 0.2 + 4 * 0.4) * MS)
    assert found.tokens_per_second == pytest.approx(3.1 / found.step_seconds)


@pytest.mark.parametrize(
    ("acceptance", "depth", "tokens"),
    [
        ((0.84, 0.60, 0.39, 0.27), 4, 3.10),
        ((0.84, 0.60, 0.39, 0.27), 2, 2.44),
        ((0.5,), 3, 1 + 0.5 + 0.25 + 0.125),
        ((0.8, 0.4), 4, 1 + 0.8 + 0.4 + 0.2 + 0.1),
        ((0.8, 0.0), 4, 1.8),
        ((), 4, 1.0),
    ],
)
def test_tokens_of_a_step(acceptance: tuple[float, ...], depth: int, tokens: float) -> None:
    assert tokens_per_step(acceptance, depth) == pytest.approx(tokens)


def test_one_stream_in_groups_is_plain() -> None:
    assert batched(setup(), 1).tokens_per_second == pytest.approx(plain(setup()).tokens_per_second)


def test_streams_share_round_trips_until_the_client_is_busy() -> None:
    slow, fast = setup(call=replace(CALL, round_trip=20 * MS)), setup(call=replace(CALL, round_trip=0.0))
    alone, together = plain(slow), batched(slow, 8)
    assert 7 < together.tokens_per_second / alone.tokens_per_second <= 8
    assert together.binds == "round trip"
    busy = step_terms(fast, 4, 4)
    client = (
        sum(busy[name] for name in ("attention", "lm_head", "engine"))
        + 6 * (0.15 + 0.175 + 0.075) * MS
        + 4 * 0.2 * MS
    )
    found = batched(fast, 8)
    assert found.step_seconds == pytest.approx(2 * client, rel=0.03)
    assert found.binds == "client arithmetic"


def test_a_message_keeps_the_client_from_other_groups_only() -> None:
    """One sequence waits for its round trip anyhow; several fill it with work, messages among it."""
    call = replace(CALL, message=0.4 * MS)
    assert plain(setup(call=call)).step_seconds == pytest.approx(plain(setup()).step_seconds)
    assert batched(setup(call=call), 1).step_seconds == pytest.approx(batched(setup(), 1).step_seconds)
    busy, idle = replace(call, round_trip=0.4 * MS), replace(CALL, round_trip=0.0)
    more = batched(setup(call=busy), 16).step_seconds - batched(setup(call=idle), 16).step_seconds
    assert more == pytest.approx(2 * 6 * 0.4 * MS, rel=0.03)


@pytest.mark.parametrize("nodes", [1, 2, 5])
@pytest.mark.parametrize(("message", "round_trip"), [(0.0, 2.0), (0.1, 2.0), (0.4, 0.2), (3.0, 2.0)])
def test_a_calls_shares_are_all_of_it(nodes: int, message: float, round_trip: float) -> None:
    call = replace(CALL, nodes=nodes, message=message * MS, round_trip=round_trip * MS)
    here, there, way = call.shares(3)
    assert here + there + 2 * way == pytest.approx((round_trip + 0.15) * MS + call.transfer(3))
    assert min(here, there, way) >= 0
    assert here >= call.handling.at(3) / (2 * nodes)


def test_nodes_that_are_never_idle_bind() -> None:
    found = batched(setup(call=replace(CALL, round_trip=0.0, experts=Curve.constant(9 * MS))), 8)
    assert found.binds == "node experts"
    assert found.step_seconds == pytest.approx(2 * 6 * 9.15 * MS, rel=0.05)


rates = st.floats(0, 0.05)


@given(rtt=rates, more=rates, local=st.integers(0, 6), streams=st.integers(1, 16), depth=st.integers(1, 15))
def test_a_longer_round_trip_is_never_faster(
    rtt: float, more: float, local: int, streams: int, depth: int
) -> None:
    near, far = (setup(local=local, call=replace(CALL, round_trip=r)) for r in (rtt, rtt + more))
    assert plain(near).tokens_per_second >= plain(far).tokens_per_second
    assert drafted(near, depth, 2.0).tokens_per_second >= drafted(far, depth, 2.0).tokens_per_second
    # Where groups alternate they may meet more luckily, by part of a job of the client.
    assert batched(near, streams).tokens_per_second >= 0.9 * batched(far, streams).tokens_per_second


@given(bandwidth=st.floats(1e4, 1e9), factor=st.floats(1, 100), depth=st.integers(1, 15))
def test_more_bandwidth_is_never_slower(bandwidth: float, factor: float, depth: int) -> None:
    thin, wide = (setup(call=replace(CALL, bandwidth=b)) for b in (bandwidth, bandwidth * factor))
    assert plain(wide).tokens_per_second >= plain(thin).tokens_per_second
    assert drafted(wide, depth, 2.0).tokens_per_second >= drafted(thin, depth, 2.0).tokens_per_second


@given(rtt=rates, streams=st.integers(1, 16), local=st.integers(0, 6))
def test_streams_never_take_longer_than_one_after_the_other(rtt: float, streams: int, local: int) -> None:
    over = setup(local=local, call=replace(CALL, round_trip=rtt))
    together = batched(over, streams)
    assert together.tokens_per_second >= 0.99 * plain(over).tokens_per_second
    assert together.tokens_per_second <= 1.01 * streams * plain(over).tokens_per_second
    assert together.tokens_per_second * together.step_seconds == pytest.approx(streams)
