"""Nodes in processes of their own: they come up, they say why not, and none is left behind."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from splitinfer.cli.processes import node_process
from splitinfer.errors import SplitinferError


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_the_process_is_gone_after_an_error_inside(tiny: Path) -> None:
    before = children()

    def use() -> None:
        with node_process([str(tiny), "--threads", "1"]) as address:
            assert address.startswith("127.0.0.1:")
            assert len(children()) == len(before) + 1
            raise LookupError

    with pytest.raises(LookupError):
        use()
    assert children() == before


def test_a_node_that_fails_is_quoted(tiny: Path) -> None:
    before = children()
    with pytest.raises(SplitinferError) as caught, node_process([str(tiny), "--experts", "9-3"]):
        pytest.fail("it came up")
    assert str(caught.value).startswith("a node did not start: --experts '9-3': the range 9-3 runs backwards")
    assert "3-9" in caught.value.remedy
    assert children() == before
