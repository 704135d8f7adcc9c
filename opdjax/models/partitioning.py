"""How parameters lie on a mesh: one rule a kind of parameter, and the gathering of a layer's
weights where it is used.

`tensor` splits what a layer computes in parallel (heads, MLP width, vocabulary), `fsdp` the other
side of each kernel, which is gathered just before use. What is not named (norms, biases of outputs)
is small and copied.
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

WEIGHT_AXES = ("fsdp", "tensor")
_INTO, _OUT_OF = (
    ("tensor", "fsdp"),
    ("fsdp", "tensor"),
)  # the axes of a kernel [out, in] that reads, or writes, the residual stream
_RULES = {
    "embedding": ("tensor", "fsdp"),
    "head": ("tensor", "fsdp"),
    "q_kernel": _INTO,
    "k_kernel": _INTO,
    "v_kernel": _INTO,
    "o_kernel": _OUT_OF,
    "gate_kernel": _INTO,
    "up_kernel": _INTO,
    "down_kernel": _OUT_OF,
    "q_bias": ("tensor",),
    "k_bias": ("tensor",),
    "v_bias": ("tensor",),
}


def spec_of(name: str, over: tuple[str, ...] = WEIGHT_AXES) -> P:
    """How a parameter of that name is split over the mesh axes `over`, its axis of layers left out."""
    return P(*(axis if axis in over else None for axis in _axes(name)))


def _axes(name: str) -> tuple[str | None, ...]:
    target, is_adapter, letter = name.partition("_lora_")
    if not is_adapter:
        return _RULES.get(name, ())
    # A [rank, in] and B [out, rank] lie as their kernel [out, in] does; a rank is divided by
    # nothing.
    axis_out, axis_in = _RULES[f"{target}_kernel"]
    return (None, axis_in) if letter == "a" else (axis_out, None)


def specs_of(tree: Any, over: tuple[str, ...] = WEIGHT_AXES) -> Any:
    """A spec for every leaf of a tree whose keys name parameters: the parameters, their gradients,
    an optimizer's moments.
    """

    def spec(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if not names:
            return P()
        return P(None, *spec_of(names[-1], over)) if "layers" in names else spec_of(names[-1], over)

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings_of(tree: Any, mesh: Mesh, over: tuple[str, ...] = WEIGHT_AXES) -> Any:
    """`specs_of` as shardings of the mesh."""
    return jax.tree.map(
        partial(NamedSharding, mesh), specs_of(tree, over), is_leaf=lambda x: isinstance(x, P)
    )


def constrain(tree: Any, mesh: Mesh | None, over: tuple[str, ...] = WEIGHT_AXES) -> Any:
    """The tree laid on the mesh by these rules, inside jit; as it is where there is no mesh."""
    return (
        tree
        if mesh is None
        else jax.lax.with_sharding_constraint(tree, shardings_of(tree, mesh, over))
    )


def require_divides(config: DecoderConfig, mesh: dict[str, int], what: str) -> None:
    """ConfigError that names the mesh axis which cannot divide this model; `what` says whose model
    it is.
    """
    sizes = {
        "fsdp": {"hidden_size": config.hidden_size},
        "tensor": {
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
        },
    }
    for axis, parts in sizes.items():
        wrong = [f"{name} {size}" for name, size in parts.items() if size % mesh[axis]]
        if wrong:
            raise ConfigError(
                f"mesh.{axis} is {mesh[axis]}, which does not divide {', '.join(wrong)} of {what}; expected a divisor"
            )


def gathered(weights: dict[str, jax.Array], mesh: Mesh | None) -> dict[str, jax.Array]:
    """One layer's weights, whole along `fsdp`: gathered where they are used, their gradient reduced
    and split again at once.

    Left to itself the compiler may gather every layer at a time, or send activations in place of
    weights.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return weights
    return {
        name: _gather(x, mesh, spec_of(name)) if spec_of(name) else x for name, x in weights.items()
    }


def is_kept(primitive, *_, **__) -> bool:
    """A rematerialisation policy: all is kept for the backward pass but what was only laid out
    anew, such as gathered weights.

    Those of all layers, kept whole, would undo fsdp.
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
