"""`splitinfer generate`: where the prompt comes from, what goes to which stream, what --json holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from splitinfer.errors import ConnectionLost
from splitinfer.transport import ClientConfig
from tests.cli import fakes
from tests.cli.conftest import Cli
from tests.cli.fakes import FakeEngine, FakeTokenizer


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch, ["Hello", ", wor", "ld"], FakeTokenizer())


def prompt_of(cli: Cli, *argv: str, stdin: bytes = b"") -> object:
    ran = cli("generate", "--model", "m", *argv, stdin=stdin)
    assert ran.code == 0, ran.err
    return FakeEngine.asked[-1]["prompt"]


def test_the_prompt_comes_from_one_of_four_places(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("from a file\n\n")
    assert prompt_of(cli, "Once") == "Once"
    assert prompt_of(cli, "--file", "p.txt") == "from a file\n"  # one newline belongs to the file
    assert prompt_of(cli, stdin="from a pipe é\r\n".encode()) == "from a pipe é"
    assert prompt_of(cli, "--token-ids", "2, 5,7") == [2, 5, 7]


@pytest.mark.parametrize(
    ("argv", "stdin", "says"),
    [
        (["a", "--file", "p"], b"", "the prompt is given twice: PROMPT and --file"),
        (["--file", "p", "--token-ids", "1"], b"", "the prompt is given twice: --file and --token-ids"),
        ([""], b"", "the prompt is empty"),
        ([], b"", "standard input is empty"),
        ([], b"\n", "standard input is empty"),
        ([], b"\xff\xfe", "standard input is not UTF-8 text (byte 0)"),
        (["--file", "missing.txt"], b"", "--file missing.txt: No such file or directory"),
        (["--token-ids", "2,-5"], b"", "--token-ids '2,-5' is not a list of token ids"),
        (["--token-ids", ","], b"", "--token-ids ',' is not a list of token ids"),
        (["--token-ids", "2,٣"], b"", "is not a list of token ids"),
    ],
)
def test_a_wrong_prompt_is_refused_before_the_model_opens(
    cli: Cli, argv: list[str], stdin: bytes, says: str
) -> None:
    ran = cli("generate", *argv, stdin=stdin)
    assert ran.code == 2
    assert says in ran.err.splitlines()[0]
    assert len(ran.err.splitlines()) == 2
    assert FakeEngine.opened == []


def test_text_and_figures_take_different_streams(cli: Cli) -> None:
    ran = cli("generate", "hi", "--model", "m")
    assert ran.out == "Hello, world\n"
    assert "2 tokens at 40.0 tokens/s" in ran.err
    assert "8 calls, 45.1 kB sent, 90.1 kB received" in ran.err
    assert "attention 75%, network 25%" in ran.err


def test_drafts_are_counted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "drafts:" not in cli("generate", "hi", "--model", "m").err
    plain = fakes.completion("x")
    drafted = replace(plain, usage=replace(plain.usage, drafted_tokens=8, accepted_tokens=6))
    monkeypatch.setattr(fakes, "completion", lambda _: drafted)
    assert "drafts: 6 of 8 tokens right (75%)" in cli("generate", "hi", "--model", "m").err


def test_no_network_line_without_nodes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    local = fakes.completion("x", calls=0)
    monkeypatch.setattr(fakes, "completion", lambda _: local)
    assert "network:" not in cli("generate", "hi", "--model", "m").err


def test_flags_reach_the_engine(cli: Cli) -> None:
    flags = {"max-tokens": "9", "temperature": "0.5", "top-p": "0.9", "top-k": "4", "seed": "3"}
    flags |= {"threads": "2", "context": "99", "timeout": "1.5", "dtype": "float32"}
    flags |= {"local-layers": "0-1", "trace": "t.json", "draft": "off", "draft-depth": "4"}
    flags |= {"quant": "int4", "quant-lm-head": "int8"}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    argv += ["--stop", "a", "--stop", "b", "--nodes", "x:1,y:2", "--nodes", "z:3"]
    cli("generate", "hi", "--model", "m", *argv)
    assert FakeEngine.asked == [
        {
            "prompt": "hi", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 3,
            "stop": ("a", "b"),
        }
    ]  # fmt: skip
    assert isinstance(FakeEngine.opened[0].pop("transport"), ClientConfig)
    expected = {
        "model": "m", "nodes": ("x:1", "y:2", "z:3"), "device": "cpu", "dtype": "float32", "threads": 2,
        "context": 99, "timeout": 1.5, "local_layers": "0-1", "trace": "t.json", "draft": "off",
        "draft_depth": 4,        "quant": "int4", "quant_lm_head": "int8", "quant_dense": None,
    }  # fmt: skip
    assert expected.items() <= FakeEngine.opened[0].items()


def test_settings_reach_the_engine(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "splitinfer.toml").write_text('model = "org/from-file"\nnodes = ["a:1"]\n')
    monkeypatch.setenv("SPLITINFER_NODES", "b:2,c:3")
    cli("generate", "hi")
    assert FakeEngine.opened[0]["model"] == "org/from-file"
    assert FakeEngine.opened[0]["nodes"] == ("b:2", "c:3")


def test_json_is_one_object(cli: Cli) -> None:
    ran = cli("generate", "hi", "--model", "m", "--nodes", "a:1", "--json")
    made = json.loads(ran.out)
    assert made["text"] == "Hello, world"
    assert made["token_ids"] == [5, 6]
    assert made["stop_reason"] == "length"
    assert made["usage"]["calls"] == 8
    assert made["timings"]["phases"] == {"attention": 0.3, "network": 0.1}
    assert (made["model"], made["nodes"]) == ("m", ["a:1"])
    assert ran.err == ""


def test_without_a_tokenizer_the_ids_are_written(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch, ["", "", ""], None)
    assert cli("generate", "--model", "m", "--token-ids", "1").out == "5,6,7\n"


def test_an_error_after_some_text_keeps_the_text(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = ConnectionLost("node a:1 went away", remedy="restart it")
    fakes.install(monkeypatch, ["Once", " upon", lost], FakeTokenizer())
    ran = cli("generate", "hi", "--model", "m")
    assert (ran.code, ran.out) == (1, "Once upon\n")
    assert ran.err == "error: node a:1 went away\nrestart it\n"


def test_an_interrupt_keeps_the_text(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch, ["Once", "^C"], FakeTokenizer())
    ran = cli("generate", "hi", "--model", "m")
    assert (ran.code, ran.out) == (130, "Once\n")
