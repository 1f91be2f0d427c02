from __future__ import annotations

import pytest

from splitinfer.errors import PlacementError
from splitinfer.exact_nodes import check_exact
from splitinfer.placement import Columns, Holding, Placement

HERE = "c 89abcdef avx2"


def placement(*nodes: tuple[str, Columns | None]) -> Placement:
    """Nodes that hold one expert of one layer of 72 columns: their arithmetic and slice."""
    held = [Holding("f" * 32, (0,), (0,), "int4", columns, how) for how, columns in nodes]
    return Placement.plan(
        [(f"box{i}:1", holding) for i, holding in enumerate(held)],
        layers=[0],
        num_experts=1,
        columns=72,
        fingerprint="f" * 32,
    )


def test_nodes_that_agree() -> None:
    check_exact(placement((HERE, None)), HERE)
    check_exact(placement((HERE, (0, 32)), (HERE, (32, 72))), HERE)


@pytest.mark.parametrize("other", ["c 89abcdef avx512", "torch 2.13 AVX2", ""])
def test_other_arithmetic_is_named(other: str) -> None:
    with pytest.raises(PlacementError, match=rf"box1:1 \({other or 'unknown'}\)") as caught:
        check_exact(placement((HERE, None), (other, None)), HERE)
    assert "box0" not in str(caught.value)
    assert caught.value.remedy


def test_slices_within_a_part_are_named() -> None:
    with pytest.raises(PlacementError, match=r"box0:1 \(columns 0-39\), box1:1 \(columns 40-71\)"):
        check_exact(placement((HERE, (0, 40)), (HERE, (40, 72))), HERE)
