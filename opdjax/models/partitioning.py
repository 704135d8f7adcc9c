"""How parameters are sharded over a mesh, and where a layer's weights are gathered.

`tensor` shards what a layer computes in parallel (heads, MLP width or experts, vocabulary); `fsdp`
shards the other axis of each kernel, which is gathered just before use. Small parameters are
replicated.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opdjax.config.validation import ConfigError

if TYPE_CHECKING:
    from opdjax.models.decoder import DecoderConfig

WEIGHT_AXES = ("fsdp", "tensor")  # shard the trained parameters and those that score
# Shard the weights that sample: sharded over `fsdp` they would be gathered again for every token.
SAMPLER_AXES = ("tensor",)
# Kernels are [out, in], or [experts, out, in]: one side of each is the residual stream, which
# `fsdp` shards.
_RULES = {
    **dict.fromkeys(("embedding", "head"), ("tensor", "fsdp")),
    **dict.fromkeys(
        ("q_kernel", "k_kernel", "v_kernel", "gate_kernel", "up_kernel"), ("tensor", "fsdp")
    ),
    **dict.fromkeys(("o_kernel", "down_kernel"), ("fsdp", "tensor")),
    **dict.fromkeys(("expert_gate_kernel", "expert_up_kernel"), ("tensor", None, "fsdp")),
    "expert_down_kernel": ("tensor", "fsdp", None),
    **dict.fromkeys(("q_bias", "k_bias", "v_bias"), ("tensor",)),
}


def _spec_of(name: str, over: tuple[str, ...] = WEIGHT_AXES) -> P:
    """The spec of a parameter by its name, for the mesh axes `over`, without the axis of layers."""
    target, is_adapter, letter = name.partition("_lora_")
    axes = _RULES.get(name, ())
    if name.endswith("_scale"):  # [out] of a weight [out, in] in 8 bits
        axes = _RULES[name.removesuffix("_scale")][:-1]
    if is_adapter:
        # A [rank, in] and B [out, rank] are sharded like their kernel [out, in]; ranks are not.
        axis_out, axis_in = _RULES[f"{target}_kernel"]
        axes = (None, axis_in) if letter == "a" else (axis_out, None)
    return P(*(axis if axis in over else None for axis in axes))


def shardings_of(tree: Any, mesh: Mesh, over: tuple[str, ...] = WEIGHT_AXES) -> Any:
    """A sharding for every leaf of a tree whose keys name parameters: parameters, their gradients,
    or an optimizer's state. Of the latter, what has fewer axes than its parameter (Adafactor's
    sums over rows and columns) is small, and replicated.
    """

    def sharding(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        spec = _spec_of(names[-1], over) if names else P()
        spec = P(None, *spec) if "layers" in names else spec
        return NamedSharding(mesh, spec if len(spec) <= leaf.ndim else P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def constrain(tree: Any, mesh: Mesh | None, over: tuple[str, ...] = WEIGHT_AXES) -> Any:
    """The tree sharded by these rules, inside jit; unchanged without a mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings_of(tree, mesh, over))


def require_divides(config: DecoderConfig, mesh: dict[str, int], what: str) -> None:
    """ConfigError that names the mesh axis which does not divide this model; `what` describes the
    model.
    """
    sizes = {
        "fsdp": {"hidden_size": config.hidden_size},
        "tensor": {
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            **(
                {"num_experts": config.num_experts}
                if config.num_experts
                else {"intermediate_size": config.intermediate_size}
            ),
            "vocab_size": config.vocab_size,
        },
    }
    for axis, fields in sizes.items():
        wrong = ", ".join(f"{name} {size}" for name, size in fields.items() if size % mesh[axis])
        if wrong:
            raise ConfigError(
                f"mesh.{axis} is {mesh[axis]}, which does not divide {wrong} of {what}; expected a "
                "divisor"
            )


def gathered(weights: dict[str, jax.Array], mesh: Mesh | None) -> dict[str, jax.Array]:
    """One layer's weights, gathered along `fsdp`; their gradients are reduced and sharded again.

    Without this the compiler may gather all layers at once, or move activations instead of weights.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return weights
    gather = lambda x, spec: _gather(x, mesh, spec) if spec else x
    return {name: gather(x, _spec_of(name)) for name, x in weights.items()}


def is_kept(primitive, *_, **__) -> bool:
    """A rematerialisation policy that keeps everything for the backward pass but arrays that were
    only resharded, such as gathered weights: kept for all layers, they would undo fsdp.
    """
    return primitive.name != "sharding_constraint"


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, mesh, spec):
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in spec)))
    )


def _gather_forward(x, mesh, spec):
    return _gather(x, mesh, spec), None


def _gather_backward(mesh, spec, _, cotangent):
    return (jax.lax.with_sharding_constraint(cotangent, NamedSharding(mesh, spec)),)


_gather.defvjp(_gather_forward, _gather_backward)
