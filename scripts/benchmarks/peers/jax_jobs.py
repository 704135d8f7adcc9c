"""What the workers of systems in jax share; it needs jax and numpy only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def blocked(function, *arguments) -> Any:
    return jax.block_until_ready(function(*arguments))


def describe_loss(result) -> dict[str, Any]:
    """Return loss and gradient norms of the result of `jax.value_and_grad`."""
    loss, gradients = result
    leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(gradients)]
    return {"loss": float(loss), "norms": [float(jnp.linalg.norm(leaf)) for leaf in leaves]}
