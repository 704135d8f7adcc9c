"""Student rollouts: one jitted prefill and decode loop over a batch of left-padded prompts.

Every row has a random key folded from (seed, stream, prompt id, sample id, policy version), and every token folds in its
position in the completion and draws ONE uniform, turned into a token by inverting the cumulative distribution. A draw is
therefore the same whatever the batch, row, padding or mesh; a token can differ only where its draw lies within logit
rounding of a boundary between two tokens.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt

from opdjax.models.decoder import DecoderConfig, KVCache, Params, forward_cached, head_of, init_cache, positions_of
from opdjax.ops.draw import invert_cdf
from opdjax.ops.masked import rank_in_sequence
from opdjax.ops.vocab import head_logits
from opdjax.sharding import ROW_AXES, by_row
from opdjax.types import PromptBatch, Rollouts

TRAIN_STREAM, EVAL_STREAM, EXTRA_STREAM = 0, 1, 2
_PAD_TOKEN = 0  # stands in masked columns only


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How tokens are drawn; static under jit. A filter that is off costs nothing."""

    max_completion_length: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    valid_vocab: int | None = None  # ids at or beyond it pad the embedding and are never drawn

    @property
    def has_filter(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def row_keys(
    seed: int, stream: int, prompt_id: Int[Array, " B"], sample_id: Int[Array, " B"], policy_version: int | Int[Array, " B"]
) -> Array:
    """One key a row, `[B]`: a pure function of what the row is, not of where it stands."""
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)

    def fold(prompt, sample, version):
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(base, prompt), sample), version)

    return jax.vmap(fold)(prompt_id, sample_id, jnp.broadcast_to(policy_version, jnp.shape(prompt_id)))


@partial(jax.jit, static_argnames="count")
def extra_uniforms(rollouts: Rollouts, seed: int, count: int) -> Float[Array, "B T M"]:
    """Uniform numbers for `count` more draws at each context of the rollouts, from a stream of their own, whatever the layout."""
    keys = row_keys(seed, EXTRA_STREAM, rollouts.prompt_id, rollouts.sample_id, rollouts.policy_version)
    position = rank_in_sequence(rollouts.mask, rollouts.segment_ids)
    draw = lambda key, place: jax.random.uniform(jax.random.fold_in(key, place), (count,))  # noqa: E731
    return jax.vmap(lambda key, places: jax.vmap(partial(draw, key))(places))(keys, position)


@partial(jax.jit, static_argnames=("config", "decoding", "num_generations", "stream", "mesh"))
def sample(
    params: Params,
    prompts: PromptBatch,
    seed: int,
    policy_version: int,
    *,
    config: DecoderConfig,
    decoding: Decoding,
    num_generations: int = 1,
    stream: int = TRAIN_STREAM,
    first_sample: int = 0,
    mesh: Mesh | None = None,
) -> Rollouts:
    """`num_generations` completions of each prompt (B = P * G rows, those of a prompt side by side).

    Rows are `[prompt | completion]`; the loop ends as soon as every row has drawn a stop token. With a `mesh`, rows are
    split over `data` and `fsdp`, whose product must divide B.
    """
    repeat = partial(jnp.repeat, repeats=num_generations, axis=0)
    prompt_tokens, prompt_mask, prompt_id = repeat(prompts.tokens), repeat(prompts.mask), repeat(prompts.prompt_id)
    batch, width = prompt_tokens.shape
    # A prompt that stands in the batch twice (a step may end one epoch and begin the next) must not be answered alike twice.
    occurrence = jnp.zeros_like(prompts.prompt_id) if prompts.occurrence is None else prompts.occurrence
    sample_id = first_sample + repeat(occurrence) * num_generations + jnp.tile(jnp.arange(num_generations), prompts.tokens.shape[0])
    keys = row_keys(seed, stream, prompt_id, sample_id, policy_version)
    if mesh is not None:
        prompt_tokens, prompt_mask, keys = jax.lax.with_sharding_constraint((prompt_tokens, prompt_mask, keys), by_row(mesh))

    columns = _decode(params, prompt_tokens, prompt_mask, keys, config, decoding, mesh)
    tokens, mask, behavior, unfiltered = columns
    before = jnp.zeros((batch, width), behavior.dtype)
    return Rollouts(
        tokens=jnp.concatenate([prompt_tokens, tokens], axis=1),
        mask=jnp.concatenate([jnp.zeros_like(prompt_mask), mask], axis=1),
        segment_ids=jnp.concatenate([prompt_mask, mask], axis=1).astype(jnp.int32),
        behavior_logprobs=jnp.concatenate([before, behavior], axis=1),
        unfiltered_logprobs=jnp.concatenate([before, unfiltered], axis=1),
        prompt_id=prompt_id,
        sample_id=sample_id,
        policy_version=jnp.full(batch, policy_version, jnp.int32),
        is_truncated=mask[:, -1] & ~_is_stop(tokens[:, -1], decoding),
    )


