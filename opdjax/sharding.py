"""The mesh, and how arrays are laid on it."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opdjax.fields import ConfigError


def make_mesh(data: int) -> Mesh:
    """A mesh whose axis `data` has this many devices (-1: all)."""
    available = jax.devices()
    count = len(available) if data == -1 else data
    if count > len(available):
        raise ConfigError(
            f"mesh.data is {data}, but there are {len(available)} {available[0].platform} devices; expected at most so many, or -1 for all"
        )
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=available[:count])


def by_row(mesh: Mesh) -> NamedSharding:
    """Rows split over `data`."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def split_rows(tree: Any, parts: int) -> Any:
    """Every leaf `[B, ...]` as `[parts, B / parts, ...]`: row r goes to part r % parts, so that each device feeds every part."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def merge_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def shard_rows(batch: Any, mesh: Mesh) -> Any:
    """Place a tree of host arrays with their first axis split over `data`."""
    return jax.device_put(batch, by_row(mesh))
