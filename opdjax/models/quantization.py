"""Weights of 8 bits for what is frozen: symmetric, with one scale for each output channel.

A kernel W `[out, in]` becomes whole numbers q from -127 to 127 and scales s `[out]`, W = s q up to
rounding, and x W^T is computed as s (x q^T): the matrix products read q alone, so that no copy of W
in a wider dtype is held. A leaf `q_kernel` of a tree then has a leaf `q_kernel_scale` beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from opdjax.config import FrozenWeights

_KERNELS = tuple(f"{name}_kernel" for name in ("q", "k", "v", "o", "gate", "up", "down"))
_LARGEST = 127


class Quantized(NamedTuple):
    """A weight in 8 bits."""

    values: Int8[Array, "*L O I"]
    scale: Float[Array, "*L O"]  # float32: bfloat16 would round it as coarsely as the values


@jax.jit
def quantize(weight: Float[Array, "*L O I"]) -> Quantized:
    """The nearest multiples of a scale by which the largest entry of an output channel is 127; a
    channel of zeros has the scale 1.
    """
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.where(largest > 0, largest / _LARGEST, 1)
    return Quantized(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)


def quantized_names(weights: FrozenWeights) -> tuple[str, ...]:
    """The parameters that are held in 8 bits."""
    return {"dtype": (), "int8": _KERNELS, "int8_head": (*_KERNELS, "embedding", "head")}[weights]


def in_8_bits(
    tree: dict[str, Any], weights: FrozenWeights, quantize: Callable[[Any], Quantized] = quantize
) -> dict[str, Any]:
    """The tree with two leaves for each parameter that `weights` holds in 8 bits."""
    names = quantized_names(weights)
    of_leaf = lambda path, leaf: quantize(leaf) if path[-1].key in names else leaf
    return with_scales(jax.tree_util.tree_map_with_path(of_leaf, tree))


def with_scales(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with two leaves for each `Quantized` one."""
    found = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Quantized):
            found |= {name: leaf.values, f"{name}_scale": leaf.scale}
        else:
            found[name] = with_scales(leaf) if isinstance(leaf, dict) else leaf
    return found
