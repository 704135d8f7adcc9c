"""The decoder with a key-value cache: the cache, and the forward pass that reads and extends it.

Columns have no order: keys are stored rotated, and the caller passes how far before a token each
column's token stands. So all rows write the same column at the same time, although their texts
differ in length.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opdjax.models import decoder
from opdjax.models.attention import by_layer, is_attended, segment_distance
from opdjax.models.blocks import rms_norm
from opdjax.models.decoder import DecoderConfig, Params
from opdjax.models.rope import rotations
from opdjax.ops.sharding import ROW_AXES

_MAX_UNSTACKED = 8  # layers; compile time grows with them, because each is compiled separately
_INT8_MAX = 127


@struct.dataclass
class StoredKV:
    """Keys or values. In int8 each vector has a scale: `data * scale` are the stored numbers."""

    data: Float[Array, "*L B K T H"] | Int[Array, "*L B K T H"]
    scale: Float[Array, "*L B K T 1"] | None = None


@struct.dataclass
class KVCache:
    """Keys and values by column: one entry per layer if the layers are unstacked, else one entry
    with stacked layers.
    """

    keys: tuple[StoredKV, ...]
    values: tuple[StoredKV, ...]

    @property
    def num_columns(self) -> int:
        """T, the columns that can be written."""
        return self.keys[0].data.shape[-2]


def is_unstacked(config: DecoderConfig) -> bool:
    """Whether decoding keeps weights and cache of each layer as separate arrays.

    XLA's CPU backend copies each slice that a loop takes of stacked arrays; the copies take half of
    the time of a decoding step.
    """
    return config.num_layers <= _MAX_UNSTACKED


def split_layers(layers: Params, config: DecoderConfig) -> tuple[Params, ...]:
    """The weights of each layer, transposed; the stacked layers as they are if `is_unstacked` is
    False. Call it once per set of weights: it copies all of them.

    On a CPU, few rows are multiplied a fifth faster by kernels of layout `[in, out]`. The barrier
    keeps XLA from undoing the transposition. Experts stay as they are.
    """
    if not is_unstacked(config):
        return (layers,)
    layer = lambda i: jax.tree.map(lambda x: _transposed(x[i]), layers)
    return jax.lax.optimization_barrier(tuple(map(layer, range(config.num_layers))))


def _transposed(x: Array) -> Array:
    return x.T if x.ndim == 2 else x


def init_cache(
    config: DecoderConfig, rows: int, columns: int, dtype: Any, scale_dtype: Any = jnp.float32
) -> KVCache:
    """An empty cache of `columns` columns; `scale_dtype` is used only for int8."""
    count, stack = (config.num_layers, ()) if is_unstacked(config) else (1, (config.num_layers,))
    shape = (*stack, rows, config.num_kv_heads, columns, config.head_size)

    def empty() -> StoredKV:
        scale = jnp.zeros((*shape[:-1], 1), scale_dtype) if jnp.dtype(dtype) == jnp.int8 else None
        return StoredKV(jnp.zeros(shape, dtype), scale)

    return KVCache(tuple(empty() for _ in range(count)), tuple(empty() for _ in range(count)))


def constrain(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """The cache with rows sharded over `data` and `fsdp`, and heads over `tensor` if divisible."""
    if mesh is None:
        return cache
    shape = cache.keys[0].data.shape
    heads = "tensor" if shape[-3] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(
        cache, NamedSharding(mesh, P(*[None] * (len(shape) - 4), ROW_AXES, heads))
    )


def forward_cached(
    params: Params,
    layer_params: tuple[Params, ...],
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    column: Int[Array, ""] | int,
    distance: Int[Array, "B T S"],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states after the final norm, and the cache with the tokens' keys and values in its
    columns `column : column + T` (of S).

    `layer_params` are the layers of `params` by `split_layers`. `distance`: how many tokens of its
    text a column's token stands before each token, for the columns written here too; negative if
    the token does not attend to it. Such columns may hold anything.
    """
    rope = rotations(positions, config.ropes, config.head_size)
    is_visible = by_layer(config.windows, partial(is_attended, distance))

    # Stacked arrays are part of the carry, which XLA updates in place; scanned inputs and outputs
    # would be copied.
    def layer(carry, weights, number, index=None):
        x, keys, values = carry
        q, k, v = decoder.project_qkv(x, weights, rope(number), config)
        keys, values = _write(keys, k, index, column), _write(values, v, index, column)
        stored = _layer_of(keys, index), _layer_of(values, index)
        attended = _attend(q, *stored, is_visible(number))
        return decoder.finish_layer(x, attended, weights, config, mesh), keys, values

    x, written = decoder.embed(params, tokens, config), []
    for number, (weights, *stored) in enumerate(zip(layer_params, cache.keys, cache.values)):
        if is_unstacked(config):
            x, *stored = layer((x, *stored), jax.tree.map(_transposed, weights), number)
        else:
            numbers = jnp.arange(config.num_layers)
            (x, *stored), _ = jax.lax.scan(
                lambda carry, each: (layer(carry, *each), None),
                (x, *stored),
                (weights, numbers, numbers),
            )
        written.append(stored)
    return rms_norm(x, params, "final_norm", config), KVCache(*zip(*written))


