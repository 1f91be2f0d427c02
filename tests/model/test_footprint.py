from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.model.cache import KVCache
from splitinfer.model.config import ModelConfig, load_config
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.footprint import PROGRAM_NBYTES, Sizes, cache_nbytes
from splitinfer.model.gemma import Gemma
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.sharding import plan_shard, write_shard
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint
from tests.model.gguf_files import Type, write_gguf

LAYERS, EXPERTS = 4, 11
SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}


@pytest.fixture(scope="module", params=["folder", "float32 folder", "shard", "gguf", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("model")
    dtype = "float32" if request.param == "float32 folder" else "bfloat16"
    given = {"tie_word_embeddings": False} if request.param == "untied" else {}
    folder = Checkpoint.open(write_checkpoint(directory / "m", tiny_config(dtype=dtype, **SIZES, **given)))
    if request.param == "shard":
        quant = QuantConfig.of("int4")
        write_shard(plan_shard(folder, experts=range(EXPERTS), client=True, quant=quant), directory / "s")
        return Checkpoint.open(directory / "s")
    if request.param == "gguf":
        return Checkpoint.open(write_gguf(folder, directory / "m.gguf", Type.Q8_0))
    return folder


def quants(model: Checkpoint) -> list[QuantConfig]:
    if type(model).__name__ == "ShardCheckpoint":
        return [QuantConfig()]
    return [QuantConfig(), QuantConfig.of("int8"), QuantConfig.of("int4", lm_head="bfloat16")]


def test_sizes_are_those_of_what_is_loaded(model: Checkpoint) -> None:
    everything = dict.fromkeys(range(LAYERS), range(EXPERTS))
    for quant in quants(model):
        sizes = Sizes.of(model, quant=quant)
        bank = ExpertBank(model, everything, format=quant.experts)
        assert sizes.experts(range(LAYERS)) == bank.nbytes
        gemma = Gemma.load(model, LocalExperts(bank), quant=quant)
        client = sizes.client(100, local_layers=[1, 2])
        assert client.experts == 2 * EXPERTS * sizes.expert(1)
        matrices = client.attention + client.dense + (client.lm_head or client.embeddings)
        router = LAYERS * EXPERTS * model.config.hidden_size * 4
        assert matrices <= gemma.nbytes <= matrices + router
        assert client.total == sum(
            (client.experts, client.attention, client.dense, client.other, client.embeddings, client.lm_head,
             client.cache, PROGRAM_NBYTES)
        )  # fmt: skip


def test_a_slice_and_some_experts(tmp_path: Path) -> None:
    model = Checkpoint.open(write_checkpoint(tmp_path / "m", tiny_config(dtype="bfloat16", **SIZES)))
    sizes = Sizes.of(model, quant=QuantConfig.of("int4"))
    bank = ExpertBank(model, {0: (1, 2), 3: (1, 2)}, format="int4", columns=(0, 16))
    assert sizes.experts([0, 3], 2, columns=(0, 16)) == bank.nbytes


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        model = Checkpoint.open(write_checkpoint(tmp_path / dtype, tiny_config(dtype=dtype, **SIZES)))
        known, guessed = Sizes.of(model), Sizes.of_config(model.config)
        assert known.client(200, [0]) == guessed.client(200, [0])


def test_two_formats_of_tied_embeddings_are_two_tensors(tmp_path: Path) -> None:
    config = load_config(write_checkpoint(tmp_path / "m", tiny_config(dtype="bfloat16", **SIZES)))
    one = Sizes.of_config(config).client(1)
    two = Sizes.of_config(config, quant=QuantConfig(embeddings="bfloat16", lm_head="int8")).client(1)
    assert one.lm_head == 0
    assert two.embeddings == one.embeddings
    assert 0 < two.lm_head < two.embeddings


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = tmp_path_factory.mktemp("cache") / "m"
    return load_config(write_checkpoint(directory, tiny_config(max_position_embeddings=5000)))


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 2500), int8=st.booleans())
def test_the_cache_is_as_large_as_it_grows(config: ModelConfig, tokens: int, int8: bool) -> None:
    kept = KVCache(config, dtype=torch.bfloat16, int8=int8)
    for _ in range(tokens):
        start = kept.begin(1)
        for layer, shape in enumerate(config.attention):
            row = torch.zeros(shape.num_key_value_heads, 1, shape.head_dim, dtype=torch.bfloat16)
            kept.append(layer, start, row, row)
    assert cache_nbytes(config, tokens, int8=int8) == kept.nbytes
