"""One decoder for all model families: a pure function of stacked parameters.

`forward` returns hidden states, not logits: logits are computed in tiles (ops/vocab.py). Layers are
stacked on the leading axis and run by `lax.scan`, so that compile time does not grow with depth.
Rows may be padded on either side and may hold several packed sequences: a token attends only to
itself and to earlier columns of its own segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from opdjax.models.attention import (
    NO_WINDOW,
    SPLASH_OUTPUT,
    Implementation,
    attend_within_segments,
    of_layer,
)
from opdjax.models.partitioning import gathered, is_kept
from opdjax.models.rope import Rope, inverse_frequencies
from opdjax.ops.masked import starts_sequence
from opdjax.ops.sharding import keep_rows
from opdjax.ops.tile import Head

Params = dict[str, Any]
# Fields of DecoderConfig that a run sets: no checkpoint stores them.
RUN_FIELDS = ("lora_scale", "attention")
Remat = Literal["none", "dots", "layer"]
_REMAT_POLICIES = {
    "none": is_kept,
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SPLASH_OUTPUT),
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and options of a decoder; static under jit."""

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
    has_qk_norm: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    # Of each layer, where layers differ: the tokens that a token attends to, itself included, and
    # the rotation. Empty: no windows, and `rope` in all layers.
    layer_windows: tuple[int, ...] = ()
    layer_ropes: tuple[Rope, ...] = ()
    lora_scale: float = 1.0  # alpha / rank; used only if the parameters hold adapters
    attention: Implementation = "xla"

    @property
    def windows(self) -> tuple[int, ...]:
        """Of each layer."""
        return self.layer_windows or (NO_WINDOW,) * self.num_layers


