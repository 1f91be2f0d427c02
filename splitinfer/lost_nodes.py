"""What is said of a node that does not serve: it is late, gone, out of reach, or came back as another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from splitinfer.errors import DeadlineExceeded, PlacementError, TransportError
from splitinfer.placement import Holding, format_ranges

__all__ = ["gone", "late", "naming", "still_holds"]


def late(address: str, layer: int, timeout: float) -> DeadlineExceeded:
    """The node is connected and gave no answer within `timeout` seconds."""
    return DeadlineExceeded(
        f"node {address} gave no answer for layer {layer} within {timeout:g} s",
        timeout=timeout,
        peer=address,
        remedy=f"See whether the node at {address} runs and is not overloaded, or raise --timeout.",
    )


def gone(address: str, experts: Iterable[int], layer: int) -> PlacementError:
    """The only node that holds these experts of a layer is not there."""
    return PlacementError(
        f"node {address} is gone and nobody else holds its experts of layer {layer}",
        gaps=(f"layer {layer}: experts {format_ranges(experts)}",),
        remedy=f"Restart the node at {address}, or start a replica and name it in --nodes.",
    )


def naming(address: str, error: BaseException) -> BaseException:
    """The error of one connection among several, saying which: a parser of bytes does not know its peer."""
    if isinstance(error, TransportError) and address not in str(error):
        error.args = (f"{address}: {error}",)
        error.peer = address
    return error


def still_holds(before: Holding, address: str, info: dict[str, Any]) -> None:
    """A node that came back must hold what it held: the placement was made from it."""
    now = Holding.from_info(info, address)
    if now != before:
        same_model = now.fingerprint == before.fingerprint
        what = str(now) if same_model else f"another model ({now.fingerprint[:12]})"
        raise PlacementError(
            f"node {address} came back holding {what}, not {before}",
            conflicts=(f"{address}: {now}",),
            remedy="Restart the node as it was, or open the engine again.",
        )
