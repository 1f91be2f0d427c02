from __future__ import annotations

import pytest
import torch

from splitinfer.model.front import Front
from splitinfer.model.layers import LOOKS, DecoderLayer, Step, Weights
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.rows import Begun
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
    step = Step([], {}, Staging(torch.device("cpu")), timeline, front, False)
    later = step.record("attention", 2, 0.0)
    assert timeline.seconds == {("attention", 2): later}
    step.leave(2)
    assert front._left == 2


class Network:
    """A dense network beside a socket that can always be read, and an answer that some look finds."""

    file = 3

    def __init__(self, there: int) -> None:
        self.there = there
        self.looks = self.ends = 0

    def mlp_until(self, begun: object, file: int) -> bool:
        assert file == self.file
        return True

    def end_mlp(self, begun: object) -> torch.Tensor:
        self.ends += 1
        return torch.zeros(1)

    def look(self) -> bool:
        self.looks += 1
        if self.there == 0:
            raise KeyboardInterrupt
        return self.looks == self.there


@pytest.mark.parametrize(("there", "looks"), [(1, 1), (2, 2), (LOOKS + 5, LOOKS), (0, 1)])
def test_looks_for_an_answer_are_few_and_the_dense_network_always_ends(
    checkpoint: Checkpoint, there: int, looks: int
) -> None:
    layer, network, timeline = layer_of(checkpoint, 0, QuantConfig()), Network(there), Timeline()
    layer.ops = network  # type: ignore[assignment]
    begun = Begun(1, torch.zeros(1), torch.zeros(1))
    step = Step([], {}, Staging(torch.device("cpu")), timeline, None, False)
    if there:
        layer.end_dense(begun, step, network)
    else:
        with pytest.raises(KeyboardInterrupt):
            layer.end_dense(begun, step, network)
    assert (network.looks, network.ends) == (looks, 1)
    assert timeline.seconds["dense", 0] > 0


def test_what_has_ended_is_not_ended_again(checkpoint: Checkpoint) -> None:
    layer, timeline = layer_of(checkpoint, 0, QuantConfig()), Timeline()
    layer.ops = network = Network(1)  # type: ignore[assignment]
    over = Begun(0, torch.zeros(1), torch.ones(1))
    step = Step([], {}, Staging(torch.device("cpu")), timeline, None, False)
    assert layer.end_dense(over, step, network) is over.out
    assert (network.looks, network.ends, timeline.seconds) == (0, 0, {})
