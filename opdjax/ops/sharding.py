"""The mesh, and how arrays are sharded over it.

Three axes: parameters are replicated over `data`; parameters and optimizer state are sharded over
`fsdp`; heads, MLP and vocabulary of a layer are sharded over `tensor`. Rows of a batch are sharded
over `data` and `fsdp` together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from opdjax.config.validation import ConfigError

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")


def mesh_sizes(data: int, fsdp: int, tensor: int, available: int, kind: str) -> dict[str, int]:
    """Axis -> size, for `available` devices of a kind; `data` -1 uses all devices that the other
    axes leave. ConfigError if there are too few devices.
    """
    data = max(available // (fsdp * tensor), 1) if data == -1 else data
    count = data * fsdp * tensor
    if count > available:
        sizes = zip(AXES, (data, fsdp, tensor))
        named = ", ".join(f"mesh.{name} {size}" for name, size in sizes if size > 1)
        raise ConfigError(
            f"{named}: {count} devices, but there are {available} {kind} devices; expected a "
            f"product of at most {available} (mesh.data -1: all devices that the other axes leave)"
        )
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def make_mesh(
    data: int, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of the first `data * fsdp * tensor` of `devices` (None: of all); `data` may be -1."""
    available = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(available), available[0].platform)
    used = available[: math.prod(sizes.values())]
    if jax.process_count() > 1 and devices is None and len(used) != len(available):
        named = " x ".join(f"mesh.{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"{named} use {len(used)} of {len(available)} devices; a run of several processes must "
            "use all of them, because a process without a device in the mesh cannot take part"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=used)


def num_row_shards(mesh: Mesh | None) -> int:
    """The number of parts that the rows of a batch are sharded into."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def by_row(mesh: Mesh) -> NamedSharding:
    """Rows sharded over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def keep_rows(x: Any, mesh: Mesh | None) -> Any:
    """`x` with its rows sharded as those of a batch, inside jit; unchanged without a mesh."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, by_row(mesh))


def is_process_zero() -> bool:
    """Whether this is process zero, which writes files and prints."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """The tree as numpy arrays. Arrays sharded over several processes are gathered: all processes
    must call this together.
    """

    def fetch(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def split_rows(tree: Any, parts: int) -> Any:
    """Every leaf `[B, ...]` as `[parts, B / parts, ...]`. Row r goes to part r % parts, so that
    every part has rows of each device.
    """
    split = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(split, tree)


def merge_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def scan_parts(
    step: Callable, carry: Any, tree: Any, mask: Bool[Array, "B T"], parts: int
) -> tuple[Any, Any, Int[Array, ""]]:
    """Scan `step(carry, part) -> (carry, outputs)` over the parts of `split_rows(tree, parts)`, up
    to the last part with an unmasked token.

    Returns (carry, merged outputs, number of parts visited); outputs of rows that were not visited
    are 0. The number of visited parts is data, so one compiled program serves all batches. The loop
    cannot be differentiated.
    """
    split = split_rows(tree, parts)
    is_live = jnp.any(split_rows(mask, parts), axis=(1, 2))
    num_visited = jnp.max(jnp.where(is_live, jnp.arange(1, parts + 1), 0))

    def visit(index, state):
        carry, outputs = state
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), split)
        carry, found = step(carry, part)
        put = lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, index, 0)
        return carry, jax.tree.map(put, outputs, found)

    shapes = jax.eval_shape(lambda: step(carry, jax.tree.map(lambda x: x[0], split))[1])
    outputs = jax.tree.map(lambda x: jnp.zeros((parts, *x.shape), x.dtype), shapes)
    carry, outputs = jax.lax.fori_loop(0, num_visited, visit, (carry, outputs))
    return carry, merge_rows(outputs), num_visited


def abstract_like(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and types, with these shardings and without values."""
    abstract = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(abstract, tree, shardings)


def shard_rows(batch: Any, mesh: Mesh) -> Any:
    """Put host arrays, equal in every process, on the mesh with their rows sharded over `data` and
    `fsdp`.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, by_row(mesh))

    def place(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, by_row(mesh))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, by_row(mesh), lambda index: x[index])

    return jax.tree.map(place, batch)
