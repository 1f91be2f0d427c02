from __future__ import annotations

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from tests.training.small import SMALL, small_target
from training.network import windowed_attention


def _reference(target: torch.nn.Module) -> Gemma4ForCausalLM:
    names = [name for name in SMALL.__dataclass_fields__ if name != "full_every"]
    config = Gemma4TextConfig(
        **{name: getattr(SMALL, name) for name in names},
        layer_types=list(SMALL.layer_types),
        attention_k_eq_v=True,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
    )
    model = Gemma4ForCausalLM(config).eval()
    tensors = {f"model.{name}": tensor for name, tensor in target.state_dict().items()}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model


@pytest.mark.parametrize("length", [5, 16, 75])
@torch.no_grad()
def test_logits_are_those_of_transformers(length: int) -> None:
    target = small_target()
    ids = torch.randint(0, SMALL.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))
    hidden, _ = target(ids)
    expected = _reference(target)(ids).logits
    torch.testing.assert_close(target.logits(hidden), expected, atol=1e-5, rtol=0)


def test_gradients_are_those_of_transformers() -> None:
    target = small_target()
    reference = _reference(target)
    ids = torch.randint(0, SMALL.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    hidden, _ = target(ids)
    target.logits(hidden).square().mean().backward()
    reference(ids).logits.square().mean().backward()
    expected = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    compared = 0
    for name, parameter in target.named_parameters():
        if name.endswith("layer_scalar"):
            continue  # a buffer there
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)
        compared += 1
    assert compared > 80


def test_balance_is_lowest_when_even_and_loads_sum_to_one() -> None:
    _, states = small_target()(torch.randint(0, SMALL.vocab_size, (2, 40)))
    for state in states:
        assert state.load.sum().item() == pytest.approx(1.0)
        assert state.balance.item() > 0.9


@pytest.mark.parametrize("nearest", [0, 1])
def test_windowed_attention_equals_a_mask(nearest: int) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 4, 50, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 50, 8, generator=generator)
    distance = torch.arange(50)[:, None] - torch.arange(50)
    seen = (distance >= nearest) & (distance < 16 + nearest)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=1.0, enable_gqa=True
    )
    got = windowed_attention(q, k, v, 16, nearest)
    torch.testing.assert_close(got[:, :, nearest:], expected[:, :, nearest:])
