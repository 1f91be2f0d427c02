"""Models by name, for planning before anything of them is on this machine."""

from __future__ import annotations

from splitinfer.model.config import AttentionConfig, ModelConfig, RopeConfig

__all__ = ["PRESETS", "preset"]

_SLIDING = AttentionConfig("sliding_attention", 256, 8, 1024, False, RopeConfig("default", 1e4))
_FULL = AttentionConfig("full_attention", 512, 2, None, True, RopeConfig("proportional", 1e6, 0.25))

PRESETS = {
    "gemma-4-26b-a4b": ModelConfig(
        model_type="gemma4",
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        attention=(*[_SLIDING] * 5, _FULL) * 5,
        max_position_embeddings=262_144,
        rms_norm_eps=1e-6,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        dtype="bfloat16",
        bos_token_id=2,
        eos_token_ids=(1, 106),
    )
}


def preset(name: str) -> ModelConfig | None:
    """The model of that name, however it is capitalised; None where there is none."""
    return PRESETS.get(name.lower())
