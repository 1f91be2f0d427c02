"""Writes what a run did as a trace: one row for this machine, one for each node, on one time line.

The format is Chrome's trace events ("JSON Object Format", complete events), which chrome://tracing and
https://ui.perfetto.dev open. A node's arithmetic is shown in the middle of its call: clocks are not shared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from splitinfer.errors import UsageError
from splitinfer.timing import Span

__all__ = ["check_trace", "trace_events", "write_trace"]


def trace_events(spans: Sequence[Span], nodes: Iterable[str] = ()) -> dict[str, Any]:
    """The trace as a JSON object: times in microseconds from the first span on, `nodes` in that order."""
    rows = {"": 0, **{node: row for row, node in enumerate(dict.fromkeys(nodes), start=1)}}
    for span in spans:
        rows.setdefault(span.node, len(rows))
    events: list[dict[str, Any]] = []
    for node, row in rows.items():
        name = f"node {node}" if node else "client"
        events.append({"ph": "M", "name": "process_name", "pid": row, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": row, "args": {"sort_index": row}})
    begin = min((span.start for span in spans), default=0.0)
    for span in sorted(spans, key=lambda span: span.start):
        event: dict[str, Any] = {
            "ph": "X",
            "name": span.phase,
            "cat": "node" if span.node else "client",
            "pid": rows[span.node],
            "tid": 0,
            "ts": round((span.start - begin) * 1e6, 1),
            "dur": round((span.end - span.start) * 1e6, 1),
        }
        if span.layer >= 0:
            event["args"] = {"layer": span.layer}
        events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def check_trace(path: str | Path) -> None:
    """See that a trace can be written there, before anything has run for it. Raises UsageError."""
    existed = Path(path).exists()
    try:
        Path(path).open("a").close()
        if not existed:  # what fails before the run leaves nothing behind
            Path(path).unlink()
    except OSError as error:
        raise UsageError(
            f"--trace {path}: {error.strerror}", remedy="Name a file in a folder that can be written to."
        ) from None


def write_trace(path: str | Path, spans: Sequence[Span], nodes: Iterable[str] = ()) -> None:
    """Write `trace_events` to a file."""
    Path(path).write_text(json.dumps(trace_events(spans, nodes)) + "\n", encoding="utf-8")
