"""The mesh, and how arrays are laid on it.

Three axes: `data` holds copies of the parameters, `fsdp` splits them and the optimizer's state,
`tensor` splits the heads, the MLP and the vocabulary within a layer. Rows of a batch are split over
`data` and `fsdp` together.
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
    """Axis -> size, out of `available` devices of a kind; `data` may be -1: as many as there are
    devices for.
    """
    data = max(available // (fsdp * tensor), 1) if data == -1 else data
    count = data * fsdp * tensor
    if count > available:
        named = ", ".join(
            f"mesh.{name} {size}" for name, size in zip(AXES, (data, fsdp, tensor)) if size > 1
        )
        raise ConfigError(
            f"{named}: {count} devices, but there are {available} {kind} devices; expected a product of at most "
            "so many (mesh.data -1: all that the others leave)"
        )
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def make_mesh(
    data: int, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data * fsdp * tensor` of these devices, by default of those that are here; `data`
    may be -1.
    """
    available = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(available), available[0].platform)
    used = available[: math.prod(sizes.values())]
    if jax.process_count() > 1 and devices is None and len(used) != len(available):
        named = " x ".join(f"mesh.{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"{named} use {len(used)} of {len(available)} devices; expected all of them where a run has several processes: one whose "
            "devices are left out would never be heard of"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=used)


def num_row_shards(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def by_row(mesh: Mesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def keep_rows(x: Any, mesh: Mesh | None) -> Any:
    """`x` with its rows where those of a batch are and whole otherwise, inside jit; as it is where
    there is no mesh.
    """
    return x if mesh is None else jax.lax.with_sharding_constraint(x, by_row(mesh))


def is_process_zero() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """The tree as numpy arrays; what lies spread over several processes is gathered, which all of
    them must do together.
    """

    def fetch(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def split_rows(tree: Any, parts: int) -> Any:
    """Every leaf `[B, ...]` as `[parts, B / parts, ...]`: row r goes to part r % parts, so that
    each device feeds every part.
    """
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree
    )


def merge_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def scan_parts(
    step: Callable, carry: Any, tree: Any, mask: Bool[Array, "B T"], parts: int
) -> tuple[Any, Any, Int[Array, ""]]:
    """`step(carry, part) -> (carry, outputs)` over the parts of `split_rows(tree, parts)`, up to
    the last in which `mask` holds.

    Returns (carry, outputs merged, number of parts visited); rows of parts that were not visited
    have outputs of 0. How many are visited is data: one compiled program serves batches however
    full, and nothing is differentiated through the loop.
    """
    split = split_rows(tree, parts)
    is_live = jnp.any(split_rows(mask, parts), axis=(1, 2))
    num_visited = jnp.max(jnp.where(is_live, jnp.arange(1, parts + 1), 0))

    def visit(index, state):
        carry, outputs = state
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), split)
        carry, found = step(carry, part)
        return carry, jax.tree.map(
            lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, index, 0), outputs, found
        )

    shapes = jax.eval_shape(lambda: step(carry, jax.tree.map(lambda x: x[0], split))[1])
    outputs = jax.tree.map(lambda x: jnp.zeros((parts, *x.shape), x.dtype), shapes)
    carry, outputs = jax.lax.fori_loop(0, num_visited, visit, (carry, outputs))
    return carry, merge_rows(outputs), num_visited


def abstract_like(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and types, with these shardings and without values."""
    abstract = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(abstract, tree, shardings)


def shard_rows(batch: Any, mesh: Mesh) -> Any:
    """Place a tree of host arrays, the same in every process, with their first axis split over the
    rows' axes.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, by_row(mesh))

    def place(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, by_row(mesh))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, by_row(mesh), lambda index: x[index])

    return jax.tree.map(place, batch)
