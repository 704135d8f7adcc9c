"""The tiled pass over the vocabulary: every loss and statistic that needs logits sees them one tile at a time.

`[N, V]` never exists. A pass sorts the tokens that count to the front, then loops over tiles of `tile` tokens: project
the hidden states, run the recipe on the tile, differentiate it with respect to the tile's logits, add to the gradient
of the head, keep the gradient of the hidden states. The gradient is thus formed in the forward pass (three matmuls a
tile instead of four with rematerialisation) and the backward pass only scales it. Tokens that do not count cost nothing.

This file owns the one shift by one of the project: column t of every argument speaks of `tokens[:, t]`, except
`hidden`, whose column t is the state after reading `tokens[:, t]` and therefore predicts column t + 1.
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

from opdjax.ops.draw import invert_cdf
from opdjax.sharding import ROW_AXES

PyTree = Any
CPU_BLOCK = 4096  # rows of the head whose gradient is formed at a time, where there is no accelerator


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["softcap", "valid_vocab", "temperature"])
@dataclasses.dataclass(frozen=True)
class Head:
    """An unembedding: `logits = softcap(hidden @ kernel.T + bias) / temperature`, -inf from `valid_vocab` on."""

    kernel: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    valid_vocab: int | None = None  # rows at or beyond this id pad the embedding and stand for no token
    temperature: float = 1.0  # of the distribution that is scored


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The type that softmaxes and sums are taken in: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def head_logits(head: Head, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Dense logits, in at least float32. For a few positions only: training and scoring go through the tiled pass."""
    raw = jnp.einsum("...d,vd->...v", hidden, head.kernel, preferred_element_type=sum_dtype(hidden.dtype))
    return _finish_logits(head, raw)


def _finish_logits(head: Head, raw: Float[Array, "... V"]) -> Float[Array, "... V"]:
    logits = raw if head.bias is None else raw + head.bias.astype(raw.dtype)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    if head.temperature != 1.0:
        logits = logits / head.temperature
    if head.valid_vocab is not None and head.valid_vocab < head.kernel.shape[0]:
        logits = jnp.where(jnp.arange(head.kernel.shape[0]) < head.valid_vocab, logits, -jnp.inf)
    return logits


def _fit_width(logits: Float[Array, "n U"], vocab: int) -> Float[Array, "n V"]:
    """Models of one family may pad one vocabulary to different widths; what differs stands for no token."""
    missing = vocab - logits.shape[1]
    return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf) if missing > 0 else logits[:, :vocab]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VocabTile:
    """The next-token distributions of n tokens. Made of plain dense `[n, V]` logits it is the reference of every test."""

    logits: Float[Array, "n V"]

    @property
    def logsumexp(self) -> Float[Array, " n"]:
        """The log-normaliser, nats."""
        return jax.nn.logsumexp(self.logits, axis=-1)

    @property
    def logprobs(self) -> Float[Array, "n V"]:
        """Log-softmax, nats; -inf on padded ids."""
        return self.logits - self.logsumexp[:, None]

    def logprob(self, ids: Int[Array, "n *K"]) -> Float[Array, "n *K"]:
        """Log-probability at one id (`[n]`) or at K ids (`[n, K]`) a token, under the full softmax."""
        columns = ids if ids.ndim == 2 else ids[:, None]
        picked = jnp.take_along_axis(self.logits, columns, axis=-1) - self.logsumexp[:, None]
        return picked if ids.ndim == 2 else picked[:, 0]

    def expect(self, f: Float[Array, "n V"]) -> Float[Array, " n"]:
        """`E_{v ~ this}[f(v)]`. Ids of probability 0 contribute exactly 0, value and gradient, whatever `f` holds there."""
        is_live = self.logits > -jnp.inf
        return jnp.sum(jnp.where(is_live, jnp.exp(jnp.where(is_live, self.logprobs, 0)) * jnp.where(is_live, f, 0), 0), axis=-1)

    def top_k(self, k: int) -> Int[Array, "n K"]:
        """Ids of the `min(k, V)` most likely tokens, most likely first."""
        return jax.lax.top_k(self.logits, min(k, self.logits.shape[-1]))[1]

    def draw(self, uniform: Float[Array, "n M"]) -> Int[Array, "n M"]:
        """M ids a token, drawn from this distribution by inverting its cumulative sum at the given uniform numbers."""
        weights = jnp.exp(self.logits - jnp.max(self.logits, axis=-1, keepdims=True))
        return jax.vmap(invert_cdf, in_axes=(None, 1), out_axes=1)(weights, uniform)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """What a recipe may read of each token beside its logits; a field that the run does not carry is None."""

    token: Int[Array, " n"]
    teacher_logprob: Float[Array, " n"] | None = None
    behavior_logprob: Float[Array, " n"] | None = None  # of the distribution the token was truly drawn from
    advantage: Float[Array, " n"] | None = None  # of the whole completion, from a scalar reward
    uniform: Float[Array, "n M"] | None = None  # for M more draws from the student at this context
    # What couples tokens, prepared by `estimators.sequence` before the pass:
    future_reward: Float[Array, " n"] | None = None  # discounted, of the tokens after this one
    mean_reward: Float[Array, " n"] | None = None  # of the tokens of all other sequences
    loss_weight: Float[Array, " n"] | None = None  # importance of a prefix or a sequence, IW-OPD's weight
    is_observed: Bool[Array, " n"] | None = None  # whether diagnostics are taken in this step: the same for every token


