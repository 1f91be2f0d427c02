from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.small import SMALL, small_assistant, small_target
from training.export import export_drafter, export_target
from training.figures import round_weights
from training.vocabulary import train_vocabulary


def _tokenizer() -> Tokenizer:
    return train_vocabulary(["def f(x):\n    return x\n"] * 3, 300)


@torch.no_grad()
def test_transformers_loads_the_target_and_agrees(tmp_path: Path) -> None:
    target = small_target()
    export_target(target, _tokenizer(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    round_weights(target)
    ids = torch.randint(0, SMALL.vocab_size, (1, 40), generator=torch.Generator().manual_seed(2))
    hidden, _ = target(ids)
    torch.testing.assert_close(model(ids).logits, target.logits(hidden), atol=1e-5, rtol=0)


def test_the_tokenizer_renders_turns(tmp_path: Path) -> None:
    export_target(small_target(), _tokenizer(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<bos><|turn>user\nhi<turn|>\n<|turn>model\nho<turn|>\n<|turn>model\n"
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"], skip_special_tokens=True) == "def f(x):"


def test_the_drafter_names_its_backbone(tmp_path: Path) -> None:
    export_drafter(small_assistant(small_target()), 40, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gemma4_assistant"
    assert config["backbone_hidden_size"] == SMALL.hidden_size
    assert config["text_config"]["num_kv_shared_layers"] == config["text_config"]["num_hidden_layers"]