def _decode(params, prompt_tokens, prompt_mask, keys, config, decoding, mesh):
    """Completion columns `[B, C]`: tokens, mask, behaviour and unfiltered log-probs."""
    batch, width = prompt_tokens.shape
    length = decoding.max_completion_length
    segments = prompt_mask.astype(jnp.int32)
    head = head_of(params, valid_vocab=decoding.valid_vocab)
    cache = init_cache(config, batch, width, params["embedding"].dtype)
    hidden, cache = forward_cached(params, config, prompt_tokens, segments, positions_of(segments), cache, 0)
    cache = _with_room(cache, length, mesh)  # only now: the prefill would otherwise attend to the empty columns too
    prompt_length = jnp.sum(prompt_mask, axis=1)

    def draw(column, hidden, is_done, drawn):
        """Draw column `column` of the rows that are not done."""
        token, behavior, unfiltered = draw_tokens(head_logits(head, hidden), keys, column, decoding)
        token = jnp.where(is_done, _PAD_TOKEN, token)
        values = (token, ~is_done, jnp.where(is_done, 0, behavior), jnp.where(is_done, 0, unfiltered))
        drawn = jax.tree.map(lambda buffer, value: buffer.at[:, column].set(value), drawn, values)
        return is_done | _is_stop(token, decoding), drawn

    def keep_going(carry):
        column, _, is_done, _ = carry
        return (column < length) & ~jnp.all(is_done)

    def step(carry):
        column, cache, is_done, drawn = carry
        token = jax.lax.dynamic_slice_in_dim(drawn[0], column - 1, 1, axis=1)
        segment = jnp.where(is_done, 0, 1)[:, None]
        position = (prompt_length + column - 1)[:, None]
        hidden, cache = forward_cached(params, config, token, segment, position, cache, width + column - 1)
        is_done, drawn = draw(column, hidden[:, 0], is_done, drawn)
        return column + 1, cache, is_done, drawn

    shape = (batch, length)
    drawn = (jnp.full(shape, _PAD_TOKEN, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape), jnp.zeros(shape))
    # A row without a prompt is filler that makes up the batch; it is done before it starts.
    is_done, drawn = draw(0, hidden[:, -1], prompt_length == 0, drawn)
    return jax.lax.while_loop(keep_going, step, (1, cache, is_done, drawn))[-1]


def _with_room(cache: KVCache, length: int, mesh: Mesh | None) -> KVCache:
    """The cache with `length` more empty columns, rows split over the mesh."""
    grow = lambda x, axis: jnp.pad(x, [(0, length if i == axis else 0) for i in range(x.ndim)])  # noqa: E731
    keys, values = grow(cache.keys, 2), grow(cache.values, 2)
    if mesh is not None:
        keys, values = jax.lax.with_sharding_constraint((keys, values), NamedSharding(mesh, P(None, ROW_AXES)))
    return KVCache(keys, values, grow(cache.segment_ids, 1))


def _is_stop(token: Int[Array, " B"], decoding: Decoding) -> Bool[Array, " B"]:
    return jnp.isin(token, jnp.asarray(decoding.stop_token_ids, jnp.int32))


def draw_tokens(logits: Float[Array, "B V"], keys: Array, position: Int[Array, ""] | int, decoding: Decoding):
    """(token, behaviour log-prob, unfiltered log-prob), each `[B]`, for the completion's token number `position`.

    The unfiltered log-prob is of the tempered softmax, the behaviour log-prob of the distribution truly drawn from.
    Greedy decoding draws nothing: its behaviour log-prob is 0 and its unfiltered one that of temperature 1.
    """
    if decoding.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logprob = _at(logits, token) - jax.nn.logsumexp(logits, axis=-1)
        return token, jnp.zeros_like(logprob), logprob
    logits = logits / decoding.temperature
    # One maximum for both normalisers, so that without a filter the two log-probs are the same computation.
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    kept = jnp.where(filter_mask(logits, decoding), weights, 0) if decoding.has_filter else weights
    uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, position)))(keys)
    token = invert_cdf(kept, uniform)
    score = _at(logits, token) - top[:, 0]
    unfiltered = score - jnp.log(jnp.sum(weights, axis=-1))
    behavior = score - jnp.log(jnp.sum(kept, axis=-1)) if decoding.has_filter else unfiltered
    return token, behavior, unfiltered


def _at(x: Float[Array, "B V"], ids: Int[Array, " B"]) -> Float[Array, " B"]:
    return jnp.take_along_axis(x, ids[:, None], axis=-1)[:, 0]


def filter_mask(logits: Float[Array, "B V"], decoding: Decoding) -> Bool[Array, "B V"]:
    """Tokens that top-k, then top-p of what top-k left, then min-p keep. Ties at a threshold are all kept.

    Thresholds are found by bisection on the bits of the logits (32 counting passes), never by sorting the vocabulary.
    """
    ordered = _order_preserving_bits(logits)
    keep = logits > -jnp.inf
    if decoding.top_k > 0:
        enough = jnp.minimum(decoding.top_k, jnp.sum(keep, axis=-1))
        keep &= ordered >= _largest_threshold(ordered, lambda above: jnp.sum(above, axis=-1) >= enough)[:, None]
    probs = jax.nn.softmax(jnp.where(keep, logits, -jnp.inf), axis=-1)
    if decoding.top_p < 1:
        mass = lambda above: jnp.sum(jnp.where(above, probs, 0), axis=-1)  # noqa: E731
        enough = jnp.minimum(decoding.top_p, mass(keep))
        keep &= ordered >= _largest_threshold(ordered, lambda above: mass(above) >= enough)[:, None]
    if decoding.min_p > 0:
        keep &= probs >= decoding.min_p * jnp.max(probs, axis=-1, keepdims=True)
    return keep


def _order_preserving_bits(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Unsigned integers in the order of the float32 values."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest_threshold(ordered: UInt[Array, "B V"], is_enough) -> UInt[Array, " B"]:
    """The largest threshold per row for which `is_enough(ordered >= threshold)` still holds, bit by bit from the top."""

    def try_bit(index, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        return jnp.where(is_enough(ordered >= candidate[:, None]), candidate, threshold)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(ordered.shape[0], jnp.uint32))
