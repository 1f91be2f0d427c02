"""A target and an assistant small enough for tests, with norms and scales that are not all ones."""

from __future__ import annotations

import torch
from torch import nn

from training.drafter import Assistant
from training.network import Architecture, Decoder

SMALL = Architecture(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    head_dim=8,
    global_head_dim=16,
    sliding_window=16,
    num_experts=6,
    top_k_experts=2,
    moe_intermediate_size=16,
)


def small_target(seed: int = 0) -> Decoder:
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(SMALL)
    model.initialise(generator)
    _unlike_ones(model, generator)
    return model


def small_assistant(target: Decoder, seed: int = 1) -> Assistant:
    generator = torch.Generator().manual_seed(seed)
    assistant = Assistant(SMALL, intermediate_size=40)
    assistant.start_from(target, generator)
    _unlike_ones(assistant, generator)
    return assistant


@torch.no_grad()
def _unlike_ones(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
