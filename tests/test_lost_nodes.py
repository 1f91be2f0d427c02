"""Errors about nodes: each names the node; a node that came back is compared with what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitinfer.errors import ConnectError, PlacementError
from splitinfer.lost_nodes import gone, late, naming, still_holds
from splitinfer.placement import Holding

HOLDING = Holding("a" * 64, (0, 1), (0, 1, 2), "float32")


def test_late_and_gone_name_the_node_and_what_to_do() -> None:
    assert late("box:1", 3, 2.5).args == ("node box:1 gave no answer for layer 3 within 2.5 s",)
    error = gone("box:1", {5, 6, 9}, 3)
    assert error.gaps == ("layer 3: experts 5-6,9",)
    assert "box:1" in error.remedy


def test_an_error_says_which_node_once() -> None:
    assert str(naming("box:1", ConnectError("refused"))) == "box:1: refused"
    assert str(naming("box:1", ConnectError("box:1 is away"))) == "box:1 is away"


def test_a_node_that_came_back_as_another() -> None:
    still_holds(HOLDING, "box:1", HOLDING.to_info())
    with pytest.raises(PlacementError, match="came back holding layers 0-1, experts 7"):
        still_holds(HOLDING, "box:1", replace(HOLDING, experts=(7,)).to_info())
    with pytest.raises(PlacementError, match="another model"):
        still_holds(HOLDING, "box:1", replace(HOLDING, fingerprint="b" * 64).to_info())
