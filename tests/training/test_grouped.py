from __future__ import annotations

import torch

from training.grouped import grouped_product


def test_each_experts_rows_meet_its_own_matrix_and_gradients_follow() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    stack = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor([2, 2, 6, 7], dtype=torch.int32)  # the second expert gets nothing
    expected = torch.cat((x[:2] @ stack[0].T, x[2:6] @ stack[2].T, x[6:] @ stack[3].T))
    torch.testing.assert_close(grouped_product(x, stack, ends), expected)
    assert torch.autograd.gradcheck(lambda a, b: grouped_product(a, b, ends), (x, stack))
