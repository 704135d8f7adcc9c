"""The tiled pass over the vocabulary: every loss and statistic that needs logits sees them one tile
at a time.

`[N, V]` never exists. A pass sorts the tokens that count to the front, then loops over tiles of
`tile` tokens: project the hidden states, run the recipe on the tile, differentiate it with respect
to the tile's logits, add to the gradient of the head, keep the gradient of the hidden states. The
gradient is thus formed in the forward pass (three matmuls a tile instead of four with
rematerialisation) and the backward pass only scales it. Tokens that do not count cost nothing.

This file owns the one shift by one of the project: column t of every argument speaks of `tokens[:,
t]`, except `hidden`, whose column t is the state after reading `tokens[:, t]` and therefore
predicts column t + 1.
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
CPU_LOGITS = 2**20  # of each side that a recipe sees at a time, where there is no accelerator
CPU_BLOCK = (
    4096  # rows of the head whose gradient is formed at a time, where there is no accelerator
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """What a recipe may read of each token beside its logits; a field that the run does not carry
    is None.
    """

    token: Int[Array, " n"]
    teacher_logprob: Float[Array, " n"] | None = None
    behavior_logprob: Float[Array, " n"] | None = (
        None  # of the distribution the token was truly drawn from
    )
    advantage: Float[Array, " n"] | None = (
        None  # of the whole completion or its stage, from a scalar reward
    )
    reference_logprob: Float[Array, " n"] | None = None  # of the student as it was at the start
    uniform: Float[Array, "n M"] | None = None  # for M more draws from the student at this context
    teacher_ids: Int[Array, "n K"] | None = None  # the teacher's K most likely, most likely first
    teacher_top_logprob: Float[Array, "n K"] | None = None  # of them, under its full softmax
    # What couples tokens, prepared by `estimators.sequence` before the pass:
    future_reward: Float[Array, " n"] | None = None  # discounted, of the tokens after this one
    mean_reward: Float[Array, " n"] | None = None  # of the tokens of all other sequences
    loss_weight: Float[Array, " n"] | None = (
        None  # importance of a prefix or a sequence, IW-OPD's weight
    )
    is_observed: Bool[Array, " n"] | None = (
        None  # whether diagnostics are taken in this step: the same for every token
    )


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
    """`sum(weights * loss)` and the recipe's detached per-token outputs `[B, T]`, without ever
    holding `[N, V]`.

    Gradients flow to `hidden` and, unless `head_grad` is False, to the head's kernel and bias;
    never to the teacher, the weights or the columns. A token of weight 0 is not visited: its loss
    and outputs are 0 whatever it holds. The head's gradient is summed in at least float32. With a
    `mesh`, rows are split over its `data` and `fsdp` axes and the vocabulary over `tensor`. The
    head is gathered once, before the loop, and its gradient and that of `hidden` are reduced once,
    after it.
    """
    run = partial(_run, token_loss, tile=tile, mesh=mesh)

    @jax.custom_vjp
    def weighted_sum(hidden, head, operands):
        total, outputs, _, _ = run(hidden, head, operands, grad="none")
        return total, outputs

    def forward(hidden, head, operands):
        total, outputs, dhidden, dhead = run(
            hidden, head, operands, grad="both" if head_grad else "hidden"
        )
        return (total, outputs), (dhidden, dhead)

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
    """`tiled_loss` from logits of the caller's own: `sum(weights * loss)` and the recipe's detached
    outputs `[n]`.

    Row i is the distribution of `columns.token[i]`. Gradients flow to `logits` alone and are formed
    in the forward pass.
    """
    plain = Head(jnp.zeros((logits.shape[-1], 0)))
    operands = teacher_logits, columns, weights, weights != 0

    def run(logits, operands, grad):
        recipe = partial(_differentiate, token_loss, plain, plain, grad=grad, axes=())
        operands = (
            jax.tree.map(lambda x: x.astype(sum_dtype(x.dtype)), (logits, operands[0]))
            + operands[1:]
        )
        return _by_platform(recipe, operands)

    @jax.custom_vjp
    def weighted_sum(logits, operands):
        return run(logits, operands, "none")[:2]

    def forward(logits, operands):
        total, outputs, dlogits = run(logits, operands, "hidden")
        return (total, outputs), dlogits.astype(logits.dtype)

    weighted_sum.defvjp(
        forward, lambda dlogits, cotangents: ((dlogits * cotangents[0]).astype(dlogits.dtype), None)
    )
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
        return jnp.zeros(row.token.shape, student.logits.dtype), token_stat(student, teacher, row)

    operands = (mask.astype(sum_dtype(hidden.dtype)), columns, _shift_teacher(teacher))
    _, outputs, _, _ = _run(
        as_loss, _predicting(hidden), head, operands, tile=tile, mesh=mesh, grad="none"
    )
    return jax.lax.stop_gradient(outputs)


def _predicting(hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The state that predicts each column's token: THE shift by one. Nothing predicts column 0,
    whose weight is 0.
    """
    return jnp.concatenate([jnp.zeros_like(hidden[:, :1]), hidden[:, :-1]], axis=1)


