"""How one token is drawn: the row's key, one uniform number a position, the filters, and the
log-probs of what was drawn.

Every row has a random key folded from (seed, stream, prompt id, sample id, policy version), and
every token folds in its position in the completion and draws ONE uniform, turned into a token by
inverting the cumulative distribution. A draw is therefore the same whatever the batch, row, padding
or mesh; a token can differ only where its draw lies within logit rounding of a boundary between two
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt

from opdjax.ops.inverse_cdf import invert_cdf
from opdjax.ops.sharding import ROW_AXES
from opdjax.ops.tile import Head, VocabTile, head_logits

TRAIN_STREAM, EVAL_STREAM, EXTRA_STREAM = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How completions are drawn; static under jit. A filter that is off costs nothing."""

    max_completion_length: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    valid_vocab: int | None = None  # ids at or beyond it pad the embedding and are never drawn
    kv_dtype: str = (
        "auto"  # of stored keys and values: auto (the parameters' type), float32, bfloat16 or int8
    )

    @property
    def has_filter(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def row_keys(
    seed: int,
    stream: int,
    prompt_id: Int[Array, " B"],
    sample_id: Int[Array, " B"],
    policy_version: int | Int[Array, " B"],
) -> Array:
    """One key a row, `[B]`: a pure function of what the row is, not of where it stands."""
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)

    def fold(prompt, sample, version):
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.fold_in(base, prompt), sample), version
        )

    return jax.vmap(fold)(
        prompt_id, sample_id, jnp.broadcast_to(policy_version, jnp.shape(prompt_id))
    )


def is_stop(token: Int[Array, " B"], decoding: Decoding) -> Bool[Array, " B"]:
    """Whether the token ends its completion."""
    return jnp.isin(token, jnp.asarray(decoding.stop_token_ids, jnp.int32))


def draw_next(
    head: Head,
    hidden: Float[Array, "B D"],
    keys: Array,
    position: Int[Array, " B"],
    decoding: Decoding,
    mesh: Mesh | None,
):
    """`draw_tokens` from hidden states. On a mesh that splits the vocabulary no device sees logits
    but those of its own slice.
    """
    if mesh is None or mesh.shape["tensor"] == 1:
        return draw_tokens(VocabTile(head_logits(head, hidden)), keys, position, decoding)

    def of_slice(head, hidden, keys, position):
        return draw_tokens(
            VocabTile(head_logits(head, hidden, "tensor"), "tensor"), keys, position, decoding
        )

    rows = P(ROW_AXES)
    return jax.shard_map(
        of_slice, mesh=mesh, in_specs=(P("tensor"), rows, rows, rows), out_specs=rows
    )(head, hidden, keys, position)


def draw_tokens(tile: VocabTile, keys: Array, position: Int[Array, " B"] | int, decoding: Decoding):
    """(token, behaviour log-prob, unfiltered log-prob), each `[B]`, for the completion's token
    number `position`, from 0.

    The unfiltered log-prob is of the tempered softmax, the behaviour log-prob of the distribution
    truly drawn from. Greedy decoding draws nothing: its behaviour log-prob is 0 and its unfiltered
    one that of temperature 1.
    """
    if decoding.temperature == 0:
        token = _first_maximum(tile)
        logprob = tile.logprob(token)
        return token, jnp.zeros_like(logprob), logprob
    tile = dataclasses.replace(tile, logits=tile.logits / decoding.temperature)
    # One maximum for both normalisers, so that without a filter the two log-probs are the same
    # computation.
    top = tile.largest(tile.logits)
    weights = jnp.exp(tile.logits - top[:, None])
    kept = jnp.where(filter_mask(tile, decoding), weights, 0) if decoding.has_filter else weights
    places = jnp.broadcast_to(position, keys.shape)
    uniform = jax.vmap(lambda key, place: jax.random.uniform(jax.random.fold_in(key, place)))(
        keys, places
    )
    token = invert_cdf(kept, uniform, tile.axis)
    score = tile.at(token[:, None])[:, 0] - top
    unfiltered = score - jnp.log(tile.total(weights))
    behavior = score - jnp.log(tile.total(kept)) if decoding.has_filter else unfiltered
    return token, behavior, unfiltered


def _first_maximum(tile: VocabTile) -> Int[Array, " B"]:
    """`argmax`, which XLA's CPU backend computes six to nine times slower, as a reduction of pairs."""
    is_top = tile.logits == tile.largest(tile.logits)[:, None]
    return -tile.largest(jnp.where(is_top, -tile.ids, 1 - tile.vocab_size))


def filter_mask(tile: VocabTile, decoding: Decoding) -> Bool[Array, "B V"]:
    """Tokens that top-k, then top-p of what top-k left, then min-p keep. Ties at a threshold are
    all kept.

    Thresholds are found by bisection on the bits of numbers (a counting pass each), never by
    sorting the vocabulary. Those of top-p and min-p are of float32 probabilities up to their
    normaliser: one array is compared and summed.
    """
    logits = tile.logits
    keep = logits > -jnp.inf
    count = lambda x: tile.total(x.astype(jnp.int32))
    if decoding.top_k > 0:
        ordered, enough = _order_preserving_bits(logits), jnp.minimum(decoding.top_k, count(keep))
        keep &= ordered >= _largest(
            lambda least: count(ordered >= least) >= enough, jnp.zeros_like(enough), 32
        )
    top = tile.largest(logits)[:, None]
    weights = jnp.where(keep, jnp.exp(logits - top), 0).astype(jnp.float32)
    if decoding.top_p < 1:
        as_weight = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
        mass = lambda least: tile.total(jnp.where(weights >= as_weight(least), weights, 0))
        enough = decoding.top_p * tile.total(weights)
        # No weight is above 1, whose highest bit is the 30th.
        keep &= weights >= as_weight(
            _largest(lambda least: mass(least) >= enough, jnp.zeros_like(enough), 30)
        )
    if decoding.min_p > 0:
        keep &= weights >= decoding.min_p
    return keep


def _order_preserving_bits(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Unsigned integers in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(is_enough: Callable, none: Float[Array, " B"], num_bits: int) -> UInt[Array, "B 1"]:
    """The largest threshold per row for which `is_enough(threshold)` still holds, bit by bit from
    the top; `none` are zeros.
    """

    def try_bit(index, threshold):
        candidate = threshold | (jnp.uint32(1) << (num_bits - 1 - index).astype(jnp.uint32))
        return jnp.where(is_enough(candidate)[:, None], candidate, threshold)

    return jax.lax.fori_loop(0, num_bits, try_bit, none[:, None].astype(jnp.uint32))
