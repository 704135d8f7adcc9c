"""The next-token distributions of a tile of tokens, which a recipe reads: over the whole vocabulary
or over one device's slice of it.
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
    data_fields=["kernel", "bias", "scale"],
    meta_fields=["softcap", "valid_vocab", "temperature"],
)
@dataclasses.dataclass(frozen=True)
class Head:
    """An unembedding: `logits = softcap(hidden @ kernel.T * scale + bias) / temperature`, -inf from
    `valid_vocab` on.
    """

    kernel: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    scale: Float[Array, " V"] | None = None  # of a kernel in 8 bits
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    valid_vocab: int | None = None  # rows from this id on pad the embedding and are no tokens
    temperature: float = 1.0  # of the distribution that is scored


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of softmaxes and sums: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def head_logits(
    head: Head, hidden: Float[Array, "... D"], axis: str | None = None
) -> Float[Array, "... V"]:
    """Dense logits, in at least float32. Only for a few positions: training and scoring use the
    tiled pass. With an `axis`, the head is this device's slice of the vocabulary along it.
    """
    return finish_logits(head, raw_logits(head, hidden), axis)


def raw_logits(head: Head, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """`hidden @ kernel.T`, in at least float32."""
    dtype, kernel = sum_dtype(hidden.dtype), head.kernel
    kernel = kernel if head.scale is None else kernel.astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, kernel, preferred_element_type=dtype)


def finish_logits(
    head: Head, raw: Float[Array, "... V"], axis: str | None = None
) -> Float[Array, "... V"]:
    """Logits from `raw_logits`: adds scale, bias, softcap, temperature, and -inf on padding ids."""
    logits = raw if head.scale is None else raw * head.scale.astype(raw.dtype)
    logits = logits if head.bias is None else logits + head.bias.astype(raw.dtype)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    if head.temperature != 1.0:
        logits = logits / head.temperature
    width = head.kernel.shape[0]
    if head.valid_vocab is not None and head.valid_vocab < width * _num_slices(axis):
        logits = jnp.where(_ids_of_slice(width, axis) < head.valid_vocab, logits, -jnp.inf)
    return logits


def _num_slices(axis: str | None) -> int:
    return 1 if axis is None else jax.lax.axis_size(axis)


def _ids_of_slice(width: int, axis: str | None) -> Int[Array, " V"]:
    ids = jnp.arange(width)
    return ids if axis is None else jax.lax.axis_index(axis) * width + ids


def fit_width(logits: Float[Array, "n U"], vocab: int) -> Float[Array, "n V"]:
    """Logits cut or padded to width `vocab`. Models of one family may pad the same vocabulary to
    different widths; only padding ids differ.
    """
    missing = vocab - logits.shape[1]
    if missing <= 0:
        return logits[:, :vocab]
    return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)


@partial(jax.tree_util.register_dataclass, data_fields=["logits"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class VocabTile:
    """The next-token distributions of n tokens. A tile of plain dense `[n, V]` logits is the
    reference of every test.

    If the mesh shards the vocabulary, each device holds the logits of its own slice, and `axis` is
    the mesh axis. A recipe must reduce over the vocabulary with the methods of this class, never
    with `jnp.sum(..., axis=-1)`: the methods reduce over the whole vocabulary and return the same
    values on every device. A recipe that does not fails when it is traced.
    """

    logits: Float[Array, "n V"]
    axis: str | None = None

    @property
    def ids(self) -> Int[Array, " V"]:
        """The token ids of the columns."""
        return _ids_of_slice(self.logits.shape[-1], self.axis)

    @property
    def vocab_size(self) -> int:
        """V, over all slices."""
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
        """`log sum exp(x)` over the vocabulary; -inf without gradient for a row of -inf."""
        top = self.largest(x)
        is_live = top != -jnp.inf  # NaN counts as live, so that it propagates
        shifted = jnp.where(is_live[:, None], x, 0) - jnp.where(is_live, top, 0)[:, None]
        return jnp.where(is_live, jnp.log(self.total(jnp.exp(shifted))) + top, -jnp.inf)

    @property
    def logsumexp(self) -> Float[Array, " n"]:
        """The log-normaliser, nats."""
        if self.axis is None:
            return jax.nn.logsumexp(self.logits, axis=-1)
        return self.log_total(self.logits)

    @property
    def logprobs(self) -> Float[Array, "n V"]:
        """Log-softmax, nats; -inf on padding ids."""
        return self.logits - self.logsumexp[:, None]

    def logprob(self, ids: Int[Array, "n *K"]) -> Float[Array, "n *K"]:
        """Log-probs of one id (`[n]`) or K ids (`[n, K]`) per token, full softmax, nats."""
        columns = ids if ids.ndim == 2 else ids[:, None]
        picked = self.at(columns) - self.logsumexp[:, None]
        return picked if ids.ndim == 2 else picked[:, 0]

    def at(self, ids: Int[Array, "n K"]) -> Float[Array, "n K"]:
        """The logits of K ids per token."""
        if self.axis is None:
            return jnp.take_along_axis(self.logits, ids, axis=-1)
        column, is_mine = self._column(ids)
        found = jnp.take_along_axis(self.logits, jnp.where(is_mine, column, 0), axis=-1)
        return jax.lax.psum(jnp.where(is_mine, found, 0), self.axis)

    def _column(self, ids: Int[Array, "n K"]) -> tuple[Int[Array, "n K"], Bool[Array, "n K"]]:
        """The columns of the ids on this device, and whether the ids are in its slice."""
        width = self.logits.shape[-1]
        column = ids if self.axis is None else ids - jax.lax.axis_index(self.axis) * width
        return column, (column >= 0) & (column < width)

    def without(self, ids: Int[Array, "n K"]) -> Float[Array, "n V"]:
        """Log-probs of all ids, -inf at the given ids; ids from `vocab_size` on are ignored."""
        column, is_mine = self._column(ids)
        column = jnp.where(is_mine, column, self.logits.shape[-1])
        places = jnp.arange(ids.shape[0])[:, None], column
        return self.logprobs.at[places].set(-jnp.inf, mode="drop")

    def expect(self, f: Float[Array, "n V"]) -> Float[Array, " n"]:
        """`E_{v ~ this}[f(v)]`. Ids of probability 0 contribute exactly 0 to value and gradient,
        even where `f` is NaN.
        """
        is_live = self.logits > -jnp.inf
        weighted = jnp.exp(jnp.where(is_live, self.logprobs, 0)) * jnp.where(is_live, f, 0)
        return self.total(jnp.where(is_live, weighted, 0))

    def top_k(self, k: int) -> Int[Array, "n K"]:
        """Ids of the `min(k, V)` most likely tokens, most likely first."""
        if k == 1:  # argmax is much faster
            columns = jnp.argmax(self.logits, axis=-1, keepdims=True)
            values = jnp.take_along_axis(self.logits, columns, axis=-1)
        else:
            values, columns = jax.lax.top_k(self.logits, min(k, self.logits.shape[-1]))
        if self.axis is None:
            return columns
        values, ids = self._collect(values), self._collect(self.ids[columns])
        return jnp.take_along_axis(ids, jax.lax.top_k(values, min(k, self.vocab_size))[1], axis=-1)

    def _collect(self, mine: Float[Array, "n K"]) -> Float[Array, "n S*K"]:
        """The values of all slices, concatenated. By psum: shard_map knows that its result is the
        same on every device, which it does not know of an all-gather.
        """
        mine = jax.lax.stop_gradient(mine)
        place = jax.nn.one_hot(jax.lax.axis_index(self.axis), _num_slices(self.axis), dtype=bool)
        spread = jnp.where(place[None, :, None], mine[:, None], jnp.zeros((), mine.dtype))
        return jax.lax.psum(spread, self.axis).reshape(mine.shape[0], -1)

    def draw(self, uniform: Float[Array, "n M"]) -> Int[Array, "n M"]:
        """M ids per token, drawn from this distribution by inverting its CDF at `uniform`."""
        weights = jnp.exp(self.logits - self.largest(self.logits)[:, None])
        invert = jax.vmap(partial(invert_cdf, axis=self.axis), in_axes=(None, 1), out_axes=1)
        return invert(weights, uniform)
