"""The training loop that target and drafter share: schedule, budget, progress, checkpoints."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from training.state import load_state, save_state

__all__ = ["ActiveClock", "Budget", "learning_rate", "train"]

_CHECKPOINT_SECONDS = 180.0
_CLIP = 1.0


class ActiveClock:
    """Seconds spent training. A pause (the process stopped, the machine asleep) counts as one ordinary
    step.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._recent: deque[float] = deque(maxlen=31)
        self._last = time.monotonic()

    def tick(self) -> float:
        now = time.monotonic()
        passed, self._last = now - self._last, now
        usual = statistics.median(self._recent) if len(self._recent) >= 5 else passed
        passed = min(passed, 5 * usual)
        self._recent.append(passed)
        self.seconds += passed
        return passed

    def skip(self) -> None:
        """Forget the time since the last tick (compilation, measuring, writing)."""
        self._last = time.monotonic()


@dataclass(frozen=True)
class Budget:
    """Training ends when either is used up; the learning rate follows the larger part."""

    tokens: int
    minutes: float

    def progress(self, tokens: float, seconds: float) -> float:
        return min(1.0, max(tokens / self.tokens, seconds / 60 / self.minutes))


def learning_rate(progress: float, step: int, warmup: int, stable: float) -> float:
    """The part of the peak rate: linear warm-up, level until `stable` of the budget, then linear to zero."""
    return min(1.0, (step + 1) / warmup, (1.0 - progress) / (1.0 - stable))


def train(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[int, float], tuple[Tensor, int]],
    *,
    name: str,
    budget: Budget,
    folder: Path,
    warmup: int,
    stable: float,
    report: Callable[[], str] | None = None,
    report_seconds: float = 1200.0,
    console: Console,
) -> dict[str, float]:
    """Run until the budget is used up. `loss_of(step, progress)` returns the loss and its tokens. `report`
    runs now and then and returns a line to print. Resumes from `folder`; returns the counters.
    """
    counters = load_state(folder, model, optimizers) or {"step": 0, "tokens": 0, "seconds": 0.0}
    clock = ActiveClock(counters["seconds"])
    saved = reported = counters["seconds"]
    begun = int(counters["step"])
    smooth = math.nan
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(name, total=1.0, figures="")
        while (progress := budget.progress(counters["tokens"], clock.seconds)) < 1.0:
            step = int(counters["step"])
            factor = learning_rate(progress, step, warmup, stable)
            loss, tokens = loss_of(step, progress)
            value = _descend(model, optimizers, loss, factor)
            if not math.isfinite(value):
                raise RuntimeError(f"the loss of step {step} is {value}; lower the learning rate")
            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            if step < begun + 2:
                clock.skip()  # compilation
            passed = clock.tick()
            counters.update(step=step + 1, tokens=counters["tokens"] + tokens, seconds=clock.seconds)
            figures = f"step {step + 1}  loss {smooth:.3f}  {tokens / max(passed, 1e-9):,.0f} tokens/s"
            bar.update(task, completed=progress, figures=figures)
            if not console.is_terminal and (step + 1) % 100 == 0:
                console.print(
                    f"{name} {progress:6.1%}  {figures}  {clock.seconds / 60:.1f} min", highlight=False
                )
            if clock.seconds - saved > _CHECKPOINT_SECONDS:
                save_state(folder, model, optimizers, counters)
                saved = clock.seconds
                clock.skip()
            if report is not None and clock.seconds - reported > report_seconds:
                console.print(f"{name}: {report()}", highlight=False)
                reported = clock.seconds
                clock.skip()
    save_state(folder, model, optimizers, counters)
    return counters


def _descend(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], loss: Tensor, factor: float
) -> float:
    """One step down the gradient of `loss`, at this part of the peak rate; returns the value of `loss`."""
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()