def _shift_teacher(teacher: Teacher | None) -> Teacher | None:
    return None if teacher is None else jax.lax.stop_gradient((_predicting(teacher[0]), teacher[1]))


def _run(token_loss, hidden, head, operands, *, tile, mesh, grad):
    """One pass, on this device alone or as one shard of rows, and of the vocabulary, per device."""
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
    split = lambda head, width: jax.tree.map(
        lambda x: P(vocab, width) if x.ndim == 2 else P(vocab), head
    )
    in_specs = (
        rows,
        split(head, None),
        rows,
        rows,
        None if teacher is None else (rows, split(teacher[1], None)),
    )
    out_specs = (
        P(),
        rows,
        None if grad == "none" else rows,
        split(head, "fsdp") if grad == "both" else None,
    )
    return jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(
        hidden, head, weights, columns, teacher
    )


def require_divisible_head(head: Head, mesh: Mesh) -> None:
    """ValueError that names the axis which does not divide the head."""
    for name, size, what in (
        ("tensor", head.kernel.shape[0], "rows"),
        ("fsdp", head.kernel.shape[1], "columns"),
    ):
        if size % mesh.shape[name]:
            raise ValueError(
                f"the unembedding has {size} {what}, which mesh.{name} {mesh.shape[name]} does not divide"
            )


def _with_rows(head: Head, vocab: int) -> Head:
    """The head with `vocab` rows, so that a slice of it stands for the same ids as that of another
    head.
    """
    rows = head.kernel.shape[0]
    if rows == vocab:
        return head
    resize = lambda x: (
        x[:vocab] if rows > vocab else jnp.pad(x, [(0, vocab - rows), *[(0, 0)] * (x.ndim - 1)])
    )
    return dataclasses.replace(
        jax.tree.map(resize, head),
        valid_vocab=min(rows if head.valid_vocab is None else head.valid_vocab, rows),
    )


def _in_type_of(head, total, outputs, dhidden, dhead):
    """The results with the head's gradient rounded to the head's type: last, once every shard's
    share is in it.
    """
    return (
        total,
        outputs,
        dhidden,
        None if dhead is None else jax.tree.map(lambda g, x: g.astype(x.dtype), dhead, head),
    )


def _visit(token_loss, hidden, head, weights, columns, teacher, *, tile, grad, axes=()):
    """The loop over tiles; returns (sum of w * loss, outputs [B, T], d hidden or None, d head or
    None).

    `axes` are those of the mesh that this is a shard of: the rows' two, and a third where the
    vocabulary is split as well.
    """
    axis = axes[2] if len(axes) == 3 else None
    shape = weights.shape
    tile = min(tile, weights.size)
    n_padded = -(-weights.size // tile) * tile
    # Tokens that count come first, so that the trip count, not the row width, sets the cost.
    order = _live_first(weights.reshape(-1) != 0)
    order = jnp.concatenate([order, jnp.full(n_padded - weights.size, order[-1], order.dtype)])
    n_live = jnp.sum(weights != 0)
    # Devices that meet in a collective inside the loop must go round equally often.
    n_tiles = (
        (n_live + tile - 1) // tile
        if axis is None
        else jax.lax.pmax((n_live + tile - 1) // tile, ROW_AXES)
    )

    def gather(x):
        return None if x is None else jnp.asarray(x).reshape(-1, *x.shape[2:])[order]

    rows = jax.tree.map(gather, (hidden, weights, columns, None if teacher is None else teacher[0]))
    teacher_head = None if teacher is None else teacher[1]

    def visit_tile(index, dhead):
        start = index * tile
        sliced = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, tile), rows)
        return _tile(
            token_loss,
            head,
            teacher_head,
            sliced,
            start + jnp.arange(tile) < n_live,
            grad,
            dhead,
            axes,
        )

    def body(index, carry):
        total, outputs, dhidden, dhead = carry
        loss, tile_outputs, tile_dhidden, dhead = visit_tile(index, dhead)
        write = lambda buffer, value: jax.lax.dynamic_update_slice_in_dim(
            buffer, value, index * tile, 0
        )
        outputs = jax.tree.map(write, outputs, tile_outputs)
        dhidden = jax.tree.map(write, dhidden, tile_dhidden)
        return total + loss, outputs, dhidden, dhead

    zeros = lambda axes, *args: _varying(jnp.zeros(*args), axes)
    dhead = (
        jax.tree.map(lambda x: zeros(axes, x.shape, sum_dtype(hidden.dtype)), head)
        if grad == "both"
        else None
    )
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
        unsorted = (
            jnp.zeros((weights.size, *x.shape[1:]), x.dtype)
            .at[order[: weights.size]]
            .set(x[: weights.size])
        )
        return unsorted.reshape(*shape, *x.shape[1:])

    outputs, dhidden = jax.tree.map(scatter, (outputs, dhidden))
    if grad == "none":
        return total, outputs, None, None
    return total, outputs, dhidden, dhead