TokenLoss = Callable[[VocabTile, VocabTile | None, Columns], tuple[Float[Array, " n"], PyTree]]
TokenStat = Callable[[VocabTile, VocabTile | None, Columns], PyTree]
Teacher = tuple[Float[Array, "B T D"], Head]


def tiled_loss(
    token_loss: TokenLoss,
    hidden: Float[Array, "B T D"],
    head: Head,
    weights: Float[Array, "B T"],
    columns: Columns,
    teacher: Teacher | None = None,
    *,
    tile: int,
    head_grad: bool = True,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], PyTree]:
    """`sum(weights * loss)` and the recipe's detached per-token outputs `[B, T]`, without ever holding `[N, V]`.

    Gradients flow to `hidden` and, unless `head_grad` is False, to the head's kernel and bias; never to the teacher, the
    weights or the columns. A token of weight 0 is not visited: its loss and outputs are 0 whatever it holds. The head's
    gradient is summed in at least float32. With a `mesh`, rows are split over its `data` axis and the head's gradient is
    reduced once, after the loop.
    """
    run = partial(_run, token_loss, tile=tile, mesh=mesh)

    @jax.custom_vjp
    def weighted_sum(hidden, head, operands):
        total, outputs, _, _ = run(hidden, head, operands, grad="none")
        return total, outputs

    def forward(hidden, head, operands):
        total, outputs, dhidden, dhead = run(hidden, head, operands, grad="both" if head_grad else "hidden")
        return (total, outputs), (dhidden, dhead)

    def backward(gradients, cotangents):
        dhidden, dhead = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), gradients)
        return dhidden, dhead, None

    weighted_sum.defvjp(forward, backward)
    head = head if head_grad else jax.lax.stop_gradient(head)
    total, outputs = weighted_sum(_predicting(hidden), head, (weights, columns, _shift_teacher(teacher)))
    return total, jax.lax.stop_gradient(outputs)


