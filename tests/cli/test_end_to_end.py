"""The true commands on a true model: text through nodes, a chat, an interrupt, a token and TLS."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.checkpoints import tiny_config, write_checkpoint
from tests.cli.conftest import Cli, listening, process
from tests.model.test_tokenizer import TEMPLATE, gemma_like

PIN = "sha256:" + "ab" * 32


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer and a chat template."""
    core = gemma_like()
    vocab = core.get_vocab_size()
    model = write_checkpoint(tmp_path_factory.mktemp("models") / "talking", tiny_config(vocab_size=vocab))
    core.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def test_the_same_tokens_through_nodes(cli: Cli, tiny: Path, whole_node: str) -> None:
    argv = ["generate", "--model", str(tiny), "--token-ids", "2,5,7", "--max-tokens", "24", "--draft", "off"]
    here = cli(*argv)
    there = cli(*argv, "--nodes", whole_node)
    assert here.code == there.code == 0
    assert here.out == there.out
    assert len(here.out.split(",")) == 24
    assert "network: 96 calls" in there.err  # 4 layers; the prompt, and all tokens but the last
    made = json.loads(cli(*argv, "--nodes", whole_node, "--json").out)
    assert ",".join(str(token) for token in made["token_ids"]) == here.out.strip()
    assert made["usage"]["calls"] == 96


def test_slices_and_a_trace(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    argv = ["generate", "--model", str(tiny), "--token-ids", "2,5,7", "--max-tokens", "12"]
    here, file = cli(*argv), tmp_path / "trace.json"
    with (
        listening(tiny, "--slice", "0:0.3") as (_, first, lines),
        listening(tiny, "--slice", "0.3:1") as (_, second, _),
    ):
        there = cli(*argv, "--nodes", f"{first},{second}", "--trace", str(file))
    assert there.out == here.out
    assert any("columns 0-5" in line for line in lines)
    rows = {
        e["args"]["name"]
        for e in json.loads(file.read_text())["traceEvents"]
        if e["ph"] == "M" and "name" in e["args"]
    }
    assert rows == {"client", f"node {first}", f"node {second}"}


def test_text_comes_out_as_it_was_said_in_json(cli: Cli, talking: Path) -> None:
    argv = ["generate", "hello wo", "--model", str(talking), "--max-tokens", "16"]
    said = cli(*argv)
    made = json.loads(cli(*argv, "--json").out)
    assert said.out.removesuffix("\n") == made["text"].removesuffix("\n")
    assert made["text"]
    assert made["usage"]["completion_tokens"] == len(made["token_ids"]) == 16


def test_a_seed_repeats(cli: Cli, talking: Path) -> None:
    argv = ["generate", "hello", "--model", str(talking), "--temperature", "1", "--json"]
    first, second, other = (
        json.loads(cli(*argv, "--seed", seed).out)["token_ids"] for seed in ("1", "1", "2")
    )
    assert first == second != other


def test_a_chat_of_two_turns(cli: Cli, talking: Path) -> None:
    ran = cli("chat", str(talking), "--max-tokens", "8", stdin=b"hello\nworld\n")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.count("\n") >= 2


def test_an_interrupt_stops_a_generation(tmp_path: Path) -> None:
    """One that would take minutes: the signal comes before its end, however late it is sent."""
    model = write_checkpoint(tmp_path / "long", tiny_config(max_position_embeddings=1 << 17))
    argv = ["--token-ids", "2,5,7", "--max-tokens", "100000", "--context", "120000"]
    with process("generate", "--model", str(model), "--threads", "1", *argv) as writing:
        assert writing.stdout is not None
        first = writing.stdout.read(1)
        writing.send_signal(signal.SIGINT)
        out, err = writing.communicate(timeout=60)
    assert (writing.returncode, err) == (130, "\n")
    assert first.isdigit()
    assert len(out.split(",")) < 100_000


def test_a_node_and_a_client_by_certificate_and_token(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    made = cli("cert", "-o", str(tmp_path / "tls"))
    pin = next(line.split()[1] for line in made.out.splitlines() if line.startswith("fingerprint"))
    certificate, key, token = (str(tmp_path / "tls" / name) for name in ("cert.pem", "key.pem", "token"))
    serving = ["--tls-cert", certificate, "--tls-key", key, "--token-file", token, "--host", "0.0.0.0"]
    asked = ["generate", "--token-ids", "2,5,7", "--model", str(tiny), "--max-tokens", "4", "--json"]
    local = cli(*asked)
    with listening(tiny, *serving) as (_, address, _):
        nodes = ["--nodes", address.replace("0.0.0.0", "127.0.0.1")]
        trusted = cli(
            *asked, *nodes, "--tls-fingerprint", pin, "--token-file", token, "--simulate-rtt", "1ms"
        )
        assert trusted.code == 0, trusted.err
        assert json.loads(trusted.out)["token_ids"] == json.loads(local.out)["token_ids"]
        stranger = cli(*asked, *nodes, "--tls-fingerprint", pin)
        assert (stranger.code, stranger.out) == (1, "")
        assert "asks for a token" in stranger.err
        fooled = cli(*asked, *nodes, "--tls-fingerprint", PIN, "--token-file", token)
        assert fooled.code == 1
        assert "another certificate" in fooled.err


def test_a_token_is_not_taken_from_the_line(cli: Cli) -> None:
    ran = cli("generate", "x", "--token", "secret")
    assert ran.code == 2
    assert "no such option: --token" in ran.err
