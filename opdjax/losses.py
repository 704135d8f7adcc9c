"""The recipes as functions of plain arrays, for a training loop of one's own.

    loss, metrics = opdjax.losses.full_kl(student_logits, teacher_logits, tokens, mask)

`logits[..., t, :]` is the distribution that `tokens[..., t]` was drawn from: shift by one before
the call (`logits[:, :-1]` belongs to `tokens[:, 1:]`). Logits are `[..., T, V]` of any floating
dtype, and softmaxes are taken in at least float32; `tokens` (integers) and `mask` (bool: the tokens
to train on) are `[..., T]`. The result is the loss of each token, `[..., T]` in nats, 0 outside of
the mask whatever the inputs hold there, and the recipe's detached per-token metrics of that shape.
The gradient flows to `student_logits` alone. `aggregate` makes one number of the losses.

Options of a recipe are keywords, as `opdjax train --help` and `opdjax audit --explain RECIPE` list
them. Columns are keywords too, `[..., T]`; one that the loss would not read is refused:
`behavior_logprobs`, `advantages`, `reference_logprobs`, `teacher_logprobs` (in place of
`teacher_logits=None` where a recipe reads sampled tokens only), `teacher_top_ids` and
`teacher_top_logprobs` (`[..., T, K]`, in the same place for a recipe on the teacher's top k),
`uniforms` (`[..., T, extra_draws]`) and `segment_ids` (for rows that hold several sequences).

All functions work under jit, grad and vmap, in reverse and forward mode. ValueError where shapes,
dtypes, options or columns do not fit; ids outside of the vocabulary are an error where their values
are known, and give NaN under jit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from opdjax.config.recipes import RECIPES, Recipe
from opdjax.estimators import TOKEN_LOSSES, Estimator, bind
from opdjax.estimators.grpo import CREDIT_OPTIONS
from opdjax.estimators.losses import aggregation_weights, count_denominators
from opdjax.ops.tile import VocabTile, sum_dtype
from opdjax.ops.vocab import TokenInputs

Losses = tuple[Float[Array, "... T"], dict[str, Float[Array, "... T"]]]
__all__ = ["aggregate", *RECIPES]
_TOP_K = ("teacher_top_ids", "teacher_top_logprobs")


def aggregate(
    loss: Float[Array, "... T"],
    mask: ArrayLike,
    kind: str = "token_mean",
    *,
    max_length: int | None = None,
    segment_ids: ArrayLike | None = None,
) -> Float[Array, ""]:
    """One number of the losses of a batch: `kind` is `token_mean`, `sequence_mean_token_mean`,
    `sequence_mean_token_sum` or `fixed_denominator` (sequences times `max_length`).

    ValueError on another kind, and where `fixed_denominator` has no `max_length`.
    """
    if (kind == "fixed_denominator") != (max_length is not None):
        raise ValueError(
            f"max_length is {max_length} where kind is {kind!r}; expected the longest completion "
            "in tokens for fixed_denominator, and none otherwise"
        )
    rows = lambda x: jnp.reshape(jnp.asarray(x), (-1, loss.shape[-1]))
    mask, loss = rows(_checked_mask(mask, loss.shape)), rows(loss)
    segments = jnp.ones(mask.shape, jnp.int32) if segment_ids is None else rows(segment_ids)
    denominators = count_denominators(mask, segments, max_length or 1)
    return jnp.sum(aggregation_weights(mask, segments, kind, denominators) * loss)


def _loss_of(recipe: Recipe) -> Callable[..., Losses]:
    """The recipe as a function of arrays; recipes that read no teacher take no logits of one."""

    def with_teacher(student_logits, teacher_logits, tokens, mask, **keywords) -> Losses:
        return _token_losses(recipe, student_logits, teacher_logits, tokens, mask, keywords)

    def without_teacher(student_logits, tokens, mask, **keywords) -> Losses:
        return _token_losses(recipe, student_logits, None, tokens, mask, keywords)

    function = without_teacher if recipe.teacher == "none" else with_teacher
    function.__name__ = function.__qualname__ = recipe.name
    function.__doc__ = TOKEN_LOSSES[recipe.name].__doc__
    return function


@functools.cache
def __getattr__(name: str) -> Callable[..., Losses]:
    if name not in RECIPES:
        raise AttributeError(f"opdjax.losses has no {name!r}; it has {', '.join(__all__)}")
    return _loss_of(RECIPES[name])


def _token_losses(
    recipe: Recipe,
    student_logits: ArrayLike,
    teacher_logits: ArrayLike | None,
    tokens: ArrayLike,
    mask: ArrayLike,
    keywords: Mapping[str, Any],
) -> Losses:
    columns = {field.name for field in dataclasses.fields(TokenInputs)} | {"segment_ids"}
    given = {name: value for name, value in keywords.items() if name in columns}
    options = {name: value for name, value in keywords.items() if name not in columns}
    if made := [name for name in CREDIT_OPTIONS if name in options and name in recipe.options]:
        raise ValueError(
            f"{recipe.name} does not take {made[0]!r} here: it makes advantages of rewards; pass "
            "advantages"
        )
    estimator = bind(recipe.name, options)
    _check_columns(estimator, given, teacher_logits is not None)
    logits = _checked_logits("student_logits", student_logits)
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    mask, tokens = _checked_mask(mask, shape), _checked_ids(tokens, mask, shape, vocab)

    def tile(logits):  # logits outside of the mask may be NaN, and would reach the gradient
        live = jnp.where(mask[..., None], logits, 0).reshape(-1, vocab)
        return VocabTile(live.astype(sum_dtype(live.dtype)))

    student, teacher = tile(logits), None
    if teacher_logits is not None:
        teacher_logits = _checked_logits("teacher_logits", teacher_logits)
        if teacher_logits.shape != logits.shape:
            raise ValueError(
                f"teacher_logits has shape {teacher_logits.shape}, student_logits {logits.shape}; "
                "expected the same: cut both to the tokenizer's ids"
            )
        teacher = tile(jax.lax.stop_gradient(teacher_logits))
    read = {name: _checked_column(name, value, shape) for name, value in given.items()}
    segments = read.pop("segment_ids", jnp.ones(shape, jnp.int32)).reshape(-1, shape[-1])
    row = TokenInputs(tokens, **read)
    flat = lambda x: jnp.where(_over(mask, x), x, 0).reshape(-1, *x.shape[len(shape) :])
    by_row = lambda x: x.reshape(-1, shape[-1])
    row = jax.tree.map(flat, row)
    if estimator.is_coupled:
        stats = jax.lax.stop_gradient(estimator.token_stats(student, teacher, row))
        rows = jax.tree.map(lambda x: x.reshape(-1, shape[-1], *x.shape[1:]), row)
        rows = estimator.prepare(rows, jax.tree.map(by_row, stats), by_row(mask), segments)
        row = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
    loss, outputs = estimator.token_loss(student, teacher, row)
    restore = lambda x: jnp.where(mask, x.reshape(shape), 0)
    return restore(loss), jax.lax.stop_gradient(jax.tree.map(restore, outputs))


def _check_columns(estimator: Estimator, given: Mapping[str, Any], has_logits: bool) -> None:
    """ValueError where a column is missing that the loss reads, or given that it would ignore."""
    recipe, options = estimator.recipe, estimator.options
    is_corrected = options.get("importance", "none") != "none"
    needed = {
        "behavior_logprobs": recipe.is_rewarded or is_corrected,
        "advantages": recipe.is_rewarded or bool(options.get("task_reward_coef")),
        "reference_logprobs": bool(options.get("reference_kl_coef")),
        "uniforms": bool(options.get("extra_draws")),
        "teacher_logprobs": estimator.teacher == "token" and not has_logits,
        **dict.fromkeys(_TOP_K, estimator.teacher == "top_k" and not has_logits),
    }
    missing = [name for name, is_needed in needed.items() if is_needed and name not in given]
    if estimator.teacher == "vocabulary" and not has_logits:
        missing = ["teacher_logits"]
    if missing:
        raise ValueError(f"{recipe.name} reads {', '.join(missing)} under these options; pass them")
    allowed = {name for name, is_needed in needed.items() if is_needed}
    allowed |= {"segment_ids"} if estimator.is_coupled else set()
    unread = ", ".join(sorted(given.keys() - allowed))
    if unread:
        raise ValueError(f"{recipe.name} would not read {unread} under these options; leave it out")


def _checked_logits(name: str, logits: ArrayLike) -> Array:
    logits = jnp.asarray(logits)
    if logits.ndim < 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"{name} has shape {logits.shape} and dtype {logits.dtype}; expected [..., T, V] and a "
            "floating dtype"
        )
    return logits


def _checked_mask(mask: ArrayLike, shape: tuple[int, ...]) -> Array:
    mask = jnp.asarray(mask)
    if mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}; expected {shape} and bool"
        )
    return mask


def _checked_ids(tokens: ArrayLike, mask: Array, shape: tuple[int, ...], vocab: int) -> Array:
    tokens = jnp.asarray(tokens)
    if tokens.shape != shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}; expected {shape} and "
            "integers"
        )
    if not isinstance(tokens, jax.core.Tracer) and not isinstance(mask, jax.core.Tracer):
        found = tokens[mask & ((tokens < 0) | (tokens >= vocab))]
        if found.size:
            raise ValueError(f"tokens holds the id {found[0]}; expected ids from 0 to {vocab - 1}")
    return tokens


def _checked_column(name: str, column: ArrayLike, shape: tuple[int, ...]) -> Array:
    column = jnp.asarray(column)
    has_width = name in (*_TOP_K, "uniforms")
    if column.shape[: len(shape)] != shape or column.ndim != len(shape) + has_width:
        expected = f"{shape} and one more axis" if has_width else f"{shape}"
        raise ValueError(f"{name} has shape {column.shape}; expected {expected}")
    return column


def _over(mask: Array, column: Array) -> Array:
    """The mask with the further axis of a column."""
    return mask.reshape(mask.shape + (1,) * (column.ndim - mask.ndim))
