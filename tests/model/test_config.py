from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from splitinfer.errors import CheckpointError, UnsupportedModelError
from splitinfer.model.config import AttentionConfig, RopeConfig, load_config, read_json
from tests.checkpoints import by_layer_table, tiny_config, wrap_config


def save(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_reads_every_part(tmp_path: Path) -> None:
    config = load_config(save(tmp_path, tiny_config()))
    assert (config.vocab_size, config.hidden_size, config.num_experts, config.top_k_experts) == (
        131,
        48,
        11,
        3,
    )
    assert config.layer_types == ("sliding_attention",) * 3 + ("full_attention",)
    sliding = AttentionConfig("sliding_attention", 8, 3, 8, False, RopeConfig("default", 1e4))
    full = AttentionConfig("full_attention", 16, 1, None, True, RopeConfig("proportional", 1e6, 0.25))
    assert config.attention == (sliding,) * 3 + (full,)
    assert (config.dtype, config.bos_token_id, config.eos_token_ids) == ("float32", 2, (1,))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kv_heads", [2, None])
def test_both_spellings_are_one_configuration(tmp_path: Path, shared: bool, kv_heads: int | None) -> None:
    """transformers' own reading decides what the published keys mean, and how they are saved."""
    from transformers import Gemma4TextConfig

    published = tiny_config(attention_k_eq_v=shared, num_global_key_value_heads=kv_heads)
    theirs = Gemma4TextConfig(**{k: v for k, v in published.items() if k != "model_type"})
    theirs.save_pretrained(tmp_path / "saved")
    ours = load_config(save(tmp_path / "published", published))
    assert "per_layer_config" in read_json(tmp_path / "saved" / "config.json")
    assert load_config(tmp_path / "saved").attention == ours.attention
    assert load_config(save(tmp_path / "table", by_layer_table(published))).attention == ours.attention
    for layer, shape in enumerate(ours.attention):
        assert theirs.per_layer_config[layer].head_dim == shape.head_dim
        assert theirs.per_layer_config[layer].num_key_value_heads == shape.num_key_value_heads


def test_defaults_are_those_of_the_reference(tmp_path: Path) -> None:
    from transformers import Gemma4TextConfig

    given = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "hidden_size": 64}
    given |= {"intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 8}
    ours, theirs = load_config(save(tmp_path, given)), Gemma4TextConfig(**given)
    assert list(ours.layer_types) == theirs.layer_types
    for layer, shape in enumerate(ours.attention):
        assert shape.head_dim == theirs.per_layer_config[layer].head_dim
        assert shape.num_key_value_heads == theirs.per_layer_config[layer].num_key_value_heads
        rope = theirs.rope_parameters[shape.layer_type]
        assert (shape.rope.rope_type, shape.rope.rope_theta) == (rope["rope_type"], rope["rope_theta"])
        assert shape.rope.partial_rotary_factor == rope.get("partial_rotary_factor", 1.0)
    assert ours.attention[0].window == theirs.sliding_window
    assert (ours.rms_norm_eps, ours.vocab_size) == (theirs.rms_norm_eps, theirs.vocab_size)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert (ours.tie_word_embeddings, ours.enable_moe_block) == (True, False)


def test_wrapped_configuration_and_generation_settings(tmp_path: Path) -> None:
    save(tmp_path, wrap_config(tiny_config()))
    assert load_config(tmp_path).eos_token_ids == (1, 106)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 50, 106]}')
    assert load_config(tmp_path).eos_token_ids == (1, 50, 106)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"model_type": "llama"}, "model_type=llama"),
        ({"model_type": None}, "model_type=None"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"hidden_activation": "silu"}, "hidden_activation=silu"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input=256"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers=2"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention=all"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types=chunked_attention"),
        ({"some_new_option": 3}, "some_new_option=3"),
        ({"per_layer_config": {"3": {"sliding_window": 4}}}, "per_layer_config.3.sliding_window=4"),
        (
            {"per_layer_config": {"0": {"head_dim": 4}}},
            "per_layer_config=different shapes within one layer type",
        ),
    ],
)
def test_refuses_by_name(tmp_path: Path, change: dict[str, Any], feature: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load_config(save(tmp_path, tiny_config(**change)))
    assert caught.value.feature == feature
    assert str(tmp_path / "config.json") in str(caught.value)
    assert caught.value.remedy


def test_refuses_rope_by_name(tmp_path: Path) -> None:
    for key, value in (("rope_type", "yarn"), ("long_factor", [1.0])):
        config = tiny_config()
        config["rope_parameters"]["full_attention"][key] = value
        with pytest.raises(UnsupportedModelError, match=rf"rope_parameters\.full_attention\.{key}"):
            load_config(save(tmp_path, config))


def test_an_option_absent_is_the_reference_default(tmp_path: Path) -> None:
    """A file silent about per-layer embeddings has them, because the reference's default is 256."""
    config = tiny_config()
    del config["hidden_size_per_layer_input"]
    with pytest.raises(UnsupportedModelError, match="hidden_size_per_layer_input=256"):
        load_config(save(tmp_path, config))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_experts": None}, "num_experts"),
        ({"top_k_experts": 12}, "top_k_experts=12 is more than num_experts=11"),
        ({"num_key_value_heads": 4}, "no multiple of num_key_value_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"layer_types": ["full_attention"]}, "layer_types has to list 4"),
        ({"rope_parameters": {}}, "rope_parameters has no entry for"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"enable_moe_block": 1}, "enable_moe_block"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": -2}, "bos_token_id"),
        ({"per_layer_config": [1]}, "per_layer_config"),
    ],
)
def test_contradictions_name_the_key(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(CheckpointError, match=word) as caught:
        load_config(save(tmp_path, tiny_config(**change)))
    assert not isinstance(caught.value, UnsupportedModelError)
    assert caught.value.path == str(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"text"', "\xff"])
def test_damaged_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist") as caught:
        load_config(tmp_path)
    assert "Name a model directory" in caught.value.remedy
    with pytest.raises(CheckpointError, match="text_config is missing"):
        load_config(save(tmp_path, {"model_type": "gemma4"}))
