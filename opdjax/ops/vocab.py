"""The tiled pass over the vocabulary: losses and statistics read logits one tile of tokens at a
time, so that `[N, V]` logits are never materialised.

A pass moves the tokens with non-zero weight to the front, then loops over tiles of `tile` tokens:
project the hidden states, run the recipe on the tile, differentiate it with respect to the tile's
logits, add to the gradient of the head, store the gradient of the hidden states. So the gradient is
formed in the forward pass (three matmuls per tile, instead of four with rematerialisation), and the
backward pass only scales it. Tokens of weight 0 cost nothing.

This file contains the only shift by one in the project: column t of every argument belongs to
`tokens[:, t]`, except `hidden`, whose column t is the state after `tokens[:, t]` and predicts
column t + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from opdjax.ops.sharding import ROW_AXES
from opdjax.ops.tile import Head, VocabTile, finish_logits, fit_width, raw_logits, sum_dtype

PyTree = Any
CPU_LOGITS = 2**20  # on a CPU: logits of one model that a recipe processes at a time
CPU_BLOCK = 4096  # on a CPU: rows of the head whose gradient is formed at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """What a recipe may read of each token besides logits; a field that the run does not have is
    None.
    """

    tokens: Int[Array, " n"]
    teacher_logprobs: Float[Array, " n"] | None = None
    behavior_logprobs: Float[Array, " n"] | None = None  # with temperature and filters
    advantages: Float[Array, " n"] | None = None  # of the completion or stage, from a scalar reward
    reference_logprobs: Float[Array, " n"] | None = None  # under the student's start
    uniforms: Float[Array, "n M"] | None = None  # for M more draws from the student at this context
    teacher_top_ids: Int[Array, "n K"] | None = None  # its K most likely, most likely first
    teacher_top_logprobs: Float[Array, "n K"] | None = None  # of these, under its full softmax
    # Coupling between tokens, computed by `estimators.coupling` before the pass:
    future_rewards: Float[Array, " n"] | None = None  # discounted rewards of later tokens
    mean_rewards: Float[Array, " n"] | None = None  # over the tokens of all other sequences
    loss_weights: Float[Array, " n"] | None = None  # importance of prefix or sequence, or IW-OPD's
    is_observed: Bool[Array, " n"] | None = None  # compute diagnostics; equal for all tokens


# Tokens whose logits exist at a time, per device. With 151,936 ids in float32 that is 311 MB. Fewer
# tokens read the head and the accumulator of its gradient more often; more save nothing.
TILE = 512

TokenLoss = Callable[[VocabTile, VocabTile | None, TokenInputs], tuple[Float[Array, " n"], PyTree]]
TokenStat = Callable[[VocabTile, VocabTile | None, TokenInputs], PyTree]
Teacher = tuple[Float[Array, "B T D"], Head]


def tiled_loss(
    token_loss: TokenLoss,
    hidden: Float[Array, "B T D"],
    head: Head,
    weights: Float[Array, "B T"],
    columns: TokenInputs,
    teacher: Teacher | None = None,
    *,
    tile: int,
    head_grad: bool = True,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], PyTree]:
    """`sum(weights * loss)` and the recipe's detached per-token outputs `[B, T]`, without `[N, V]`
    logits.

    Gradients flow to `hidden` and, unless `head_grad` is False, to the head's kernel and bias;
    never to the teacher, the weights or the columns. A token of weight 0 is not visited: its loss
    and outputs are 0, even if its inputs are NaN. The head's gradient is summed in at least
    float32. With a `mesh`, rows are sharded over `data` and `fsdp` and the vocabulary over
    `tensor`. The head is gathered once, before the loop; its gradient and that of `hidden` are
    reduced once, after it. ValueError if the mesh does not divide the head.
    """
    run = partial(_run, token_loss, tile=tile, mesh=mesh)

    @jax.custom_vjp
    def weighted_sum(hidden, head, operands):
        total, outputs, _, _ = run(hidden, head, operands, grad="none")
        return total, outputs

    def forward(hidden, head, operands):
        grad = "both" if head_grad else "hidden"
        total, outputs, *gradients = run(hidden, head, operands, grad=grad)
        return (total, outputs), gradients

    def backward(gradients, cotangents):
        dhidden, dhead = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
        return dhidden, dhead, None

    weighted_sum.defvjp(forward, backward)
    head = head if head_grad else jax.lax.stop_gradient(head)
    total, outputs = weighted_sum(
        _predicting(hidden), head, (weights, columns, _shift_teacher(teacher))
    )
    return total, jax.lax.stop_gradient(outputs)


def dense_loss(
    token_loss: TokenLoss,
    logits: Float[Array, "n V"],
    weights: Float[Array, " n"],
    columns: TokenInputs,
    teacher_logits: Float[Array, "n U"] | None = None,
) -> tuple[Float[Array, ""], PyTree]:
    """`tiled_loss` of dense logits: `sum(weights * loss)` and the recipe's detached outputs `[n]`.

    Row i is the distribution of `columns.tokens[i]`. Gradients flow only to `logits`; they are
    formed in the forward pass.
    """
    plain = Head(jnp.zeros((logits.shape[-1], 0)))
    operands = teacher_logits, columns, weights, weights != 0

    def run(logits, operands, grad):
        recipe = partial(_differentiate, token_loss, plain, plain, grad=grad, axes=())
        wide = jax.tree.map(lambda x: x.astype(sum_dtype(x.dtype)), (logits, operands[0]))
        return _by_platform(recipe, (*wide, *operands[1:]))

    @jax.custom_vjp
    def weighted_sum(logits, operands):
        return run(logits, operands, "none")[:2]

    def forward(logits, operands):
        total, outputs, dlogits = run(logits, operands, "hidden")
        return (total, outputs), dlogits.astype(logits.dtype)

    def backward(dlogits, cotangents):
        return (dlogits * cotangents[0]).astype(dlogits.dtype), None

    weighted_sum.defvjp(forward, backward)
    total, outputs = weighted_sum(logits, jax.lax.stop_gradient(operands))
    return total, jax.lax.stop_gradient(outputs)


def tiled_stats(
    token_stat: TokenStat,
    hidden: Float[Array, "B T D"],
    head: Head,
    mask: Bool[Array, "B T"],
    columns: TokenInputs,
    teacher: Teacher | None = None,
    *,
    tile: int,
    mesh: Mesh | None = None,
) -> PyTree:
    """Per-token statistics `[B, T, ...]` of the unmasked tokens (0 elsewhere): the loop of
    `tiled_loss` without gradient.
    """

    def as_loss(student, teacher, row):
        return jnp.zeros(row.tokens.shape, student.logits.dtype), token_stat(student, teacher, row)

    operands = (mask.astype(sum_dtype(hidden.dtype)), columns, _shift_teacher(teacher))
    _, outputs, _, _ = _run(
        as_loss, _predicting(hidden), head, operands, tile=tile, mesh=mesh, grad="none"
    )
    return jax.lax.stop_gradient(outputs)


def _predicting(hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The state that predicts each column's token: the shift by one. Column 0 has no such state and
    weight 0.
    """
    return jnp.concatenate([jnp.zeros_like(hidden[:, :1]), hidden[:, :-1]], axis=1)


