from __future__ import annotations

import pytest
import torch

from splitinfer.model import dense as module
from splitinfer.model.dense import WIDEN_ROWS, linear


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [1, WIDEN_ROWS - 1, WIDEN_ROWS, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(monkeypatch: pytest.MonkeyPatch, native: bool, rows: int, dtype: torch.dtype) -> None:
    """With and without the CPU's own bfloat16 products; several blocks of columns, the last one short."""
    monkeypatch.setattr(module, "_has_bfloat16_products", lambda: native)
    monkeypatch.setattr(module, "WIDEN_ELEMENTS", 70 * 33)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 70, generator=generator).to(dtype)
    weight = torch.randn(100, 70, generator=generator).to(dtype)
    found = linear(x, weight)
    assert found.dtype == dtype
    exact = x.double() @ weight.double().T
    scale = exact.abs().max()
    assert (found.double() - exact).abs().max() <= scale * (1e-6 if dtype is torch.float32 else 2**-8)


def test_widening_is_for_many_rows_of_bfloat16_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_bfloat16_products", lambda: False)
    widened: list[int] = []
    original = module._widened

    def recorded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        widened.append(len(x))
        return original(x, weight)

    monkeypatch.setattr(module, "_widened", recorded)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows in (WIDEN_ROWS - 1, WIDEN_ROWS):
            linear(torch.ones(rows, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype))
    assert widened == [WIDEN_ROWS]
