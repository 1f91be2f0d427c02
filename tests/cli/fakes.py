"""Stand-ins for the engine, so that a command's own behaviour is tested in milliseconds."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator
from types import ModuleType
from typing import Any, ClassVar, Self

import pytest

from splitinfer.generation import Completion, Piece, Timings, Usage

__all__ = ["FakeEngine", "FakeTokenizer", "completion", "install"]


def completion(text: str, token_ids: tuple[int, ...] = (5, 6), calls: int = 8) -> Completion:
    usage = Usage(3, len(token_ids), 45056, 90112, calls)
    timings = Timings(0.25, 1.25, 12.0, 40.0, {"attention": 0.3, "network": 0.1})
    return Completion(text, token_ids, "length", usage, timings)


class FakeTokenizer:
    """A chat template that shows every turn."""

    has_chat_template = True

    def render_chat(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "|".join(f"{m['role']}:{m['content']}" for m in messages)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class FakeEngine:
    """An AsyncEngine that says `script`; an exception in it is raised there, "^C" is an interrupt."""

    script: ClassVar[list[str | BaseException]] = []
    tokenizer: Any = FakeTokenizer()
    context = 8192
    opened: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, model: str, **settings: Any) -> None:
        self.opened.append({"model": model, **settings})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def stream(self, prompt: Any, **options: Any) -> AsyncGenerator[Piece]:
        self.asked.append({"prompt": prompt, **options})
        said = ""
        for number, item in enumerate(self.script):
            if isinstance(item, BaseException):
                raise item
            if item == "^C":
                signal.raise_signal(signal.SIGINT)
                await asyncio.sleep(10)
            said += item
            last = completion(said) if number == len(self.script) - 1 else None
            yield Piece(item, (number + 5,), last)

    async def generate(self, prompt: Any, **options: Any) -> Completion:
        pieces = [piece async for piece in self.stream(prompt, **options)]
        assert pieces[-1].completion is not None
        return pieces[-1].completion


def install(monkeypatch: pytest.MonkeyPatch, script: list[str | BaseException], tokenizer: Any) -> None:
    """Put the fakes where the commands import the engines from."""
    monkeypatch.setattr(FakeEngine, "script", script)
    monkeypatch.setattr(FakeEngine, "tokenizer", tokenizer)
    monkeypatch.setattr(FakeEngine, "opened", [])
    monkeypatch.setattr(FakeEngine, "asked", [])
    module = ModuleType("splitinfer.engine")
    vars(module)["AsyncEngine"] = FakeEngine
    monkeypatch.setitem(sys.modules, "splitinfer.engine", module)
