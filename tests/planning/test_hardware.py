from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.model.footprint import Sizes, cache_nbytes
from splitinfer.model.quantize import QuantConfig
from splitinfer.planning.cost import CallCost, Setup, plain, step_terms
from splitinfer.planning.cuts import Cut, Machine, ways_to_cut
from splitinfer.planning.hardware import Assumed, Rate, setup_of
from splitinfer.planning.presets import PRESETS, preset

GIB = 1 << 30
SIZES = Sizes.of_config(PRESETS["gemma-4-26b-a4b"], quant=QuantConfig.of("int4"))
ASSUMED = Assumed(
    read=40e9,
    rates={"int4": Rate(30e9, 0.3), "int8": Rate(30e9, 0.2), "bfloat16": Rate(40e9, 0.1)},
    layer=2e-4,
    step=5e-4,
    token=3e-4,
    call=2e-4,
    round_trip=2e-3,
    bandwidth=125e6,
)


def cuts(*nodes: Machine, memory: float = 24) -> dict[str, Cut]:
    return {cut.name: cut for cut in ways_to_cut(SIZES, int(memory * GIB), nodes, 8192)}


def setup(name: str, *nodes: Machine, memory: float = 24, assumed: Assumed = ASSUMED) -> Setup:
    return setup_of(cuts(*nodes, memory=memory)[name], SIZES, assumed, tokens=4096)


def boxes(*gib: float, bandwidth: float = 0.0) -> list[Machine]:
    return [Machine(f"m{i}", int(size * GIB), bandwidth) for i, size in enumerate(gib)]


def call_of(made: Setup) -> CallCost:
    (_, call), *_ = [stage for stage in made.layers if stage[1] is not None]
    assert call is not None
    return call


def test_the_preset_is_the_published_model() -> None:
    config = PRESETS["gemma-4-26b-a4b"]
    whole = Sizes.of_config(config)
    assert whole.experts([0]) == pytest.approx(2 * 761e6, rel=0.001)
    client = whole.client(1)
    assert client.dense == pytest.approx(30 * 2 * 17.8e6, rel=0.01)
    assert client.embeddings == 2 * 262_144 * 2816
    assert client.attention / 30 == pytest.approx(2 * 35e6, rel=0.07)
    assert [kind == "full_attention" for kind in config.layer_types].count(True) == 5
    assert preset("Gemma-4-26B-A4B") is config
    assert preset("gemma-5") is None


def test_a_step_reads_its_bytes() -> None:
    terms = step_terms(setup("everything here"), 1)
    active = 8 * SIZES.expert(0)
    assert terms["local experts"] == pytest.approx(30 * active / 30e9)
    client = SIZES.client(0)
    assert terms["lm_head"] == pytest.approx(client.embeddings / 30e9)
    assert terms["dense network"] == pytest.approx(client.dense / 30e9)
    keys = cache_nbytes(SIZES.config, 4096) / 40e9
    weights = (client.attention + client.other) / 30e9
    assert terms["attention"] == pytest.approx(weights + keys + 30 * 2e-4)


def test_rows_touch_other_experts_until_all_are_read() -> None:
    experts = call_of(setup("by experts", Machine("a", 32 * GIB), memory=3.5)).experts
    first = experts.at(1)
    distinct = [128 * (1 - (15 / 16) ** rows) for rows in (1, 2, 4, 8)]
    for rows, touched in zip((1, 2, 4, 8), distinct, strict=True):
        expected = (touched + (8 * rows - touched) * 0.3) / 8
        assert experts.at(rows) / first == pytest.approx(expected, rel=0.03)


def test_of_several_nodes_the_slowest_decides() -> None:
    one = call_of(setup("by experts", *boxes(32), memory=3.5)).experts.at(1)
    two = call_of(setup("by experts", *boxes(16, 16), memory=3.5)).experts.at(1)
    pair = call_of(setup("by slices", *boxes(16, 16), memory=3.5)).experts.at(1)
    copies = call_of(setup("replicas", *boxes(32, 32), memory=3.5)).experts.at(1)
    assert pair == pytest.approx(one / 2, rel=0.01)
    assert 0.55 * one < two < 0.75 * one  # about 5 of 8 experts are with one of them
    assert copies == pytest.approx(two, rel=0.05)


def test_by_layers_each_call_goes_to_one_node() -> None:
    made = setup("by layers", *boxes(16, 32), memory=3.5)
    assert [count for count, call in made.layers] == [10, 20]
    for _, call in made.layers:
        assert call is not None
        assert call.handling.at(1) == pytest.approx(2e-4)
        assert call.nbytes == 2816 * 2 * 2 + 8 * 6 + 150
    apart = call_of(setup("by experts", *boxes(16, 32), memory=3.5))
    assert apart.handling.at(1) == pytest.approx(4e-4)
    assert apart.nbytes == 2 * (2816 * (2 + 4) + 8 * 6 + 150)


def test_a_nodes_own_bandwidth_counts() -> None:
    slow, fast = (
        call_of(setup("by experts", *boxes(32, bandwidth=rate), memory=3.5)).experts.at(1)
        for rate in (20e9, 80e9)
    )
    assert slow == pytest.approx(4 * fast)


@settings(max_examples=10, deadline=None)
@given(
    rtt=st.floats(0, 0.05),
    rate=st.floats(1e9, 1e12),
    node=st.floats(5e9, 5e11),
    factor=st.floats(1, 20),
    name=st.sampled_from(["by experts", "by layers", "by slices", "replicas"]),
)
def test_better_machines_and_links_are_never_slower(
    rtt: float, rate: float, node: float, factor: float, name: str
) -> None:
    base = replace(ASSUMED, round_trip=rtt, bandwidth=rate)
    nearer, wider = replace(base, round_trip=rtt / factor), replace(base, bandwidth=rate * factor)

    def speed(assumed: Assumed, bandwidth: float = node) -> float:
        return plain(setup(name, *boxes(16, 32, bandwidth=bandwidth), assumed=assumed)).tokens_per_second

    least = speed(base) * (1 - 1e-9)
    assert speed(nearer) >= least
    assert speed(wider) >= least
    assert speed(base, node * factor) >= least
