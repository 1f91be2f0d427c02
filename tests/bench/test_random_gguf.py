from __future__ import annotations

from pathlib import Path

import pytest

from splitinfer.model.weights import Checkpoint

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("head", ["Q4_0", "Q6_K"])
def test_a_file_with_true_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    monkeypatch.syspath_prepend(BENCH)  # its scripts import each other as scripts do
    from random_gguf import write

    write(tmp_path / "m.gguf", layers=1, head=head, experts=8, vocab=512)
    file = Checkpoint.open(tmp_path / "m.gguf")  # checks every tensor against the metadata
    assert (file.config.hidden_size, file.config.num_experts) == (2816, 8)
    assert file.stored_as("embed_tokens.weight", None) == (32, "int4" if head == "Q4_0" else "int8")
    for name in ("embed_tokens.weight", "layers.0.mlp.down_proj.weight"):
        wide = file.matrix(name).widen()
        assert wide.std() * wide.shape[1] ** 0.5 == pytest.approx(1, rel=0.1)
        assert abs(wide.mean()) * wide.shape[1] ** 0.5 < 0.01
