"""Gemma 4's multi-token-prediction assistant: a small network that drafts by reading the target's own state.

At position t it knows the target's embedding of token t, the target's final hidden state of position t - 1,
and the target's keys and values up to t - 1 of its last sliding and its last full layer. It has no cache:
every further draft feeds its own projected state back, at the same position with the same keys and values.
Reference: transformers' `models/gemma4_assistant`.

Shape letters: H hidden_size of the assistant, B of the target, N query heads, V key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from splitinfer.errors import CheckpointError, UnsupportedModelError
from splitinfer.model.attention import Block, attend
from splitinfer.model.cache import Held
from splitinfer.model.config import AttentionConfig, ModelConfig, read_json, read_text_config
from splitinfer.model.linear import Linear
from splitinfer.model.mapped import MappedFile
from splitinfer.model.native import DTYPES, kernels
from splitinfer.model.quantize import natural_format, quantize
from splitinfer.model.rotary import Rotary, Rotation
from splitinfer.model.row_kernels import row_ops
from splitinfer.model.rows import Dense

__all__ = ["ASSISTANT", "Assistant", "AssistantConfig", "KeysValues", "load_assistant_config"]

ASSISTANT = "gemma4_assistant"  # the model_type
FETCH = "Fetch the assistant again."

KeysValues = dict[str, tuple[Tensor, Tensor]]  # by layer type: keys and values [V, positions, D]


@dataclass(frozen=True)
class AssistantConfig:
    """`text` is the assistant's own trunk; `backbone_hidden_size` the target's. With `num_centroids` 0 the
    head is plain; else the vocabulary is ordered in that many clusters, of which `top_centroids` are
    scored."""

    text: ModelConfig
    backbone_hidden_size: int
    num_centroids: int
    top_centroids: int


def load_assistant_config(path: str | Path) -> AssistantConfig:
    """Read `path`/config.json of a `gemma4_assistant` checkpoint.

    Raises CheckpointError for what is missing or damaged, UnsupportedModelError for another architecture.
    """
    file = Path(path) / "config.json"
    outer = read_json(file)
    text = outer.get("text_config")
    if outer.get("model_type") != ASSISTANT or not isinstance(text, dict):
        raise UnsupportedModelError(
            f"{file}: model_type {outer.get('model_type')!r} is no assistant",
            feature=f"model_type={outer.get('model_type')}",
            path=str(file),
            remedy=f"Use a checkpoint with model_type {ASSISTANT}.",
        )
    # Every layer shares the target's keys and values: that is what an assistant is, not an option of it.
    config = read_text_config(file, {**text, "num_kv_shared_layers": 0}, outer)
    if config.enable_moe_block:
        raise UnsupportedModelError(
            f"{file}: an assistant with a mixture of experts is not implemented",
            feature="enable_moe_block=True",
            path=str(file),
        )
    sizes = {"backbone_hidden_size": 1536, "num_centroids": 2048, "centroid_intermediate_top_k": 32}
    for key, default in sizes.items():
        value = outer.get(key, default)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{file}: {key} has to be a positive integer and is {value!r}", path=str(file), remedy=FETCH
            )
        sizes[key] = value
    centroids, top = sizes["num_centroids"], sizes["centroid_intermediate_top_k"]
    if not outer.get("use_ordered_embeddings", False):
        centroids = 0
    elif config.vocab_size % centroids or top > centroids:
        raise CheckpointError(
            f"{file}: {centroids} clusters, {top} of them scored, do not divide {config.vocab_size} tokens",
            path=str(file),
            remedy=FETCH,
        )
    return AssistantConfig(config, sizes["backbone_hidden_size"], centroids, top)


class Assistant:
    """The network. It computes in `dtype` on `device`; its methods expect tensors that are there."""

    def __init__(self, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load a `gemma4_assistant` directory.

        Raises CheckpointError, naming file and tensor, for what is missing or misshapen.
        """
        self.config = load_assistant_config(path)
        weights = _Weights(Path(path) / "model.safetensors", device, dtype)
        text = self.config.text
        vocab, hidden, backbone = text.vocab_size, text.hidden_size, self.config.backbone_hidden_size
        self.device, self.dtype = device, dtype
        self._eps = text.rms_norm_eps
        self._ops = row_ops(device, dtype)
        self._input = weights.linear(("pre_projection", hidden, 2 * backbone))
        self._output = weights.linear(("post_projection", backbone, hidden))
        self._norm = weights.scale("model.norm", hidden)
        self._layers = [
            _Layer(weights, f"model.layers.{i}.", text, shape) for i, shape in enumerate(text.attention)
        ]
        self._rotary = {a.layer_type: Rotary(a, device) for a in text.attention}
        if self.config.num_centroids:
            clusters = self.config.num_centroids
            self._rows = weights("model.embed_tokens.weight", vocab, hidden)
            self._centroids = weights.linear(("masked_embedding.centroids", clusters, hidden))
            order = weights.integers("masked_embedding.token_ordering", vocab)
            self._clusters = order.view(clusters, vocab // clusters)
        else:
            self._head = weights.linear(("model.embed_tokens", vocab, hidden))

    def rotations(self, position: int) -> dict[str, Rotation]:
        """The rotary factors of one position, for `states`."""
        return {kind: rotary.at([(position, position + 1)]) for kind, rotary in self._rotary.items()}

    def states(
        self, embedded: Tensor, hidden: Tensor, rotations: dict[str, Rotation], shared: KeysValues
    ) -> tuple[Tensor, Tensor]:
        """One draft, from the target's scaled embedding of the last token [1, B] and the state before it.

        Returns what `logits` takes [1, H], and the state [1, B] to feed back with the next token.
        """
        x = self._input(torch.cat((embedded, hidden), dim=-1))
        for layer in self._layers:
            keys, values = shared[layer.kind]
            x = layer(x, rotations[layer.kind], keys, values)
        x = self._ops.norm(x, self._norm, self._eps, x.dtype)
        return x, self._output(x)

    def logits(self, x: Tensor) -> Tensor:
        """[vocab_size] float32, of the first of `states`."""
        if not self.config.num_centroids:
            return self._head(x, torch.float32)[0]
        top = self._centroids(x)[0].topk(self.config.top_centroids).indices
        ids = self._clusters[top].flatten()
        scored = F.linear(x, self._rows[ids])[0].float()
        # Tokens of other clusters get what the reference gives them: one less than the least one scored.
        return (scored.min() - 1.0).repeat(len(self._rows)).index_copy_(0, ids, scored)


class _Layer:
    """One layer: attention with queries of its own over the target's keys and values, and a gated MLP."""

    def __init__(
        self, weights: _Weights, prefix: str, config: ModelConfig, attention: AttentionConfig
    ) -> None:
        hidden, inter = config.hidden_size, config.intermediate_size
        self.kind = attention.layer_type
        heads, head_dim = config.num_attention_heads, attention.head_dim
        self.window, self.eps = attention.window, config.rms_norm_eps
        self.ops = row_ops(weights.device, weights.dtype)
        self.kernels = kernels() if weights.device.type == "cpu" and weights.dtype in DTYPES else None
        size = heads * head_dim
        self.query = weights.linear((f"{prefix}self_attn.q_proj", size, hidden))
        self.query_norm = weights.scale(f"{prefix}self_attn.q_norm", head_dim).repeat(heads, 1)
        self.output = weights.linear((f"{prefix}self_attn.o_proj", hidden, size))
        gate, up = (f"{prefix}mlp.gate_proj", inter, hidden), (f"{prefix}mlp.up_proj", inter, hidden)
        down = weights.linear((f"{prefix}mlp.down_proj", hidden, inter))
        self.mlp = Dense(weights.linear(gate, up), down, None, self.eps)
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        self.norms = [weights.scale(f"{prefix}{name}_layernorm", hidden) for name in names]
        self.scalar = float(weights(f"{prefix}layer_scalar", 1))

    def __call__(self, x: Tensor, turn: Rotation, keys: Tensor, values: Tensor) -> Tensor:
        before, after, before_mlp, after_mlp = self.norms
        queries, _ = self.ops.attention_in(x, before, self.eps, self.query, self.query_norm, 0, False, *turn)
        if self.window is not None:  # the reference counts a distance up to the window, the last key as 0
            keys, values = keys[:, -self.window - 1 :], values[:, -self.window - 1 :]
        if self.kernels is not None:
            attended = self.kernels.attend(queries, keys, values, window=None)
        else:
            attended = attend(queries, Held(keys, values), [Block(0, 1, 0, keys.shape[1], None)])
        x, dense, *_ = self.ops.attention_out(
            attended, self.output, x, after, self.eps, before_mlp, None, None
        )
        dense = self.ops.mlp(dense, self.mlp)
        return self.ops.combine(x, dense, None, None, after_mlp, self.eps, self.scalar)


class _Weights:
    """Takes tensors of known shapes from the assistant's file."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.file = MappedFile(path)
        self.device = device
        self.dtype = dtype
        self.format = natural_format(dtype)

    def __call__(self, name: str, *shape: int) -> Tensor:
        return self._stored(name, shape).to(self.device, self.dtype)

    def linear(self, *matrices: tuple[str, int, int]) -> Linear:
        """Matrices (name, out, in) that share their input, as one product."""
        parts = (quantize(self(f"{name}.weight", *shape), self.format) for name, *shape in matrices)
        return Linear(*parts, device=self.device)

    def scale(self, name: str, size: int) -> Tensor:
        """A norm's weights, float32."""
        return self._stored(f"{name}.weight", (size,)).to(self.device, torch.float32)

    def integers(self, name: str, *shape: int) -> Tensor:
        return self._stored(name, shape).to(self.device, torch.int64)

    def _stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        entry = self.file.entries.get(name)
        if entry is None or entry.shape != shape:
            found = "is missing" if entry is None else f"has shape {list(entry.shape)}, not {list(shape)}"
            raise CheckpointError(
                f"{self.file.path}: tensor {name} {found}", path=str(self.file.path), remedy=FETCH
            )
        return self.file.tensor(name)
