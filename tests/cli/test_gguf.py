"""A GGUF file through the commands: nodes, client, chat, shards; and a dense model, which has no nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint
from tests.cli.conftest import Cli, listening
from tests.gemma3_checkpoints import gemma3_checkpoint, tiny_gemma3
from tests.model.gguf_files import TOKENS, Type, write_gguf

CONFIG = tiny_config(
    hidden_size=64, intermediate_size=64, moe_intermediate_size=64, vocab_size=len(TOKENS) + 1
)
PROMPT = ("--max-tokens", "12", "--draft", "off", "--json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that the file was made of, in the Hugging Face layout."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "source", CONFIG)


@pytest.fixture(scope="module")
def model(source: Path) -> Path:
    return write_gguf(Checkpoint.open(source), source.parent / "model.gguf", Type.Q4_0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3, as its GGUF files have it."""
    path = tmp_path_factory.mktemp("models") / "gemma3"
    config = tiny_gemma3(
        num_hidden_layers=7, sliding_window_pattern=6, query_pre_attn_scalar=8, vocab_size=len(TOKENS) + 1
    )
    gemma3_checkpoint(path, config)
    file = path.with_suffix(".gguf")
    return write_gguf(
        Checkpoint.open(path), file, tokenizer="llama", merges=False, last_token="<end_of_turn>"
    )


def ids(cli: Cli, model: Path, *argv: str) -> list[int]:
    ran = cli("generate", "he ahe", "--model", str(model), *PROMPT, *argv)
    assert ran.code == 0, ran.err
    found: list[int] = json.loads(ran.out)["token_ids"]
    return found


def test_the_same_text_through_nodes(cli: Cli, model: Path) -> None:
    """By experts, and by slices of them; in the formats of the file."""
    here = ids(cli, model)
    assert len(here) == 12
    with (
        listening(model, "--experts", "0-5") as (_, first, lines),
        listening(model, "--experts", "6-10", "--slice", "1/2") as (_, second, sliced),
        listening(model, "--experts", "6-10", "--slice", "2/2") as (_, third, _),
    ):
        assert "experts 0-5 (int4)" in lines[0]
        assert "experts 6-10, columns 0-31 (int4)" in sliced[0]
        nodes = ["--nodes", ",".join((first, second, third))]
        assert ids(cli, model, *nodes) == here
        said = cli("chat", str(model), *nodes, "--max-tokens", "6", stdin=b"he a\nahe\n")
        assert (said.code, said.err) == (0, "")
        assert said.out == cli("chat", str(model), "--max-tokens", "6", stdin=b"he a\nahe\n").out


def test_the_same_weights_from_another_file_are_another_model(cli: Cli, model: Path, source: Path) -> None:
    """Their roundings differ: a client on the folder refuses a node on the GGUF file by name."""
    with listening(model) as (_, address, _):
        ran = cli("generate", "--token-ids", "2,5", "--model", str(source), "--nodes", address)
    assert ran.code == 1
    assert f"{address} holds another model" in ran.err
    assert "a GGUF file and a folder of one model count as two" in ran.err


def test_a_shard_of_it_serves_the_file_s_client(cli: Cli, model: Path) -> None:
    here = ids(cli, model)
    assert cli("shard", str(model), "--experts", "0-10", "-o", "experts").code == 0
    assert cli("shard", str(model), "--client", "-o", "client").code == 0
    ran = cli("verify", "experts")
    assert (ran.code, ran.err) == (0, "")
    ran = cli("node", "client")
    assert ran.code == 2
    assert "client is a client's shard: it has no experts to hold" in ran.err
    with (
        listening(Path("experts"), "--slice", "1/2") as (_, first, _),
        listening(Path("experts"), "--slice", "2/2") as (_, second, _),
    ):
        assert ids(cli, model, "--nodes", f"{first},{second}") == here
        assert ids(cli, Path("client"), "--nodes", f"{first},{second}") == here


def test_what_verify_says_of_the_file_itself(cli: Cli, model: Path) -> None:
    ran = cli("verify", str(model))
    assert ran.code == 1
    assert "is not a shard" in ran.err
    assert "splitinfer shard" in ran.err


def test_a_dense_model_runs_here(cli: Cli, dense: Path) -> None:
    here = ids(cli, dense)
    assert here
    said = cli("chat", str(dense), "--max-tokens", "4", stdin=b"he a\n")
    assert (said.code, said.err) == (0, "")
    assert cli("shard", str(dense), "-o", "all").code == 0
    assert ids(cli, Path("all")) == here


@pytest.mark.parametrize(
    ("argv", "says", "remedy"),
    [
        (["generate", "he", "--nodes", "127.0.0.1:1", "--model"], "is a dense model", "Leave out --nodes"),
        (["node"], "is a dense model", "without nodes"),
        (["node", "--estimate"], "is a dense model", "without nodes"),
        (["shard", "--experts", "0-3", "--dry-run"], "is a dense model", "without nodes"),
        (["generate", "he", "--local-layers", "0", "--model"], "there are none", "Leave them out"),
    ],
)
def test_a_dense_model_has_nothing_to_split_off(
    cli: Cli, dense: Path, argv: list[str], says: str, remedy: str
) -> None:
    ran = cli(*argv, str(dense))
    assert ran.code == 2
    first, second = ran.err.splitlines()
    assert says in first
    assert remedy in second
