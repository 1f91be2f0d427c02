from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from splitinfer import demo
from splitinfer.errors import CheckpointError
from training.corpus import Document, read_corpus
from training.data import encode_documents
from training.decode import draft_and_verify
from training.drafter import Assistant
from training.evaluate import measure
from training.network import Architecture, Decoder

# Held-out modules that every supported Python carries, nearly unchanged.
_SAMPLE = ("getpass.py", "json/decoder.py")
_BITS_PER_BYTE = 1.2  # 1.10 on Python 3.11; other versions differ a little, and xz -9 needs more than 2


@pytest.fixture(scope="module")
def target() -> Decoder:
    tensors = load_file(demo.path() / "model.safetensors")
    model = Decoder(Architecture())
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()})
    return model


@pytest.fixture(scope="module")
def sample() -> list[Document]:
    found = [document for document in read_corpus().held_out if document.name in _SAMPLE]
    assert len(found) == len(_SAMPLE)
    return found


def test_files_are_those_that_were_measured() -> None:
    folder = demo.path().parent
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    present = {
        str(path.relative_to(folder)) for part in ("target", "drafter") for path in (folder / part).iterdir()
    }
    assert {line.split("  ")[1] for line in lines} == present


def test_all_of_it_stays_under_16_mib() -> None:
    folder = demo.path().parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16 * 2**20


@torch.no_grad()
def test_transformers_computes_the_same_logits(target: Decoder, sample: list[Document]) -> None:
    tokenizer = Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(sample[0].text).ids[:200]])
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)
    hidden, _ = target(ids)
    torch.testing.assert_close(model(ids).logits, target.logits(hidden), atol=1e-4, rtol=0)


def test_it_compresses_held_out_text_and_uses_every_expert(target: Decoder, sample: list[Document]) -> None:
    tokenizer = Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    found = measure(target, sample, encode_documents(tokenizer, sample), length=512)
    assert found.bits_per_byte < _BITS_PER_BYTE
    assert found.shares.min() > 0.25


def test_drafts_are_taken_often_enough(target: Decoder, sample: list[Document]) -> None:
    config = json.loads((demo.drafter_path() / "config.json").read_text())
    assistant = Assistant(target.architecture, config["text_config"]["intermediate_size"])
    tensors = load_file(demo.drafter_path() / "model.safetensors")
    assistant.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    tokenizer = Tokenizer.from_file(str(demo.path() / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    steps = tokens = 0
    for document in sample:
        prompt = tokenizer.encode(document.text).ids[:96]
        _, count = draft_and_verify(
            target, assistant, prompt, 64, depth=4, temperature=0.7, generator=generator
        )
        steps, tokens = steps + count.steps, tokens + count.tokens
    assert tokens / steps > 2.2  # 2.5 and more over the card's many prompts


def test_a_missing_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_HERE", tmp_path)
    with pytest.raises(CheckpointError, match="demo model is not installed"):
        demo.path()
    with pytest.raises(CheckpointError, match="drafter"):
        demo.drafter_path()
