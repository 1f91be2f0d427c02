from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.errors import CapacityError, UsageError
from splitinfer.model.footprint import Sizes
from splitinfer.model.quantize import QuantConfig
from splitinfer.placement import Holding, Placement, parse_ranges, parse_slice
from splitinfer.planning.cuts import (
    Cut,
    Machine,
    cuts_of_holdings,
    divide,
    slice_text,
    usable,
    ways_to_cut,
)
from splitinfer.planning.presets import PRESETS

GIB = 1 << 30
GEMMA = PRESETS["gemma-4-26b-a4b"]
INT4 = Sizes.of_config(GEMMA, quant=QuantConfig.of("int4"))
SMALL = replace(GEMMA, num_hidden_layers=6, attention=GEMMA.attention[:6])
FEW = Sizes.of_config(SMALL, quant=QuantConfig.of("int4"))


def machines(*gib: float) -> list[Machine]:
    return [Machine(f"m{i}", int(size * GIB)) for i, size in enumerate(gib)]


def check(cut: Cut, sizes: Sizes) -> None:
    """The client's own rules find every expert of every layer, and memories hold what they should."""
    config = sizes.config
    holdings = []
    for part in cut.parts:
        flags = dict(zip(*[iter(part.flags(sizes).split())] * 2, strict=True))
        assert (
            parse_ranges(flags.get("--experts", f"0-{config.num_experts - 1}"), config.num_experts, "")
            == part.experts
        )
        assert (
            parse_ranges(
                flags.get("--layers", f"0-{config.num_hidden_layers - 1}"), config.num_hidden_layers, ""
            )
            == part.layers
        )
        if "--slice" in flags:
            assert parse_slice(flags["--slice"], config.moe_intermediate_size, "") == part.columns
        assert part.nbytes == sizes.experts(part.layers, len(part.experts), part.columns)
        assert part.nbytes <= usable(part.machine.memory)
        holdings.append((part.machine.name, Holding("f", part.layers, part.experts, "int4", part.columns)))
    remote = [layer for layer in range(config.num_hidden_layers) if layer not in cut.local]
    if not remote:
        assert not cut.parts
        return
    placement = Placement.plan(
        holdings,
        layers=remote,
        num_experts=config.num_experts,
        columns=config.moe_intermediate_size,
        fingerprint="f",
    )
    held = sum(table.sum() for table in placement.holders.values())
    copies = len(cut.parts) if cut.kind in ("replicas", "by slices") else 1
    assert held == copies * len(remote) * config.num_experts  # no more than that: nothing is held twice


@settings(max_examples=60, deadline=None)
@given(
    memory=st.floats(3.5, 8),
    nodes=st.lists(st.floats(0.5, 6), max_size=4),
    context=st.sampled_from([1, 1000, 8192]),
)
def test_cuts_cover_every_expert_once_within_memory(memory: float, nodes: list[float], context: int) -> None:
    try:
        cuts = ways_to_cut(FEW, int(memory * GIB), machines(*nodes), context)
    except CapacityError:
        room = sum(usable(machine.memory) for machine in machines(*nodes))
        assert room < FEW.experts(range(6)) + len(nodes) * FEW.experts([0])
        return
    assert cuts
    for cut in cuts:
        check(cut, FEW)
        assert cut.client == FEW.client(context, cut.local)
        assert cut.client.total - cut.client.program <= usable(int(memory * GIB))


@settings(max_examples=60, deadline=None)
@given(
    memory=st.floats(3.5, 8), nodes=st.lists(st.floats(0.3, 6), min_size=1, max_size=3), more=st.floats(0, 4)
)
def test_more_memory_never_takes_a_way_away(memory: float, nodes: list[float], more: float) -> None:
    def kinds(extra: float) -> set[str]:
        try:
            given = machines(*(size + extra for size in nodes))
            return {cut.kind for cut in ways_to_cut(FEW, int(memory * GIB), given, 100) if not cut.local}
        except CapacityError:
            return set()

    # With much more memory one machine may take all layers, which is then no longer a cut by layers.
    assert kinds(0.0) - {"by layers", "by slices"} <= kinds(more)


@given(
    total=st.integers(0, 200),
    pairs=st.lists(st.tuples(st.integers(1, 1 << 35), st.integers(0, 100)), min_size=1, max_size=6),
)
def test_divide_gives_everything_within_limits_or_nothing(total: int, pairs: list[tuple[int, int]]) -> None:
    weights, limits = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    given = divide(total, weights, limits)
    if sum(limits) < total:
        assert given is None
        return
    assert given is not None
    assert sum(given) == total
    assert all(0 <= count <= limit for count, limit in zip(given, limits, strict=True))


