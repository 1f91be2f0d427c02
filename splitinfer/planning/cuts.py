"""Ways to cut a model over machines of given memory, and what each of them then holds.

By experts (ranges in proportion to memory), by layers, by slices of every expert, or everything on every
machine (replicas); each with none, or with as many whole layers as fit, on the client. A cut that does not
fit is not among them; where none fits, the error says by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from splitinfer.errors import CapacityError, UsageError
from splitinfer.model.footprint import PROGRAM_NBYTES, Footprint, Sizes
from splitinfer.placement import Columns, Holding, format_ranges, parse_slice, slice_step

__all__ = ["Cut", "Machine", "Part", "cuts_of_holdings", "divide", "usable", "ways_to_cut"]

SPARE = 0.1  # of a machine's memory, which stays with its system


@dataclass(frozen=True)
class Machine:
    """A node to be: its name, which is where the client will look for it, and its memory in bytes.
    `bandwidth` is what it reads from memory, in bytes/s; 0 means: as this machine."""

    name: str
    memory: int
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Part:
    """What one machine holds: `experts` of `layers`, or the slice `columns` of them. `nbytes` of weights."""

    machine: Machine
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    columns: Columns | None
    nbytes: int

    def flags(self, sizes: Sizes) -> str:
        """The options of `splitinfer node` that make it hold this."""
        config, flags = sizes.config, []
        if len(self.experts) < config.num_experts:
            flags.append(f"--experts {format_ranges(self.experts)}")
        if len(self.layers) < config.num_hidden_layers:
            flags.append(f"--layers {format_ranges(self.layers)}")
        if self.columns is not None:
            flags.append(f"--slice {slice_text(self.columns, config.moe_intermediate_size)}")
        return " ".join(flags)


@dataclass(frozen=True)
class Cut:
    """One way: what each machine holds, the layers whose experts stay on the client, and the client's
    memory."""

    kind: str
    parts: tuple[Part, ...]
    local: tuple[int, ...]
    client: Footprint

    @property
    def name(self) -> str:
        if not self.parts:
            return "everything here"
        return f"{self.kind}, {len(self.local)} here" if self.local else self.kind


def usable(memory: int) -> int:
    """Bytes of a machine's memory that weights and caches may take."""
    return max(0, int(memory * (1 - SPARE)) - PROGRAM_NBYTES)


def ways_to_cut(
    sizes: Sizes, memory: int, machines: Sequence[Machine], context: int, *, int8_cache: bool = False
) -> list[Cut]:
    """Every cut that fits: a client of `memory` bytes with a cache of `context` tokens, and `machines`.

    Raises CapacityError where none does, saying what is missing, and UsageError for a model without experts
    or a machine named twice.
    """
    config = sizes.config
    if not config.enable_moe_block:
        raise UsageError(
            "a dense model has no experts to put on nodes", remedy="Name a model with a mixture of experts."
        )
    names = [machine.name for machine in machines]
    if len(set(names)) < len(names):
        raise UsageError(
            "two nodes have the same name", remedy="Give each its own: --node a=16GiB --node b=16GiB."
        )
    layers = range(config.num_hidden_layers)
    fitting = _layers_here(sizes, memory, context, int8_cache)
    cuts: list[Cut] = []
    for here in sorted({0, fitting} if machines else {fitting}):
        local, remote = tuple(layers[:here]), tuple(layers[here:])
        client = sizes.client(context, local, int8_cache=int8_cache)
        if not remote:
            cuts.append(Cut("everything here", (), local, client))
            continue
        for kind, cut in KINDS.items():
            if machines and (parts := cut(sizes, machines, remote)):
                cuts.append(Cut(kind, parts, local, client))
    if not cuts:
        raise _too_little(sizes, machines, layers[fitting:], here=fitting)
    return cuts


def cuts_of_holdings(
    sizes: Sizes,
    memory: int,
    holdings: Sequence[tuple[str, Holding]],
    context: int,
    *,
    int8_cache: bool = False,
) -> list[Cut]:
    """Nodes that hold what they hold, with no layers on a client of `memory` bytes, and with as many as
    fit."""
    parts = tuple(
        Part(
            Machine(address, 0),
            own.layers,
            own.experts,
            own.columns,
            sizes.experts(own.layers, len(own.experts), own.columns),
        )
        for address, own in holdings
    )
    fitting = min(_layers_here(sizes, memory, context, int8_cache), sizes.config.num_hidden_layers - 1)
    ways = (tuple(range(here)) for here in sorted({0, fitting}))
    return [
        Cut("as they are", parts, local, sizes.client(context, local, int8_cache=int8_cache))
        for local in ways
    ]


def _layers_here(sizes: Sizes, memory: int, context: int, int8_cache: bool) -> int:
    """How many layers' experts fit beside the client's half. Raises CapacityError where that alone does
    not."""
    half = sizes.client(context, int8_cache=int8_cache)
    room = usable(memory) - (half.total - half.program)
    if room < 0:
        raise CapacityError(
            f"the client's half takes {_gib(half.total)} GiB with {context} tokens of context; of this "
            f"machine's {_gib(memory)} GiB {_gib(-room)} are missing",
            remedy="Lower --context, or hold it in fewer bits: --quant int4, --kv-cache int8, ...",
        )
    layers = range(sizes.config.num_hidden_layers)
    return next((n for n in layers if sizes.experts(layers[: n + 1]) > room), len(layers))


