"""llama.cpp itself, in a process of its own: what it makes of a GGUF file, and files that it quantises.

Run as a script by `logits`: an assertion in ggml ends the process that it happens in.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

__all__ = ["logits", "needs_llama_cpp", "quantised", "tokens"]

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (bench extra)"
)


def logits(path: Path, ids: Sequence[int]) -> torch.Tensor:
    """llama.cpp's logits [n, vocab] float32 after each of the tokens."""
    out = path.with_suffix(".npy")
    _run("logits", path, out, *map(str, ids))
    return torch.from_numpy(np.load(out))


def tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """llama.cpp's token ids of each text, special tokens parsed, <bos> first."""
    return [[int(i) for i in line.split()] for line in _run("tokens", path, *texts).splitlines()]


def quantised(path: Path, out: Path, kind: str) -> Path:
    """The file as llama.cpp's own quantiser writes it: `kind` such as "Q4_K_M"."""
    _run("quantise", path, out, kind)
    return out


def _run(what: str, *args: object) -> str:
    command = [sys.executable, __file__, what, *map(str, args)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def _main(what: str, path: str, *args: str) -> None:
    import llama_cpp

    if what == "quantise":
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{args[1]}")
        params.nthread = 1
        assert llama_cpp.llama_model_quantize(path.encode(), args[0].encode(), params) == 0
        return
    float32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        path,
        n_ctx=256,
        n_batch=256,
        n_threads=1,
        logits_all=True,
        type_k=float32,
        type_v=float32,
        verbose=False,
    )
    if what == "tokens":
        for text in args:
            print(*model.tokenize(text.encode(), add_bos=True, special=True))
    else:
        ids = [int(i) for i in args[1:]]
        model.eval(ids)
        np.save(args[0], model.scores[: len(ids)])


if __name__ == "__main__":
    _main(*sys.argv[1:])
