"""What layers are made of besides attention: norms, products with kernels, the MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from opdjax.models.experts import mix_experts

if TYPE_CHECKING:
    from opdjax.models.decoder import DecoderConfig

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def rms_norm(
    x: Float[Array, "... D"], weights: dict[str, Any], name: str, config: DecoderConfig
) -> Float[Array, "... D"]:
    """RMS norm, computed in at least float32; `x` itself if there are no weights of this name."""
    if (scale := weights.get(name)) is None:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(variance + config.norm_epsilon)
    if config.norm_offset:  # which a narrow dtype would round
        return (normed * (config.norm_offset + scale.astype(wide.dtype))).astype(x.dtype)
    return normed.astype(x.dtype) * scale


def linear(
    x: Float[Array, "B T I"], weights: dict[str, Any], name: str, config: DecoderConfig
) -> Float[Array, "B T O"]:
    """The product with a kernel, with its adapter and its bias, where there are any."""
    y = _product(x, weights, f"{name}_kernel")
    if f"{name}_lora_a" in weights:
        low = jnp.einsum("bti,ri->btr", x, weights[f"{name}_lora_a"])
        y += config.lora_scale * jnp.einsum("btr,or->bto", low, weights[f"{name}_lora_b"])
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias


def _product(x, weights, name):
    if (scale := weights.get(f"{name}_scale")) is None:
        return jnp.einsum("bti,oi->bto", x, weights[name])
    wide = jnp.promote_types(x.dtype, scale.dtype)
    values = weights[name].astype(x.dtype)
    y = jnp.einsum("bti,oi->bto", x, values, preferred_element_type=wide)
    return (y * scale).astype(x.dtype)


def mlp(
    x: Float[Array, "B T D"], weights: dict[str, Any], config: DecoderConfig, mesh: Mesh | None
) -> Float[Array, "B T D"]:
    """The gated MLP, or the experts that the router chooses."""
    activation = _ACTIVATIONS[config.activation]
    if config.num_experts:
        return mix_experts(x, weights, activation, config, mesh)
    gate, up = (linear(x, weights, name, config) for name in ("gate", "up"))
    return linear(activation(gate) * up, weights, "down", config)
