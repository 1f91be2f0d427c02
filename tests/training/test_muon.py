from __future__ import annotations

import pytest
import torch
from torch import nn

from training.muon import make_optimizers, orthogonalise


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 8, 8)])
def test_singular_values_end_near_one(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_every_trainable_parameter_has_one_optimizer() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.RMSNorm(3))
    optimizers = make_optimizers(model, matrix_lr=0.1, embedding_lr=0.01, vector_lr=0.001, weight_decay=0.0)
    owned = [parameter for o in optimizers for group in o.param_groups for parameter in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))


def test_it_fits_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(6, 4, generator=generator)
    model = nn.Linear(4, 6, bias=False)
    optimizers = make_optimizers(model, matrix_lr=0.05, embedding_lr=0.1, vector_lr=0.1, weight_decay=0.0)
    x = torch.randn(64, 4, generator=generator)
    losses = []
    for _ in range(200):
        loss = (model(x) - x @ wanted.T).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
