"""Bad input: one clear line that names the file, node or flag, one line of remedy, the right exit code."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from splitinfer.transport import frames
from tests.checkpoints import tiny_config, write_checkpoint
from tests.cli.conftest import Cli, Ran, process


def check(ran: Ran, code: int, *named: str) -> None:
    """Two lines on standard error, nothing on standard output."""
    lines = ran.err.splitlines()
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert lines[0].startswith("error: ")
    for name in named:
        assert name in lines[0]
    assert len(lines) == 2, ran.err
    assert "Traceback" not in ran.err


def ask(cli: Cli, model: Path, *argv: str) -> Ran:
    return cli("generate", "--model", str(model), "--token-ids", "2,5,7", "--max-tokens", "4", *argv)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@contextmanager
def stranger(answer: bytes) -> Iterator[str]:
    """The address of a server that answers whatever it hears with `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            try:
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.recv(65536)
                        peer.sendall(answer)
                        peer.recv(65536)
            except OSError:
                return  # closed: the test is over

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.parametrize("command", ["generate", "node", "chat", "bench"])
def test_a_model_that_is_not_there(cli: Cli, command: str) -> None:
    argv = {"generate": ["generate", "hi", "--model"], "bench": ["bench", "--rtt"]}.get(command, [command])
    check(cli(*argv, "missing/folder/of mine"), 1, "missing/folder/of mine does not exist")


@pytest.mark.parametrize("command", [["generate", "hi", "--model"], ["node"]])
def test_no_config(cli: Cli, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    check(cli(*command, "empty"), 1, "empty/config.json")


def test_wrong_model_type(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check(cli("node", str(tmp_path)), 1, "config.json", "llama")


def test_truncated_safetensors(cli: Cli, copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    check(cli("node", str(copy)), 1, "model.safetensors")
    check(ask(cli, copy), 1, "model.safetensors")


def test_missing_shard_file(cli: Cli, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "sharded", tiny_config(), shards=3)
    lost = sorted(model.glob("model-*.safetensors"))[1]
    lost.unlink()
    check(cli("node", str(model)), 1, lost.name)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--experts", "0-11"], "--experts '0-11': 11 is out of bounds, this model has 11 (0-10)"),
        (["--experts", "5-2"], "--experts '5-2': the range 5-2 runs backwards"),
        (["--experts", "all"], "--experts 'all'"),
        (["--experts", "0-3,3-5"], "--experts '0-3,3-5'"),
        (["--layers", "3-4"], "--layers '3-4': 4 is out of bounds, this model has 4 (0-3)"),
        (["--layers", "-1"], "--layers '-1'"),
        (["--slice", "3/2"], "--slice '3/2' is not a slice"),
    ],
)
def test_ranges(cli: Cli, tiny: Path, flags: list[str], says: str) -> None:
    check(cli("node", str(tiny), *flags), 2, says)


def test_a_shard_where_none_can_be(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check(cli("shard", str(tiny), "-o", "file/shard"), 2, "file/shard cannot be made")


def test_port_in_use(cli: Cli, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check(cli("node", str(tiny), "--port", str(port)), 1, f"127.0.0.1:{port}")


def test_a_host_that_is_not_this_machine(cli: Cli, tiny: Path) -> None:
    check(cli("node", str(tiny), "--host", "192.0.2.1", "--port", "0", "--insecure"), 2, "192.0.2.1")


def test_an_open_port_needs_a_token_and_tls(cli: Cli, tiny: Path) -> None:
    check(cli("node", str(tiny), "--host", "0.0.0.0", "--port", "0"), 2, "0.0.0.0", "token", "TLS")


def test_node_absent(cli: Cli, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    check(ask(cli, tiny, "--nodes", address), 1, f"nobody answers at {address}: connection refused")


@pytest.mark.parametrize("address", [",", "nowhere", "127.0.0.1:x", "127.0.0.1:99999"])
def test_an_address_that_is_none(cli: Cli, tiny: Path, address: str) -> None:
    check(ask(cli, tiny, "--nodes", address), 2, address)


def test_node_holding_another_model(cli: Cli, tmp_path: Path, whole_node: str) -> None:
    other = write_checkpoint(tmp_path / "other", tiny_config(), seed=1)
    check(ask(cli, other, "--nodes", whole_node), 1, whole_node, "another model")


def test_node_of_another_protocol_version(cli: Cli, tiny: Path) -> None:
    hello = bytearray(frames.pack_frame(frames.HELLO))
    assert hello[2] == frames.VERSION
    hello[2] += 1
    with stranger(bytes(hello)) as address:
        check(ask(cli, tiny, "--nodes", address), 1, address, f"version {frames.VERSION + 1}")


def test_a_server_of_another_kind(cli: Cli, tiny: Path) -> None:
    with stranger(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as address:
        check(ask(cli, tiny, "--nodes", address), 1, address)


def test_prompt_longer_than_the_context(cli: Cli, tiny: Path) -> None:
    check(ask(cli, tiny, "--context", "2"), 2, "3 tokens")
    check(ask(cli, tiny, "--context", "5"), 2, "do not fit")
    check(ask(cli, tiny, "--context", "513"), 2, "513")


def test_empty_prompt(cli: Cli, tiny: Path) -> None:
    check(cli("generate", "", "--model", str(tiny)), 2, "the prompt is empty")


def test_a_token_outside_the_vocabulary(cli: Cli, tiny: Path) -> None:
    check(cli("generate", "--token-ids", "131", "--model", str(tiny)), 2, "131")


def test_text_without_a_tokenizer(cli: Cli, tiny: Path) -> None:
    check(cli("generate", "hi", "--model", str(tiny)), 2, "no tokenizer")
    check(cli("chat", str(tiny), stdin=b"hi\n"), 1, "no chat template")


def test_unknown_tokenizer(cli: Cli, copy: Path) -> None:
    (copy / "tokenizer.model").write_bytes(b"sentencepiece")
    check(ask(cli, copy), 1, "tokenizer.model")
    (copy / "tokenizer.json").write_text('{"model": {"type": "Alphabet"}}')
    check(ask(cli, copy), 1, "tokenizer.json")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--top-p", "0"], "top_p"),
        (["--device", "tpu"], "tpu"),
        (["--stop", "x"], "no tokenizer"),
        (["--token-file", "missing.token"], "missing.token"),
    ],
)
def test_values_that_only_the_engine_can_judge(cli: Cli, tiny: Path, flags: list[str], says: str) -> None:
    check(ask(cli, tiny, *flags), 2, says)


def test_the_true_command_says_the_same(tiny: Path) -> None:
    with process("node", str(tiny), "--experts", "9-3") as node:
        out, err = node.communicate(timeout=60)
    check(Ran(node.returncode, out, err), 2, "--experts '9-3'")
