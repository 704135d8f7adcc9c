"""The decoder with a memory: keys and values of columns already read, by layer, and the forward
pass that reads and extends it.

Columns have no order of their own: rotary positions are applied before a key is stored, and the
caller says which columns each new token sees. So all rows can write the same column at the same
time, wherever each of them stands in its text.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opdjax.models import decoder
from opdjax.models.attention import segment_mask
from opdjax.models.decoder import DecoderConfig, Params
from opdjax.ops.sharding import ROW_AXES

_MAX_APART = 8  # layers; more of them, each compiled on its own, take too long to compile
_INT8_MAX = 127


@struct.dataclass
class StoredKV:
    """Keys or values; int8 ones with the scale of each, so that `data * scale` is what was stored."""

    data: Float[Array, "*L B K T H"] | Int[Array, "*L B K T H"]
    scale: Float[Array, "*L B K T 1"] | None = None


@struct.dataclass
class KVCache:
    """Keys and values by column: a part for each layer where layers are few, and otherwise one part
    in which they are stacked.
    """

    keys: tuple[StoredKV, ...]
    values: tuple[StoredKV, ...]

    @property
    def num_columns(self) -> int:
        """T."""
        return self.keys[0].data.shape[-2]


def is_taken_apart(config: DecoderConfig) -> bool:
    """Whether every layer has weights and a cache of its own.

    XLA's CPU backend copies what a loop slices out of a stack, which is half of a decoding step.
    """
    return config.num_layers <= _MAX_APART


def parts_of(layers: Params, config: DecoderConfig) -> tuple[Params, ...]:
    """The weights of each layer, transposed, or their stack as it is: a copy of them all, so do it
    once.

    Few rows are multiplied a fifth faster on a CPU by kernels whose inputs come first. The barrier
    keeps XLA from undoing it.
    """
    if not is_taken_apart(config):
        return (layers,)
    return jax.lax.optimization_barrier(
        tuple(jax.tree.map(lambda x, i=i: x[i].T, layers) for i in range(config.num_layers))
    )


def init_cache(
    config: DecoderConfig, rows: int, columns: int, dtype: Any, scale_dtype: Any = jnp.float32
) -> KVCache:
    """An empty cache of `columns` columns; `scale_dtype` matters for int8 alone."""
    count, stack = (config.num_layers, ()) if is_taken_apart(config) else (1, (config.num_layers,))
    shape = (*stack, rows, config.num_kv_heads, columns, config.head_size)

    def empty() -> StoredKV:
        scale = jnp.zeros((*shape[:-1], 1), scale_dtype) if jnp.dtype(dtype) == jnp.int8 else None
        return StoredKV(jnp.zeros(shape, dtype), scale)

    return KVCache(tuple(empty() for _ in range(count)), tuple(empty() for _ in range(count)))


def constrain(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Rows split over `data` and `fsdp`, heads over `tensor` where it divides them."""
    if mesh is None:
        return cache
    shape = cache.keys[0].data.shape
    heads = "tensor" if shape[-3] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(
        cache, NamedSharding(mesh, P(*[None] * (len(shape) - 4), ROW_AXES, heads))
    )


