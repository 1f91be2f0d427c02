from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

from training import card
from training.card import write_card, write_checksums
from training.drafter import DrafterRecipe
from training.target import TargetRecipe


def test_card_and_checksums_say_what_is_there(tmp_path: Path) -> None:
    for index, name in enumerate(card.SHIPPED):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * (2_000_000 + index))
    run = {"step": 10, "tokens": 2e6, "seconds": 600.0}
    figures = {
        "target": asdict(TargetRecipe()),
        "drafter": asdict(DrafterRecipe()),
        "target_run": run,
        "drafter_run": run,
        "python": "3.11.7",
        "torch": "2.13.0",
        "device": "cpu",
        "compression": {
            "documents": 3,
            "bytes": 12345,
            "bits_per_byte": 1.234,
            "xz_bits_per_byte": 1.789,
            "shares": [[0.5, 1.0, 1.5, 1.0]],
        },
        "drafts": [
            {
                "drafter": "drafter",
                "temperature": 0.7,
                "depth": 2,
                "tokens_per_step": 2.25,
                "rates": (0.75, 0.5),
            }
        ],
    }
    write_card(tmp_path, figures)
    write_checksums(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for expected in (
        "**1.234**",
        "1.789",
        "12,345",
        "| 0 | 0.50 |",
        "| drafter | temperature 0.7 | 2 | 2.25 |",
    ):
        assert expected in text
    for line in (tmp_path / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