def abstract_params(config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """The tree of parameters that `forward` takes, as shapes and types without values."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_size
    q, kv = config.num_heads * h, config.num_kv_heads * h
    layer = {
        **dict.fromkeys(("attention_norm", "mlp_norm"), (d,)),
        **dict.fromkeys(("k_kernel", "v_kernel"), (kv, d)),
        **dict.fromkeys(("gate_kernel", "up_kernel"), (f, d)),
        **{"q_kernel": (q, d), "o_kernel": (d, q), "down_kernel": (d, f)},
    }
    if config.has_qk_norm:
        layer |= {"q_norm": (h,), "k_norm": (h,)}
    if config.has_qkv_bias:
        layer |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,)}
    if config.has_output_bias:
        layer |= {"o_bias": (d,)}
    shapes = {"embedding": (config.vocab_size, d), "final_norm": (d,)}
    if not config.ties_embeddings:
        shapes["head"] = (config.vocab_size, d)
    shapes["layers"] = {name: (config.num_layers, *shape) for name, shape in layer.items()}
    abstract = lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return jax.tree.map(abstract, shapes, is_leaf=lambda x: isinstance(x, tuple))


def num_parameters(config: DecoderConfig) -> int:
    """Elements of all parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def init_params(config: DecoderConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters: norms 1, biases 0, embeddings N(0, 0.02²), kernels N(0, 1/in)."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))

    def init(path, leaf, key):
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(leaf.shape, dtype)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, dtype)
        scale = 0.02 if name in ("embedding", "head") else leaf.shape[-1] ** -0.5
        return scale * jax.random.normal(key, leaf.shape, dtype)

    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(init(*leaf, key) for leaf, key in zip(leaves, keys))


def head_of(params: Params, *, valid_vocab: int | None = None, temperature: float = 1.0) -> Head:
    """The unembedding of these parameters; tied parameters use the embedding."""
    kernel = params.get("head", params["embedding"])
    return Head(kernel, valid_vocab=valid_vocab, temperature=temperature)


def positions_of(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each column in its segment, from 0."""
    column = jnp.arange(segment_ids.shape[1])
    return column - jax.lax.cummax(jnp.where(starts_sequence(segment_ids), column, 0), axis=1)


def forward(
    params: Params,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, in the parameters' dtype. Segment 0 is padding: its
    states are undefined.

    With a `mesh`, rows stay sharded over `data` and `fsdp`, and each layer's weights are gathered
    along `fsdp` when the layer runs. Without a mesh, `xla` replaces splash attention, whose kernel
    must know how its inputs are sharded. `remat`: what the backward pass recomputes. `layer`:
    everything but the input of each layer. `dots`: everything but products with weights and the
    output of splash attention.
    """
    needs_mesh = mesh is None and config.attention == "splash"
    implementation = "xla" if needs_mesh else config.attention
    attend = attend_within_segments(segment_ids, implementation, mesh, config.windows)
    rope = rope_angles(positions_of(segment_ids), config)

    def layer(x, numbered):
        number, weights = numbered
        weights = gathered(weights, mesh)
        q, k, v = project_qkv(x, weights, rope(number), config)
        attended = attend(q, k, v, number)
        return keep_rows(finish_layer(x, attended, weights, config), mesh), None

    embedding = gathered({"embedding": params["embedding"]}, mesh)["embedding"]
    x = keep_rows(embedding[tokens], mesh)
    if remat != "none" or (mesh is not None and mesh.shape["fsdp"] > 1):
        # prevent_cse is not needed: the scan already keeps recomputation out of the forward pass.
        layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    x, _ = jax.lax.scan(layer, x, (jnp.arange(config.num_layers), params["layers"]))
    return rms_norm(x, params["final_norm"], config.norm_epsilon)


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], epsilon: float
) -> Float[Array, "... D"]:
    """RMS norm, computed in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * scale


def rope_angles(
    positions: Int[Array, "B T"], config: DecoderConfig
) -> Callable[[Any], Float[Array, "2 B T 1 H/2"]]:
    """`angles(layer)`: cosines and sines, float32: bfloat16 cannot represent all integers above
    256. `layer` may be traced.
    """
    ropes = config.layer_ropes or (config.rope,)
    kinds = tuple(dict.fromkeys(ropes))

    def rotation(rope):
        inverse = inverse_frequencies(rope, config.head_size)
        angles = positions[:, :, None, None].astype(jnp.float32) * inverse
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.attention_factor

    # Once for each kind, outside the loop over layers.
    tables, number = jnp.stack(list(map(rotation, kinds))), tuple(map(kinds.index, ropes))
    return lambda layer: tables[of_layer(number, layer)]


def _rotate(x: Float[Array, "B T N H"], rope) -> Float[Array, "B T N H"]:
    """Rotate the pairs (h, h + H/2), as Hugging Face checkpoints do."""
    cos, sin = (part.astype(x.dtype) for part in rope)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _linear(
    x: Float[Array, "B T I"], weights: Params, name: str, config: DecoderConfig
) -> Float[Array, "B T O"]:
    y = jnp.einsum("bti,oi->bto", x, weights[f"{name}_kernel"])
    if f"{name}_lora_a" in weights:
        low = jnp.einsum("bti,ri->btr", x, weights[f"{name}_lora_a"])
        y += config.lora_scale * jnp.einsum("btr,or->bto", low, weights[f"{name}_lora_b"])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def project_qkv(x, weights, rope, config: DecoderConfig) -> tuple[Array, Array, Array]:
    """Queries `[B, T, N, H]` and keys `[B, T, K, H]` of one layer, both rotated, and values
    `[B, T, K, H]`.
    """
    x = rms_norm(x, weights["attention_norm"], config.norm_epsilon)
    q, k, v = (
        _linear(x, weights, name, config).reshape(*x.shape[:2], -1, config.head_size)
        for name in ("q", "k", "v")
    )
    if config.has_qk_norm:
        q = rms_norm(q, weights["q_norm"], config.norm_epsilon)
        k = rms_norm(k, weights["k_norm"], config.norm_epsilon)
    return _rotate(q, rope), _rotate(k, rope), v


def finish_layer(x, attended, weights, config: DecoderConfig) -> Float[Array, "B T D"]:
    """Output projection and the gated MLP, each added to the residual stream."""
    x = x + _linear(attended, weights, "o", config)
    y = rms_norm(x, weights["mlp_norm"], config.norm_epsilon)
    gate, up = (_linear(y, weights, name, config) for name in ("gate", "up"))
    return x + _linear(jax.nn.silu(gate) * up, weights, "down", config)
