"""A layer's MLP as experts: a router chooses a few for each token (arXiv:1701.06538).

Tokens are sorted by expert and multiplied in groups, so no expert has a capacity, no token is
dropped, and the result for a token does not depend on the others. A TPU multiplies each group by
its own kernel. JAX on a CPU multiplies all tokens by all kernels: only small models can afford it.

The choice is a step function: where two experts are nearly as probable, sampler and scorer, which
round differently, may choose different ones, and their log-probabilities differ by more than
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from opdjax.ops.sharding import ROW_AXES, num_row_shards

if TYPE_CHECKING:
    from opdjax.models.decoder import DecoderConfig

_KERNELS = ("expert_gate_kernel", "expert_up_kernel", "expert_down_kernel")
# Rows in groups, times the kernel [out, in] of their group.
_GROUPED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


def route(
    x: Float[Array, "N D"], router: Float[Array, "E D"], config: DecoderConfig
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """The K experts of each token, and their weights: the most probable ones of a softmax over all
    experts, in at least float32. Of equally probable experts those of lower index are chosen.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum("nd,ed->ne", x, router, preferred_element_type=wide)
    chosen, experts = jax.lax.top_k(jax.nn.softmax(logits), config.experts_per_token)
    if config.normalizes_experts:
        chosen /= jnp.sum(chosen, axis=-1, keepdims=True)
    return chosen, experts


def mix_experts(
    x: Float[Array, "B T D"],
    weights: dict[str, Any],
    activation: Callable[[Array], Array],
    config: DecoderConfig,
    mesh: Mesh | None,
) -> Float[Array, "B T D"]:
    """The sum of each token's experts by their weights.

    On a `mesh`, a device multiplies the tokens of its rows by the experts that `tensor` gives to
    it, and the sums over `tensor` are added.
    """
    run = partial(_mix_rows, activation=activation, config=config)
    kernels = [weights[name] for name in _KERNELS]
    if mesh is None or mesh.size == 1:
        return run(x, weights["router_kernel"], *kernels)
    rows = P(ROW_AXES) if x.shape[0] % num_row_shards(mesh) == 0 else P()
    run = partial(run, axis="tensor")
    specs = {"in_specs": (rows, P(), *[P("tensor")] * len(kernels)), "out_specs": rows}
    # With check_vma, JAX 0.10.2 loses a part of the gradient of `x`.
    run = jax.shard_map(run, mesh=mesh, **specs, check_vma=False)
    return run(x, weights["router_kernel"], *kernels)


def _mix_rows(x, router, gate, up, down, *, activation, config, axis: str | None = None) -> Array:
    """The part of `mix_experts` of the experts of these kernels `[E, out, in]`; with an `axis`, it
    shards them, and the parts are added.
    """
    tokens, num_own = x.reshape(-1, x.shape[-1]), len(gate)
    chosen, experts = route(tokens, router, config)
    own = experts - (jax.lax.axis_index(axis) * num_own if axis else 0)
    own = jnp.where((own >= 0) & (own < num_own), own, num_own).reshape(-1)
    # By expert; last the choices of experts that other devices have.
    order, sizes = jnp.argsort(own), jnp.bincount(own, length=num_own)
    # Rows of no group are undefined, forward and backward.
    is_own = (jnp.arange(len(own)) < jnp.sum(sizes))[:, None]
    multiply = partial(
        jax.lax.ragged_dot_general, group_sizes=sizes, ragged_dot_dimension_numbers=_GROUPED
    )
    grouped = jnp.where(is_own, jnp.repeat(tokens, experts.shape[1], axis=0)[order], 0)
    y = multiply(activation(multiply(grouped, gate)) * multiply(grouped, up), down)
    y = jnp.where(is_own, y, 0)[jnp.argsort(order)].reshape(*experts.shape, -1)
    mixed = jnp.einsum("nkd,nk->nd", y, chosen.astype(y.dtype), preferred_element_type=chosen.dtype)
    mixed = jax.lax.psum(mixed, axis) if axis else mixed
    return mixed.astype(x.dtype).reshape(x.shape)
