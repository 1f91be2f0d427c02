"""An engine's settings, checked against what is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from splitinfer.engine_config import EngineConfig, addresses_of
from splitinfer.errors import UsageError


def test_a_device_that_is_there() -> None:
    assert EngineConfig().torch_device() == "cpu"


@pytest.mark.parametrize("device", ["cuda", "tpu", "cpu:x"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UsageError, match=f"device '{device}' cannot be used") as error:
        EngineConfig(device=device).torch_device()
    assert error.value.remedy


def test_keys_and_values_in_another_format() -> None:
    assert not EngineConfig().int8_cache()
    assert EngineConfig(kv_cache="int8").int8_cache()
    with pytest.raises(UsageError, match="cannot be kept in 'fp8'"):
        EngineConfig(kv_cache="fp8").int8_cache()


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), None, "60", True])
def test_a_timeout_that_is_none(timeout: Any) -> None:
    with pytest.raises(UsageError, match="timeout=") as caught:
        EngineConfig(timeout=timeout)
    assert "seconds" in caught.value.remedy


@pytest.mark.parametrize("draft", [None, 4, False])
def test_a_drafter_that_is_none(draft: Any) -> None:
    with pytest.raises(UsageError, match="draft=") as caught:
        EngineConfig(draft=draft)
    assert 'draft="off"' in caught.value.remedy


def test_a_connection_that_is_none() -> None:
    with pytest.raises(UsageError, match="transport='tls' sets no connection"):
        EngineConfig(transport="tls")  # type: ignore[arg-type]


@pytest.mark.parametrize("nodes", [5, [5], ["a:1", None], {"a:1": 2}])
def test_nodes_that_are_none(nodes: Any) -> None:
    with pytest.raises(UsageError, match="nodes is"):
        addresses_of(nodes)


def test_a_list_of_nodes() -> None:
    assert addresses_of(None) == addresses_of([]) == ()
    assert addresses_of(["a:1", "b:2"]) == addresses_of(("a:1", "b:2")) == ("a:1", "b:2")
