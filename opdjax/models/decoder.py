"""One decoder for all model families: a pure function of stacked parameters.

`forward` returns hidden states, not logits: logits are computed in tiles (ops/vocab.py). Layers are
stacked on the leading axis and run by `lax.scan`, so that compile time does not grow with depth.
Rows may be padded on either side and may hold several packed sequences: a token attends only to
itself and to earlier columns of its own segment.
"""

from __future__ import annotations

import dataclasses
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
)
from opdjax.models.blocks import linear, mlp, rms_norm
from opdjax.models.partitioning import gathered, is_kept
from opdjax.models.rope import Rope, rotate, rotations
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
    has_pre_norms: bool = True  # of the inputs of attention and MLP
    has_post_norms: bool = False  # of their outputs
    norms_all_heads: bool = False  # the norms of queries and keys are over all heads at once
    norm_offset: float = 0.0  # what norms add to their weights
    embedding_scale: float = 1.0
    query_scale: float = 1.0  # besides the usual 1/sqrt(head_size)
    activation: Literal["silu", "gelu"] = "silu"  # gelu: its approximation by tanh
    # Of each layer, where layers differ: the tokens that a token attends to, itself included, and
    # the rotation. Empty: no windows, and `rope` in all layers.
    layer_windows: tuple[int, ...] = ()
    layer_ropes: tuple[Rope, ...] = ()
    num_experts: int = 0  # of a layer, each of `intermediate_size`; 0: one MLP for all tokens
    experts_per_token: int = 0
    normalizes_experts: bool = False  # the weights of a token's experts add up to 1
    lora_scale: float = 1.0  # alpha / rank; used only if the parameters hold adapters
    attention: Implementation = "xla"

    @property
    def windows(self) -> tuple[int, ...]:
        """Of each layer."""
        return self.layer_windows or (NO_WINDOW,) * self.num_layers

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """Of each layer."""
        return self.layer_ropes or (self.rope,) * self.num_layers


def abstract_params(config: DecoderConfig, dtype: Any = jnp.float32) -> Params:
    """The tree of parameters that `forward` takes, as shapes and types without values."""
    d, f, h = config.hidden_size, config.intermediate_size, config.head_size
    q, kv = config.num_heads * h, config.num_kv_heads * h
    layer = {
        **dict.fromkeys(("k_kernel", "v_kernel"), (kv, d)),
        **{"q_kernel": (q, d), "o_kernel": (d, q)},
    }
    if experts := config.num_experts:
        layer |= dict.fromkeys(("expert_gate_kernel", "expert_up_kernel"), (experts, f, d))
        layer |= {"router_kernel": (experts, d), "expert_down_kernel": (experts, d, f)}
    else:
        layer |= {"gate_kernel": (f, d), "up_kernel": (f, d), "down_kernel": (d, f)}
    if config.has_pre_norms:
        layer |= {"attention_norm": (d,), "mlp_norm": (d,)}
    if config.has_post_norms:
        layer |= {"attention_post_norm": (d,), "mlp_post_norm": (d,)}
    if config.has_qk_norm:
        is_whole = config.norms_all_heads
        layer |= {"q_norm": (q if is_whole else h,), "k_norm": (kv if is_whole else h,)}
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


def num_parameters(config: DecoderConfig, *, of_token: bool = False) -> int:
    """Elements of all parameters, or of those without the experts that a token does not use."""
    unused = config.num_layers * (config.num_experts - config.experts_per_token) * of_token
    size = 3 * config.hidden_size * config.intermediate_size  # of an expert
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))) - unused * size


def init_params(config: DecoderConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters: norms 1 with their offset, biases 0, embeddings N(0, 0.02²), kernels
    N(0, 1/in).
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))

    def init(path, leaf, key):
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.full(leaf.shape, 1 - config.norm_offset, dtype)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, dtype)
        scale = 0.02 if name in ("embedding", "head") else leaf.shape[-1] ** -0.5
        return scale * jax.random.normal(key, leaf.shape, dtype)

    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(init(*leaf, key) for leaf, key in zip(leaves, keys))


def head_of(params: Params, *, valid_vocab: int | None = None, temperature: float = 1.0) -> Head:
    """The unembedding of these parameters; tied parameters use the embedding."""
    name = "head" if "head" in params else "embedding"
    scale = params.get(f"{name}_scale")
    return Head(params[name], scale=scale, valid_vocab=valid_vocab, temperature=temperature)


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
    rope = rotations(positions_of(segment_ids), config.ropes, config.head_size)

    def layer(x, numbered):
        number, weights = numbered
        weights = gathered(weights, mesh)
        q, k, v = project_qkv(x, weights, rope(number), config)
        attended = attend(q, k, v, number)
        return keep_rows(finish_layer(x, attended, weights, config, mesh), mesh), None

    rows = {name: leaf for name, leaf in params.items() if name.startswith("embedding")}
    x = keep_rows(embed(params | gathered(rows, mesh), tokens, config), mesh)
    if remat != "none" or (mesh is not None and mesh.shape["fsdp"] > 1):
        # prevent_cse is not needed: the scan already keeps recomputation out of the forward pass.
        layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    x, _ = jax.lax.scan(layer, x, (jnp.arange(config.num_layers), params["layers"]))
    return rms_norm(x, params, "final_norm", config)


def dtype_of(params: Params) -> jnp.dtype:
    """The dtype of the activations: that of the norms, which are never held in 8 bits."""
    return params["final_norm"].dtype


def embed(params: Params, tokens, config: DecoderConfig) -> Float[Array, "B T D"]:
    """The inputs of the first layer."""
    x = params["embedding"][tokens]
    if "embedding_scale" in params:
        dtype, scale = dtype_of(params), params["embedding_scale"][tokens][..., None]
        wide = jnp.promote_types(dtype, scale.dtype)
        x = (x.astype(wide) * scale).astype(dtype)
    return x if config.embedding_scale == 1 else x * jnp.asarray(config.embedding_scale, x.dtype)


def project_qkv(x, weights, rope, config: DecoderConfig) -> tuple[Array, Array, Array]:
    """Queries `[B, T, N, H]` and keys `[B, T, K, H]` of one layer, both rotated, and values
    `[B, T, K, H]`.
    """
    x = rms_norm(x, weights, "attention_norm", config)
    by_head = lambda y: y.reshape(*x.shape[:2], -1, config.head_size)

    def project(name):
        y = linear(x, weights, name, config)
        norm = lambda y: rms_norm(y, weights, f"{name}_norm", config)
        return by_head(norm(y)) if config.norms_all_heads else norm(by_head(y))

    q, k, v = map(project, ("q", "k", "v"))
    q = q if config.query_scale == 1 else q * jnp.asarray(config.query_scale, q.dtype)
    return rotate(q, rope), rotate(k, rope), v


def finish_layer(
    x, attended, weights, config: DecoderConfig, mesh: Mesh | None = None
) -> Float[Array, "B T D"]:
    """Output projection and the MLP, each added to the residual stream."""
    y = linear(attended, weights, "o", config)
    x = x + rms_norm(y, weights, "attention_post_norm", config)
    y = mlp(rms_norm(x, weights, "mlp_norm", config), weights, config, mesh)
    return x + rms_norm(y, weights, "mlp_post_norm", config)