def _shift_teacher(teacher: Teacher | None) -> Teacher | None:
    return None if teacher is None else jax.lax.stop_gradient((_predicting(teacher[0]), teacher[1]))


def _run(token_loss, hidden, head, operands, *, tile, mesh, grad):
    """One pass: on one device, or on the mesh with one shard of rows and vocabulary per device."""
    weights, columns, teacher = operands
    local = partial(_visit, token_loss, tile=tile, grad=grad)
    if mesh is None or mesh.size == 1:
        return _in_type_of(head, *local(hidden, head, weights, columns, teacher))
    require_divisible_head(head, mesh)
    axes = ROW_AXES if mesh.shape["tensor"] == 1 else (*ROW_AXES, "tensor")
    if teacher is not None:
        teacher = teacher[0], _with_rows(teacher[1], head.kernel.shape[0])

    def shard(hidden, head, weights, columns, teacher):
        total, outputs, dhidden, dhead = local(hidden, head, weights, columns, teacher, axes=axes)
        total = jax.lax.psum(total, ROW_AXES)
        if dhidden is not None and len(axes) == 3:
            dhidden = jax.lax.psum(dhidden, "tensor").astype(hidden.dtype)
        if dhead is not None:
            bias = None if dhead.bias is None else jax.lax.psum(dhead.bias, ROW_AXES)
            kernel = jax.lax.psum_scatter(
                jax.lax.psum(dhead.kernel, "data"), "fsdp", scatter_dimension=1, tiled=True
            )
            dhead = dataclasses.replace(dhead, kernel=kernel, bias=bias)
        return _in_type_of(head, total, outputs, dhidden, dhead)

    rows, vocab = P(ROW_AXES), "tensor" if len(axes) == 3 else None

    def split(head, width=None):
        return jax.tree.map(lambda x: P(vocab, width) if x.ndim == 2 else P(vocab), head)

    of_teacher = None if teacher is None else (rows, split(teacher[1]))
    of_dhidden = None if grad == "none" else rows
    of_dhead = split(head, "fsdp") if grad == "both" else None
    return jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(rows, split(head), rows, rows, of_teacher),
        out_specs=(P(), rows, of_dhidden, of_dhead),
    )(hidden, head, weights, columns, teacher)


