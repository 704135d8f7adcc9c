"""The audit in parameter space: how much of the gradient of one rollout is chance, and where that chance comes from.

P prompts, G rollouts of each, R redraws of every token at the contexts of each rollout: an analysis of variance with three
levels. What differs between redraws is the noise of actions, between rollouts of a prompt also that of trajectories,
between prompts also that of the data. Squared norms over all parameters; a rollout is a micro-batch of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.audit.pair import States, kl_bins, ratio_with_interval
from opdjax.audit.subjects import Subject, subject
from opdjax.estimators import RECIPES, sequence
from opdjax.estimators.divergence import reverse_kl
from opdjax.ops.vocab import Columns, tiled_loss, tiled_stats
from opdjax.train_state import passes

NUM_REDRAWS = 2
_LEAST_SHARE = 1e-4  # of the noise, that a ratio is told of
BATCH = 64  # rollouts of the batch that a signal-to-noise ratio is told for


def audit_gradients(states: States, subjects: Sequence[Subject]) -> dict[str, Any]:
    """Signal and the parts of the noise of each subject, with the ratio of its noise to that of `opd`.

    Every subject sees the same redraws. A coupled one is measured on the tokens that were drawn: its action noise cannot be
    told from that of trajectories. `by_kl`: for the baselines, the action noise of the contexts between neighbouring quantiles
    of the KL, relative to `opd` there; redraws at different contexts are independent, so that the noise of a rollout is the
    sum of that of its contexts.
    """
    runs = {each.name: _measure(states, each) for each in subjects}
    plain_run = runs.get("opd") or _measure(states, subject("opd"))
    rows = {name: run(states.mask) for name, run in runs.items()}
    plain = rows.get("opd") or plain_run(states.mask)
    for row in rows.values():
        row["noise_ratio"] = row["noise"] / plain["noise"]
        if row["action"] is not None and plain["action"]:
            row["action_ratio"] = ratio_with_interval(row["per_prompt"], plain["per_prompt"])
    baselines = {each.name: runs[each.name] for each in subjects if each.recipe == "vopd" and not each.is_coupled}
    return {
        "num_redraws": NUM_REDRAWS,
        "batch": BATCH,
        "rows": {name: _without(row, "per_prompt") for name, row in rows.items()},
        "by_kl": _by_kl(states, plain_run, baselines),
    }


def _by_kl(states: States, plain_run: Callable, runs: dict[str, Callable]) -> dict[str, Any]:
    bins = kl_bins(states.per_token(lambda s, t, _: reverse_kl(s, t)), states.mask)
    plain = [plain_run(inside)["per_prompt"] for inside in bins]
    total = sum(part.sum() for part in plain)
    ratios = {
        name: [ratio_with_interval(run(inside)["per_prompt"], part) for inside, part in zip(bins, plain)] for name, run in runs.items()
    }
    return {"variance_share": [float(part.sum() / total) if total else None for part in plain], "rows": ratios}


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _measure(states: States, each: Subject) -> Callable[[np.ndarray], dict[str, Any]]:
    """`measure(mask) -> row`: the parts of the variance of one rollout's gradient of the tokens in `mask`; compiled once."""
    is_split = each.is_sampled and not each.is_coupled
    by_prompt = lambda tree: jax.tree.map(lambda x: jnp.reshape(x, (-1, states.num_generations, *x.shape[1:])), tree)  # noqa: E731
    rows = by_prompt((states.batch, _columns(states, each)))
    draws = by_prompt(_redraws(states, each) if is_split else _as_drawn(states, each))
    run = jax.jit(partial(_scan_prompts, each, states.spec))

    def measure(mask: np.ndarray) -> dict[str, Any]:
        # fixed_denominator: a rollout's gradient then does not depend on the lengths of others, and their mean is the batch's.
        weights = by_prompt(jnp.asarray(mask / states.spec.max_completion_length, jnp.float32))
        total, *per_prompt = jax.tree.map(
            lambda x: np.asarray(x, np.float64), run(states.params, states.teacher[1], (*rows, weights), draws)
        )
        return _split(total, *per_prompt, draws[0].shape[2], states.num_generations)

    return measure


