from __future__ import annotations

import pytest
import torch

from tests.training.small import SMALL, small_assistant, small_target
from training.decode import Decoding, draft_and_verify, probabilities


@torch.no_grad()
def test_pieces_equal_the_whole_and_rejected_tokens_leave_no_trace() -> None:
    target = small_target()
    ids = torch.randint(0, SMALL.vocab_size, (2, 60), generator=torch.Generator().manual_seed(1))
    expected, _ = target(ids)
    decoding = Decoding(target)
    decoding.feed(ids[:, :30])
    decoding.feed(torch.zeros(2, 4, dtype=torch.int64))
    decoding.truncate(30)
    rest = torch.cat([decoding.feed(ids[:, place : place + 3]) for place in range(30, 60, 3)], dim=1)
    torch.testing.assert_close(rest, expected[:, 30:], atol=1e-5, rtol=0)


def test_greedy_drafting_gives_the_plain_tokens() -> None:
    target = small_target()
    prompt = list(range(2, 22))
    decoding = Decoding(target)
    hidden = decoding.feed(torch.tensor([prompt]))
    plain = list(prompt)
    for _ in range(24):
        plain.append(int(target.logits(hidden[0, -1]).argmax()))
        hidden = decoding.feed(torch.tensor([plain[-1:]]))
    for assistant in (small_assistant(target), None):
        ids, count = draft_and_verify(
            target, assistant, prompt, 20, depth=3, temperature=0.0, generator=torch.Generator()
        )
        assert ids[:44] == plain[: len(ids)][:44]
        assert count.tokens == len(ids) - len(prompt) - 1
        assert count.reached[0] >= count.accepted[0] >= count.reached[1]


@pytest.mark.slow
def test_sampled_drafting_keeps_the_targets_distribution() -> None:
    target = small_target()
    assistant = small_assistant(target)
    prompt = [5, 6, 7, 8]
    generator = torch.Generator().manual_seed(0)
    runs = 1500
    second = torch.zeros(SMALL.vocab_size)
    expected = torch.zeros(SMALL.vocab_size)
    after: dict[int, torch.Tensor] = {}
    for _ in range(runs):
        ids, _ = draft_and_verify(target, assistant, prompt, 2, depth=1, temperature=0.4, generator=generator)
        second[ids[5]] += 1 / runs
        if ids[4] not in after:
            hidden = Decoding(target).feed(torch.tensor([ids[:5]]))
            after[ids[4]] = probabilities(target.logits(hidden[0, -1]).detach(), 0.4)
        expected += after[ids[4]] / runs
    assert (second - expected).abs().sum() / 2 < 0.12
