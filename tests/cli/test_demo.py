"""The demo: two nodes, the text, the costs by layer, the comparison, and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import tiny_config, write_checkpoint
from tests.cli.conftest import Cli
from tests.model.test_tokenizer import gemma_like


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    core = gemma_like()
    path = tmp_path_factory.mktemp("models") / "demo"
    write_checkpoint(path, tiny_config(vocab_size=core.get_vocab_size()))
    core.save(str(path / "tokenizer.json"))
    return path


def test_the_demo(cli: Cli, talking: Path) -> None:
    ran = cli("demo", str(talking), "--prompt", "hello", "--max-tokens", "12")
    assert ran.code == 0, ran.err
    nodes = re.findall(r"node (127\.0\.0\.1:\d+) holds experts (\S+)", ran.out)
    assert [held for _, held in nodes] == ["0-4", "5-10"]
    assert "\nhello" in ran.out
    for word in ("attention", "network", "experts", "tokens/s", "received per"):
        assert word in ran.out
    rows = re.findall(r"^ +(\d)(?: +\d+){5} *(█*) *$", ran.out, re.MULTILINE)
    assert [layer for layer, _ in rows] == ["0", "1", "2", "3"]
    assert any(bar for _, bar in rows)  # beside a layer that was held up the others have none
    assert "same tokens with the experts here: 12 of 12" in ran.out
    left = [p for p in psutil.process_iter(["cmdline"]) if str(talking) in (p.info["cmdline"] or [])]
    assert left == []


def test_what_cannot_be_shown_is_refused_before_nodes_start(
    cli: Cli, talking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(arguments: list[str]) -> None:
        raise AssertionError("a node was started")

    monkeypatch.setattr("splitinfer.cli.demo.node_process", never)
    ran = cli("demo", str(talking), "--prompt", "hello", "--max-tokens", "600")
    assert ran.code == 2
    assert "600 new ones do not fit the context of 512" in ran.err
    dense = write_checkpoint(talking.parent / "dense", tiny_config(enable_moe_block=False))
    ran = cli("demo", str(dense))
    assert ran.code == 2
    assert "is a dense model" in ran.err
