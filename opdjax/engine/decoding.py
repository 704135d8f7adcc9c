"""How one token is sampled. The key of a row is folded from (seed, stream, prompt id, sample id,
policy version); each token folds in its position and draws ONE uniform number, which is turned into
a token by inverting the cumulative distribution. So a draw does not depend on batch, row, padding
or mesh; a token differs only if its draw lies within logit rounding of a boundary between tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt

from opdjax.data.stop_strings import StopStrings
from opdjax.ops.inverse_cdf import invert_cdf
from opdjax.ops.sharding import ROW_AXES
from opdjax.ops.tile import Head, VocabTile, head_logits

TRAIN_STREAM, EVAL_STREAM, EXTRA_STREAM = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How completions are sampled; static under jit. A filter that is off costs nothing."""

    max_completion_length: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    valid_vocab: int | None = None  # ids from here on pad the embedding; never sampled
    # Of the cache: auto (the parameters' dtype), float32, bfloat16 or int8.
    kv_dtype: str = "auto"
    stop_strings: StopStrings | None = None  # texts that end a completion

    @property
    def has_filter(self) -> bool:
        """Whether a filter excludes some tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def row_keys(
    seed: int,
    stream: int,
    prompt_id: Int[Array, " B"],
    sample_id: Int[Array, " B"],
    policy_version: int | Int[Array, " B"],
) -> Array:
    """One key per row, `[B]`. It depends on the row's ids, not on its place in the batch."""
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)
    fold = lambda *ids: reduce(jax.random.fold_in, ids, base)
    version = jnp.broadcast_to(policy_version, jnp.shape(prompt_id))
    return jax.vmap(fold)(prompt_id, sample_id, version)


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
    """`draw_tokens` from hidden states. If the mesh shards the vocabulary, each device computes the
    logits of its own slice only.
    """
    if mesh is None or mesh.shape["tensor"] == 1:
        return draw_tokens(VocabTile(head_logits(head, hidden)), keys, position, decoding)

    def of_slice(head, hidden, keys, position):
        tile = VocabTile(head_logits(head, hidden, "tensor"), "tensor")
        return draw_tokens(tile, keys, position, decoding)

    rows = P(ROW_AXES)
    specs = {"in_specs": (P("tensor"), rows, rows, rows), "out_specs": rows}
    return jax.shard_map(of_slice, mesh=mesh, **specs)(head, hidden, keys, position)


def draw_tokens(tile: VocabTile, keys: Array, position: Int[Array, " B"] | int, decoding: Decoding):
    """(token, behaviour log-prob, unfiltered log-prob), each `[B]`, at position `position` of the
    completion, from 0.

    The unfiltered log-prob is under the tempered softmax; the behaviour log-prob is under the
    distribution that was sampled from, after the filters. Greedy decoding draws nothing: its
    behaviour log-prob is 0, its unfiltered log-prob that of temperature 1.
    """
    if decoding.temperature == 0:
        token = _first_maximum(tile)
        logprob = tile.logprob(token)
        return token, jnp.zeros_like(logprob), logprob
    tile = dataclasses.replace(tile, logits=tile.logits / decoding.temperature)
    # Both normalisers use one maximum, so that without a filter both log-probs are the same
    # computation.
    top = tile.largest(tile.logits)
    weights = jnp.exp(tile.logits - top[:, None])
    kept = jnp.where(filter_mask(tile, decoding), weights, 0) if decoding.has_filter else weights
    draw = lambda key, place: jax.random.uniform(jax.random.fold_in(key, place))
    uniform = jax.vmap(draw)(keys, jnp.broadcast_to(position, keys.shape))
    token = invert_cdf(kept, uniform, tile.axis)
    score = tile.at(token[:, None])[:, 0] - top
    unfiltered = score - jnp.log(tile.total(weights))
    behavior = score - jnp.log(tile.total(kept)) if decoding.has_filter else unfiltered
    return token, behavior, unfiltered


def _first_maximum(tile: VocabTile) -> Int[Array, " B"]:
    """`argmax` as two maxima: XLA's CPU backend computes an argmax six to nine times slower."""
    is_top = tile.logits == tile.largest(tile.logits)[:, None]
    return -tile.largest(jnp.where(is_top, -tile.ids, 1 - tile.vocab_size))


def filter_mask(tile: VocabTile, decoding: Decoding) -> Bool[Array, "B V"]:
    """True for the tokens left by top-k, then top-p, then min-p. Ties at a threshold are all kept.

    Thresholds are found by bisection on the bits of numbers (one counting pass per bit), never by
    sorting the vocabulary. Top-p and min-p compare and sum one array: float32 probabilities before
    normalisation.
    """
    logits = tile.logits
    keep = logits > -jnp.inf
    count = lambda x: tile.total(x.astype(jnp.int32))
    if decoding.top_k > 0:
        ordered, enough = _order_preserving_bits(logits), jnp.minimum(decoding.top_k, count(keep))
        is_enough = lambda least: count(ordered >= least) >= enough
        keep &= ordered >= _largest_threshold(is_enough, jnp.zeros_like(enough), 32)
    top = tile.largest(logits)[:, None]
    weights = jnp.where(keep, jnp.exp(logits - top), 0).astype(jnp.float32)
    if decoding.top_p < 1:
        as_weight = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
        mass = lambda least: tile.total(jnp.where(weights >= as_weight(least), weights, 0))
        enough = decoding.top_p * tile.total(weights)
        # The largest weight is 1.0, which has 30 bits.
        is_enough = lambda least: mass(least) >= enough
        keep &= weights >= as_weight(_largest_threshold(is_enough, jnp.zeros_like(enough), 30))
    if decoding.min_p > 0:
        keep &= weights >= decoding.min_p
    return keep


def _order_preserving_bits(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Unsigned integers in the same order as the float32 values."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest_threshold(
    is_enough: Callable, zeros: Float[Array, " B"], num_bits: int
) -> UInt[Array, "B 1"]:
    """The largest threshold per row for which `is_enough(threshold)` holds, found bit by bit."""

    def try_bit(index, threshold):
        candidate = threshold | (jnp.uint32(1) << (num_bits - 1 - index).astype(jnp.uint32))
        return jnp.where(is_enough(candidate)[:, None], candidate, threshold)

    return jax.lax.fori_loop(0, num_bits, try_bit, zeros[:, None].astype(jnp.uint32))