def test_divide_is_in_proportion() -> None:
    assert divide(128, [16, 32], [200, 200]) == [43, 85]
    assert divide(10, [1, 1, 1], [10, 10, 10]) == [4, 3, 3]
    assert divide(10, [1, 9], [10, 3]) == [7, 3]


def test_the_ways_for_two_boxes() -> None:
    cuts = {cut.name: cut for cut in ways_to_cut(INT4, 24 * GIB, machines(16, 32), 8192)}
    assert list(cuts) == ["by experts", "by layers", "by slices", "replicas", "everything here"]
    small, large = cuts["by experts"].parts
    assert (small.experts[0], small.experts[-1], large.experts[-1]) == (0, 41, 127)
    assert {len(part.columns or ()) for part in cuts["by slices"].parts} == {2}
    assert sum(part.nbytes for part in cuts["replicas"].parts) == 2 * INT4.experts(range(30))
    assert cuts["everything here"].local == tuple(range(30))


def test_layers_stay_where_the_client_has_room() -> None:
    cuts = ways_to_cut(INT4, 8 * GIB, machines(16), 8192)
    assert [cut.name for cut in cuts] == ["by experts", "by experts, 9 here"]
    assert cuts[1].parts[0].flags(INT4) == "--layers 9-29"
    assert cuts[0].parts[0].flags(INT4) == ""


def test_what_does_not_fit_says_by_how_much() -> None:
    need = INT4.experts(range(30)) / GIB
    with pytest.raises(
        CapacityError, match=r"^the experts take 13.3 GiB, the nodes have room for 7.0: 6.3 GiB"
    ) as caught:
        ways_to_cut(INT4, int(3.4 * GIB), machines(4, 4.3), 8192)
    assert need == pytest.approx(13.3, abs=0.05)
    assert caught.value.remedy == "Add a node, or memory."
    with pytest.raises(CapacityError, match=r"no node is given: 42.5 GiB are missing") as caught:
        ways_to_cut(Sizes.of_config(GEMMA), 6 * GIB, [], 8192)
    assert "--quant int4" in caught.value.remedy
    with pytest.raises(CapacityError, match=r"half takes 5.2 GiB with 8192 tokens.*4.3 are missing"):
        ways_to_cut(Sizes.of_config(GEMMA), 1 * GIB, [], 8192)


def test_pieces_may_be_too_large_for_machines_that_together_have_room() -> None:
    one = usable(1 * GIB)
    tiny = [Machine(f"m{i}", 286 << 20) for i in range(200)]  # some bytes less than an expert's layers take
    assert usable(tiny[0].memory) < FEW.experts(range(6), 1) < one
    with pytest.raises(CapacityError, match=r"too large|missing"):
        ways_to_cut(FEW, int(3 * GIB), tiny, 100)


def test_refused() -> None:
    with pytest.raises(UsageError, match="same name"):
        ways_to_cut(INT4, 24 * GIB, [Machine("a", GIB), Machine("a", GIB)], 100)
    dense = replace(GEMMA, enable_moe_block=False, num_experts=0, top_k_experts=0, moe_intermediate_size=0)
    with pytest.raises(UsageError, match="dense"):
        ways_to_cut(Sizes.of_config(dense), 24 * GIB, [], 100)


@given(columns=st.sampled_from([32, 48, 64, 704, 1000]), data=st.data())
def test_slices_can_be_written(columns: int, data: st.DataObject) -> None:
    step = 32 if columns % 32 == 0 and columns > 32 else 1
    low = data.draw(st.integers(0, columns // step - 1))
    high = data.draw(st.integers(low + 1, columns // step))
    span = (low * step, high * step)
    assert parse_slice(slice_text(span, columns), columns, "--slice") == span


def test_the_usual_slices_are_written_as_people_do() -> None:
    assert slice_text((0, 352), 704) == "1/2"
    assert slice_text((352, 704), 704) == "2/2"
    assert slice_text((0, 192), 704) == "0:0.27"


def test_nodes_as_they_are() -> None:
    half = tuple(range(64))
    holdings = [
        ("a:7077", Holding("f", tuple(range(30)), half, "int4")),
        ("b:7077", Holding("f", (3,), half, "int4", (0, 352))),
    ]
    plain, local = cuts_of_holdings(INT4, 8 * GIB, holdings, 8192)
    assert (plain.local, local.local) == ((), tuple(range(9)))
    assert plain.parts[0].nbytes == INT4.experts(range(30), 64)
    assert plain.parts[1].nbytes == INT4.experts([3], 64, (0, 352))