def require_divisible_head(head: Head, mesh: Mesh) -> None:
    """ValueError that names the mesh axis which does not divide the head."""
    for axis, size, what in zip(("tensor", "fsdp"), head.kernel.shape, ("rows", "columns")):
        if size % mesh.shape[axis]:
            raise ValueError(
                f"the unembedding has {size} {what}, which mesh.{axis} {mesh.shape[axis]} does not "
                "divide"
            )


def _with_rows(head: Head, vocab: int) -> Head:
    """The head with `vocab` rows, so that a slice of it covers the same ids as a slice of another
    head with as many rows.
    """
    rows = head.kernel.shape[0]
    if rows == vocab:
        return head
    pad = lambda x: jnp.pad(x, [(0, vocab - rows), *[(0, 0)] * (x.ndim - 1)])
    resized = jax.tree.map(lambda x: x[:vocab] if rows > vocab else pad(x), head)
    valid_vocab = min(rows if head.valid_vocab is None else head.valid_vocab, rows)
    return dataclasses.replace(resized, valid_vocab=valid_vocab)


def _in_type_of(head, total, outputs, dhidden, dhead):
    """The results with the head's gradient cast to the head's dtype, after all shards are added."""
    if dhead is not None:
        dhead = jax.tree.map(lambda g, x: g.astype(x.dtype), dhead, head)
    return total, outputs, dhidden, dhead


