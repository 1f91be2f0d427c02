from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitinfer.errors import CheckpointError, UnsupportedModelError
from splitinfer.model.config import ModelConfig, RopeConfig, load_config
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.gemma3 import translated
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.sharding import plan_shard, write_shard
from splitinfer.model.weights import Checkpoint
from tests.gemma3_checkpoints import gemma3_checkpoint, tiny_gemma3

CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "ends in a sliding layer, scaled positions": ({}, "text"),
    "as the 1B: positions as they are, one key/value head": (
        {"rope_scaling": None, "num_key_value_heads": 1, "query_pre_attn_scalar": 8},
        "text",
    ),
    "text half of the multimodal one": ({"num_hidden_layers": 6}, "multimodal"),
    "untied, soft-capped": ({"tie_word_embeddings": False, "final_logit_softcapping": 20.0}, "text"),
}


def save(path: Path, config: dict[str, Any]) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(config))
    return load_config(path)


def logits(model: Gemma, ids: Tensor, step: int) -> Tensor:
    cache = model.new_cache()
    parts = [model.logits(asyncio.run(model.forward([Segment(part, cache)]))) for part in ids.split(step)]
    return torch.cat(parts)


@pytest.fixture(params=CONFIGURATIONS, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Checkpoint]:
    overrides, layout = CONFIGURATIONS[request.param]
    path = tmp_path_factory.mktemp("reference") / "model"
    model = gemma3_checkpoint(path, tiny_gemma3(**overrides), layout=layout)
    return model, Checkpoint.open(path)


@pytest.mark.parametrize("step", [100, 1, 37])
def test_logits_equal_transformers(pair: tuple[Any, Checkpoint], step: int) -> None:
    reference, checkpoint = pair
    ids = torch.randint(0, 131, (100,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(
        logits(Gemma.load(checkpoint, None), ids, step), expected, atol=1e-4, rtol=1e-4
    )


def test_generates_what_transformers_generates(pair: tuple[Any, Checkpoint]) -> None:
    reference, checkpoint = pair
    model, ids = Gemma.load(checkpoint, None), list(range(5, 15))
    cache = model.new_cache()
    given, step = list(ids), torch.tensor(ids)
    for _ in range(16):
        with torch.no_grad():
            expected = int(reference(input_ids=torch.tensor([given])).logits[0, -1].argmax())
        found = model.logits(asyncio.run(model.forward([Segment(step, cache)]))[-1:])
        assert int(found.argmax()) == expected
        given.append(expected)
        step = torch.tensor([expected])


def test_a_shard_of_it(pair: tuple[Any, Checkpoint], tmp_path: Path) -> None:
    checkpoint = pair[1]
    write_shard(plan_shard(checkpoint, client=True, quant=QuantConfig.of(attention="int8")), tmp_path)
    ids = torch.arange(20)
    found = logits(Gemma.load(Checkpoint.open(tmp_path), None), ids, 20)
    quant = QuantConfig.of(attention="int8")
    assert torch.equal(found, logits(Gemma.load(checkpoint, None, quant=quant), ids, 20))


def test_the_published_files_leave_defaults_out(tmp_path: Path) -> None:
    """The text half of the published 4B: everything that transformers assumes is assumed here too."""
    from transformers import Gemma3TextConfig

    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    ours = save(tmp_path, {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text})
    theirs = Gemma3TextConfig(**{k: v for k, v in text.items() if k != "model_type"})
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.layer_types[-1] == "sliding_attention"
    for name in ("vocab_size", "num_attention_heads", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name)
    for shape in ours.attention:
        assert (shape.head_dim, shape.num_key_value_heads) == (theirs.head_dim, theirs.num_key_value_heads)
    full, sliding = ours.attention[5], ours.attention[0]
    assert (full.window, sliding.window) == (None, 1024)
    assert full.rope == RopeConfig("linear", 1e6, 1.0, 8.0)
    assert sliding.rope == RopeConfig("default", 1e4)
    assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
    assert ours.eos_token_ids == (1, 106)
    assert (ours.enable_moe_block, ours.num_experts, ours.final_logit_softcapping) == (False, 0, None)


def test_both_spellings_are_one_configuration(tmp_path: Path) -> None:
    from transformers import Gemma3TextConfig

    published = tiny_gemma3()
    Gemma3TextConfig(**{k: v for k, v in published.items() if k != "model_type"}).save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    saved = load_config(tmp_path)
    assert saved.attention == save(tmp_path, published).attention
    old = {"factor": 8.0, "type": "linear"}
    assert save(tmp_path, tiny_gemma3(rope_scaling=old)).attention == saved.attention


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"something_new": 3}, "something_new"),
    ],
)
def test_what_is_not_implemented_is_named(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        save(tmp_path, tiny_gemma3(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"query_pre_attn_scalar": 0},
        {"layer_types": ["full_attention"]},
        {"sliding_window_pattern": "six"},
        {"num_hidden_layers": "four"},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_parameters": 3},
    ],
)
def test_damaged_configurations(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        save(tmp_path, tiny_gemma3(**change))


def test_translation_leaves_the_original_alone() -> None:
    given = tiny_gemma3()
    translated(given)
    assert given == tiny_gemma3()
