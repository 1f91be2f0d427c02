"""What `takes` makes of a command: its options, its settings, and nothing else."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from splitinfer.cli.options import ENGINE, LINK, MODEL, SERVING, takes
from splitinfer.cli.session import Request
from splitinfer.config import Settings
from splitinfer.errors import UsageError


@pytest.fixture(autouse=True)
def no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_a_command_gets_its_settings_and_its_own_arguments() -> None:
    got: dict[str, Any] = {}

    @takes("model", "timeout", sampling=True)
    def command(prompt: str = "x", *, settings: Settings, request: Request) -> None:
        got.update(prompt=prompt, settings=settings, request=request)

    asked = {"max_tokens": 3, "temperature": 0.5, "top_p": 1.0, "top_k": 0, "seed": None, "stop": ["a"]}
    command(prompt="y", model="m", timeout=2.0, **asked)
    assert got["prompt"] == "y"
    assert got["settings"] == Settings(model="m", timeout=2.0)
    assert got["request"] == Request(3, 0.5, 1.0, 0, None, ("a",))
    assert list(signature(command).parameters) == ["prompt", *asked, "model", "timeout"]


def test_a_model_is_named_once() -> None:
    @takes(*MODEL)
    def command(*, settings: Settings) -> None:
        assert settings.model == "m"

    command(model_argument="m", model=None)
    command(model_argument=None, model="m")
    with pytest.raises(UsageError, match="two models are named: a and --model b"):
        command(model_argument="a", model="b")


@pytest.mark.parametrize("names", [SERVING, LINK, ENGINE])
def test_every_option_is_a_setting(names: tuple[str, ...]) -> None:
    assert set(names) <= set(Settings.__dataclass_fields__)


def test_no_secret_comes_from_the_line() -> None:
    assert "token" not in {*SERVING, *ENGINE}
