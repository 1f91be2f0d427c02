"""Sampling against the definition of each filter, and drawn frequencies against the distribution."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.errors import SplitinferError, UsageError
from splitinfer.model.sampling import Sampler, SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5, 3.0, -30.0])
DRAWS = 20_000


def counts(params: SamplingParams, logits: torch.Tensor = LOGITS) -> Counter[int]:
    sampler = Sampler(params)
    return Counter(sampler(logits, index) for index in range(DRAWS))


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-squared over tokens with more than a few expected draws; nothing outside the support is drawn."""
    settings_ = SamplingParams(**params, seed=7)
    expected = Sampler(settings_).distribution(LOGITS) * DRAWS
    found = counts(settings_)
    assert all(expected[token] > 0 for token in found)
    tested = [t for t in range(len(LOGITS)) if expected[t] > 5]
    chi2 = sum((found[t] - float(expected[t])) ** 2 / float(expected[t]) for t in tested)
    assert chi2 < 25  # seven tokens at most: p < 0.001 above 22.5; the seed is fixed


def test_distribution_of_plain_temperature_is_the_softmax() -> None:
    found = Sampler(SamplingParams(temperature=0.7)).distribution(LOGITS)
    torch.testing.assert_close(found, torch.softmax(LOGITS.double() / 0.7, 0))


def test_filters_keep_what_they_say() -> None:
    softmax = torch.softmax(LOGITS.double(), 0)  # 1 and 5 have 0.39 each, 2 has 0.14, 0 has 0.05

    def kept(**params: Any) -> set[int]:
        probabilities = Sampler(SamplingParams(temperature=1.0, **params)).distribution(LOGITS)
        ids = set(probabilities.nonzero().flatten().tolist())
        torch.testing.assert_close(probabilities[list(ids)], softmax[list(ids)] / softmax[list(ids)].sum())
        return ids

    assert kept(top_k=3) == {1, 5, 2}
    assert kept(top_k=100) == set(range(7))
    assert kept(top_p=0.5) == {1, 5}
    assert kept(top_p=0.9) == {1, 5, 2}
    assert len(kept(top_p=0.1)) == 1
    assert kept(min_p=0.3) == {1, 5, 2}
    assert kept(top_k=3, top_p=0.83) == {1, 5}  # the nucleus of what top_k left


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 0.99), st.floats(0.1, 20), st.integers(0, 1000))
def test_nucleus_of_a_large_vocabulary(top_p: float, spread: float, seed: int) -> None:
    """The fewest tokens that reach top_p, found without sorting everything."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * spread
    found = Sampler(SamplingParams(temperature=1.0, top_p=top_p)).distribution(logits)
    ordered = torch.softmax(logits.double(), 0).sort(descending=True).values
    fewest = int((ordered.cumsum(0) < top_p * (1 - 1e-9)).sum()) + 1
    assert abs(int(found.count_nonzero()) - min(fewest, 5000)) <= 1  # one for rounding at the very edge
    assert found.sum() == pytest.approx(1)


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler(SamplingParams())(LOGITS) == 1
    assert Sampler(SamplingParams())(torch.zeros(100_000)) == 0
    assert Sampler(SamplingParams()).distribution(LOGITS).tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    params = SamplingParams(temperature=2.0, seed=3)
    tokens = [Sampler(params)(LOGITS, index) for index in range(50)]
    torch.manual_seed(0)
    sampler = Sampler(params)
    backwards = [sampler(LOGITS, index) for index in reversed(range(50))]
    assert backwards[::-1] == tokens
    other = Sampler(SamplingParams(temperature=2.0, seed=4))
    assert [other(LOGITS, index) for index in range(50)] != tokens


def test_without_a_seed_replies_differ() -> None:
    params = SamplingParams(temperature=5.0)
    replies = {tuple(Sampler(params)(LOGITS, i) for i in range(30)) for _ in range(3)}
    assert len(replies) == 3
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Sampler(params)(LOGITS)
    assert torch.equal(torch.get_rng_state(), state)


def test_repetition_penalty() -> None:
    """Positive logits are divided, negative ones multiplied, once per distinct token; the input is kept."""
    params = SamplingParams(temperature=1.0, repetition_penalty=2.0)
    logits = LOGITS.clone()
    found = Sampler(params).distribution(logits, [1, 3, 1])
    expected = torch.tensor([1.0, 1.5, 2.0, -2.0, 0.5, 3.0, -30.0]).double()
    torch.testing.assert_close(found, torch.softmax(expected, 0))
    assert torch.equal(logits, LOGITS)
    assert Sampler(SamplingParams(repetition_penalty=2.0))(LOGITS, context=[1]) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature: float) -> None:
    bad = LOGITS.clone()
    bad[3] = math.nan
    with pytest.raises(SplitinferError, match=r"not .*numbers"):
        Sampler(SamplingParams(temperature=temperature))(bad)


def test_masked_tokens_are_never_drawn() -> None:
    masked = torch.full((50,), -math.inf)
    masked[17] = 0.0
    sampler = Sampler(SamplingParams(temperature=5e-324, seed=0))
    assert {sampler(masked, i) for i in range(100)} == {17}
    sampler = Sampler(SamplingParams(temperature=100.0, top_p=0.99, seed=0))
    assert {sampler(masked, i) for i in range(100)} == {17}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", True),
        ("seed", -1),
        ("seed", 1 << 64),
        ("seed", "1"),
    ],
)
def test_parameters_that_cannot_be(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert name in caught.value.remedy
