from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from splitinfer.errors import SplitinferError
from splitinfer.fixed_point import from_fixed
from splitinfer.model import exact
from splitinfer.model.exact import expert_in_fixed_point
from splitinfer.model.quantize import quantize

HIDDEN, INNER = 48, 70


def weights(format: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    down = torch.randn(HIDDEN, INNER, generator=generator) * INNER**-0.5
    return quantize(gate_up, format), quantize(down, format)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_an_expert(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK", 500)  # several blocks of channels, the last one short
    gate_up, down = weights(format)
    x, factors = torch.randn(5, HIDDEN), torch.rand(5)
    found = from_fixed(expert_in_fixed_point(gate_up, down, x, factors), torch.float64)
    gate, up = (x.double() @ gate_up.widen().double().T).chunk(2, dim=-1)
    expected = (F.gelu(gate, approximate="tanh") * up) @ down.widen().double().T * factors.double()[:, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_slices_add_up_to_the_whole_bit_for_bit(format: str) -> None:
    gate_up, down = weights(format)
    x, factors = torch.randn(3, HIDDEN), torch.rand(3)
    whole = expert_in_fixed_point(gate_up, down, x, factors)
    parts = []
    for low, high in ((0, 32), (32, 64), (64, INNER)):
        rows = torch.cat([half[low:high] for half in gate_up.widen().chunk(2)])
        parts.append(expert_in_fixed_point(quantize(rows, "float32"), down.columns(low, high), x, factors))
    assert torch.equal(parts[2] + parts[0] + parts[1], whole)


def test_nan_is_not_added() -> None:
    gate_up, down = weights("float32")
    with pytest.raises(SplitinferError, match="not a number"):
        expert_in_fixed_point(gate_up, down, torch.full((1, HIDDEN), float("nan")), torch.ones(1))
