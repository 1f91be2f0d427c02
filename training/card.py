"""The model card, from the measured figures and `card.md`, and the checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path
from string import Template
from typing import Any

__all__ = ["SHIPPED", "write_card", "write_checksums"]

SHIPPED = (
    "target/config.json",
    "target/generation_config.json",
    "target/model.safetensors",
    "target/tokenizer.json",
    "target/tokenizer_config.json",
    "drafter/config.json",
    "drafter/model.safetensors",
)
_TEMPLATE = Path(__file__).with_name("card.md")


def write_checksums(folder: Path) -> None:
    """`SHA256SUMS` beside the card, in the format that `sha256sum --check` reads."""
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in SHIPPED]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """`README.md` in `folder`: data, licence, recipe, figures, intended use."""
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    values = _sizes(folder) | _recipe(figures) | _measured(figures)
    (folder / "README.md").write_text(template.substitute(values), encoding="utf-8")


def _sizes(folder: Path) -> dict[str, str]:
    sizes = {name: (folder / name).stat().st_size for name in SHIPPED}
    target, drafter = sizes["target/model.safetensors"], sizes["drafter/model.safetensors"]
    return {
        "target_parameters": f"{target / 2e6:.2f} million",
        "target_size": f"{target / 2**20:.1f} MiB",
        "drafter_parameters": f"{drafter / 2e6:.2f} million",
        "drafter_size": f"{drafter / 2**20:.1f} MiB",
        "total_size": f"{sum(sizes.values()) / 2**20:.1f} MiB",
    }


def _recipe(figures: dict[str, Any]) -> dict[str, str]:
    recipe, run = figures["target"], figures["target_run"]
    drafter, drafter_run = figures["drafter"], figures["drafter_run"]
    a = recipe["architecture"]
    return {
        "layers": a["num_hidden_layers"],
        "hidden": a["hidden_size"],
        "dense": a["intermediate_size"],
        "experts": a["num_experts"],
        "top_k": a["top_k_experts"],
        "heads": a["num_attention_heads"],
        "kv_heads": a["num_key_value_heads"],
        "head_dim": a["head_dim"],
        "window": a["sliding_window"],
        "global_kv_heads": a["num_global_key_value_heads"],
        "global_head_dim": a["global_head_dim"],
        "vocabulary": f"{a['vocab_size']:,}",
        "target_tokens": f"{run['tokens'] / 1e6:.1f}",
        "target_steps": f"{run['step']:,.0f}",
        "target_minutes": f"{run['seconds'] / 60:.0f}",
        "rows": recipe["module_rows"] + recipe["test_rows"],
        "stable": f"{recipe['stable']:.0%}",
        "late": f"{recipe['late']:.0%}",
        **{
            name: recipe[name]
            for name in ("length", "matrix_lr", "embedding_lr", "vector_lr", "warmup", "balance")
        },
        "drafter_steps": f"{drafter_run['step']:,.0f}",
        "drafter_minutes": f"{drafter_run['seconds'] / 60:.0f}",
        "draft_depth": drafter["depth"],
        "draft_temperature": drafter["temperature"],
        **{name: figures[name] for name in ("python", "torch", "device")},
    }


def _measured(figures: dict[str, Any]) -> dict[str, str]:
    c = figures["compression"]
    shares = []
    for layer, row in enumerate(c["shares"]):
        ordered = sorted(row)
        quarters = [ordered[min(len(ordered) - 1, len(ordered) * part // 4)] for part in range(5)]
        shares.append(f"| {layer} | " + " | ".join(f"{share:.2f}" for share in quarters) + " |")
    drafts = []
    for row in figures["drafts"]:
        how = "greedy" if row["temperature"] == 0 else f"temperature {row['temperature']}"
        rates = " ".join(f"{rate:.2f}" for rate in row["rates"])
        drafts.append(
            f"| {row['drafter']} | {how} | {row['depth']} | {row['tokens_per_step']:.2f} | {rates} |"
        )
    return {
        "held_out": c["documents"],
        "held_out_bytes": f"{c['bytes']:,}",
        "bits_per_byte": f"{c['bits_per_byte']:.3f}",
        "xz_bits_per_byte": f"{c['xz_bits_per_byte']:.3f}",
        "shares": "\n".join(shares),
        "drafts": "\n".join(drafts),
    }