def _visit(token_loss, hidden, head, weights, columns, teacher, *, tile, grad, axes=()):
    """The loop over tiles: (sum of w * loss, outputs [B, T], d hidden or None, d head or None).

    `axes` are the mesh axes that this shard belongs to: two for rows, and a third if the vocabulary
    is sharded.
    """
    axis = axes[2] if len(axes) == 3 else None
    shape = weights.shape
    tile = min(tile, weights.size)
    n_padded = -(-weights.size // tile) * tile
    # Live tokens come first, so that the cost depends on their number, not on the row width.
    order = _live_first(weights.reshape(-1) != 0)
    order = jnp.concatenate([order, jnp.full(n_padded - weights.size, order[-1], order.dtype)])
    n_live = jnp.sum(weights != 0)
    n_tiles = (n_live + tile - 1) // tile
    if axis is not None:  # devices that share a collective in the loop need equal trip counts
        n_tiles = jax.lax.pmax(n_tiles, ROW_AXES)

    def gather(x):
        return None if x is None else jnp.asarray(x).reshape(-1, *x.shape[2:])[order]

    rows = jax.tree.map(gather, (hidden, weights, columns, None if teacher is None else teacher[0]))
    teacher_head = None if teacher is None else teacher[1]

    def visit_tile(index, dhead):
        start = index * tile
        sliced = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, tile), rows)
        is_live = start + jnp.arange(tile) < n_live
        return _tile(token_loss, head, teacher_head, sliced, is_live, grad, dhead, axes)

    def body(index, carry):
        total, outputs, dhidden, dhead = carry
        loss, tile_outputs, tile_dhidden, dhead = visit_tile(index, dhead)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, index * tile, 0)
        outputs = jax.tree.map(put, outputs, tile_outputs)
        dhidden = jax.tree.map(put, dhidden, tile_dhidden)
        return total + loss, outputs, dhidden, dhead

    zeros = lambda axes, *args: _varying(jnp.zeros(*args), axes)
    dhead, dtype = None, sum_dtype(hidden.dtype)
    if grad == "both":
        dhead = jax.tree.map(lambda x: zeros(axes, x.shape, dtype), head)
    shapes = jax.eval_shape(visit_tile, 0, dhead)
    whole = lambda axes: lambda leaf: zeros(axes, (n_padded, *leaf.shape[1:]), leaf.dtype)
    row_axes = axes[:2]
    carry = (
        zeros(row_axes, (), shapes[0].dtype),
        jax.tree.map(whole(row_axes), shapes[1]),
        jax.tree.map(whole(axes), shapes[2]),
        dhead,
    )
    total, outputs, dhidden, dhead = jax.lax.fori_loop(0, n_tiles, body, carry)

    def scatter(x):
        unsorted = jnp.zeros((weights.size, *x.shape[1:]), x.dtype)
        unsorted = unsorted.at[order[: weights.size]].set(x[: weights.size])
        return unsorted.reshape(*shape, *x.shape[1:])

    return total, *jax.tree.map(scatter, (outputs, dhidden)), dhead


def _varying(x, axes: tuple[str, ...]):
    """`x` marked as device-varying along these axes: the initial carry of a loop must be."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _live_first(is_live: Bool[Array, " N"]) -> Int[Array, " N"]:
    """The stable order that puts live tokens first. Two running counts compile and run faster than
    a sort.
    """
    place = jnp.where(is_live, jnp.cumsum(is_live) - 1, jnp.sum(is_live) + jnp.cumsum(~is_live) - 1)
    numbers = jnp.arange(place.size, dtype=place.dtype)
    return jnp.zeros_like(place).at[place].set(numbers, unique_indices=True)


def _tile(token_loss, head, teacher_head, rows, is_live, grad, dhead, axes):
    """Loss, outputs and d hidden of one tile of n tokens, and `dhead` plus the tile's gradient."""
    # Slots after the live tokens may hold anything, NaN included: their inputs become zeros and
    # their results are dropped.
    keep = partial(_keep, is_live)
    hidden, weights, columns, teacher_hidden = rows
    hidden, teacher_hidden, columns = jax.tree.map(keep, (hidden, teacher_hidden, columns))
    teacher_raw = None if teacher_head is None else raw_logits(teacher_head, teacher_hidden)
    recipe = partial(_differentiate, token_loss, head, teacher_head, grad=grad, axes=axes)
    operands = raw_logits(head, hidden), teacher_raw, columns, weights, is_live
    total, outputs, dlogits = _by_platform(recipe, operands)
    if grad == "none":
        return total, outputs, None, None
    # Operands of the products have the model's dtype; sums are in at least float32.
    cotangent, dkernel = dlogits.astype(head.kernel.dtype), None if dhead is None else dhead.kernel
    dhidden, dkernel = _pull_back(cotangent, hidden, head.kernel, dkernel, axes)
    if dhead is not None:
        bias = None if head.bias is None else dhead.bias + jnp.sum(dlogits, axis=0)
        dhead = dataclasses.replace(dhead, kernel=dkernel, bias=bias)
    # With a sharded vocabulary, d hidden is rounded after the sum over all slices.
    return total, outputs, dhidden if len(axes) == 3 else dhidden.astype(hidden.dtype), dhead


