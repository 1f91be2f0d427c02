from __future__ import annotations

from math import inf

import pytest

from splitinfer.cli import machine
from splitinfer.cli.calibration import Effort
from splitinfer.cli.console import run
from splitinfer.model.quantize import FORMATS


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "EFFORT", Effort(steps=2, calls=4, pings=2, tokens=4))
    monkeypatch.setattr(machine, "READ_NBYTES", 4 << 20)


def test_reading_and_products_have_a_rate() -> None:
    """Of a machine that may be held up meanwhile: figures of the right kind, no more."""
    assert 0 < machine.measure_read() < 1e13
    rates = machine.measure_rates([*FORMATS, "int4"])
    assert set(rates) == set(FORMATS)
    for rate in rates.values():
        assert 0 < rate.nbytes < 1e13
        assert 0 <= rate.row < inf


def test_what_a_layer_costs_whatever_its_size() -> None:
    over = run(machine.measure_overheads())
    assert 1e-6 < over.layer < 10
    assert 0 <= over.step < 10
    assert 0 <= over.token < 10
