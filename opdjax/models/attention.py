"""Causal attention within segments, by one of three implementations that agree up to rounding.

`xla` materialises the T x T scores of every head and runs everywhere. `cudnn` (NVIDIA GPUs) and
`splash` (TPUs) are fused kernels like FlashAttention (arXiv:2205.14135) that do not materialise
them, forward or backward. `auto` in a config means splash on TPU and xla elsewhere. cudnn has to be
named: it has not been measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opdjax.ops.sharding import ROW_AXES, num_row_shards

Implementation = Literal["xla", "cudnn", "splash"]
SPLASH_HEAD_SIZES = (64, 128, 256)  # its kernels compile for these
CUDNN_MAX_HEAD_SIZE = 128  # on every GPU with cuDNN attention; in steps of 8
SPLASH_OUTPUT = "splash_attention"  # its output's name in rematerialisation policies
NO_WINDOW = 2**31 - 1  # more tokens than any row has
_LANES = 128  # columns are padded to a multiple of a TPU register's width
_BLOCKS = (512, 256, 128)  # columns per block of the kernel: the largest that divides a row


def attend_within_segments(
    segment_ids: Int[Array, "B T"],
    implementation: Implementation,
    mesh: Mesh | None = None,
    windows: tuple[int, ...] = (NO_WINDOW,),
) -> Callable[..., Float[Array, "B T O"]]:
    """`attend(q, k, v, layer)` of whole rows: a token attends to the last `windows[layer]` columns
    of its own segment up to itself. `layer` may be traced.

    q is `[B, T, N, H]`, k and v are `[B, T, K, H]`, and K divides N. On a `mesh`, splash attention
    is sharded: rows over `data` and `fsdp`, heads over `tensor`.
    """
    if implementation == "splash":
        # Its masks are static: a layer chooses among one kernel for each window.
        kinds, number = _kinds_of(windows)
        run = partial(splash_attention, segment_ids=segment_ids, mesh=mesh)
        branches = [partial(run, window=window) for window in kinds]
        return lambda q, k, v, layer=0: jax.lax.switch(number(layer), branches, q, k, v)
    columns = jnp.arange(segment_ids.shape[1])
    distance = segment_distance(columns, segment_ids, columns, segment_ids)
    run = fused_attention if implementation == "cudnn" else masked_attention
    mask = by_layer(windows, partial(is_attended, distance))
    return lambda q, k, v, layer=0: run(q, k, v, mask(layer))


def by_layer(values: tuple[Any, ...], make: Callable[[Any], Array]) -> Callable[[Any], Array]:
    """`of(layer)`: what is made of the value of a layer, which may be traced. It is made once for
    each different value, outside the loop over layers.
    """
    kinds, number = _kinds_of(values)
    made = jnp.stack(list(map(make, kinds)))
    return lambda layer: made[number(layer)]


def _kinds_of(values: tuple[Any, ...]) -> tuple[tuple[Any, ...], Callable[[Any], Any]]:
    """The different values, and the number among them of that of a layer: static if all are 0."""
    kinds = tuple(dict.fromkeys(values))
    numbers = tuple(map(kinds.index, values))
    return kinds, lambda layer: jnp.asarray(numbers)[layer] if len(kinds) > 1 else 0


def segment_distance(q_columns, q_segments, k_columns, k_segments) -> Int[Array, "B Q S"]:
    """How many columns a key stands before a query of its segment; negative if it stands behind it
    or in another segment.
    """
    is_same = q_segments[:, :, None] == k_segments[:, None, :]
    return jnp.where(is_same, q_columns[None, :, None] - k_columns[None, None, :], -1)


def is_attended(distance: Int[Array, "B Q S"], window: int) -> Bool[Array, "B Q S"]:
    """Whether a query attends to a key this far before it, if its window, which contains itself,
    has this many tokens.
    """
    return (distance >= 0) & (distance < window)


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B T O"]:
    """Grouped-query attention with any mask; scores and softmax in at least float32."""
    batch, length, heads, size = q.shape
    groups = q.reshape(batch, length, k.shape[2], heads // k.shape[2], size)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("btkgh,bskh->bkgts", groups, k, preferred_element_type=wide) * size**-0.5
    # A finite floor, not -inf: a padding row that attends to nothing must not become NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(batch, length, heads * size)


def fused_attention(
    q, k, v, mask: Bool[Array, "B T T"], implementation: str = "cudnn"
) -> Float[Array, "B T O"]:
    """`masked_attention` by cuDNN through jax.nn: bfloat16 or float16, head sizes up to 128 in
    multiples of 8.

    cuDNN takes the mask as a bias: T x T numbers per row, shared by all heads.
    """
    batch, length = q.shape[:2]
    # Its backward pass refuses odd lengths with a bias. The added column is masked for queries and
    # keys.
    odd = (0, length % 2)
    q, k, v = (jnp.pad(x, ((0, 0), odd, (0, 0), (0, 0))) for x in (q, k, v))
    mask = jnp.pad(mask, ((0, 0), odd, odd))[:, None]
    attended = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    return attended[:, :length].reshape(batch, length, -1)


def splash_attention(
    q,
    k,
    v,
    segment_ids: Int[Array, "B T"],
    mesh: Mesh | None,
    window: int = NO_WINDOW,
    interpret: bool = False,
) -> Float[Array, "B T O"]:
    """Causal attention within segments by the block-sparse flash kernel for TPU. `interpret` runs
    it on any device, slowly.

    Blocks above the diagonal or before the window are skipped. Columns are padded to a multiple of
    128.
    """
    batch, length, heads, size = q.shape
    pad = -length % _LANES
    # Scaled in float32, so that queries are rounded once: the kernel does not scale them.
    q = (q.astype(jnp.float32) * size**-0.5).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    run = partial(_splash_rows, window=window, interpret=interpret)
    if mesh is not None and mesh.size > 1:
        # XLA cannot shard a kernel by itself. Axes that the mesh does not divide are replicated.
        rows = ROW_AXES if batch % num_row_shards(mesh) == 0 else None
        spec = P(rows, "tensor" if k.shape[1] % mesh.shape["tensor"] == 0 else None)
        specs = {"in_specs": (spec, spec, spec, P(rows)), "out_specs": spec}
        run = jax.shard_map(run, mesh=mesh, **specs, check_vma=False)
    return run(q, k, v, segment_ids).swapaxes(1, 2)[:, :length].reshape(batch, length, heads * size)


def _splash_rows(
    q: Float[Array, "B N T H"], k, v, segment_ids, *, window: int, interpret: bool
) -> Float[Array, "B N T H"]:
    # Imported here: it takes a second and is needed only on TPU.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads, length = q.shape[1:3]
    block = next(size for size in _BLOCKS if length % size == 0)
    of_forward = ("block_q", "block_kv", "block_kv_compute")
    of_dkv = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    names = (*of_forward, *of_dkv, "block_q_dq", "block_kv_dq")
    mask = splash.CausalMask((length, length))
    if window < length:
        mask = splash.LocalMask((length, length), (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SPLASH_OUTPUT,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
