"""Ranges, coverage and the choice among replicas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitinfer.errors import PlacementError, RemoteProtocolError, UsageError
from splitinfer.placement import Holding, Placement, format_ranges, parse_ranges, parse_size, parse_slice

MODEL = "ab" * 32


def holding(
    experts: str,
    layers: str = "0-3",
    fmt: str = "float32",
    fingerprint: str = MODEL,
    columns: tuple[int, int] | None = None,
) -> Holding:
    ids = parse_ranges(layers, 4, "--layers"), parse_ranges(experts, 64, "--experts")
    return Holding(fingerprint, *ids, fmt, columns)


def plan(*nodes: tuple[str, Holding]) -> Placement:
    return Placement.plan(nodes, layers=range(4), num_experts=64, columns=96, fingerprint=MODEL)


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
    for columns in (None, (32, 64)):
        one = holding("0-3,9,60-63", layers="1,3", columns=columns)
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
        {"columns": [3]},
        {"columns": [5, 5]},
        {"columns": [0, 1 << 40]},
        {"columns": [0.0, 1.0]},
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
        assert owner.shape == (1, 64)


def test_replicas_share_the_load_and_stand_in_for_each_other() -> None:
    placement = plan(("a:1", holding("0-63")), ("b:1", holding("0-63")))
    assert np.bincount(placement.owner(0)[0]).tolist() == [32, 32]
    assert set(placement.owner(0, down=frozenset({0}))[0].tolist()) == {1}
    assert set(placement.owner(0, down=frozenset({0, 1}))[0].tolist()) == {-1}


def test_sizes() -> None:
    assert parse_size("6GiB", "--x") == 6 << 30
    assert parse_size(" 1.5 mib ", "--x") == 3 << 19
    assert parse_size("8GB", "--x") == 8 * 10**9
    for wrong in ("", "6", "GiB", "-1GiB", "1.GiB", "6 G iB", "nan GiB"):
        with pytest.raises(UsageError, match="--x"):
            parse_size(wrong, "--x")


@pytest.mark.parametrize(
    ("text", "columns", "slice_"),
    [
        ("1/2", 704, (0, 352)),
        ("2/2", 704, (352, 704)),
        ("1/3", 704, (0, 224)),
        ("2/3", 704, (224, 480)),
        ("3/3", 704, (480, 704)),
        ("0.3:0.7", 100, (30, 70)),
        (" 0:.3 ", 96, (0, 32)),
        ("1/1", 20, (0, 20)),
        ("0:1", 20, (0, 20)),
    ],
)
def test_slices(text: str, columns: int, slice_: tuple[int, int]) -> None:
    assert parse_slice(text, columns, "--slice") == slice_


@pytest.mark.parametrize(
    "text", ["", "0/2", "3/2", "1/0", "0.7:0.3", "0.5:0.5", "0:1.1", "half", "1/64", "-1:1"]
)
def test_slices_that_cannot_be(text: str) -> None:
    with pytest.raises(UsageError, match="--slice") as error:
        parse_slice(text, 96, "--slice")
    assert error.value.remedy


@given(st.integers(1, 40), st.integers(1, 3000))
def test_the_slices_of_one_cut_meet(parts: int, columns: int) -> None:
    edges = [0]
    for part in range(1, parts + 1):
        try:
            low, high = parse_slice(f"{part}/{parts}", columns, "--slice")
        except UsageError:  # more parts than there are steps
            continue
        assert low == edges[-1]
        edges.append(high)
    assert edges[-1] == columns


def test_slices_make_up_every_expert_once() -> None:
    left, right = holding("0-63", columns=(0, 32)), holding("0-63", columns=(32, 96))
    placement = plan(("r:1", right), ("l:1", left), ("w:1", holding("8-15", "0")))
    assert placement.addresses == ("l:1", "r:1", "w:1")
    assert placement.owner(3).tolist() == [[0] * 64, [1] * 64]
    owner = placement.owner(0)
    assert owner[:, :8].tolist() == [[0] * 8, [1] * 8]
    assert owner[:, 8:16].tolist() == [[2] * 8, [-1] * 8]  # the idle one that holds them whole
    assert placement.owner(3, down=frozenset({1}))[0].tolist() == [-1] * 64
    assert placement.owner(3, span=(32, 96)).tolist() == [[1] * 64]
    assert placement.owner(0, down=frozenset({2}))[:, 9].tolist() == [0, 1]


def test_slices_with_a_gap_or_an_overlap_are_listed() -> None:
    whole = ("w:1", holding("0-63", "0-2"))
    with pytest.raises(PlacementError) as error:
        plan(whole, ("a:1", holding("0-63", "3", columns=(0, 32))))
    assert error.value.gaps == ("layer 3: experts 0-63 (columns 32-95 of 96)",)
    with pytest.raises(PlacementError) as error:
        plan(whole, *((f"{n}:1", holding("0-63", "3", columns=c)) for n, c in enumerate([(0, 64), (32, 96)])))
    assert error.value.gaps == ("layer 3: experts 0-63 (slices 0-63, 32-95 overlap and do not add up)",)
    with pytest.raises(PlacementError, match="offers column 96, the model has 96"):
        plan(whole, ("a:1", holding("0-63", "3", columns=(0, 97))))


def test_formats_may_differ_between_slices_that_do_not_overlap() -> None:
    left = ("a:1", holding("0-63", columns=(0, 32)))
    assert plan(left, ("b:1", holding("0-63", fmt="int4", columns=(32, 96))))
    with pytest.raises(PlacementError, match="held in two formats"):
        plan(left, ("b:1", holding("0-63", fmt="int4")))
