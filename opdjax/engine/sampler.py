"""Student rollouts by continuous batching: a fixed number of slots decode together, and the slot of
a finished row starts the next one. The sampled tokens depend on none of this (see decoding.py).

The host schedules (scheduling.py). `prefill` reads a block of prompts; `advance` starts their rows
in free slots and decodes until enough slots are free again. All slots write keys and values at the
same column of a ring buffer, so that a write is one slice. The ring is no longer than the longest
unfinished row needs; it grows in powers of two, and each length is one compiled program.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from opdjax.engine.decoding import (
    EXTRA_STREAM,
    TRAIN_STREAM,
    Decoding,
    draw_next,
    is_stop,
    row_keys,
)
from opdjax.engine.scheduling import (
    Assignments,
    RowIds,
    block_size,
    num_slots,
    prompt_blocks,
    ring_sizes,
)
from opdjax.models import kv_cache
from opdjax.models.decoder import DecoderConfig, Params, dtype_of, head_of
from opdjax.models.kv_cache import KVCache
from opdjax.ops.masked import rank_in_sequence
from opdjax.ops.sharding import by_row, num_row_shards, replicated
from opdjax.types import PromptBatch, Rollouts

_FREE_SHARE = 8  # while rows wait, decoding stops once 1 / _FREE_SHARE of the slots is free


@partial(jax.jit, static_argnames="count")
def extra_uniforms(rollouts: Rollouts, seed: int, count: int) -> Float[Array, "B T M"]:
    """Uniform numbers for `count` more draws at each context of the rollouts, from a random stream
    of their own; the same in every layout.
    """
    keys = row_keys(
        seed, EXTRA_STREAM, rollouts.prompt_id, rollouts.sample_id, rollouts.policy_version
    )
    position = rank_in_sequence(rollouts.mask, rollouts.segment_ids)
    draw = lambda key, place: jax.random.uniform(jax.random.fold_in(key, place), (count,))
    return jax.vmap(lambda key, places: jax.vmap(partial(draw, key))(places))(keys, position)


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
    slots: int | None = None,
    prompt_columns: int | None = None,
    is_wanted: Bool[np.ndarray, " B"] | None = None,
) -> Rollouts:
    """`num_generations` completions of each prompt (B = P * G rows; rows of a prompt are adjacent).

    Rows are `[prompt | completion]`. Prompts are host arrays; a prompt row without tokens is filler
    and its completions are empty. `slots` rows are decoded at a time (None: all). With a `mesh`,
    slots are sharded over `data` and `fsdp`, heads over `tensor`; ConfigError if `slots` is not
    divisible. `prompt_columns`: columns of the cache for prompts (None: the width of the widest
    prompt). If it is constant over a run, each prompt width and each ring length compiles once.
    `is_wanted`: completions that are not wanted stay empty (None: all are wanted).
    Cannot be called under jit: it runs a host loop over jitted steps.
    """
    rows = RowIds.of(prompts, num_generations, first_sample)
    num_rows = len(rows.prompt_id)
    slots = num_slots(slots, num_rows, mesh)
    size = block_size(slots, num_generations, mesh)
    is_wanted = np.ones(num_rows, bool) if is_wanted is None else is_wanted
    has_rows = is_wanted.reshape(-1, num_generations).any(axis=1, keepdims=True)
    blocks = deque(prompt_blocks(np.asarray(prompts.mask) & has_rows, size))
    width = max([block.width for block in blocks] + [prompt_columns or 1])
    rings = ring_sizes(decoding.max_completion_length)
    static = {"config": config, "decoding": decoding, "mesh": mesh}
    stop_table = decoding.stop_strings and decoding.stop_strings.table
    state = start(params, slots=slots, rows=num_rows, columns=width + rings[0], **static)
    layer_params = split_layers(params["layers"], config)
    stream_ids = np.array([seed, stream, policy_version], np.int32)
    static |= {"prompt_columns": width}
    prefix, waiting = None, deque()  # (row of the block prefilled last, row of the rollouts)
    is_done, num_sampled = np.ones(slots, bool), np.zeros(slots, np.int32)
    while waiting or blocks or not is_done.all():
        if blocks and not waiting:
            block = blocks.popleft()
            prefix = prefill(params, layer_params, *block.read(prompts), **static)
            waiting.extend(pair for pair in block.rows(num_generations) if is_wanted[pair[1]])
        assignments = rows.assign(waiting, np.flatnonzero(is_done), slots)
        keeps_row = assignments.block_row < 0
        is_done, num_sampled = is_done & keeps_row, np.where(keeps_row, num_sampled, 0)
        if blocks and is_done.any():
            limit, min_free_slots = 0, slots  # fill all slots before decoding
        else:
            longest = int(num_sampled[~is_done].max())
            if longest == rings[0] and len(rings) > 1:
                rings = rings[1:]
                cache = _with_ring(state.cache, state.cursor, width, rings[0], mesh)
                state = state.replace(cache=cache)
            limit = rings[0] - longest if len(rings) > 1 else decoding.max_completion_length
            min_free_slots = max(slots // _FREE_SHARE, 1) if waiting or blocks else slots
        schedule = prefix, assignments, stream_ids, limit, min_free_slots, stop_table
        state, status = advance(params, layer_params, state, *schedule, **static)
        if limit:
            is_done, num_sampled = map(np.asarray, status)
    static = rows, policy_version, decoding, mesh
    return _collect(state, prompts.tokens, prompts.mask, *static, stop_table)


@struct.dataclass
class Prefix:
    """A block of prefilled prompts."""

    cache: KVCache  # prompts end in its last column
    hidden: Float[Array, "R D"]  # after the last token
    length: Int[Array, " R"]


@struct.dataclass
class SampledTokens:
    """Sampled tokens by column of the completion; columns without a sampled token are undefined."""

    tokens: Int[Array, "N C"]
    behavior_logprobs: Float[Array, "N C"]
    unfiltered_logprobs: Float[Array, "N C"]


@struct.dataclass
class SlotState:
    """The S slots, each decoding a row, and the results of the B rows that are finished."""

    cache: KVCache  # columns of the prompt, then the ring
    clock: Int[Array, ""]  # decoding steps so far
    cursor: Int[Array, ""]  # column of the ring that is written next
    hidden: Float[Array, "S D"]  # predicts the next token
    keys: Array  # [S]
    row: Int[Array, " S"]  # B: none yet
    prompt_length: Int[Array, " S"]
    start_clock: Int[Array, " S"]  # the clock when the row's first token was sampled
    num_sampled: Int[Array, " S"]
    is_done: Bool[Array, " S"]
    recent: SampledTokens  # [S, C]; the token sampled at clock c is in column c % C
    finished: SampledTokens  # [B, C]
    lengths: Int[Array, " B"]
    stop_state: Int[Array, " S"] | None  # of the automaton of the stop strings, if there are any


@partial(jax.jit, static_argnames=("prompt_columns", "config", "decoding", "mesh"))
def prefill(
    params, layer_params, tokens, mask, *, prompt_columns, config, decoding, mesh
) -> Prefix:
    """Read left-padded prompts `[R, T]`; the cache is padded to `prompt_columns` for every T."""
    dtype = _kv_dtype(params, decoding)
    hidden, cache = kv_cache.prefill(params, layer_params, config, tokens, mask, dtype, mesh)
    missing = prompt_columns - tokens.shape[1]
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(missing, 0), (0, 0)])
    cache = kv_cache.constrain(jax.tree.map(pad, cache), mesh)
    return Prefix(cache, hidden, jnp.sum(mask, axis=1))


@partial(jax.jit, static_argnames=("slots", "rows", "columns", "config", "decoding", "mesh"))
def start(params, *, slots, rows, columns, config, decoding, mesh) -> SlotState:
    """Empty slots."""
    dtype, length = dtype_of(params), decoding.max_completion_length
    wide = jnp.promote_types(dtype, jnp.float32)

    def no_tokens(count: int) -> SampledTokens:
        zeros = partial(jnp.zeros, (count, length))
        return SampledTokens(zeros(jnp.int32), zeros(wide), zeros(wide))

    of_slot, zero = jnp.zeros(slots, jnp.int32), jnp.int32(0)
    state = SlotState(
        cache=kv_cache.init_cache(config, slots, columns, _kv_dtype(params, decoding), wide),
        clock=zero,
        cursor=zero,
        hidden=jnp.zeros((slots, config.hidden_size), dtype),
        keys=row_keys(0, 0, of_slot, of_slot, 0),
        row=of_slot + rows,
        prompt_length=of_slot,
        start_clock=of_slot,
        num_sampled=of_slot,
        is_done=jnp.ones(slots, bool),
        recent=no_tokens(slots),
        finished=no_tokens(rows),
        lengths=jnp.zeros(rows, jnp.int32),
        stop_state=None if decoding.stop_strings is None else of_slot,
    )
    return _constrain(state, mesh)


@partial(
    jax.jit,
    static_argnames=("prompt_columns", "config", "decoding", "mesh"),
    donate_argnames="state",
)
def advance(
    params: Params,
    layer_params: tuple[Params, ...],
    state: SlotState,
    prefix: Prefix,
    assignments: Assignments,
    stream_ids: Int[Array, "3"],
    limit: int,
    min_free_slots: int,
    stop_table: Int[Array, "Q V"] | None = None,
    *,
    prompt_columns: int,
    config: DecoderConfig,
    decoding: Decoding,
    mesh: Mesh | None,
) -> tuple[SlotState, tuple[Bool[Array, " S"], Int[Array, " S"]]]:
    """Fill slots by `assignments`, then decode until `min_free_slots` slots are done, for at most
    `limit` steps.

    `layer_params` are the layers by `split_layers`; `stream_ids` are seed, stream and policy
    version. Also returns `is_done` and `num_sampled` of each slot for the host, replicated on every
    device.
    """
    head = head_of(params, valid_vocab=decoding.valid_vocab)
    fill = lambda state: _fill_slots(state, prefix, assignments, stream_ids)
    state = jax.lax.cond(jnp.any(assignments.block_row >= 0), fill, lambda state: state, state)

    def keep_going(carry):
        steps, state = carry
        return (steps < limit) & (jnp.sum(state.is_done) < min_free_slots)

    def step(carry):
        steps, state = carry
        state = _sample_token(state, head, decoding, mesh, stop_table)
        return steps + 1, _decode_token(state, params, layer_params, config, prompt_columns, mesh)

    state = _constrain(jax.lax.while_loop(keep_going, step, (0, _constrain(state, mesh)))[1], mesh)
    status = state.is_done, state.num_sampled
    if mesh is not None:
        status = jax.lax.with_sharding_constraint(status, replicated(mesh))
    return state, status


def _fill_slots(
    state: SlotState, prefix: Prefix, assignments: Assignments, stream_ids: Int[Array, "3"]
) -> SlotState:
    """Start the assigned rows, after storing the results of the rows that their slots held."""
    is_new, block_row = assignments.block_row >= 0, assignments.block_row
    finished, lengths = _retire_rows(state, is_new)
    seed, stream, policy_version = stream_ids
    new = {
        "hidden": prefix.hidden[block_row],
        "keys": row_keys(
            seed, stream, assignments.prompt_id, assignments.sample_id, policy_version
        ),
        "row": assignments.row,
        "prompt_length": prefix.length[block_row],
        "start_clock": state.clock,
        "num_sampled": 0,
        "is_done": False,
    } | ({} if state.stop_state is None else {"stop_state": 0})
    old = {name: getattr(state, name) for name in new}
    pick = lambda new, old: jnp.where(is_new[:, None] if old.ndim == 2 else is_new, new, old)
    return state.replace(
        cache=kv_cache.copy_prefix(state.cache, prefix.cache, block_row),
        finished=finished,
        lengths=lengths,
        **jax.tree.map(pick, new, old),
    )


def _retire_rows(
    state: SlotState, is_leaving: Bool[Array, " S"]
) -> tuple[SampledTokens, Int[Array, " B"]]:
    """The results of all rows so far, with the rows of the leaving slots added."""
    length, (num_rows,) = state.recent.tokens.shape[1], state.lengths.shape
    column = (state.start_clock[:, None] + jnp.arange(length)) % length
    to = jnp.where(is_leaving, state.row, num_rows)
    put = lambda all_rows, new: all_rows.at[to].set(new, mode="drop")
    put_in_order = lambda old, new: put(old, jnp.take_along_axis(new, column, axis=1))
    finished = jax.tree.map(put_in_order, state.finished, state.recent)
    return finished, put(state.lengths, state.num_sampled)


def _sample_token(
    state: SlotState, head, decoding: Decoding, mesh: Mesh | None, stop_table: Array | None
) -> SlotState:
    """Sample the next token of every slot; a slot that is done stays as it is."""
    length = decoding.max_completion_length
    sampled = draw_next(head, state.hidden, state.keys, state.num_sampled, decoding, mesh)
    column = state.clock % length
    num_sampled = state.num_sampled + ~state.is_done
    is_ended, stop_state = is_stop(sampled[0], decoding), state.stop_state
    if stop_table is not None:
        stop_state = jnp.where(state.is_done, stop_state, stop_table[stop_state, sampled[0]])
        is_ended |= stop_state == len(stop_table) - 1

    def put(old: Array, new: Array) -> Array:
        # The clock wraps around: a finished row that waits for `_retire_rows` must not be
        # overwritten.
        kept = jax.lax.dynamic_slice_in_dim(old, column, 1, axis=1)
        new = jnp.where(state.is_done[:, None], kept, new[:, None].astype(old.dtype))
        return jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=1)

    return state.replace(
        recent=jax.tree.map(put, state.recent, SampledTokens(*sampled)),
        num_sampled=num_sampled,
        is_done=state.is_done | is_ended | (num_sampled == length),
        stop_state=stop_state,
    )


def _decode_token(
    state: SlotState,
    params: Params,
    layer_params,
    config: DecoderConfig,
    prompt_columns: int,
    mesh: Mesh | None,
) -> SlotState:
    """Run the model on the tokens sampled last, which writes the next column of the ring."""
    token = jax.lax.dynamic_slice_in_dim(
        state.recent.tokens, state.clock % state.recent.tokens.shape[1], 1, axis=1
    )
    ring = state.cache.num_columns - prompt_columns
    # How far before the token a column's token stands, and whether it is of this row's text.
    of_ring, last = (state.cursor - jnp.arange(ring)) % ring, state.num_sampled[:, None]
    of_prompt = last - 1 + prompt_columns - jnp.arange(prompt_columns)
    is_prompt = jnp.arange(prompt_columns) >= prompt_columns - state.prompt_length[:, None]
    of_prompt, of_ring = (
        jnp.where(is_own, distance, -1)
        for is_own, distance in ((is_prompt, of_prompt), (of_ring < last, of_ring))
    )
    hidden, cache = kv_cache.forward_cached(
        params,
        layer_params,
        config,
        token,
        (state.prompt_length + state.num_sampled - 1)[:, None],
        state.cache,
        prompt_columns + state.cursor,
        jnp.concatenate([of_prompt, of_ring], axis=1)[:, None],
        mesh,
    )
    return state.replace(
        hidden=hidden[:, 0], cache=cache, clock=state.clock + 1, cursor=(state.cursor + 1) % ring
    )


def _with_ring(
    cache: KVCache, cursor: Array, prompt_columns: int, ring: int, mesh: Mesh | None
) -> KVCache:
    """The cache with a longer ring, copied array by array: one old array exists beside the new."""

    def lengthen(old: Array) -> Array:
        new = _lengthen(old, cursor, prompt_columns, ring)
        old.delete()
        return new

    return _constrain_cache(jax.tree.map(lengthen, cache), mesh=mesh)


@partial(jax.jit, static_argnums=(2, 3))
def _lengthen(
    x: Float[Array, "*L S K T H"], cursor: Int[Array, ""], prompt_columns: int, ring: int
) -> Float[Array, "*L S K U H"]:
    """Insert empty columns at the cursor, before the oldest columns."""
    prompt, old = x[..., :prompt_columns, :], x[..., prompt_columns:, :]
    room = jnp.zeros((*x.shape[:-2], ring - old.shape[-2], x.shape[-1]), x.dtype)
    oldest_first = jnp.concatenate([room, jnp.roll(old, -cursor, axis=-2)], axis=-2)
    return jnp.concatenate([prompt, jnp.roll(oldest_first, cursor, axis=-2)], axis=-2)


@partial(jax.jit, static_argnames=("decoding", "mesh"))
def _collect(
    state: SlotState,
    prompt_tokens,
    prompt_mask,
    rows: RowIds,
    policy_version,
    decoding,
    mesh,
    stop_table=None,
) -> Rollouts:
    """The rollouts, once all rows are done."""
    sampled, lengths = _retire_rows(state, jnp.ones_like(state.is_done))
    repeat = partial(jnp.repeat, repeats=len(lengths) // len(prompt_mask), axis=0)
    prompt_tokens, prompt_mask = repeat(prompt_tokens), repeat(prompt_mask)
    mask = jnp.arange(decoding.max_completion_length) < lengths[:, None]
    sampled = jax.tree.map(lambda x: jnp.where(mask, x, 0), sampled)
    after = lambda prompt, completion: jnp.concatenate([prompt, completion], axis=1)
    is_ended = is_stop(sampled.tokens[:, -1], decoding)
    if stop_table is not None:
        follow = lambda found, tokens: (stop_table[found, tokens], None)
        found = jax.lax.scan(follow, jnp.zeros_like(lengths), sampled.tokens.T)[0]
        is_ended |= found == len(stop_table) - 1
    zeros = jnp.zeros(prompt_mask.shape, sampled.behavior_logprobs.dtype)
    rollouts = Rollouts(
        tokens=after(prompt_tokens, sampled.tokens),
        mask=after(jnp.zeros_like(prompt_mask), mask),
        segment_ids=after(prompt_mask, mask).astype(jnp.int32),
        behavior_logprobs=after(zeros, sampled.behavior_logprobs),
        unfiltered_logprobs=after(zeros, sampled.unfiltered_logprobs),
        prompt_id=rows.prompt_id,
        sample_id=rows.sample_id,
        policy_version=jnp.full(lengths.shape, policy_version, jnp.int32),
        is_truncated=mask[:, -1] & ~is_ended,
    )
    return _by_row(rollouts, mesh)


def _kv_dtype(params: Params, decoding: Decoding):
    is_auto = decoding.kv_dtype == "auto"
    return dtype_of(params) if is_auto else jnp.dtype(decoding.kv_dtype)


split_layers = partial(jax.jit, static_argnums=1)(kv_cache.split_layers)
_constrain_cache = partial(jax.jit, static_argnames="mesh", donate_argnums=0)(kv_cache.constrain)


def _constrain(state: SlotState, mesh: Mesh | None) -> SlotState:
    """Slots and rows sharded over `data` and `fsdp`, the two counters replicated."""
    if mesh is None:
        return state
    rest = _by_row(state.replace(cache=None), mesh)
    return rest.replace(cache=kv_cache.constrain(state.cache, mesh))


def _by_row(tree, mesh: Mesh | None):
    """Arrays sharded by their first axis over `data` and `fsdp`; replicated if not divisible."""
    if mesh is None:
        return tree
    is_divisible = lambda x: x.ndim and x.shape[0] % num_row_shards(mesh) == 0
    layout = lambda x: by_row(mesh) if is_divisible(x) else replicated(mesh)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, layout(x)), tree)