def _keep(is_live, x):
    return jnp.where(is_live.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def _differentiate(token_loss, head, teacher_head, operands, *, grad, axes):
    """Weighted loss, outputs and the cotangent of the raw logits (None if `grad` is "none"), of
    some rows of a tile.
    """
    raw, teacher_raw, columns, weights, is_live = operands
    axis = axes[2] if len(axes) == 3 else None
    teacher = None
    if teacher_raw is not None:
        teacher_logits = finish_logits(teacher_head, teacher_raw, axis)
        teacher = VocabTile(fit_width(teacher_logits, head.kernel.shape[0]), axis)

    def loss_of(raw):
        student = VocabTile(finish_logits(head, raw, axis), axis)
        losses, outputs = token_loss(student, teacher, columns)
        losses = jnp.where(is_live, losses, 0)
        total = jnp.sum(weights.astype(losses.dtype) * losses)
        return total, jax.tree.map(partial(_keep, is_live), outputs)

    if grad == "none":
        return *loss_of(raw), None
    total, pullback, outputs = jax.vjp(loss_of, raw, has_aux=True)
    (cotangent,) = pullback(_varying(jnp.ones((), total.dtype), axes[:2]))
    return total, outputs, _keep(is_live, cotangent)


def _by_platform(recipe, operands):
    """Run the recipe on all rows, on a CPU in blocks of rows. XLA for CPU passes over the logits
    once for each maximum, sum and product of a recipe, and the logits of a few rows stay in cache.
    """
    n, width = operands[0].shape
    block = max(size for size in range(1, min(max(CPU_LOGITS // width, 1), n) + 1) if n % size == 0)
    if block == n:  # the same on every platform: traced once
        return recipe(operands)
    in_blocks = partial(_in_row_blocks, recipe, block)
    return jax.lax.platform_dependent(operands, cpu=in_blocks, default=recipe)


def _in_row_blocks(recipe, block, operands):
    """The recipe on `block` rows at a time, which divide the rows."""
    n = operands[0].shape[0]
    blocks = jax.tree.map(lambda x: x.reshape(n // block, block, *x.shape[1:]), operands)
    totals, *rest = jax.lax.map(recipe, blocks)
    return jnp.sum(totals), *jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), rest)


def _pull_back(dlogits, hidden, kernel, dkernel, axes):
    """(d hidden of a tile, `dkernel` plus the tile's gradient or None) from d raw logits."""
    vocab, dtype = kernel.shape[0], sum_dtype(hidden.dtype)

    def add_rows(start, size, sums):
        dhidden, dkernel = sums
        cotangent = jax.lax.dynamic_slice_in_dim(dlogits, start, size, axis=1)
        weight = jax.lax.dynamic_slice_in_dim(kernel, start, size)
        dhidden += jnp.einsum("nv,vd->nd", cotangent, weight, preferred_element_type=dtype)
        if dkernel is not None:
            share = jnp.einsum("nv,nd->vd", cotangent, hidden, preferred_element_type=dtype)
            share += jax.lax.dynamic_slice_in_dim(dkernel, start, size)
            dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, share, start, 0)
        return dhidden, dkernel

    def in_blocks(sums):
        block = min(CPU_BLOCK, vocab)
        n_blocks, rest = divmod(vocab, block)
        add_block = lambda i, sums: add_rows(i * block, block, sums)
        sums = jax.lax.fori_loop(0, n_blocks, add_block, sums)
        return add_rows(n_blocks * block, rest, sums) if rest else sums

    # XLA for CPU does not add a product in place: it would hold the tile's own [V, D] and pass over
    # it twice more. Blocks of rows stay in cache instead. Accelerators compute one large product;
    # this choice has not been measured on them yet.
    sums = _varying(jnp.zeros(hidden.shape, dtype), axes), dkernel
    return jax.lax.platform_dependent(sums, cpu=in_blocks, default=partial(add_rows, 0, vocab))
