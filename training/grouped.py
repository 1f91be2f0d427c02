"""One matrix product per expert over rows sorted by expert, as an operator that `torch.compile` leaves
alone.

PyTorch's own `grouped_mm` does the same, but cannot be traced in float32. Here each expert's rows go
through one `mm` that writes straight into the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["grouped_product"]


@torch.library.custom_op("splitinfer_training::rows", mutates_args=())
def _rows(x: Tensor, stack: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """`x` [rows, K] by `stack` [E, N, K] (or [E, K, N] when `transposed`) -> [rows, N]."""
    out = x.new_empty(x.shape[0], stack.shape[2 if transposed else 1])
    start = 0
    for matrix, end in zip(stack.unbind(), ends.tolist(), strict=True):
        if end > start:
            torch.mm(x[start:end], matrix if transposed else matrix.t(), out=out[start:end])
        start = end
    return out


@_rows.register_fake
def _rows_shape(x: Tensor, stack: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], stack.shape[2 if transposed else 1])


@torch.library.custom_op("splitinfer_training::weights", mutates_args=())
def _weights(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The gradient of every expert's matrix: `grad` [rows, N], `x` [rows, K] -> [E, N, K]."""
    out = grad.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
    start = 0
    for matrix, end in zip(out.unbind(), ends.tolist(), strict=True):
        if end > start:
            torch.mm(grad[start:end].t(), x[start:end], out=matrix)
        else:
            matrix.zero_()
        start = end
    return out


@_weights.register_fake
def _weights_shape(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return grad.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    x, stack, ends, _ = inputs
    ctx.save_for_backward(x, stack, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, stack, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return _rows(grad, stack, ends, True), _weights(grad, x, ends), None, None


_rows.register_autograd(_backward, setup_context=_keep)


def grouped_product(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """`x` [rows, K] sorted by expert, `stack` [E, N, K], `ends` [E] (one past each expert's last row) ->
    [rows, N].
    """
    result: Tensor = _rows(x, stack, ends, False)
    return result
