"""Rotary position embeddings: the angle by which each pair of a head's dimensions rotates from one
token to the next.

Every kind is a pure function of the position, so cached, packed and padded tokens get the same
angles. families.py refuses the kinds of `transformers` that are not: `dynamic` and `longrope`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from opdjax.models.attention import by_layer


@dataclasses.dataclass(frozen=True)
class Rope:
    """The parameters of the angles; static under jit. The kind `default` reads only `theta`.

    Rotations of a pair are counted over `original_length` tokens, the trained context length before
    it was stretched by `factor`.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    slow_rotations: float = 0.0  # pairs with at most as many are stretched by the whole factor
    fast_rotations: float = 0.0  # pairs with at least as many are not stretched
    rounds_range: bool = True  # yarn: the range between the two starts and ends at a whole pair
    rotated: float = 1.0  # the part of a head's dimensions, from the first, that rotates
    attention_factor: float = 1.0  # of cosines and sines; attention logits get its square


UNROTATED = Rope(1.0, "linear", factor=math.inf)  # every angle is 0


def inverse_frequencies(rope: Rope, head_size: int) -> Float[np.ndarray, " R/2"]:
    """Radians per token of each pair, float32: f_i (k_i + (1 - k_i) / factor), with
    f_i = theta^(-2i/H).

    k_i in [0, 1] depends on the kind: 1 for `default`, 0 for `linear`; for `llama3` (as released
    with Llama 3.1) and `yarn` (arXiv 2309.00071, section 3.2) it grows with the pair's rotations.
    Equals transformers' `modeling_rope_utils.py`. Computed in float64 at trace time.
    """
    head_size = int(head_size * rope.rotated)
    pairs = np.arange(head_size // 2)
    frequencies = float(rope.theta) ** (-2 * pairs / head_size)
    kept = _KEPT[rope.kind](rope, head_size, frequencies)
    return (frequencies * (kept + (1 - kept) / rope.factor)).astype(np.float32)


def rotations(
    positions: Int[Array, "B T"], ropes: tuple[Rope, ...], head_size: int
) -> Callable[[Any], Float[Array, "2 B T 1 R/2"]]:
    """`rotation(layer)`: cosines and sines of the rotated dimensions, float32: bfloat16 cannot
    represent all integers above 256. `layer`, which may be traced, counts `ropes`.
    """

    def rotation(rope: Rope) -> Float[Array, "2 B T 1 R/2"]:
        angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(
            rope, head_size
        )
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.attention_factor

    return by_layer(ropes, rotation)


def rotate(x: Float[Array, "B T N H"], rotation) -> Float[Array, "B T N H"]:
    """Rotate the pairs (h, h + R/2) of the first R dimensions, as Hugging Face checkpoints do."""
    cos, sin = rotation.astype(x.dtype)
    low, high, rest = jnp.split(x, [cos.shape[-1], 2 * cos.shape[-1]], axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """m(1), or m(mscale) / m(mscale_all_dim) if both are given, with m(s) = 1 + 0.1 s ln(factor)
    (arXiv 2309.00071, eq. 22).
    """
    if mscale is None or mscale_all_dim is None:
        mscale, mscale_all_dim = 1.0, 0.0
    growth = 0.1 * math.log(max(factor, 1.0))
    return (1 + mscale * growth) / (1 + mscale_all_dim * growth)


def _keep_by_rotations(rope: Rope, head_size: int, frequencies) -> Float[np.ndarray, " H/2"]:
    """From 0 to 1, linear in the number of rotations."""
    rotations = rope.original_length * frequencies / (2 * math.pi)
    slow, fast = rope.slow_rotations, rope.fast_rotations
    return np.clip((rotations - slow) / (fast - slow), 0, 1)


def _keep_by_index(rope: Rope, head_size: int, frequencies) -> Float[np.ndarray, " H/2"]:
    """From 1 to 0, linear in the pair's index, between the (fractional) pairs that rotate `fast`
    and `slow` times.

    The pair that rotates r times is i(r) = H ln(original_length / (2 pi r)) / (2 ln theta).
    """

    def index(rotations):
        wavelengths = rope.original_length / (2 * math.pi * rotations)
        return head_size * math.log(wavelengths) / (2 * math.log(rope.theta))

    first, last = index(rope.fast_rotations), index(rope.slow_rotations)
    if rope.rounds_range:
        first, last = math.floor(first), math.ceil(last)
    # The bound is H - 1 although there are H / 2 pairs, as in the original code, with which models
    # were trained.
    first, last = max(first, 0), min(last, head_size - 1)
    width = last - first or 0.001
    return 1 - np.clip((np.arange(head_size // 2) - first) / width, 0, 1)


_KEPT = {
    "default": lambda rope, head_size, frequencies: np.ones_like(frequencies),
    "linear": lambda rope, head_size, frequencies: np.zeros_like(frequencies),
    "llama3": _keep_by_rotations,
    "yarn": _keep_by_index,
}
