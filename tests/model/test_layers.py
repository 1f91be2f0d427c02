from __future__ import annotations

import pytest
import torch

from splitinfer.model.front import Front
from splitinfer.model.layers import DecoderLayer, Step, Weights
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.staging import Staging
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("layers") / "model"))


def layer_of(checkpoint: Checkpoint, index: int, quant: QuantConfig) -> DecoderLayer:
    weights = Weights(checkpoint, f"layers.{index}.", torch.device("cpu"), torch.float32, quant)
    return DecoderLayer(weights, checkpoint.config, index)


def test_each_part_takes_its_own_format_and_the_router_none(checkpoint: Checkpoint) -> None:
    """A rounded router would choose other experts."""
    layer = layer_of(checkpoint, 0, QuantConfig("int4", attention="int8", dense="int4"))
    assert {part.format for part in layer.attention.projections.parts} == {"int8"}
    assert {part.format for part in layer.mlp.gate_up.parts + layer.mlp.down.parts} == {"int4"}
    assert layer.routing is not None
    assert [part.format for part in layer.routing.proj.parts] == ["float32"]


def test_sliding_layers_project_values_and_full_ones_do_not(checkpoint: Checkpoint) -> None:
    """q, k, v of heads of 8; q and k of heads of 16, where keys are values."""
    sliding, full = (layer_of(checkpoint, index, QuantConfig()) for index in (0, 3))
    assert [part.out_features for part in sliding.attention.projections.parts] == [6 * 8, 3 * 8, 3 * 8]
    assert [part.out_features for part in full.attention.projections.parts] == [6 * 16, 1 * 16]
    assert (sliding.attention.window, full.attention.window) == (8, None)


def test_a_step_tells_time_and_the_step_behind() -> None:
    timeline, front = Timeline(), Front()
    step = Step([], {}, Staging(torch.device("cpu")), timeline, front)
    later = step.record("attention", 2, 0.0)
    assert timeline.seconds == {("attention", 2): later}
    step.leave(2)
    assert front._left == 2
