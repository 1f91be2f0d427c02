"""docs/protocol.md says what the code does: the example frame, the kinds, the dtypes, the limits."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np

from splitinfer.transport import frames
from splitinfer.transport.frames import REQUEST, Limits
from splitinfer.transport.outbox import Outbox
from splitinfer.transport.tensors import DTYPES

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text("utf-8")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "": 1}


def test_the_example_frame() -> None:
    shown = bytes.fromhex("".join(re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)$", TEXT, re.MULTILINE)))
    outbox = Outbox(Limits())
    outbox.send(REQUEST, 1, "double", [np.arange(3, dtype=np.float32)], {"unit": "m"}, 5000)
    assert b"".join(bytes(piece) for piece in outbox.pieces()) == shown


def test_the_kinds() -> None:
    kinds = re.findall(r"^\| (\d+) \| ([A-Z]+) \| (?:both|client|server) \|", TEXT, re.MULTILINE)
    assert len(kinds) == 14
    for number, name in kinds:
        assert getattr(frames, name) == int(number)


def test_the_dtypes() -> None:
    rows = re.findall(r"(?<=\| )([a-z]+[0-9a-z_]*) \| (\d+) \| (\d+)(?= \|)", TEXT)
    assert {name: (int(code), int(size)) for name, code, size in rows} == {
        dtype.name: (dtype.code, dtype.itemsize) for dtype in DTYPES.values()
    }


def test_the_limits() -> None:
    rows = re.findall(r"^\| `(max_\w+)` \| ([\d,]+) ?([KMG]iB)? \|", TEXT, re.MULTILINE)
    assert {name: int(n.replace(",", "")) * UNITS[unit] for name, n, unit in rows} == asdict(Limits())
