"""An engine's settings, checked against what is there."""

from __future__ import annotations

import pytest
import torch

from splitinfer.engine_config import EngineConfig
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
