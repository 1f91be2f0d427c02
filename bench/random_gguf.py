"""A GGUF file with the true shapes of Gemma 4 26B-A4B and random Q4_0 weights, any number of layers.

    python bench/random_gguf.py FILE.gguf                  6 layers, 3.2 GB
    python bench/random_gguf.py FILE.gguf --layers 30      the whole size, 14.4 GB

Every matrix is Q4_0, the embedding that is lm_head too included, so that llama.cpp and this library compute
with the same bits (llama.cpp's own quantiser would leave that one in Q6_K: --head Q6_K). Norms and the router
are float32. Blocks are drawn as bytes, tensor by tensor: 0.3 GB of memory. Text from it says nothing.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import gguf
import numpy as np
from gguf_metadata import describe_gemma4, rope_factors
from random_model import RandomCheckpoint

from splitinfer.model.config import ModelConfig
from splitinfer.model.gguf import gguf_name
from splitinfer.model.weights import expected_tensors

__all__ = ["HEADS", "write"]

Type = gguf.GGMLQuantizationType
HEADS = {"Q4_0": Type.Q4_0, "Q6_K": Type.Q6_K}
PIECE = 1 << 26  # bytes drawn at a time


def write(path: Path, layers: int, head: str = "Q4_0", experts: int = 128, vocab: int = 262_144) -> None:
    """Writes under another name first, so that a run that is stopped leaves no file that looks whole."""
    source = RandomCheckpoint(layers, experts, vocab)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, "gemma4")
    describe_gemma4(writer, source.config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    _add_words(writer, source.config)
    kinds = {name: _kind(name, shape, head) for name, shape in expected_tensors(source.config)}
    factors = rope_factors(source.config)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, kind in kinds.items():
        shape = source.shapes[name]
        count = math.prod(shape)
        if kind is None:
            writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), 4 * count)
        else:
            size, nbytes = gguf.GGML_QUANT_SIZES[kind]
            stored = [*shape[:-1], shape[-1] // size * nbytes]
            writer.add_tensor_info(
                gguf_name(name), stored, np.dtype(np.uint8), count // size * nbytes, raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(factors)
    generator = np.random.default_rng(0)
    for name, kind in kinds.items():
        if kind is None:
            writer.write_tensor_data(source.tensor(name).float().numpy())
        else:
            writer.write_tensor_data(_blocks(source.shapes[name], kind, generator))
    writer.close()
    part.replace(path)


def _kind(name: str, shape: tuple[int, ...], head: str) -> Type | None:
    """The type of a matrix; None for what stays in float32."""
    if len(shape) == 1 or name.endswith("router.proj.weight"):
        return None
    return HEADS[head] if name == "embed_tokens.weight" else Type.Q4_0


def _blocks(shape: tuple[int, ...], kind: Type, generator: np.random.Generator) -> np.ndarray:
    """Random blocks whose weights keep the scale of their input. Signs of the factors are drawn too, else all
    rows of a matrix would share a mean, and all tokens their experts."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.empty((math.prod(shape) // size, nbytes), dtype=np.uint8)
    step = PIECE // nbytes
    for lo in range(0, len(blocks), step):
        piece = blocks[lo : lo + step]
        piece[:] = np.frombuffer(generator.bytes(piece.nbytes), dtype=np.uint8).reshape(piece.shape)
    std = shape[-1] ** -0.5
    signs = generator.integers(0, 2, len(blocks), dtype=np.uint16) << 15
    if kind is Type.Q4_0:  # a factor, then nibbles: a spread of 4.6 steps
        factor, at = np.float16(std / 4.6), 0
    else:  # Q6_K: 32 steps, times scales of 8 bits, which are set to 64; a spread of 18.5 steps
        factor, at = np.float16(std / 18.5 / 64), nbytes - 2
        blocks[:, at - 16 : at] = 64
    blocks[:, at : at + 2] = (factor.view(np.uint16) ^ signs).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], -1)


def _add_words(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """A vocabulary of made-up words."""
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [3, 3, 3, 2, *[6] * 256]
    tokens += [f"▁w{i:x}" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(kinds + [1] * (len(tokens) - len(kinds)))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="FILE")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--head", choices=list(HEADS), default="Q4_0")
    arguments = parser.parse_args()
    write(arguments.path, arguments.layers, arguments.head)
    print(f"{arguments.path}: {arguments.path.stat().st_size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