def _scan_prompts(each: Subject, spec, params, teacher_head, rows, draws):
    """(|mean gradient|^2, and for each prompt the sums of squares between redraws and between rollouts, and |its mean|^2)."""

    def gradient(row, draw):
        (batch, columns, weights), (token, uniform) = jax.tree.map(lambda x: x[None], (row, draw))

        def loss(params):
            hidden, head, _, teacher = passes(params, batch, teacher_head, spec)
            drawn = dataclasses.replace(columns, token=token, uniform=uniform)
            return tiled_loss(each.token_loss(), hidden, head, weights, drawn, teacher, tile=spec.estimator.tile)[0]

        return jax.grad(loss)(params)

    mean = lambda tree: jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)  # noqa: E731
    square = lambda tree: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))  # noqa: E731
    spread = lambda tree, center: square(jax.tree.map(jnp.subtract, tree, center))  # noqa: E731

    def of_prompt(sums, prompt):
        gradients = jax.vmap(jax.vmap(gradient, in_axes=(None, 0)))(*prompt)  # [G, R, ...]
        by_rollout = jax.vmap(mean)(gradients)
        center = mean(by_rollout)
        action = spread(gradients, jax.tree.map(lambda x: x[:, None], by_rollout))
        trajectory = spread(by_rollout, jax.tree.map(lambda x: x[None], center))
        return jax.tree.map(jnp.add, sums, center), (action, trajectory, square(center))

    sums, per_prompt = jax.lax.scan(of_prompt, jax.tree.map(jnp.zeros_like, params), (rows, draws))
    num_prompts = rows[-1].shape[0]
    return square(jax.tree.map(lambda x: x / num_prompts, sums)), *per_prompt


def _split(total, action, trajectory, squares, redraws: int, rollouts: int) -> dict[str, Any]:
    """Unbiased estimates from the sums of squares; a part that is estimated below 0 is told as it is."""
    prompts = len(action)
    within = trajectory.sum() / (prompts * (rollouts - 1))  # variance of a rollout's mean over its redraws
    between = (squares.sum() - prompts * total) / (prompts - 1)
    signal = total - between / prompts
    of_action = action.sum() / (prompts * rollouts * (redraws - 1)) if redraws > 1 else None
    of_trajectory = within if of_action is None else within - of_action / redraws
    of_prompt = between - within / rollouts
    noise = of_prompt + of_trajectory + (of_action or 0.0)
    return {
        "signal": float(signal), "noise": float(noise), "prompt": float(of_prompt), "trajectory": float(of_trajectory),
        "action": None if of_action is None else float(of_action),
        "signal_to_noise": float(np.sqrt(max(signal, 0) / (noise / BATCH))) if noise > 0 else None,
        "per_prompt": action,
    }  # fmt: skip


def _columns(states: States, each: Subject) -> Columns:
    """The columns of the whole batch, prepared where the subject asks for it; tokens and uniforms are set draw by draw."""
    columns = dataclasses.replace(states.columns, uniform=None)
    if each.recipe is None or not sequence.is_coupled(each.options):
        return columns
    stat = partial(sequence.token_stats, options=each.options)
    operands = (states.hidden, states.head, states.batch.mask, columns, states.teacher)
    stats = jax.jit(lambda *args: tiled_stats(stat, *args, tile=states.spec.estimator.tile))(*operands)
    is_policy_gradient = RECIPES[each.recipe].is_policy_gradient
    mask, segments = states.batch.mask, states.batch.segment_ids
    return sequence.prepare(columns, stats, mask, segments, each.options, is_policy_gradient=is_policy_gradient)


def num_uniforms(subjects: Sequence[Subject]) -> int:
    """Uniform numbers a context that the redraws of these subjects use up."""
    return NUM_REDRAWS * max(each.num_draws for each in subjects)


def _as_drawn(states: States, each: Subject):
    """(tokens `[B, 1, T]`, uniforms of extra draws or None): one draw, that of the rollouts themselves."""
    extra = each.num_draws - 1
    return jnp.asarray(states.batch.tokens)[:, None], states.columns.uniform[:, None, :, :extra] if extra else None


def _redraws(states: States, each: Subject):
    """(tokens `[B, R, T]`, uniforms of extra draws `[B, R, T, M]` or None), drawn anew at every context."""
    first, extra = states.columns.uniform[:, :, :NUM_REDRAWS], each.num_draws - 1
    columns = dataclasses.replace(states.columns, uniform=first)
    draw = lambda student, teacher, row: each.drawn_from(student, teacher).draw(row.uniform)  # noqa: E731
    operands = (states.hidden, states.head, states.batch.mask, columns, states.teacher)
    tokens = jax.jit(lambda *args: tiled_stats(draw, *args, tile=states.spec.estimator.tile))(*operands)
    if not extra:
        return jnp.moveaxis(tokens, -1, 1), None
    more = states.columns.uniform[:, :, NUM_REDRAWS : NUM_REDRAWS * (1 + extra)]
    more = jnp.moveaxis(more.reshape(*more.shape[:2], NUM_REDRAWS, extra), 2, 1)
    return jnp.moveaxis(tokens, -1, 1), more
