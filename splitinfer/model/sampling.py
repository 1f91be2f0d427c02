"""From logits to the next token: greedy, or drawn from what temperature and filters leave.

The randomness of the n-th token of a reply depends on the seed and on n alone, not on how many draws came
before: a rolled-back draft, a retried step or another sequence in the batch changes nothing. It is one number
per token of the vocabulary, and the likeliest token in the light of those is taken (the Gumbel-max method, as
a race of exponential clocks). Two models that draw for the same n so choose the same token with probability
at least (1 - d) / (1 + d), d their total variation distance, without knowing of each other: what lets drafts
be verified by comparing tokens, with the very tokens of plain decoding (Daliri, Musco, Suresh 2024).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splitinfer.errors import SplitinferError, UsageError

__all__ = ["Sampler", "SamplingParams"]

NUCLEUS_START = (
    256  # candidates sorted first for top_p; the whole vocabulary only where these hold too little
)
MAX_SEED = 1 << 64


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The filters apply in this order, as in transformers.

    repetition_penalty   > 1 makes tokens of the context less likely (Keskar et al. 2019, section 4.1)
    temperature          0 takes the most likely token; else logits are divided by it
    top_k                keep the k most likely tokens; 0 keeps all
    top_p                keep the fewest tokens whose probabilities reach p; 1 keeps all
    min_p                keep tokens at least this probable relative to the most likely one; 0 keeps all
    seed                 the same seed gives the same tokens; None draws one
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        finite = math.inf
        _number("temperature", self.temperature, 0 <= _real(self.temperature) < finite, "0 or more")
        _number("top_p", self.top_p, 0 < _real(self.top_p) <= 1, "above 0 and at most 1")
        _number("min_p", self.min_p, 0 <= _real(self.min_p) <= 1, "between 0 and 1")
        penalty = _real(self.repetition_penalty)
        _number("repetition_penalty", self.repetition_penalty, 0 < penalty < finite, "above 0")
        _number("top_k", self.top_k, _whole(self.top_k), "a whole number, 0 or more")
        seeded = self.seed is None or (_whole(self.seed) and self.seed < MAX_SEED)
        _number("seed", self.seed, seeded, "a whole number, 0 or more, of at most 64 bits")


def _real(value: object) -> float:
    """The number, or NaN, which no comparison holds for."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(name: str, value: object, valid: bool, rule: str) -> None:
    if not valid:
        raise UsageError(f"{name} is {value!r}", remedy=f"Choose {rule} for {name}.")


class Sampler:
    """Chooses the tokens of one reply."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed

    def __call__(self, logits: Tensor, index: int = 0, context: Sequence[int] = ()) -> int:
        """The token for logits [V] float32. `index` counts the reply's tokens; `context` is what precedes.

        Greedy takes the lowest id of equal logits. Raises SplitinferError where the logits are not numbers.
        """
        logits = self._penalised(logits, context)
        if self.params.temperature == 0:
            token = int(logits.argmax())
            if math.isnan(logits[token]):
                raise SplitinferError("the model's logits are not numbers")
            return token
        ids, probabilities = self._filtered(logits)
        return int(ids[(self._clocks(index, ids) / probabilities).argmin()])

    def distribution(self, logits: Tensor, context: Sequence[int] = ()) -> Tensor:
        """The probabilities [V] float64 that tokens are drawn with; one-hot for greedy."""
        logits = self._penalised(logits, context)
        full = torch.zeros(len(logits), dtype=torch.float64)
        if self.params.temperature == 0:
            full[int(logits.argmax())] = 1.0
            return full
        ids, probabilities = self._filtered(logits)
        full[ids] = probabilities / probabilities.sum()
        return full

    def _penalised(self, logits: Tensor, context: Sequence[int]) -> Tensor:
        logits = logits.cpu()
        penalty = self.params.repetition_penalty
        if penalty == 1 or not context:
            return logits
        seen = torch.tensor(sorted(set(context)))
        logits = logits.clone()
        at = logits[seen]
        logits[seen] = torch.where(at > 0, at / penalty, at * penalty)
        return logits

    def _filtered(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Ids left by the filters, and their probabilities up to a common factor, float64."""
        params = self.params
        largest = logits.max()
        if not math.isfinite(largest):
            raise SplitinferError("the model's logits are not finite numbers")
        # The most likely token has weight 1. Subtracting first keeps the smallest temperature finite.
        weights = logits.double().sub_(largest).div_(params.temperature).exp_()
        ids = torch.arange(len(weights))
        if 0 < params.top_k < len(weights):
            weights, ids = weights.topk(params.top_k)
        if params.top_p < 1:
            weights, ids = _nucleus(weights, ids, params.top_p)
        if params.min_p > 0:
            kept = weights >= params.min_p
            weights, ids = weights[kept], ids[kept]
        return ids, weights

    def _clocks(self, index: int, ids: Tensor) -> Tensor:
        """Exponentially distributed numbers, float64, one for each of `ids`, by seed, index and id."""
        key = self.seed.to_bytes(8, "little") + index.to_bytes(8, "little")
        start = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        # SplitMix64 (Steele, Lea, Flood 2014): the id-th number of the stream that begins at `start`.
        bits = ids.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return torch.from_numpy(-np.log(uniform))


def _nucleus(weights: Tensor, ids: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest entries whose weights reach the part `top_p` of their sum (Holtzman et al. 2020)."""
    bound = float(weights.sum()) * top_p
    count = NUCLEUS_START
    while True:
        count = min(count, len(weights))
        top, order = weights.topk(count)
        cumulative = top.cumsum(0)
        if count == len(weights) or float(cumulative[-1]) >= bound:
            break
        count *= 8
    kept = min(count, int(torch.searchsorted(cumulative, bound)) + 1)
    return top[:kept], ids[order[:kept]]
