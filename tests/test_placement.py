"""Ranges, coverage and the choice among replicas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitinfer.errors import PlacementError, RemoteProtocolError, UsageError
from splitinfer.placement import Holding, Placement, format_ranges, parse_ranges, parse_size

MODEL = "ab" * 32


def holding(experts: str, layers: str = "0-3", fmt: str = "float32", fingerprint: str = MODEL) -> Holding:
    return Holding(
        fingerprint, parse_ranges(layers, 4, "--layers"), parse_ranges(experts, 64, "--experts"), fmt
    )


def plan(*nodes: tuple[str, Holding]) -> Placement:
    return Placement.plan(nodes, layers=range(4), num_experts=64, fingerprint=MODEL)


@given(st.sets(st.integers(0, 63), min_size=1))
def test_ranges_round_trip(ids: set[int]) -> None:
    assert parse_ranges(format_ranges(ids), 64, "--experts") == tuple(sorted(ids))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("31-0", "backwards"),
        ("0-64", "out of bounds"),
        ("64", "0-63"),
        ("", "not a range"),
        ("a-b", "not a range"),
        ("0-3,2", "twice"),
        ("-1", "not a range"),
        ("1-2-3", "not a range"),
        ("9" * 50, "not a range"),
    ],
)
def test_bad_ranges_name_the_flag(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as error:
        parse_ranges(text, 64, "--experts")
    assert "--experts" in str(error.value)
    assert error.value.remedy


def test_holding_round_trip() -> None:
    one = holding("0-3,9,60-63", layers="1,3")
    assert Holding.from_info(one.to_info(), "peer") == one


@pytest.mark.parametrize(
    "change",
    [
        {"service": "files"},
        {"fingerprint": 7},
        {"experts": []},
        {"experts": [[3, 1]]},
        {"experts": [[0, 1 << 40]]},
        {"experts": [[0, 5], [4, 6]]},
        {"layers": [[0, True]]},
        {"layers": 5},
        {"layers": [[-1, 2]]},
    ],
)
def test_a_peer_cannot_lie_about_shapes(change: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError, match="peer"):
        Holding.from_info({**holding("0-63").to_info(), **change}, "peer")


def test_a_peer_of_another_service() -> None:
    with pytest.raises(RemoteProtocolError, match="not as an expert node"):
        Holding.from_info({}, "peer")


def test_gaps_are_listed_by_layer_and_range() -> None:
    with pytest.raises(PlacementError) as error:
        plan(
            ("a:1", holding("0-31")), ("b:1", holding("32-63", layers="0-1")), ("c:1", holding("40-63", "2"))
        )
    assert error.value.gaps == ("layer 2: experts 32-39", "layer 3: experts 32-63")
    assert "layer 2: experts 32-39" in str(error.value)


def test_differing_formats_are_listed_by_layer_and_range() -> None:
    with pytest.raises(PlacementError) as error:
        plan(("a:1", holding("0-63")), ("b:1", holding("30-33", layers="1-2", fmt="int4")))
    assert error.value.conflicts == ("layers 1-2: experts 30-33 (a:1 float32, b:1 int4)",)


def test_another_model_is_named() -> None:
    with pytest.raises(PlacementError, match=r"b:1 holds another model"):
        plan(("a:1", holding("0-63")), ("b:1", holding("0-63", fingerprint="cd" * 32)))


def test_order_of_addresses_does_not_matter() -> None:
    nodes = [("a:1", holding("48-63")), ("b:1", holding("0-15,20-30")), ("c:1", holding("16-19,31-47"))]
    straight, shuffled = plan(*nodes), plan(*reversed(nodes))
    assert straight.addresses == shuffled.addresses == ("b:1", "c:1", "a:1")
    assert np.array_equal(straight.owner(0), shuffled.owner(0))


def test_every_expert_has_an_owner_that_holds_it() -> None:
    placement = plan(("a:1", holding("0-40")), ("b:1", holding("30-63")), ("c:1", holding("0-63", "1,2")))
    for layer in range(4):
        owner = placement.owner(layer)
        assert placement.holders[layer][owner, np.arange(64)].all()


def test_replicas_share_the_load_and_stand_in_for_each_other() -> None:
    placement = plan(("a:1", holding("0-63")), ("b:1", holding("0-63")))
    assert np.bincount(placement.owner(0)).tolist() == [32, 32]
    assert set(placement.owner(0, down=frozenset({0})).tolist()) == {1}
    assert set(placement.owner(0, down=frozenset({0, 1})).tolist()) == {-1}


def test_sizes() -> None:
    assert parse_size("6GiB", "--x") == 6 << 30
    assert parse_size(" 1.5 mib ", "--x") == 3 << 19
    assert parse_size("8GB", "--x") == 8 * 10**9
    for wrong in ("", "6", "GiB", "-1GiB", "1.GiB", "6 G iB", "nan GiB"):
        with pytest.raises(UsageError, match="--x"):
            parse_size(wrong, "--x")
