from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

from tests.training.small import SMALL, small_assistant, small_target
from training.drafter import LAYER_TYPES, Assistant, DrafterRecipe, TargetState, unrolled_loss


@pytest.fixture
def _all_layers_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.23 refuses to build any assistant: its check of shared layers forgets that all may be
    shared.
    """
    original = Gemma4TextConfig.kv_sharing_modes.fget

    def modes(config: Gemma4TextConfig) -> list[str | None]:
        if config.num_kv_shared_layers == config.num_hidden_layers:
            return ["reuse"] * config.num_hidden_layers
        return original(config)

    monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(modes))


def _reference(assistant: Assistant) -> Gemma4AssistantForCausalLM:
    text = Gemma4TextConfig(
        vocab_size=SMALL.vocab_size,
        hidden_size=SMALL.hidden_size,
        intermediate_size=40,
        num_hidden_layers=len(LAYER_TYPES),
        layer_types=list(LAYER_TYPES),
        num_attention_heads=SMALL.num_attention_heads,
        num_key_value_heads=SMALL.num_key_value_heads,
        head_dim=SMALL.head_dim,
        global_head_dim=SMALL.global_head_dim,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=SMALL.sliding_window,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
    )
    config = Gemma4AssistantConfig(text_config=text, backbone_hidden_size=SMALL.hidden_size)
    model = Gemma4AssistantForCausalLM(config).eval()
    tensors = assistant.state_dict()
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    return model


def _state(length: int) -> tuple[Assistant, TargetState]:
    target = small_target()
    ids = torch.randint(0, SMALL.vocab_size, (1, length), generator=torch.Generator().manual_seed(5))
    return small_assistant(target), TargetState.of(target, ids)


@torch.no_grad()
def test_all_positions_at_once_equal_one_by_one() -> None:
    assistant, state = _state(60)
    hidden = F.pad(state.hidden[:, :-1], (0, 0, 1, 0))
    logits, fed_back = assistant(
        state.embedded, hidden, assistant.ropes(torch.arange(60)), state.memory, True
    )
    for place in (1, 15, 16, 17, 59):
        memory = {name: (k[:, :, :place], v[:, :, :place]) for name, (k, v) in state.memory.items()}
        one = slice(place, place + 1)
        alone, back = assistant(
            state.embedded[:, one], hidden[:, one], assistant.ropes(torch.tensor([place])), memory, False
        )
        torch.testing.assert_close(logits[:, one], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(fed_back[:, one], back, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("_all_layers_shared")
@torch.no_grad()
def test_logits_are_those_of_transformers() -> None:
    assistant, state = _state(60)
    reference = _reference(assistant)
    place = (
        12  # within the window: beyond it, the reference sees one position more than the target's cache keeps
    )
    memory = {name: (k[:, :, :place], v[:, :, :place]) for name, (k, v) in state.memory.items()}
    embedded, hidden = state.embedded[:, place : place + 1], state.hidden[:, place - 1 : place]
    logits, back = assistant(embedded, hidden, assistant.ropes(torch.tensor([place])), memory, False)
    expected = reference(
        inputs_embeds=torch.cat((embedded, hidden), dim=-1),
        position_ids=torch.tensor([[place]]),
        shared_kv_states=memory,
    )
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(back, expected.last_hidden_state, atol=1e-5, rtol=0)


def test_the_loss_falls_and_only_the_assistant_learns() -> None:
    target = small_target()
    target.requires_grad_(False)
    assistant = small_assistant(target)
    recipe = DrafterRecipe(depth=3)
    ids = torch.randint(0, SMALL.vocab_size, (2, 40), generator=torch.Generator().manual_seed(6))
    optimizer = torch.optim.AdamW(assistant.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss, accepted = unrolled_loss(assistant, target, ids, recipe)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert len(accepted) == 3
    assert all(parameter.grad is None for parameter in target.parameters())