def divide(total: int, weights: Sequence[int], limits: Sequence[int]) -> list[int] | None:
    """`total` whole things in proportion to `weights`, none beyond its limit; None where they do not fit."""
    if sum(limits) < total or not sum(weights):
        return None
    ideal = [total * weight / sum(weights) for weight in weights]
    given = [min(int(share), limit) for share, limit in zip(ideal, limits, strict=True)]
    while sum(given) < total:
        open_ = [i for i, limit in enumerate(limits) if given[i] < limit]
        most = max(open_, key=lambda i: (ideal[i] - given[i], limits[i] - given[i], -i))
        # All that is left at once where only one can take it: limits may be far from proportions.
        given[most] += total - sum(given) if len(open_) == 1 else 1
    return given


def _by_experts(sizes: Sizes, machines: Sequence[Machine], layers: Sequence[int]) -> tuple[Part, ...]:
    each = sizes.experts(layers, 1)
    rooms = [usable(machine.memory) for machine in machines]
    counts = divide(sizes.config.num_experts, rooms, [room // each for room in rooms])
    return tuple(
        Part(machine, tuple(layers), tuple(run), None, sizes.experts(layers, len(run)))
        for machine, run in _runs(machines, counts)
    )


def _by_layers(sizes: Sizes, machines: Sequence[Machine], layers: Sequence[int]) -> tuple[Part, ...]:
    largest = max(sizes.experts([layer]) for layer in layers)
    rooms = [usable(machine.memory) for machine in machines]
    counts = divide(len(layers), rooms, [room // largest for room in rooms])
    every = tuple(range(sizes.config.num_experts))
    held = ((machine, tuple(layers[i] for i in run)) for machine, run in _runs(machines, counts))
    return tuple(Part(machine, own, every, None, sizes.experts(own)) for machine, own in held)


def _by_slices(sizes: Sizes, machines: Sequence[Machine], layers: Sequence[int]) -> tuple[Part, ...]:
    columns = sizes.config.moe_intermediate_size
    step = slice_step(columns)
    each = sizes.experts(layers, columns=(0, step))
    rooms = [usable(machine.memory) for machine in machines]
    counts = divide(columns // step, rooms, [room // each for room in rooms])
    every = tuple(range(sizes.config.num_experts))
    spans = ((m, (run.start * step, run.stop * step)) for m, run in _runs(machines, counts))
    return tuple(
        Part(machine, tuple(layers), every, span, sizes.experts(layers, columns=span))
        for machine, span in spans
    )


def _replicas(sizes: Sizes, machines: Sequence[Machine], layers: Sequence[int]) -> tuple[Part, ...]:
    nbytes, every = sizes.experts(layers), tuple(range(sizes.config.num_experts))
    if any(usable(machine.memory) < nbytes for machine in machines):
        return ()
    return tuple(Part(machine, tuple(layers), every, None, nbytes) for machine in machines)


def _with_several(cut: Callable[..., tuple[Part, ...]]) -> Callable[..., tuple[Part, ...]]:
    """A cut that is none where one machine holds everything: that is the cut by experts, or no replica."""

    def checked(sizes: Sizes, machines: Sequence[Machine], layers: Sequence[int]) -> tuple[Part, ...]:
        parts = cut(sizes, machines, layers)
        return parts if len(parts) > 1 else ()

    return checked


KINDS = {
    "by experts": _by_experts,
    "by layers": _with_several(_by_layers),
    "by slices": _with_several(_by_slices),
    "replicas": _with_several(_replicas),
}


def slice_text(columns: Columns, whole: int) -> str:
    """The shortest way to write a slice so that `parse_slice` gives exactly these columns."""
    low, high = columns
    for text in _spellings(low, high, whole):
        try:
            if parse_slice(text, whole, "--slice") == columns:
                return text
        except UsageError:
            continue
    raise AssertionError(f"nine digits tell columns {columns} of {whole} apart")


def _spellings(low: int, high: int, whole: int) -> Iterator[str]:
    width = high - low
    if whole % width == 0 and low % width == 0:
        yield f"{low // width + 1}/{whole // width}"
    for digits in range(1, 10):
        yield ":".join(f"{round(edge / whole, digits):.9f}".rstrip("0").rstrip(".") for edge in (low, high))


def _runs(machines: Sequence[Machine], counts: Sequence[int] | None) -> Iterator[tuple[Machine, range]]:
    """Consecutive runs of so many, for the machines that get any."""
    low = 0
    for machine, count in zip(machines, counts or [0] * len(machines), strict=True):
        if count:
            yield machine, range(low, low + count)
        low += count


def _too_little(sizes: Sizes, machines: Sequence[Machine], layers: Sequence[int], here: int) -> CapacityError:
    """What the machines lack of the experts that the client has no room for."""
    need, room = sizes.experts(layers), sum(usable(machine.memory) for machine in machines)
    whose = "no node is given" if not machines else f"the nodes have room for {_gib(room)}"
    # Whole experts and layers do not fill every machine: then the sum would fit and the pieces do not.
    short = f"{_gib(need - room)} GiB are missing" if need > room else "its pieces are too large for them"
    some = f" beside the {here} layers that fit here" if here else ""
    remedy = "Add a node, or memory"
    if sizes.quant.experts not in ("int4", "int8"):
        remedy += ", or hold the experts in four bits: --quant int4"
    return CapacityError(f"the experts{some} take {_gib(need)} GiB, {whose}: {short}", remedy=remedy + ".")


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f}"