def _varying(x, axes: tuple[str, ...]):
    """`x` marked as what differs between the devices along these axes, as the carry of a loop must
    be from its start.
    """
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _live_first(is_live: Bool[Array, " N"]) -> Int[Array, " N"]:
    """The stable order that puts the live tokens first; two running counts, where a sort would cost
    more to compile and run.
    """
    place = jnp.where(is_live, jnp.cumsum(is_live) - 1, jnp.sum(is_live) + jnp.cumsum(~is_live) - 1)
    return (
        jnp.zeros_like(place)
        .at[place]
        .set(jnp.arange(place.size, dtype=place.dtype), unique_indices=True)
    )


def _tile(token_loss, head, teacher_head, rows, is_live, grad, dhead, axes):
    """Loss, outputs and d hidden of one tile of n tokens, and `dhead` with the tile's share added."""
    # A slot past the live ones may hold anything, NaN included: it enters as zeros and its results
    # are dropped.
    hidden, weights, columns, teacher_hidden = rows
    hidden, teacher_hidden, columns = jax.tree.map(
        partial(_keep, is_live), (hidden, teacher_hidden, columns)
    )
    teacher_raw = None if teacher_head is None else raw_logits(teacher_head, teacher_hidden)
    recipe = partial(_differentiate, token_loss, head, teacher_head, grad=grad, axes=axes)
    total, outputs, draw = _by_platform(
        recipe, (raw_logits(head, hidden), teacher_raw, columns, weights, is_live)
    )
    if grad == "none":
        return total, outputs, None, None
    small = draw.astype(head.kernel.dtype)  # operands in the model's type, sums in at least float32
    dhidden, dkernel = _pull_back(
        small, hidden, head.kernel, None if dhead is None else dhead.kernel, axes
    )
    if dhead is not None:
        dhead = dataclasses.replace(
            dhead,
            kernel=dkernel,
            bias=None if head.bias is None else dhead.bias + jnp.sum(draw, axis=0),
        )
    # A slice's share is rounded once all slices are added.
    return total, outputs, dhidden if len(axes) == 3 else dhidden.astype(hidden.dtype), dhead


def _keep(is_live, x):
    return jnp.where(is_live.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def _differentiate(token_loss, head, teacher_head, operands, *, grad, axes):
    """Weighted loss, outputs and, unless `grad` is none, the cotangent of the raw logits, of some
    rows of a tile.
    """
    raw, teacher_raw, columns, weights, is_live = operands
    axis = axes[2] if len(axes) == 3 else None
    teacher = None
    if teacher_raw is not None:
        teacher = VocabTile(
            fit_width(finish_logits(teacher_head, teacher_raw, axis), head.kernel.shape[0]), axis
        )

    def loss_of(raw):
        losses, outputs = token_loss(
            VocabTile(finish_logits(head, raw, axis), axis), teacher, columns
        )
        losses = jnp.where(is_live, losses, 0)
        return jnp.sum(weights.astype(losses.dtype) * losses), jax.tree.map(
            partial(_keep, is_live), outputs
        )

    if grad == "none":
        return *loss_of(raw), None
    total, pullback, outputs = jax.vjp(loss_of, raw, has_aux=True)
    return (
        total,
        outputs,
        _keep(is_live, pullback(_varying(jnp.ones((), total.dtype), axes[:2]))[0]),
    )


def _by_platform(recipe, operands):
    """XLA for CPU goes over the vocabulary once for each maximum, sum and product of a recipe: few
    rows at a time stay in the cache.
    """
    return jax.lax.platform_dependent(operands, cpu=partial(_in_row_blocks, recipe), default=recipe)


def _in_row_blocks(recipe, operands):
    """The recipe on as many rows at a time as `CPU_LOGITS` allows."""
    n, width = operands[0].shape
    block = max(size for size in range(1, min(max(CPU_LOGITS // width, 1), n) + 1) if n % size == 0)
    if block == n:
        return recipe(operands)
    totals, *rest = jax.lax.map(
        recipe, jax.tree.map(lambda x: x.reshape(n // block, block, *x.shape[1:]), operands)
    )
    return jnp.sum(totals), *jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), rest)


def _pull_back(draw, hidden, kernel, dkernel, axes):
    """(d hidden of a tile, `dkernel` with the tile's share added or None) from the cotangent of its
    raw logits.
    """
    vocab, dtype = kernel.shape[0], sum_dtype(hidden.dtype)

    def add_rows(start, size, sums):
        dhidden, dkernel = sums
        cotangent = jax.lax.dynamic_slice_in_dim(draw, start, size, axis=1)
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
        sums = jax.lax.fori_loop(
            0, n_blocks, lambda i, sums: add_rows(i * block, block, sums), sums
        )
        return add_rows(n_blocks * block, rest, sums) if rest else sums

    # XLA for CPU adds no product in place: it would hold the tile's own [V, D] and pass over it
    # twice more. Blocks of rows stay in the cache instead. Elsewhere one large product is left to
    # XLA; that has not been measured on an accelerator yet.
    sums = _varying(jnp.zeros(hidden.shape, dtype), axes), dkernel
    return jax.lax.platform_dependent(sums, cpu=in_blocks, default=partial(add_rows, 0, vocab))
