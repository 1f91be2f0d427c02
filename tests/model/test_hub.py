from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from splitinfer.errors import CheckpointError, UsageError
from splitinfer.model.hub import check_model, resolve_model


def forbidden(*args: Any, **kwargs: Any) -> str:
    raise AssertionError("the network was asked")


def test_what_is_here_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model("owner/name") == Path("owner/name")


@pytest.mark.parametrize("model", ["absent", "/absent/dir", "./a/b", "a/b/c", "../x", "owner/", "a b/c"])
def test_what_is_no_id_is_a_missing_path(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        resolve_model(model)
    assert "owner/name" in caught.value.remedy


def test_an_id_is_fetched_without_code_or_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, *, allow_patterns: list[str]) -> str:
        asked.update(model=model, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("google/gemma-4-26B-A4B-it") == tmp_path
    assert asked["model"] == "google/gemma-4-26B-A4B-it"
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["patterns"])


# Made without its constructor, which wants a response of whatever HTTP library the hub client uses.
REFUSAL = RepositoryNotFoundError.__new__(RepositoryNotFoundError)


@pytest.mark.parametrize(
    ("error", "what", "remedy"),
    [
        (REFUSAL, "there is no such model", "login"),
        (LocalEntryNotFoundError("offline"), "cannot be reached", "Copy the model's directory"),
        (ConnectionError("no route"), "cannot be reached", "Copy the model's directory"),
    ],
)
def test_without_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, what: str, remedy: str) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=f"owner/name: no such directory here, and .*{what}") as caught:
        resolve_model("owner/name")
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("model", [None, 3, "", " ", b"model"])
def test_what_cannot_name_a_model(model: object) -> None:
    with pytest.raises(UsageError, match="neither a path nor a hub id"):
        check_model(model)
