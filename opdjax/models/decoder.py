"""One decoder for every family: a pure function of stacked parameters.

`forward` returns hidden states, not logits: the vocabulary is visited in tiles (ops/vocab.py). Layers are stacked on the
leading axis and run by `lax.scan`, so that compile time does not grow with depth. Padding may stand on either side and a
row may hold several packed sequences: a token attends to earlier columns of its own segment only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from opdjax.models.layout import gathered
from opdjax.models.rope import Rope, inverse_frequencies
from opdjax.ops.masked import starts_sequence
from opdjax.ops.vocab import Head
from opdjax.sharding import keep_rows

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and switches of a decoder; static under jit."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    rope: Rope
    norm_epsilon: float
    ties_embeddings: bool
    has_qk_norm: bool
    has_qkv_bias: bool
    has_output_bias: bool


def parameter_shapes(config: DecoderConfig) -> Params:
    """The shape of every parameter, as the tree that `forward` takes."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_size
    q, kv = config.num_heads * h, config.num_kv_heads * h
    layer = {
        "attention_norm": (d,), "q_kernel": (q, d), "k_kernel": (kv, d), "v_kernel": (kv, d), "o_kernel": (d, q),
        "mlp_norm": (d,), "gate_kernel": (f, d), "up_kernel": (f, d), "down_kernel": (d, f),
    }  # fmt: skip
    if config.has_qk_norm:
        layer |= {"q_norm": (h,), "k_norm": (h,)}
    if config.has_qkv_bias:
        layer |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.has_output_bias:
        layer |= {"o_bias": (d,)}
    shapes = {"embedding": (config.vocab_size, d), "final_norm": (d,)}
    if not config.ties_embeddings:
        shapes["head"] = (config.vocab_size, d)
    return shapes | {"layers": {name: (config.num_layers, *shape) for name, shape in layer.items()}}


def abstract_params(config: DecoderConfig, dtype) -> Params:
    """The tree of parameters as shapes and types, without values."""
    shapes = parameter_shapes(config)
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), shapes, is_leaf=lambda x: isinstance(x, tuple))


def init_params(config: DecoderConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters: norms 1, biases 0, embeddings N(0, 0.02²), kernels N(0, 1/in)."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(parameter_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))

    def init(name, shape, key):
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape, dtype)
        scale = 0.02 if name in ("embedding", "head") else shape[-1] ** -0.5
        return scale * jax.random.normal(key, shape, dtype)

    return tree.unflatten([init(path[-1].key, shape, key) for (path, shape), key in zip(leaves, keys)])


def head_of(params: Params, *, valid_vocab: int | None = None, temperature: float = 1.0) -> Head:
    """The unembedding of these parameters: the embedding itself where they are tied."""
    return Head(params.get("head", params["embedding"]), valid_vocab=valid_vocab, temperature=temperature)


def positions_of(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that start from 0 at each segment's first column."""
    column = jnp.arange(segment_ids.shape[1])
    return column - jax.lax.cummax(jnp.where(starts_sequence(segment_ids), column, 0), axis=1)


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, in the parameters' type. Segment 0 is padding; its states are garbage.

    With a `mesh`, rows stay split over its `data` and `fsdp` axes, and each layer's weights are gathered along `fsdp` in turn.
    """
    columns = jnp.arange(tokens.shape[1])
    mask = _attention_mask(columns, segment_ids, columns, segment_ids)
    rope = _rope(positions_of(segment_ids), config)

    def layer(x, weights):
        weights = gathered(weights, mesh)
        q, k, v = _project(x, weights, rope, config)
        return keep_rows(_finish_layer(x, _attend(q, k, v, mask), weights, config), mesh), None

    embedding = gathered({"embedding": params["embedding"]}, mesh)["embedding"]
    x = keep_rows(embedding[tokens], mesh)
    x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params["layers"])
    return _rms_norm(x, params["final_norm"], config.norm_epsilon)


def _attention_mask(q_columns, q_segments, k_columns, k_segments) -> Bool[Array, "B Q S"]:
    """A token sees itself and the earlier columns of its own segment."""
    return (q_segments[:, :, None] == k_segments[:, None, :]) & (k_columns[None, None, :] <= q_columns[None, :, None])


def _rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float) -> Float[Array, "... D"]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * scale


def _rope(positions: Int[Array, "B T"], config: DecoderConfig):
    """Cosines and sines `[B, T, 1, H/2]`; angles in float32, since bfloat16 cannot count past 256."""
    inverse = inverse_frequencies(config.rope, config.head_size)
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * config.rope.attention_factor, jnp.sin(angles) * config.rope.attention_factor


def _rotate(x: Float[Array, "B T N H"], rope) -> Float[Array, "B T N H"]:
    """Rotate the pairs (h, h + H/2), the layout of Hugging Face checkpoints."""
    cos, sin = (part.astype(x.dtype) for part in rope)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _linear(x: Float[Array, "B T I"], weights: Params, name: str) -> Float[Array, "B T O"]:
    y = jnp.einsum("bti,oi->bto", x, weights[f"{name}_kernel"])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def _project(x, weights, rope, config: DecoderConfig):
    """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` of one layer, rotated."""
    x = _rms_norm(x, weights["attention_norm"], config.norm_epsilon)
    q, k, v = (_linear(x, weights, name).reshape(*x.shape[:2], -1, config.head_size) for name in ("q", "k", "v"))
    if config.has_qk_norm:
        q = _rms_norm(q, weights["q_norm"], config.norm_epsilon)
        k = _rms_norm(k, weights["k_norm"], config.norm_epsilon)
    return _rotate(q, rope), _rotate(k, rope), v


def _attend(q, k, v, mask) -> Float[Array, "B T O"]:
    """Grouped-query attention; scores and softmax in at least float32."""
    batch, length, heads, size = q.shape
    groups = q.reshape(batch, length, k.shape[2], heads // k.shape[2], size)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", groups, k, preferred_element_type=wide) * size**-0.5
    # A finite floor, not -inf: a padding row that attends to nothing must not turn into NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(batch, length, heads * size)


def _finish_layer(x, attended, weights, config: DecoderConfig) -> Float[Array, "B T D"]:
    """Output projection and the gated MLP, each added to the residual stream."""
    x = x + _linear(attended, weights, "o")
    y = _rms_norm(x, weights["mlp_norm"], config.norm_epsilon)
    return x + _linear(jax.nn.silu(_linear(y, weights, "gate")) * _linear(y, weights, "up"), weights, "down")
