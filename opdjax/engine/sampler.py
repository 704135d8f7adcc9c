"""Student rollouts by continuous batching: a fixed number of slots decode together, and a finished
row's slot goes to the next.

The host plans and the device works. `prefill` reads a few prompts of one width at a time; `advance`
puts their rows into free slots and decodes until enough slots are free again. All slots write their
keys and values at one column of a ring, so that a write is one slice; a slot sees its prompt's
columns and as many columns of the ring behind the clock as it has drawn tokens. The ring is no
longer than the longest living row needs: it grows in powers of two, each a program of its own.

What is drawn does not depend on any of this (see decoding.py): neither on slots and schedule nor on
widths, ring or mesh.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from opdjax.config.validation import ConfigError
from opdjax.data.prompts import padded_width
from opdjax.engine.decoding import (
    EXTRA_STREAM,
    TRAIN_STREAM,
    Decoding,
    draw_next,
    is_stop,
    row_keys,
)
from opdjax.models import kv_cache
from opdjax.models.decoder import DecoderConfig, Params, head_of
from opdjax.models.kv_cache import KVCache
from opdjax.ops.masked import rank_in_sequence
from opdjax.ops.sharding import by_row, num_row_shards, replicated
from opdjax.types import PromptBatch, Rollouts

# columns; below it attention costs so little that another program is not worth its compilation
_SHORTEST_RING = 128
_FREE_SHARE = 8  # while rows wait, decoding is interrupted once one slot in so many is free
BLOCKS_PER_FILL = 4  # prompts are read in blocks of which so many fill all slots


@partial(jax.jit, static_argnames="count")
def extra_uniforms(rollouts: Rollouts, seed: int, count: int) -> Float[Array, "B T M"]:
    """Uniform numbers for `count` more draws at each context of the rollouts, from a stream of
    their own, whatever the layout.
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
) -> Rollouts:
    """`num_generations` completions of each prompt (B = P * G rows, those of a prompt side by
    side).

    Rows are `[prompt | completion]`. `slots` rows are decoded at a time (None: all); prompts are
    host arrays, and a row without a prompt is filler that stays empty. Runs its own loop over
    jitted steps, so it cannot be called under jit. With a `mesh`, slots are split over `data` and
    `fsdp`, heads over `tensor`; ConfigError where `slots` does not divide. `prompt_columns`: of the
    cache, for prompts (None: as the widest here needs); the same for all batches of a run, it is
    compiled once for each width of prompts and each length of the ring.
    """
    rows = _Rows.of(prompts, num_generations, first_sample)
    slots = num_slots(slots, len(rows.prompt_id), mesh)
    blocks = deque(_blocks(np.asarray(prompts.mask), block_size(slots, num_generations, mesh)))
    width = max([block.width for block in blocks] + [prompt_columns or 1])
    rings = _ring_sizes(decoding.max_completion_length)
    static = {"config": config, "decoding": decoding, "mesh": mesh}
    state = start(params, slots=slots, rows=len(rows.prompt_id), columns=width + rings[0], **static)
    parts = parts_of(params["layers"], config)
    names = np.array([seed, stream, policy_version], np.int32)
    prefix, waiting = None, deque()  # rows of the block that was read last: (place in it, row)
    is_done, drawn = np.ones(slots, bool), np.zeros(slots, np.int32)
    while waiting or blocks or not is_done.all():
        if blocks and not waiting:
            block = blocks.popleft()
            prefix = prefill(params, parts, *block.read(prompts), width=width, **static)
            waiting.extend(block.rows(num_generations))
        placed = rows.place(waiting, np.flatnonzero(is_done), slots)
        is_done, drawn = is_done & (placed.source < 0), np.where(placed.source < 0, drawn, 0)
        if blocks and is_done.any():
            state, _ = advance(
                params,
                parts,
                state,
                prefix,
                placed,
                names,
                0,
                slots,
                prompt_columns=width,
                **static,
            )
            continue
        longest = int(drawn[~is_done].max())
        if longest == rings[0] and len(rings) > 1:
            rings = rings[1:]
            state = state.replace(
                cache=_with_ring(state.cache, state.cursor, width, rings[0], mesh)
            )
        limit = rings[0] - longest if len(rings) > 1 else decoding.max_completion_length
        patience = max(slots // _FREE_SHARE, 1) if waiting or blocks else slots
        state, status = advance(
            params,
            parts,
            state,
            prefix,
            placed,
            names,
            limit,
            patience,
            prompt_columns=width,
            **static,
        )
        is_done, drawn = map(np.asarray, status)
    return _collect(
        state, prompts.tokens, prompts.mask, rows, policy_version, decoding=decoding, mesh=mesh
    )


# The plan, on the host: a pure function of the prompts and of which slots are free


@dataclasses.dataclass(frozen=True)
class _Block:
    """Prompts that are read together, padded to one width; fewer than `size` are made up with empty
    ones.
    """

    width: int
    prompts: tuple[int, ...]
    size: int

    def read(self, prompts: PromptBatch) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and mask, `[size, width]`."""
        tokens, mask = (
            np.zeros((self.size, self.width), np.int32),
            np.zeros((self.size, self.width), bool),
        )
        for place, prompt in enumerate(self.prompts):
            tokens[place], mask[place] = (
                prompts.tokens[prompt, -self.width :],
                prompts.mask[prompt, -self.width :],
            )
        return tokens, mask

    def rows(self, num_generations: int) -> Iterator[tuple[int, int]]:
        """(place in the block, row) of everything that is drawn for these prompts."""
        for place, prompt in enumerate(self.prompts):
            yield from (
                (place, prompt * num_generations + number) for number in range(num_generations)
            )


def _blocks(mask: Bool[np.ndarray, "P T"], size: int) -> Iterator[_Block]:
    """Every prompt that has tokens, the wide ones first, each block of one width."""
    lengths = mask.sum(axis=1)
    widths = np.array([min(padded_width(int(length)), mask.shape[1]) for length in lengths])
    for width in sorted({int(width) for width in widths[lengths > 0]}, reverse=True):
        members = np.flatnonzero((widths == width) & (lengths > 0)).tolist()
        yield from (
            _Block(width, tuple(members[i : i + size]), size) for i in range(0, len(members), size)
        )


def block_size(slots: int, num_generations: int, mesh: Mesh | None) -> int:
    """Prompts that are read together. Depends on no prompt, so that one program reads every block
    of a width.
    """
    shards = num_row_shards(mesh)
    return -(-slots // (num_generations * BLOCKS_PER_FILL * shards)) * shards


def num_slots(slots: int | None, rows: int, mesh: Mesh | None) -> int:
    """Rows decoded at a time; ConfigError where the devices cannot share them out evenly."""
    shards = num_row_shards(mesh)
    if slots is not None and (slots < 1 or slots % shards):
        raise ConfigError(
            f"slots is {slots}; expected a multiple of {shards}, the devices that rows are split over (mesh.data x mesh.fsdp)"
        )
    most = -(-rows // shards) * shards
    return most if slots is None else min(slots, most)


def _ring_sizes(length: int) -> list[int]:
    """Powers of two, and last the length of a completion, which no row outlives."""
    sizes = [
        _SHORTEST_RING << i
        for i in range(length.bit_length())
        if 2 * (_SHORTEST_RING << i) <= length
    ]
    return [*sizes, length] if length not in sizes else sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """What each slot is given, `[S]`: a place in the block that was read last (-1: nothing), and
    the row's names.
    """

    source: Int[Array, " S"]
    row: Int[Array, " S"]
    prompt_id: Int[Array, " S"]
    sample_id: Int[Array, " S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """Names of all rows, `[B]`, those of a prompt side by side."""

    prompt_id: Int[Array, " B"]
    sample_id: Int[Array, " B"]

    @classmethod
    def of(cls, prompts: PromptBatch, num_generations: int, first_sample: int) -> _Rows:
        # A prompt that stands in the batch twice (a step may end one epoch and begin the next) must
        # not be answered alike twice.
        count = len(prompts.prompt_id)
        occurrence = (
            np.zeros(count, np.int32)
            if prompts.occurrence is None
            else np.asarray(prompts.occurrence)
        )
        numbers = np.tile(np.arange(num_generations, dtype=np.int32), count)
        repeat = partial(np.repeat, repeats=num_generations)
        return cls(
            repeat(np.asarray(prompts.prompt_id, np.int32)),
            first_sample + repeat(occurrence) * num_generations + numbers,
        )

    def place(self, waiting: deque[tuple[int, int]], free: np.ndarray, slots: int) -> Placed:
        """Give the free slots to the rows that wait, in their order; those rows leave `waiting`."""
        source, row = np.full(slots, -1, np.int32), np.zeros(slots, np.int32)
        for slot in free[: len(waiting)]:
            source[slot], row[slot] = waiting.popleft()
        return Placed(source, row, self.prompt_id[row], self.sample_id[row])


# The work, on the device


@struct.dataclass
class Prefix:
    """Prompts that were read: what a slot is given of one of them."""

    cache: KVCache  # the prompts end in its last column
    hidden: Float[Array, "R D"]  # after the last token
    length: Int[Array, " R"]


@struct.dataclass
class SampledTokens:
    """What was drawn, by column of the completion; columns that were not drawn hold anything."""

    tokens: Int[Array, "N C"]
    behavior: Float[Array, "N C"]
    unfiltered: Float[Array, "N C"]


@struct.dataclass
class SlotState:
    """S rows in decoding, and what became of the B rows so far."""

    cache: KVCache  # columns of the prompt, then the ring
    clock: Int[Array, ""]  # steps that were decoded
    cursor: Int[Array, ""]  # column of the ring that is written next
    hidden: Float[Array, "S D"]  # predicts the next token
    keys: Array  # [S]
    row: Int[Array, " S"]  # B: none yet
    prompt_length: Int[Array, " S"]
    born: Int[Array, " S"]  # the clock when the row's first token was drawn
    num_drawn: Int[Array, " S"]
    is_done: Bool[Array, " S"]
    recent: SampledTokens  # [S, C]: the token drawn at some clock stands in column clock % C
    finished: SampledTokens  # [B, C]
    lengths: Int[Array, " B"]


@partial(jax.jit, static_argnames=("width", "config", "decoding", "mesh"))
def prefill(
    params,
    parts,
    tokens,
    mask,
    *,
    width: int,
    config: DecoderConfig,
    decoding: Decoding,
    mesh: Mesh | None,
) -> Prefix:
    """Read left-padded prompts `[R, T]`; their cache is padded to `width` columns, whatever T."""
    hidden, cache = kv_cache.prefill(
        params, parts, config, tokens, mask, _kv_dtype(params, decoding), mesh
    )
    short = width - tokens.shape[1]
    cache = jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(short, 0), (0, 0)]), cache
    )
    return Prefix(kv_cache.constrain(cache, mesh), hidden, jnp.sum(mask, axis=1))


@partial(jax.jit, static_argnames=("slots", "rows", "columns", "config", "decoding", "mesh"))
def start(params, *, slots, rows, columns, config, decoding, mesh) -> SlotState:
    """Empty slots."""
    dtype, length = params["embedding"].dtype, decoding.max_completion_length
    wide = jnp.promote_types(dtype, jnp.float32)

    def nothing(count: int) -> SampledTokens:
        return SampledTokens(
            jnp.zeros((count, length), jnp.int32),
            jnp.zeros((count, length), wide),
            jnp.zeros((count, length), wide),
        )

    of_slot, zero = jnp.zeros(slots, jnp.int32), jnp.int32(0)
    state = SlotState(
        cache=kv_cache.init_cache(config, slots, columns, _kv_dtype(params, decoding), wide),
        clock=zero,
        cursor=zero,
        hidden=jnp.zeros((slots, config.hidden_size), dtype),
        keys=row_keys(0, 0, of_slot, of_slot, 0),
        row=of_slot + rows,
        prompt_length=of_slot,
        born=of_slot,
        num_drawn=of_slot,
        is_done=jnp.ones(slots, bool),
        recent=nothing(slots),
        finished=nothing(rows),
        lengths=jnp.zeros(rows, jnp.int32),
    )
    return _constrain(state, mesh)


@partial(
    jax.jit,
    static_argnames=("prompt_columns", "config", "decoding", "mesh"),
    donate_argnames="state",
)
def advance(
    params,
    parts,
    state: SlotState,
    prefix: Prefix,
    placed: Placed,
    names,
    limit,
    patience,
    *,
    prompt_columns,
    config,
    decoding,
    mesh,
) -> tuple[SlotState, tuple[Array, Array]]:
    """Put rows into slots, then decode by `parts`, the layers apart, until `patience` slots are
    done, for at most `limit` steps.

    `names` are the seed, the stream and the policy version. Also returns what the host must know, a
    copy on every device: which slots are done and how many tokens each has drawn.
    """
    head = head_of(params, valid_vocab=decoding.valid_vocab)
    put = lambda state: _put(state, prefix, placed, names, prompt_columns)
    state = jax.lax.cond(jnp.any(placed.source >= 0), put, lambda state: state, state)

    def keep_going(carry):
        steps, state = carry
        return (steps < limit) & (jnp.sum(state.is_done) < patience)

    def step(carry):
        steps, state = carry
        state = _draw(state, head, decoding, mesh)
        return steps + 1, _read(state, params, parts, config, prompt_columns)

    state = _constrain(jax.lax.while_loop(keep_going, step, (0, _constrain(state, mesh)))[1], mesh)
    status = state.is_done, state.num_drawn
    return state, status if mesh is None else jax.lax.with_sharding_constraint(
        status, replicated(mesh)
    )


def _put(
    state: SlotState, prefix: Prefix, placed: Placed, names: Int[Array, "3"], prompt_columns: int
) -> SlotState:
    """Slots that are given a row hand over the one they had and start it."""
    is_new = placed.source >= 0
    finished, lengths = _hand_over(state, is_new)
    new = {
        "hidden": prefix.hidden[placed.source],
        "keys": row_keys(names[0], names[1], placed.prompt_id, placed.sample_id, names[2]),
        "row": placed.row,
        "prompt_length": prefix.length[placed.source],
        "born": state.clock,
        "num_drawn": 0,
        "is_done": False,
    }
    old = {name: getattr(state, name) for name in new}
    pick = lambda new, old: jnp.where(is_new[:, None] if old.ndim == 2 else is_new, new, old)
    cache = kv_cache.place(state.cache, prefix.cache, placed.source)
    return state.replace(
        cache=cache, finished=finished, lengths=lengths, **jax.tree.map(pick, new, old)
    )


def _hand_over(
    state: SlotState, is_leaving: Bool[Array, " S"]
) -> tuple[SampledTokens, Int[Array, " B"]]:
    """What became of the rows so far, with that of the slots that are left."""
    length, (num_rows,) = state.recent.tokens.shape[1], state.lengths.shape
    column = (state.born[:, None] + jnp.arange(length)) % length
    to = jnp.where(is_leaving, state.row, num_rows)
    put = lambda all_rows, drawn: all_rows.at[to].set(drawn, mode="drop")
    finished = jax.tree.map(
        lambda old, new: put(old, jnp.take_along_axis(new, column, axis=1)),
        state.finished,
        state.recent,
    )
    return finished, put(state.lengths, state.num_drawn)


def _draw(state: SlotState, head, decoding: Decoding, mesh: Mesh | None) -> SlotState:
    """Draw the next token of every slot; a slot that is done is not counted on."""
    length = decoding.max_completion_length
    token, behavior, unfiltered = draw_next(
        head, state.hidden, state.keys, state.num_drawn, decoding, mesh
    )
    column = state.clock % length
    num_drawn = state.num_drawn + ~state.is_done

    def put(old: Array, new: Array) -> Array:
        # A row that is done and waits to be handed over must not be written over, however often the
        # clock goes round.
        kept = jax.lax.dynamic_slice_in_dim(old, column, 1, axis=1)
        new = jnp.where(state.is_done[:, None], kept, new[:, None].astype(old.dtype))
        return jax.lax.dynamic_update_slice_in_dim(old, new, column, axis=1)

    return state.replace(
        recent=jax.tree.map(put, state.recent, SampledTokens(token, behavior, unfiltered)),
        num_drawn=num_drawn,
        is_done=state.is_done | is_stop(token, decoding) | (num_drawn == length),
    )


def _read(
    state: SlotState, params: Params, parts, config: DecoderConfig, prompt_columns: int
) -> SlotState:
    """Read the tokens that were drawn last, all of them in the ring's next column."""
    token = jax.lax.dynamic_slice_in_dim(
        state.recent.tokens, state.clock % state.recent.tokens.shape[1], 1, axis=1
    )
    ring = state.cache.num_columns - prompt_columns
    is_prompt = jnp.arange(prompt_columns) >= prompt_columns - state.prompt_length[:, None]
    is_own = (state.cursor - jnp.arange(ring)) % ring < state.num_drawn[:, None]
    hidden, cache = kv_cache.forward_cached(
        params,
        parts,
        config,
        token,
        (state.prompt_length + state.num_drawn - 1)[:, None],
        state.cache,
        prompt_columns + state.cursor,
        jnp.concatenate([is_prompt, is_own], axis=1)[:, None],
    )
    return state.replace(
        hidden=hidden[:, 0], cache=cache, clock=state.clock + 1, cursor=(state.cursor + 1) % ring
    )


def _with_ring(
    cache: KVCache, cursor: Array, prompt_columns: int, ring: int, mesh: Mesh | None
) -> KVCache:
    """The cache with a longer ring, array by array: the most that lives beside the new one is a
    single old array.
    """

    def lengthen(old: Array) -> Array:
        new = _lengthen(old, cursor, prompt_columns, ring)
        old.delete()
        return new

    return _constrain_cache(jax.tree.map(lengthen, cache), mesh=mesh)


@partial(jax.jit, static_argnums=(2, 3))
def _lengthen(
    x: Float[Array, "*L S K T H"], cursor: Int[Array, ""], prompt_columns: int, ring: int
) -> Float[Array, "*L S K U H"]:
    """Room where the cursor stands: the columns from there on are the oldest, and stay before the
    others in the ring's order.
    """
    prompt, old = x[..., :prompt_columns, :], x[..., prompt_columns:, :]
    room = jnp.zeros((*x.shape[:-2], ring - old.shape[-2], x.shape[-1]), x.dtype)
    oldest_first = jnp.concatenate([room, jnp.roll(old, -cursor, axis=-2)], axis=-2)
    return jnp.concatenate([prompt, jnp.roll(oldest_first, cursor, axis=-2)], axis=-2)


@partial(jax.jit, static_argnames=("decoding", "mesh"))
def _collect(
    state: SlotState, prompt_tokens, prompt_mask, rows: _Rows, policy_version, *, decoding, mesh
) -> Rollouts:
    """The rollouts, once all rows are done."""
    drawn, lengths = _hand_over(state, jnp.ones_like(state.is_done))
    num_generations = len(lengths) // len(prompt_mask)
    prompt_tokens, prompt_mask = (
        jnp.repeat(x, num_generations, axis=0) for x in (prompt_tokens, prompt_mask)
    )
    mask = jnp.arange(decoding.max_completion_length) < lengths[:, None]
    tokens, behavior, unfiltered = (
        jnp.where(mask, x, 0) for x in (drawn.tokens, drawn.behavior, drawn.unfiltered)
    )
    before = jnp.zeros(prompt_mask.shape, behavior.dtype)
    rollouts = Rollouts(
        tokens=jnp.concatenate([prompt_tokens, tokens], axis=1),
        mask=jnp.concatenate([jnp.zeros_like(prompt_mask), mask], axis=1),
        segment_ids=jnp.concatenate([prompt_mask, mask], axis=1).astype(jnp.int32),
        behavior_logprobs=jnp.concatenate([before, behavior], axis=1),
        unfiltered_logprobs=jnp.concatenate([before, unfiltered], axis=1),
        prompt_id=rows.prompt_id,
        sample_id=rows.sample_id,
        policy_version=jnp.full(lengths.shape, policy_version, jnp.int32),
        is_truncated=mask[:, -1] & ~is_stop(tokens[:, -1], decoding),
    )
    return _by_row(rollouts, mesh)


def _kv_dtype(params: Params, decoding: Decoding):
    return (
        params["embedding"].dtype if decoding.kv_dtype == "auto" else jnp.dtype(decoding.kv_dtype)
    )


parts_of = partial(jax.jit, static_argnums=1)(kv_cache.parts_of)
_constrain_cache = partial(jax.jit, static_argnames="mesh", donate_argnums=0)(kv_cache.constrain)


def _constrain(state: SlotState, mesh: Mesh | None) -> SlotState:
    """Slots split over the rows' axes, the two counters everywhere."""
    if mesh is None:
        return state
    split = (
        "hidden",
        "keys",
        "row",
        "prompt_length",
        "born",
        "num_drawn",
        "is_done",
        "recent",
        "finished",
        "lengths",
    )
    laid = {name: _by_row(getattr(state, name), mesh) for name in split}
    whole = {
        name: jax.lax.with_sharding_constraint(getattr(state, name), replicated(mesh))
        for name in ("clock", "cursor")
    }
    return state.replace(cache=kv_cache.constrain(state.cache, mesh), **laid, **whole)


def _by_row(tree, mesh: Mesh | None):
    """Arrays split by their first axis over the rows' axes; whole on every device where it does not
    divide.
    """
    if mesh is None:
        return tree
    shards = num_row_shards(mesh)
    lay = lambda x: jax.lax.with_sharding_constraint(
        x, by_row(mesh) if x.shape[0] % shards == 0 else replicated(mesh)
    )
    return jax.tree.map(lay, tree)