def prefill(
    params: Params,
    layer_params: tuple[Params, ...],
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    dtype: Any,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """The last hidden state of left-padded prompts, and a cache of T columns that holds them."""
    segments, columns = mask.astype(jnp.int32), jnp.arange(tokens.shape[1])
    distance = segment_distance(columns, segments, columns, segments)
    wide = jnp.promote_types(decoder.dtype_of(params), jnp.float32)
    cache = constrain(init_cache(config, *tokens.shape, dtype, wide), mesh)
    positions = decoder.positions_of(segments)
    hidden, cache = forward_cached(
        params, layer_params, config, tokens, positions, cache, 0, distance, mesh
    )
    return hidden[:, -1], constrain(cache, mesh)


def copy_prefix(cache: KVCache, prefix: KVCache, prefix_row: Int[Array, " B"]) -> KVCache:
    """The cache with row `prefix_row[b]` of `prefix` copied to the first columns of row b; if it is
    negative, row b stays as it is.
    """
    is_new = (prefix_row >= 0)[:, None, None, None]

    def put(old: Array, new: Array) -> Array:
        chosen = jnp.take(new, jnp.maximum(prefix_row, 0), axis=-4)
        merged = jnp.where(is_new, chosen, old[..., : new.shape[-2], :])
        return jax.lax.dynamic_update_slice(old, merged, (0,) * old.ndim)

    return jax.tree.map(put, cache, prefix)


def _write(stored: StoredKV, new: Float[Array, "B T K H"], index, column) -> StoredKV:
    """Write T columns of one layer; `index` is its number if layers are stacked, else None."""
    new, scale = new.swapaxes(1, 2), None
    if stored.scale is not None:
        new = new.astype(stored.scale.dtype)  # else the quotient is rounded twice
        peak = jnp.max(jnp.abs(new), axis=-1, keepdims=True)
        scale = (peak / _INT8_MAX).astype(stored.scale.dtype)
        new = jnp.round(new / jnp.where(peak > 0, peak / _INT8_MAX, 1))

    def put(old: Array, new: Array) -> Array:
        place = (0, 0, column, 0)
        new, place = (new, place) if index is None else (new[None], (index, *place))
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), place)

    return StoredKV(put(stored.data, new), None if scale is None else put(stored.scale, scale))


def _layer_of(stored: StoredKV, index) -> StoredKV:
    """One layer's `[B, K, T, H]`."""
    if index is None:
        return stored
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stored)


def _attend(
    q: Float[Array, "B T N H"], keys: StoredKV, values: StoredKV, is_visible: Bool[Array, "B T S"]
) -> Float[Array, "B T O"]:
    """Grouped-query attention to the cached columns of one layer; scores and softmax in at least
    float32.

    int8 scales multiply scores and probabilities, which are H times fewer than keys and values.
    """
    batch, length, heads, size = q.shape
    kv_heads = keys.data.shape[1]
    # Queries that share keys become rows of one matrix: XLA's CPU backend is slow at products with
    # more free axes.
    q_groups = q.reshape(batch, length, kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    q_rows, k = q_groups.reshape(batch, kv_heads, -1, size), keys.data.astype(q.dtype)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkgh,bksh->bkgs", q_rows, k, preferred_element_type=wide) * size**-0.5
    if keys.scale is not None:
        scores = scores * keys.scale[..., 0][:, :, None]
    scores = scores.reshape(batch, kv_heads, -1, length, scores.shape[-1])
    # A finite floor, not -inf: a row that attends to nothing must not become NaN.
    scores = jnp.where(is_visible[:, None, None], scores, jnp.finfo(wide).min)
    probs = jax.nn.softmax(scores, axis=-1)
    if values.scale is not None:
        probs = probs * values.scale[..., 0][:, :, None, None]
    probs = probs.astype(q.dtype).reshape(batch, kv_heads, -1, probs.shape[-1])
    out = jnp.einsum("bkgs,bksh->bkgh", probs, values.data.astype(q.dtype))
    out = out.reshape(batch, kv_heads, -1, length, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads * size)