def tiled_stats(
    token_stat: TokenStat,
    hidden: Float[Array, "B T D"],
    head: Head,
    mask: Bool[Array, "B T"],
    columns: Columns,
    teacher: Teacher | None = None,
    *,
    tile: int,
    mesh: Mesh | None = None,
) -> PyTree:
    """Per-token statistics `[B, T, ...]` of the unmasked tokens (0 elsewhere): the loop of `tiled_loss` without gradient."""

    def as_loss(student, teacher, row):
        return jnp.zeros(row.token.shape, student.logits.dtype), token_stat(student, teacher, row)

    operands = (mask.astype(sum_dtype(hidden.dtype)), columns, _shift_teacher(teacher))
    _, outputs, _, _ = _run(as_loss, _predicting(hidden), head, operands, tile=tile, mesh=mesh, grad="none")
    return jax.lax.stop_gradient(outputs)


def _predicting(hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The state that predicts each column's token: THE shift by one. Nothing predicts column 0, whose weight is 0."""
    return jnp.concatenate([jnp.zeros_like(hidden[:, :1]), hidden[:, :-1]], axis=1)


def _shift_teacher(teacher: Teacher | None) -> Teacher | None:
    return None if teacher is None else jax.lax.stop_gradient((_predicting(teacher[0]), teacher[1]))


def _run(token_loss, hidden, head, operands, *, tile, mesh, grad):
    """One pass, on this device alone or as one shard of rows per device."""
    weights, columns, teacher = operands
    local = partial(_visit, token_loss, tile=tile, grad=grad)
    if mesh is None or mesh.size == 1:
        return _in_type_of(head, *local(hidden, head, weights, columns, teacher))

    def shard(hidden, head, weights, columns, teacher):
        total, outputs, dhidden, dhead = local(hidden, head, weights, columns, teacher)
        total, dhead = jax.lax.psum((total, dhead), ROW_AXES)
        return _in_type_of(head, total, outputs, dhidden, dhead)

    rows = P(ROW_AXES)
    in_specs = (rows, P(), rows, rows, None if teacher is None else (rows, P()))
    out_specs = (P(), rows, rows, P())
    # check_vma=False: the function returns finished gradients and is never differentiated itself.
    return jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(hidden, head, weights, columns, teacher)


def _in_type_of(head, total, outputs, dhidden, dhead):
    """The results with the head's gradient rounded to the head's type: last, once every shard's share is in it."""
    return total, outputs, dhidden, None if dhead is None else jax.tree.map(lambda g, x: g.astype(x.dtype), dhead, head)


def _visit(token_loss, hidden, head, weights, columns, teacher, *, tile, grad):
    """The loop over tiles; returns (sum of w * loss, outputs [B, T], d hidden or None, d head or None)."""
    shape = weights.shape
    tile = min(tile, weights.size)
    n_padded = -(-weights.size // tile) * tile
    # Tokens that count come first, so that the trip count, not the row width, sets the cost.
    order = _live_first(weights.reshape(-1) != 0)
    order = jnp.concatenate([order, jnp.full(n_padded - weights.size, order[-1], order.dtype)])
    n_live = jnp.sum(weights != 0)

    def gather(x):
        return None if x is None else jnp.asarray(x).reshape(-1, *x.shape[2:])[order]

    rows = jax.tree.map(gather, (hidden, weights, columns, None if teacher is None else teacher[0]))
    teacher_head = None if teacher is None else teacher[1]

    def visit_tile(index, dhead):
        start = index * tile
        sliced = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, tile), rows)
        return _tile(token_loss, head, teacher_head, sliced, start + jnp.arange(tile) < n_live, grad, dhead)

    def body(index, carry):
        total, outputs, dhidden, dhead = carry
        loss, tile_outputs, tile_dhidden, dhead = visit_tile(index, dhead)
        write = lambda buffer, value: jax.lax.dynamic_update_slice_in_dim(buffer, value, index * tile, 0)  # noqa: E731
        outputs = jax.tree.map(write, outputs, tile_outputs)
        dhidden = jax.tree.map(write, dhidden, tile_dhidden)
        return total + loss, outputs, dhidden, dhead

    dhead = jax.tree.map(lambda x: jnp.zeros(x.shape, sum_dtype(hidden.dtype)), head) if grad == "both" else None
    shapes = jax.eval_shape(visit_tile, 0, dhead)
    whole = lambda leaf: jnp.zeros((n_padded, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
    carry = (jnp.zeros((), shapes[0].dtype), jax.tree.map(whole, shapes[1]), jax.tree.map(whole, shapes[2]), dhead)
    total, outputs, dhidden, dhead = jax.lax.fori_loop(0, (n_live + tile - 1) // tile, body, carry)

    def scatter(x):
        unsorted = jnp.zeros((weights.size, *x.shape[1:]), x.dtype).at[order[: weights.size]].set(x[: weights.size])
        return unsorted.reshape(*shape, *x.shape[1:])

    outputs, dhidden = jax.tree.map(scatter, (outputs, dhidden))
    if grad == "none":
        return total, outputs, None, None
    return total, outputs, dhidden, dhead


def _live_first(is_live: Bool[Array, " N"]) -> Int[Array, " N"]:
    """The stable order that puts the live tokens first; two running counts, where a sort would cost more to compile and run."""
    place = jnp.where(is_live, jnp.cumsum(is_live) - 1, jnp.sum(is_live) + jnp.cumsum(~is_live) - 1)
    return jnp.zeros_like(place).at[place].set(jnp.arange(place.size, dtype=place.dtype), unique_indices=True)


def _tile(token_loss, head, teacher_head, rows, is_live, grad, dhead):
    """Loss, outputs and d hidden of one tile of n tokens, and `dhead` with the tile's share added."""
    hidden, weights, columns, teacher_hidden = rows

    def keep(x):
        return jnp.where(is_live.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

    def loss_of(raw):
        losses, outputs = token_loss(VocabTile(_finish_logits(head, raw)), teacher, columns)
        losses = jnp.where(is_live, losses, 0)
        return jnp.sum(weights.astype(losses.dtype) * losses), jax.tree.map(keep, outputs)

    # A slot past the live ones may hold anything, NaN included: it enters as zeros and its results are dropped.
    hidden, teacher_hidden, columns = jax.tree.map(keep, (hidden, teacher_hidden, columns))
    vocab = head.kernel.shape[0]
    teacher = None if teacher_head is None else VocabTile(_fit_width(head_logits(teacher_head, teacher_hidden), vocab))
    raw = jnp.einsum("nd,vd->nv", hidden, head.kernel, preferred_element_type=sum_dtype(hidden.dtype))
    if grad == "none":
        return *loss_of(raw), None, None
    total, pullback, outputs = jax.vjp(loss_of, raw, has_aux=True)
    draw = keep(pullback(jnp.ones_like(total))[0])
    small = draw.astype(head.kernel.dtype)  # operands in the model's type, sums in at least float32
    dhidden, dkernel = _pull_back(small, hidden, head.kernel, None if dhead is None else dhead.kernel)
    if dhead is not None:
        dhead = dataclasses.replace(dhead, kernel=dkernel, bias=None if head.bias is None else dhead.bias + jnp.sum(draw, axis=0))
    return total, outputs, dhidden.astype(hidden.dtype), dhead


def _pull_back(draw, hidden, kernel, dkernel):
    """(d hidden of a tile, `dkernel` with the tile's share added or None) from the cotangent of its raw logits."""
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
        sums = jax.lax.fori_loop(0, n_blocks, lambda i, sums: add_rows(i * block, block, sums), sums)
        return add_rows(n_blocks * block, rest, sums) if rest else sums

    # XLA for CPU adds no product in place: it would hold the tile's own [V, D] and pass over it twice more. Blocks of rows
    # stay in the cache instead. Elsewhere one large product is left to XLA; that has not been measured on an accelerator yet.
    sums = jnp.zeros(hidden.shape, dtype), dkernel
    return jax.lax.platform_dependent(sums, cpu=in_blocks, default=partial(add_rows, 0, vocab))
