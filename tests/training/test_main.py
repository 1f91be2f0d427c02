from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from training import __main__ as program
from training import figures
from training.corpus import Corpus, read_corpus


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_the_whole_recipe_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = read_corpus()
    small = Corpus(corpus.modules[:40], corpus.tests[:40], corpus.held_out[:3])
    monkeypatch.setattr(program, "read_corpus", lambda: small)
    monkeypatch.setattr(program, "_DEPTHS", (2,))
    monkeypatch.setattr(figures, "_NEW", 4)
    for _ in range(2):  # the second run finds everything done and measures again
        program.main(minutes=0.1, work=tmp_path / "work", output=tmp_path / "model", device="cpu")
        found = json.loads((tmp_path / "model" / "figures.json").read_text())
        assert found["target_run"]["seconds"] >= 6.0
        assert found["target_run"]["step"] < 1000
    for line in (tmp_path / "model" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "model" / name).read_bytes()).hexdigest() == digest
    assert "bits per byte" in (tmp_path / "model" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "target")
