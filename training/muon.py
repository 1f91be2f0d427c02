"""Muon for the matrices, AdamW for the rest.

Muon (K. Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum
by the nearest orthogonal matrix, found by a few Newton-Schulz steps. Experts are a stack of matrices: one
batched product serves all of a layer, and matrices of one shape are stacked across layers too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "make_optimizers", "orthogonalise"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the cited page: fast at zero, all it needs


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly (singular values end between 0.7 and 1.2). `stack` [n, rows,
    columns].
    """
    a, b, c = _COEFFICIENTS
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay. Parameters are (stacks of) matrices."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"])
                rows, columns = parameter.shape[-2:]
                by_shape[rows, columns].append((parameter, update.reshape(-1, rows, columns)))
            for (rows, columns), members in by_shape.items():
                stacked = orthogonalise(torch.cat([update for _, update in members]))
                scale = max(1.0, rows / columns) ** 0.5
                parts = torch.split(stacked, [update.shape[0] for _, update in members])
                for (parameter, _), part in zip(members, parts, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(part.reshape(parameter.shape), alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, *, matrix_lr: float, embedding_lr: float, vector_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for every projection; AdamW for embeddings, routers, norms and scales. Each group keeps its own
    peak rate as `peak`, which the schedule multiplies.
    """
    matrices, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif name.endswith(("embed_tokens.weight", "router.proj.weight")):
            embeddings.append(parameter)
        else:
            matrices.append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, matrix_lr, 0.95, weight_decay),
        torch.optim.AdamW(
            [{"params": embeddings, "lr": embedding_lr}, {"params": vectors, "lr": vector_lr}],
            betas=(0.9, 0.98),
            eps=1e-10,
            weight_decay=0.0,
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
