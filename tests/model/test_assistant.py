"""The assistant against transformers: equal logits and states, both heads, below and beyond the window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitinfer.errors import CheckpointError, UnsupportedModelError
from splitinfer.model.assistant import Assistant, KeysValues, load_assistant_config
from tests.checkpoints import tiny_config

TOLERANCE = 1e-4
BACKBONE = 48
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]


@pytest.fixture(autouse=True)
def all_layers_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.23 refuses to build any assistant: its check forgets that all layers may be shared."""
    from transformers import Gemma4TextConfig

    def modes(config: Any) -> list[str]:
        return ["reuse"] * config.num_hidden_layers

    monkeypatch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(modes))


def assistant_checkpoint(path: Path, *, ordered: bool, seed: int = 0, **overrides: Any) -> Any:
    """Writes a random assistant for the model of `tiny_config`; returns transformers' model, float32."""
    from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    skipped = (
        "architectures",
        "model_type",
        "dtype",
        "num_experts",
        "top_k_experts",
        "moe_intermediate_size",
    )
    text = tiny_config(
        hidden_size=24, intermediate_size=20, num_hidden_layers=3, layer_types=LAYERS, vocab_size=132,
        enable_moe_block=False, vocab_size_per_layer_input=0, final_logit_softcapping=None,
    )  # fmt: skip
    text.update(overrides)
    config = Gemma4AssistantConfig(
        text_config=Gemma4TextConfig(
            **{k: v for k, v in text.items() if k not in skipped} | {"num_kv_shared_layers": 3}
        ),
        backbone_hidden_size=BACKBONE,
        use_ordered_embeddings=ordered,
        num_centroids=12,
        centroid_intermediate_top_k=4,
    )
    config._attn_implementation = "eager"
    config.text_config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = Gemma4AssistantForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        if ordered:
            model.masked_embedding.token_ordering.copy_(torch.randperm(text["vocab_size"]))
    model.save_pretrained(path)
    return model


def random_state(positions: int, seed: int = 1) -> tuple[Tensor, Tensor, KeysValues]:
    draw = torch.Generator().manual_seed(seed)
    shared = {
        kind: (
            torch.randn(heads, positions, size, generator=draw),
            torch.randn(heads, positions, size, generator=draw),
        )
        for kind, heads, size in (("sliding_attention", 3, 8), ("full_attention", 1, 16))
    }
    return torch.randn(1, BACKBONE, generator=draw), torch.randn(1, BACKBONE, generator=draw), shared


@pytest.mark.parametrize("ordered", [False, True], ids=["plain head", "ordered embeddings"])
@pytest.mark.parametrize("positions", [1, 5, 8, 9, 10, 60])
def test_logits_and_states_equal_the_reference(tmp_path: Path, ordered: bool, positions: int) -> None:
    """Three drafts one after the other, as a sequence of `positions` tokens would get them."""
    reference = assistant_checkpoint(tmp_path, ordered=ordered)
    ours = Assistant(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    embedded, hidden, shared = random_state(positions)
    theirs = hidden
    rotations = ours.rotations(positions)
    with torch.inference_mode():
        for _ in range(3):
            expected = reference(
                inputs_embeds=torch.cat((embedded, theirs), -1).unsqueeze(0),
                position_ids=torch.tensor([[positions]]),
                shared_kv_states={kind: (k[None], v[None]) for kind, (k, v) in shared.items()},
                use_cache=False,
            )
            last, hidden = ours.states(embedded, hidden, rotations, shared)
            logits = ours.logits(last)
            theirs = expected.last_hidden_state[0]
            assert (logits - expected.logits[0, 0]).abs().max() < TOLERANCE
            assert (hidden - theirs).abs().max() < TOLERANCE
            embedded = torch.roll(embedded, 1, -1)


def changed(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def test_what_is_no_assistant_is_refused_by_name(tmp_path: Path) -> None:
    assistant_checkpoint(tmp_path, ordered=True)
    assert load_assistant_config(tmp_path).num_centroids == 12
    changed(tmp_path, num_centroids=7)
    with pytest.raises(CheckpointError, match="7 clusters"):
        load_assistant_config(tmp_path)
    changed(tmp_path, num_centroids=0)
    with pytest.raises(CheckpointError, match="num_centroids"):
        load_assistant_config(tmp_path)
    changed(tmp_path, model_type="gemma4_text")
    with pytest.raises(UnsupportedModelError, match="gemma4_text"):
        load_assistant_config(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    assistant_checkpoint(tmp_path, ordered=False)
    changed(tmp_path, backbone_hidden_size=40)
    with pytest.raises(CheckpointError, match=r"pre_projection.*\[24, 96\], not \[24, 80\]"):
        Assistant(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
