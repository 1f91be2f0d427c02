"""Files as llama.cpp reads and quantises them: the same logits there and here, and every type it writes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.gguf import GgufCheckpoint
from splitinfer.model.tokenizer import Tokenizer
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint
from tests.gemma3_checkpoints import gemma3_checkpoint, tiny_gemma3
from tests.model.gguf_files import TOKENS, write_gguf
from tests.model.llama_cpp_peer import logits, needs_llama_cpp, quantised, tokens

pytestmark = needs_llama_cpp
VOCABULARY = len(TOKENS) + 1
IDS = list(range(260, 268)) * 5
GEMMA4 = tiny_config(
    hidden_size=256, intermediate_size=256, moe_intermediate_size=256, head_dim=64, global_head_dim=128,
    num_hidden_layers=2, num_key_value_heads=2, num_attention_heads=4, num_global_key_value_heads=2,
    layer_types=["sliding_attention", "full_attention"], vocab_size=VOCABULARY,
)  # fmt: skip
GEMMA3 = tiny_gemma3(
    hidden_size=256, intermediate_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=7, sliding_window_pattern=6, query_pre_attn_scalar=64, vocab_size=VOCABULARY,
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A float32 file of each architecture."""
    base = tmp_path_factory.mktemp("llama")
    gemma3_checkpoint(base / "gemma3", GEMMA3)
    write_checkpoint(base / "gemma4", GEMMA4)
    return {
        name: write_gguf(
            Checkpoint.open(base / name), base / f"{name}.gguf", tokenizer=tokenizer, merges=merges
        )
        for name, tokenizer, merges in (("gemma3", "llama", False), ("gemma4", "gemma4", True))
    }


def ours(path: Path) -> Tensor:
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    experts = None
    if config.enable_moe_block:
        held = dict.fromkeys(range(config.num_hidden_layers), range(config.num_experts))
        experts = LocalExperts(ExpertBank(checkpoint, held))
    model = Gemma.load(checkpoint, experts, dtype=torch.float32)
    return model.logits(asyncio.run(model.forward([Segment(torch.tensor(IDS), model.new_cache())])))


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_logits_on_float32_weights(files: dict[str, Path], name: str) -> None:
    """llama.cpp's GELU is a table in half precision, so not closer than that."""
    expected = logits(files[name], IDS)
    assert (ours(files[name]) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "Q5_K_M"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_files_that_its_quantiser_writes(
    files: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    """llama.cpp rounds activations too, to 8 bits, so logits differ by that; on random weights a router near
    a tie adds to it."""
    path = quantised(files[name], tmp_path / "q.gguf", kind)
    file = Checkpoint.open(path)
    assert isinstance(file, GgufCheckpoint)
    found, expected = ours(path), logits(path, IDS)
    near = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert near.median() < 0.06


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_token_ids(files: dict[str, Path], name: str) -> None:
    texts = ["he ahe", "a  he\nhé", "<|turn>he b", " he", "ahehe  "]
    tokenizer = Tokenizer.open(files[name])
    assert tokenizer is not None
    assert [tokenizer.encode(text) for text in texts] == tokens(files[name], texts)
