"""Rotary position embeddings: by what angle each pair of a head's dimensions rotates from one token
to the next.

Every kind here is a pure function of the position, so that cached, packed and padded tokens are
rotated alike. Two kinds of `transformers` are not, and families.py refuses them: `dynamic` and
`longrope` choose their frequencies by the longest sequence that a forward pass meets, so that a
token's keys depend on the other rows of its batch, and keys that were cached before the sequence
crossed the bound disagree with those of a full forward after it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Rope:
    """What the angles are computed from; static under jit. Only `theta` is read where `kind` is
    `default`.

    A pair's rotations are counted over `original_length` tokens, the length that the model was
    trained on before its context was stretched by `factor`.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    slow_rotations: float = (
        0.0  # a pair that rotates no more often is stretched by the whole factor
    )
    fast_rotations: float = 0.0  # one that rotates at least as often is not stretched
    rounds_range: bool = (
        True  # yarn: whether the range between the two begins and ends at a whole pair
    )
    attention_factor: float = (
        1.0  # multiplies cosines and sines, so the logits of attention by its square
    )


def inverse_frequencies(rope: Rope, head_size: int) -> Float[np.ndarray, " H/2"]:
    """Radians per token of each pair, float32: f_i (k_i + (1 - k_i) / factor), where f_i =
    theta^(-2i/H).

    k in [0, 1] is the share of its own frequency that a pair keeps, by kind: 1 `default`, 0
    `linear`, between them by how often the pair rotates `llama3` (Llama 3.1's release) and `yarn`
    (arXiv 2309.00071, section 3.2). Agrees with transformers' `modeling_rope_utils.py`. Computed in
    float64 at trace time, where it costs nothing.
    """
    pairs = np.arange(head_size // 2)
    frequencies = float(rope.theta) ** (-2 * pairs / head_size)
    kept = _KEPT[rope.kind](rope, head_size, frequencies)
    return (frequencies * (kept + (1 - kept) / rope.factor)).astype(np.float32)


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """m(1), or m(mscale) / m(mscale_all_dim) where both are given; m(s) = 1 + 0.1 s ln(factor)
    (arXiv 2309.00071, eq. 22).
    """
    if mscale is None or mscale_all_dim is None:
        mscale, mscale_all_dim = 1.0, 0.0
    growth = 0.1 * math.log(max(factor, 1.0))
    return (1 + mscale * growth) / (1 + mscale_all_dim * growth)


def _keep_all(rope: Rope, head_size: int, frequencies) -> Float[np.ndarray, " H/2"]:
    return np.ones_like(frequencies)


def _keep_nothing(rope: Rope, head_size: int, frequencies) -> Float[np.ndarray, " H/2"]:
    return np.zeros_like(frequencies)


def _keep_by_rotations(rope: Rope, head_size: int, frequencies) -> Float[np.ndarray, " H/2"]:
    """From 0 to 1, linear in the number of rotations."""
    rotations = rope.original_length * frequencies / (2 * math.pi)
    return np.clip(
        (rotations - rope.slow_rotations) / (rope.fast_rotations - rope.slow_rotations), 0, 1
    )


def _keep_by_index(rope: Rope, head_size: int, frequencies) -> Float[np.ndarray, " H/2"]:
    """From 1 to 0, linear in the index of the pair, between the (fractional) pairs that rotate
    `fast` and `slow` times.

    The pair that rotates r times is i(r) = H ln(original_length / (2 pi r)) / (2 ln theta).
    """

    def index(rotations):
        return (
            head_size
            * math.log(rope.original_length / (2 * math.pi * rotations))
            / (2 * math.log(rope.theta))
        )

    first, last = index(rope.fast_rotations), index(rope.slow_rotations)
    if rope.rounds_range:
        first, last = math.floor(first), math.ceil(last)
    # The bound is H - 1 although there are H / 2 pairs: so it is in the original code, and models
    # were trained with it.
    first, last = max(first, 0), min(last, head_size - 1)
    width = last - first or 0.001
    return 1 - np.clip((np.arange(head_size // 2) - first) / width, 0, 1)


_KEPT = {
    "default": _keep_all,
    "linear": _keep_nothing,
    "llama3": _keep_by_rotations,
    "yarn": _keep_by_index,
}
