"""`splitinfer chat`: turns, the template, and Ctrl-C."""

from __future__ import annotations

import builtins
from collections.abc import Iterator

import pytest

from splitinfer.errors import ConnectionLost
from tests.cli import fakes
from tests.cli.conftest import Cli
from tests.cli.fakes import FakeEngine, FakeTokenizer


def prompts() -> list[str]:
    return [bytes(asked["prompt"]).decode() for asked in FakeEngine.asked]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | BaseException]]:
    """A person: the lines and interrupts in the list come from the keyboard."""
    typed: list[str | BaseException] = []

    def ask(_: str) -> str:
        if not typed:
            raise EOFError
        line = typed.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", ask)
    yield typed
    assert typed == []  # everything was asked for


def test_each_turn_carries_the_ones_before(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch, ["fi", "ne"], FakeTokenizer())
    ran = cli("chat", "m", "--system", "be brief", stdin=b"how are you?\n\n  and now?\n")
    assert (ran.code, ran.out) == (0, "fine\nfine\n")
    assert prompts() == [
        "system:be brief|user:how are you?",
        "system:be brief|user:how are you?|assistant:fine|user:and now?",
    ]
    assert FakeEngine.asked[0]["max_tokens"] is None


@pytest.mark.parametrize("tokenizer", [None, type("T", (), {"has_chat_template": False})()])
def test_no_template_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch, tokenizer: object) -> None:
    fakes.install(monkeypatch, ["x"], tokenizer)
    ran = cli("chat", "some/model", stdin=b"hi\n")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: some/model has no chat template\nUse `splitinfer generate`")


def test_ctrl_c_stops_the_reply_only(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, terminal: list[str | BaseException]
) -> None:
    fakes.install(monkeypatch, ["half", "^C"], FakeTokenizer())
    terminal += ["one", "two"]
    ran = cli("chat", "m", terminal=True)
    assert ran.code == 0  # the keyboard ended, as by Ctrl-D
    assert prompts() == ["user:one", "user:one|assistant:half|user:two"]  # what was said stays said
    assert ran.err.count("Ctrl-C again leaves") == 2


def test_ctrl_c_twice_leaves(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, terminal: list[str | BaseException]
) -> None:
    fakes.install(monkeypatch, ["half", "^C"], FakeTokenizer())
    terminal += ["one", KeyboardInterrupt()]
    assert cli("chat", "m", terminal=True).code == 130
    terminal += [KeyboardInterrupt(), KeyboardInterrupt()]
    assert cli("chat", "m", terminal=True).code == 130


def test_a_turn_between_two_interrupts_keeps_the_chat(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, terminal: list[str | BaseException]
) -> None:
    fakes.install(monkeypatch, ["ok"], FakeTokenizer())
    terminal += [KeyboardInterrupt(), "one", KeyboardInterrupt(), "two"]
    assert cli("chat", "m", terminal=True).code == 0
    assert len(prompts()) == 2


def test_a_lost_node_does_not_end_the_conversation(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, terminal: list[str | BaseException]
) -> None:
    fakes.install(monkeypatch, [ConnectionLost("node a:1 went away", remedy="restart it")], FakeTokenizer())
    terminal += ["one", "two"]
    ran = cli("chat", "m", terminal=True)
    assert ran.code == 0
    assert ran.err.count("error: node a:1 went away\nrestart it\n") == 2
    assert prompts() == ["user:one", "user:two"]  # a turn that failed is not part of the conversation


def test_a_lost_node_ends_a_script(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch, [ConnectionLost("node a:1 went away")], FakeTokenizer())
    assert cli("chat", "m", stdin=b"one\ntwo\n").code == 1
    assert prompts() == ["user:one"]


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.install(monkeypatch, ["ok"], FakeTokenizer())
    monkeypatch.setattr(FakeEngine, "context", 10 + 50)
    ran = cli("chat", "m", "--system", "s", "--max-tokens", "10", stdin=b"a\nb\nc\n" + b"d" * 60 + b"\n")
    assert prompts() == [
        "system:s|user:a",
        "system:s|user:a|assistant:ok|user:b",
        "system:s|user:b|assistant:ok|user:c",
        "system:s|user:" + "d" * 60,  # too long by itself: for the engine to refuse
    ]
    assert ran.err.splitlines() == [
        "the conversation outgrew the context: the oldest turn forgotten",
        "the conversation outgrew the context: the 2 oldest turns forgotten",
    ]
