"""What a recipe sees: the next-token distributions of a few tokens, whole or as one device's slice
of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opdjax.ops.inverse_cdf import invert_cdf


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "bias"],
    meta_fields=["softcap", "valid_vocab", "temperature"],
)
@dataclasses.dataclass(frozen=True)
class Head:
    """An unembedding: `logits = softcap(hidden @ kernel.T + bias) / temperature`, -inf from
    `valid_vocab` on.
    """

    kernel: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    valid_vocab: int | None = (
        None  # rows at or beyond this id pad the embedding and stand for no token
    )
    temperature: float = 1.0  # of the distribution that is scored


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The type that softmaxes and sums are taken in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def head_logits(
    head: Head, hidden: Float[Array, "... D"], axis: str | None = None
) -> Float[Array, "... V"]:
    """Dense logits, in at least float32. For a few positions only: training and scoring go through
    the tiled pass.

    With an `axis` the head is this device's slice of the vocabulary along it.
    """
    return finish_logits(head, raw_logits(head, hidden), axis)


def raw_logits(head: Head, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """The product alone, in at least float32."""
    return jnp.einsum(
        "...d,vd->...v", hidden, head.kernel, preferred_element_type=sum_dtype(hidden.dtype)
    )


def finish_logits(
    head: Head, raw: Float[Array, "... V"], axis: str | None = None
) -> Float[Array, "... V"]:
    """Logits from the head's product with hidden states: bias, softcap, temperature, and -inf on
    what stands for no token.
    """
    logits = raw if head.bias is None else raw + head.bias.astype(raw.dtype)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    if head.temperature != 1.0:
        logits = logits / head.temperature
    if head.valid_vocab is not None and head.valid_vocab < head.kernel.shape[0] * _num_slices(axis):
        logits = jnp.where(
            _ids_of_slice(head.kernel.shape[0], axis) < head.valid_vocab, logits, -jnp.inf
        )
    return logits


def _num_slices(axis: str | None) -> int:
    return 1 if axis is None else jax.lax.axis_size(axis)


def _ids_of_slice(width: int, axis: str | None) -> Int[Array, " V"]:
    ids = jnp.arange(width)
    return ids if axis is None else jax.lax.axis_index(axis) * width + ids


def fit_width(logits: Float[Array, "n U"], vocab: int) -> Float[Array, "n V"]:
    """Models of one family may pad one vocabulary to different widths; what differs stands for no
    token.
    """
    missing = vocab - logits.shape[1]
    return (
        jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)
        if missing > 0
        else logits[:, :vocab]
    )


@partial(jax.tree_util.register_dataclass, data_fields=["logits"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class VocabTile:
    """The next-token distributions of n tokens. Made of plain dense `[n, V]` logits it is the
    reference of every test.

    On a mesh that splits the vocabulary each device has the logits of its own slice, and `axis`
    names the mesh axis. So a recipe reduces over the vocabulary by the methods of this class alone,
    never by `jnp.sum(..., axis=-1)`: what they return is of the whole vocabulary and the same on
    every device. One that forgets is refused when it is traced.
    """

    logits: Float[Array, "n V"]
    axis: str | None = None

    @property
    def ids(self) -> Int[Array, " V"]:
        """The ids that the columns stand for."""
        return _ids_of_slice(self.logits.shape[-1], self.axis)

    @property
    def vocab_size(self) -> int:
        """V, all slices together."""
        return self.logits.shape[-1] * _num_slices(self.axis)

    def total(self, x: Float[Array, "n V"]) -> Float[Array, " n"]:
        """The sum of `x` over the vocabulary."""
        summed = jnp.sum(x, axis=-1)
        return summed if self.axis is None else jax.lax.psum(summed, self.axis)

    def largest(self, x: Float[Array, "n V"]) -> Float[Array, " n"]:
        """The maximum of `x` over the vocabulary; detached."""
        found = jnp.max(jax.lax.stop_gradient(x), axis=-1)
        return found if self.axis is None else jax.lax.pmax(found, self.axis)

    def log_total(self, x: Float[Array, "n V"]) -> Float[Array, " n"]:
        """`log sum exp(x)` over the vocabulary; -inf, without gradient, in a row that is -inf
        throughout.
        """
        top = self.largest(x)
        is_live = top != -jnp.inf  # a NaN is live: it has to be seen
        summed = self.total(
            jnp.exp(jnp.where(is_live[:, None], x, 0) - jnp.where(is_live, top, 0)[:, None])
        )
        return jnp.where(is_live, jnp.log(summed) + top, -jnp.inf)

    @property
    def logsumexp(self) -> Float[Array, " n"]:
        """The log-normaliser, nats."""
        return (
            jax.nn.logsumexp(self.logits, axis=-1)
            if self.axis is None
            else self.log_total(self.logits)
        )

    @property
    def logprobs(self) -> Float[Array, "n V"]:
        """Log-softmax, nats; -inf on padded ids."""
        return self.logits - self.logsumexp[:, None]

    def logprob(self, ids: Int[Array, "n *K"]) -> Float[Array, "n *K"]:
        """Log-probability at one id (`[n]`) or at K ids (`[n, K]`) a token, under the full softmax."""
        columns = ids if ids.ndim == 2 else ids[:, None]
        picked = self.at(columns) - self.logsumexp[:, None]
        return picked if ids.ndim == 2 else picked[:, 0]

    def at(self, ids: Int[Array, "n K"]) -> Float[Array, "n K"]:
        """The logits of K ids a token."""
        if self.axis is None:
            return jnp.take_along_axis(self.logits, ids, axis=-1)
        column, is_mine = self._column(ids)
        found = jnp.take_along_axis(self.logits, jnp.where(is_mine, column, 0), axis=-1)
        return jax.lax.psum(jnp.where(is_mine, found, 0), self.axis)

    def _column(self, ids: Int[Array, "n K"]) -> tuple[Int[Array, "n K"], Bool[Array, "n K"]]:
        """Where the ids stand among this device's columns, and whether they do."""
        width = self.logits.shape[-1]
        column = ids if self.axis is None else ids - jax.lax.axis_index(self.axis) * width
        return column, (column >= 0) & (column < width)

    def without(self, ids: Int[Array, "n K"]) -> Float[Array, "n V"]:
        """Log-probabilities of all ids but the given ones, which are -inf; an id of `vocab_size` or
        more is none.
        """
        column, is_mine = self._column(ids)
        column = jnp.where(is_mine, column, self.logits.shape[-1])
        return self.logprobs.at[jnp.arange(ids.shape[0])[:, None], column].set(
            -jnp.inf, mode="drop"
        )

    def expect(self, f: Float[Array, "n V"]) -> Float[Array, " n"]:
        """`E_{v ~ this}[f(v)]`. Ids of probability 0 contribute exactly 0, value and gradient,
        whatever `f` holds there.
        """
        is_live = self.logits > -jnp.inf
        return self.total(
            jnp.where(
                is_live, jnp.exp(jnp.where(is_live, self.logprobs, 0)) * jnp.where(is_live, f, 0), 0
            )
        )

    def top_k(self, k: int) -> Int[Array, "n K"]:
        """Ids of the `min(k, V)` most likely tokens, most likely first."""
        if k == 1:  # an argmax costs far less
            columns = jnp.argmax(self.logits, axis=-1, keepdims=True)
            values = jnp.take_along_axis(self.logits, columns, axis=-1)
        else:
            values, columns = jax.lax.top_k(self.logits, min(k, self.logits.shape[-1]))
        if self.axis is None:
            return columns
        values, ids = self._collect(values), self._collect(self.ids[columns])
        return jnp.take_along_axis(ids, jax.lax.top_k(values, min(k, self.vocab_size))[1], axis=-1)

    def _collect(self, mine: Float[Array, "n K"]) -> Float[Array, "n S*K"]:
        """The slices' values side by side. By a sum, since that, unlike a gather, is known to be
        the same on every device.
        """
        mine = jax.lax.stop_gradient(mine)
        place = jax.nn.one_hot(jax.lax.axis_index(self.axis), _num_slices(self.axis), dtype=bool)
        spread = jnp.where(place[None, :, None], mine[:, None], jnp.zeros((), mine.dtype))
        return jax.lax.psum(spread, self.axis).reshape(mine.shape[0], -1)

    def draw(self, uniform: Float[Array, "n M"]) -> Int[Array, "n M"]:
        """M ids a token, drawn from this distribution by inverting its cumulative sum at the given
        uniform numbers.
        """
        weights = jnp.exp(self.logits - self.largest(self.logits)[:, None])
        return jax.vmap(partial(invert_cdf, axis=self.axis), in_axes=(None, 1), out_axes=1)(
            weights, uniform
        )