def forward_cached(
    params: Params,
    parts: tuple[Params, ...],
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    column: Int[Array, ""] | int,
    is_visible: Bool[Array, "B T S"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Hidden states after the final norm; keys and values go to columns `column : column + T` of
    the cache's S.

    `parts` are the layers of `params` by `parts_of`. `is_visible` says which columns each token
    attends to, those that are written here included; the others may hold anything.
    """
    rope = decoder._rope(positions, config)

    # A stack rides in the carry, where XLA updates it in place; as scanned input and output it
    # would be copied.
    def layer(carry, weights, index=None):
        x, keys, values = carry
        q, k, v = decoder._project(x, weights, rope, config)
        keys, values = _write(keys, k, index, column), _write(values, v, index, column)
        attended = _attend(q, _layer_of(keys, index), _layer_of(values, index), is_visible)
        return decoder._finish_layer(x, attended, weights, config), keys, values

    x, written = params["embedding"][tokens], []
    for weights, *stored in zip(parts, cache.keys, cache.values):
        if is_taken_apart(config):
            x, *stored = layer((x, *stored), jax.tree.map(jnp.transpose, weights))
        else:
            numbered = (weights, jnp.arange(config.num_layers))
            (x, *stored), _ = jax.lax.scan(
                lambda carry, each: (layer(carry, *each), None), (x, *stored), numbered
            )
        written.append(stored)
    return decoder._rms_norm(x, params["final_norm"], config.norm_epsilon), KVCache(*zip(*written))


def prefill(
    params: Params,
    parts,
    config: DecoderConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    dtype: Any,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B D"], KVCache]:
    """The last hidden state of left-padded prompts and a cache of T columns that holds them."""
    segments = mask.astype(jnp.int32)
    columns = jnp.arange(tokens.shape[1])
    is_visible = segment_mask(columns, segments, columns, segments)
    cache = constrain(
        init_cache(
            config, *tokens.shape, dtype, jnp.promote_types(params["embedding"].dtype, jnp.float32)
        ),
        mesh,
    )
    hidden, cache = forward_cached(
        params, parts, config, tokens, decoder.positions_of(segments), cache, 0, is_visible
    )
    return hidden[:, -1], constrain(cache, mesh)


def place(cache: KVCache, prefix: KVCache, source: Int[Array, " B"]) -> KVCache:
    """The cache whose row b begins with row `source[b]` of `prefix`; rows whose source is negative
    stay as they are.
    """
    is_new = (source >= 0)[:, None, None, None]

    def put(old: Array, new: Array) -> Array:
        chosen = jnp.take(new, jnp.maximum(source, 0), axis=-4)
        return jax.lax.dynamic_update_slice(
            old, jnp.where(is_new, chosen, old[..., : new.shape[-2], :]), (0,) * old.ndim
        )

    return jax.tree.map(put, cache, prefix)


def _write(stored: StoredKV, new: Float[Array, "B T K H"], index, column) -> StoredKV:
    """Write T columns of one layer; `index` is its place in the stack, None where there is no
    stack.
    """
    new, scale = new.swapaxes(1, 2), None
    if stored.scale is not None:
        new = new.astype(stored.scale.dtype)  # or the quotient would be rounded twice
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
    """Grouped-query attention to the columns of one layer's cache; scores and softmax in at least
    float32.

    The scales of int8 multiply scores and probabilities, which are H times fewer than the numbers
    they stand for.
    """
    batch, length, heads, size = q.shape
    kv_heads = keys.data.shape[1]
    # Queries that share a head's keys are the rows of one matrix: XLA's CPU backend is slow at
    # products with more free axes.
    rows = (
        q.reshape(batch, length, kv_heads, -1, size)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, kv_heads, -1, size)
    )
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = (
        jnp.einsum("bkgh,bksh->bkgs", rows, keys.data.astype(q.dtype), preferred_element_type=wide)
        * size**-0.5
    )
    if keys.scale is not None:
        scores = scores * keys.scale[..., 0][:, :, None]
    scores = scores.reshape(batch, kv_heads, -1, length, scores.shape[-1])
    # A finite floor, not -inf: a row that attends to nothing must not turn into NaN.
    probs = jax.nn.softmax(
        jnp.where(is_visible[:, None, None], scores, jnp.finfo(wide).min), axis=-1
    )
    if values.scale is not None:
        probs = probs * values.scale[..., 0][:, :, None, None]
    probs = probs.astype(q.dtype).reshape(batch, kv_heads, -1, probs.shape[-1])
    out = jnp.einsum("bkgs,bksh->bkgh", probs, values.data.astype(q.dtype))
    return (
        out.reshape(batch, kv_heads, -1, length, size)
        .transpose(0, 3, 1, 2, 4)
        .reshape(batch, length, heads * size)
    )
