"""Gemma 3's text configuration in the words of Gemma 4's, so that one reader checks both.

The reference for every meaning and default is transformers' `Gemma3TextConfig`; published files leave most
defaults out. What is left of the difference is arithmetic, and stands in `ModelConfig`: queries are scaled,
values are not normalised, norms multiply by one plus their weight, and layers have no factor of their own.
"""

from __future__ import annotations

from typing import Any

__all__ = ["GEMMA3_TYPES", "translated"]

GEMMA3_TYPES = ("gemma3", "gemma3_text")
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
THETAS = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
# Said otherwise in the translation, or without influence on inference.
CONSUMED = ("cache_implementation", "rope_local_base_freq", "rope_scaling", "rope_theta")
PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")


def translated(text: dict[str, Any]) -> dict[str, Any]:
    """The same text configuration in Gemma 4's published spelling. Checks nothing: its reader does."""
    table = {**DEFAULTS, **text}
    layers = table["num_hidden_layers"]
    period = next((table[key] for key in PATTERNS if table.get(key)), 6)
    if type(period) is int:
        table.pop("sliding_window_pattern", None)
        if table.get("layer_types") is None and isinstance(layers, int):
            kinds = ("full_attention", "sliding_attention")
            table["layer_types"] = [kinds[(i + 1) % period != 0] for i in range(layers)]
    if table.get("rope_parameters") is None:
        table["rope_parameters"] = {kind: _rope(kind, text) for kind in THETAS}
    for key in CONSUMED:
        table.pop(key, None)
    return {
        **table,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "global_head_dim": table["head_dim"],
        "hidden_size_per_layer_input": 0,
    }


def _rope(kind: str, text: dict[str, Any]) -> dict[str, Any]:
    """The older spelling: one key per layer type, and a scaling for the full ones."""
    key, theta = THETAS[kind]
    scaling = text.get("rope_scaling") if kind == "full_attention" else None
    found = dict(scaling) if isinstance(scaling, dict) else {}
    old = found.pop("type", "default")  # the name that this key had before
    return {"rope_type": old, "rope_theta": text.get(key, theta), **found}
