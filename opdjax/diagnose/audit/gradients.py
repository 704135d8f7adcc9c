"""The audit in parameter space: the variance of one rollout's gradient, and its causes.

A nested analysis of variance: P prompts, G rollouts of each, R redraws of every token at the
contexts of each rollout. Redraws differ by the noise of actions, rollouts of a prompt also by that
of trajectories, prompts also by that of the data. Variances and signals are squared norms over all
parameters; every rollout is a micro-batch of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config.recipes import PLAIN, WITH_BASELINE
from opdjax.diagnose.audit.pair import States, kl_bins, ratio_with_interval
from opdjax.diagnose.audit.subjects import Subject
from opdjax.engine.update import prepared, vocabulary_inputs
from opdjax.estimators import bind
from opdjax.ops.vocab import TokenInputs, tiled_loss
from opdjax.types import TrainBatch

NUM_REDRAWS = 2
_MIN_SHARE = 1e-4  # of opd's noise: no ratio is reported for bins below
BATCH = 64  # rollouts in the batch whose signal-to-noise ratio is reported


def audit_gradients(
    states: States, subjects: Sequence[Subject], log: Callable[[str], None]
) -> dict[str, Any]:
    """Return the signal and the noise components of each subject, and its noise relative to `opd`.

    Every subject sees the same redraws. A coupled subject is measured on the sampled tokens only:
    its action noise is part of its trajectory noise. Recipes whose expectation is the gradient of
    the exact reverse KL share the signal of the exact one, the estimate with the least noise. None:
    not distinguishable from 0. `by_kl`: the action noise of the baselines, relative to `opd`, for
    the contexts between neighbouring quantiles of the KL. Redraws at different contexts are
    independent, so the noise of a rollout is the sum of that of its contexts.
    """
    batch = _by_prompt(states, states.batch)
    bins = kl_bins(states.kl, states.mask)
    rows, by_bin = {}, {}
    for each in subjects:
        log(f"  {each.name}")
        run = _measure(states, batch, each)
        rows[each.name] = run(states.mask)
        if each.name == PLAIN or (each.recipe == WITH_BASELINE and not each.is_coupled):
            by_bin[each.name] = [run(inside)["per_prompt"] for inside in bins]
    _share_signal(subjects, rows)
    plain = rows[PLAIN]
    for row in rows.values():
        is_known = min(row["signal"], row["noise"]) > 0
        ratio = float(np.sqrt(row["signal"] / (row["noise"] / BATCH))) if is_known else None
        row["signal_to_noise"] = ratio
        row["noise_ratio"] = row["noise"] / plain["noise"]
        if row["action"] is not None and plain["action"]:
            row["action_ratio"] = ratio_with_interval(row["per_prompt"], plain["per_prompt"])
    for row in rows.values():
        del row["per_prompt"]
    return {"num_redraws": NUM_REDRAWS, "batch": BATCH, "rows": rows, "by_kl": _by_kl(by_bin)}


def _share_signal(subjects: Sequence[Subject], rows: dict[str, dict[str, Any]]) -> None:
    """Give the exact reverse KL's signal to every subject with the same expectation."""
    reverse = [each for each in subjects if each.advertises == "reverse"]
    exact = next((rows[each.name] for each in reverse if not each.is_sampled), None)
    for each in reverse if exact is not None else ():
        if each.recipe is not None and not each.is_coupled:
            rows[each.name]["signal"] = exact["signal"]


def _by_kl(by_bin: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    plain = by_bin.pop(PLAIN)
    total = sum(part.sum() for part in plain)
    shares = [float(part.sum() / total) if total else 0.0 for part in plain]

    def ratio(ours: np.ndarray, theirs: np.ndarray, share: float):
        # In a bin with almost no noise, rare tokens make all of it, and redraws miss them.
        return ratio_with_interval(ours, theirs) if share > _MIN_SHARE else (None, None, None)

    rows = {name: list(map(ratio, parts, plain, shares)) for name, parts in by_bin.items()}
    return {"variance_share": shares, "rows": rows}


def _by_prompt(states: States, tree: Any) -> Any:
    """Reshape leaves `[B, ...]` to `[P, G, ...]`."""
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, states.num_generations, *x.shape[1:])), tree)


def _measure(
    states: States, batch: TrainBatch, each: Subject
) -> Callable[[np.ndarray], dict[str, Any]]:
    """Return `measure(mask) -> row`, compiled once.

    The row holds the variance components of one rollout's gradient of the tokens in `mask`.
    """
    is_redrawn = each.is_sampled and not each.is_coupled
    columns = _by_prompt(states, _columns(states, each))
    draws = _by_prompt(states, (_redraws if is_redrawn else _sampled_tokens)(states, each))
    run = jax.jit(partial(_scan_prompts, each, states.spec))
    # As in training, the master copy and all sums are float32, whatever the forward pass uses.
    params = jax.tree.map(lambda x: x.astype(jnp.float32), states.params)

    def measure(mask: np.ndarray) -> dict[str, Any]:
        # As fixed_denominator: a rollout's gradient does not depend on the lengths of others, and
        # the gradient of a batch is the mean over its rollouts.
        weights = jnp.asarray(mask / states.spec.max_completion_length, jnp.float32)
        rows = (batch, columns, _by_prompt(states, weights))
        found = run(params, states.inputs.teacher[1], rows, draws)
        total, *per_prompt = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        return _components(total, *per_prompt, draws[0].shape[2], states.num_generations)

    return measure


def _scan_prompts(each: Subject, spec, params, teacher_head, rows, draws):
    """Return |mean gradient|^2 and, for each prompt, sums of squares.

    These are the sum of squares between redraws, that between rollouts, and |mean gradient of the
    prompt|^2. One gradient exists at a time, next to the running means of a rollout and of a prompt
    and the sum over prompts.
    """

    def gradient(row, draw):
        (batch, columns, weights), (token, uniform) = jax.tree.map(lambda x: x[None], (row, draw))

        def loss(params):
            inputs = vocabulary_inputs(params, batch, teacher_head, spec)
            row = dataclasses.replace(columns, tokens=token, uniforms=uniform)
            operands = inputs.hidden, inputs.head, weights, row, inputs.teacher
            return tiled_loss(each.token_loss(), *operands, tile=spec.estimator.tile)[0]

        return jax.grad(loss)(params)

    zero = jax.tree.map(jnp.zeros_like, params)

    def of_rollout(row, draws):
        """Return (mean over redraws, their sum of squares around it)."""
        return _running_mean(lambda draw: (gradient(row, draw), 0.0), zero, draws)[:2]

    def of_prompt(sums, prompt):
        center, trajectory, action = _running_mean(lambda x: of_rollout(*x), zero, prompt)
        return jax.tree.map(jnp.add, sums, center), (action, trajectory, _square(center))

    sums, per_prompt = jax.lax.scan(of_prompt, zero, (rows, draws))
    return _square(jax.tree.map(lambda x: x / rows[-1].shape[0], sums)), *per_prompt


def _square(tree: Any) -> jax.Array:
    return sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree))


def _running_mean(value_of: Callable, zero: Any, items: Any):
    """Return (mean of vectors, sum of squares around it, sum of the scalars).

    `value_of(item) -> (vector, scalar)`; Welford's update.
    """

    def step(carry, item):
        count, mean, spread, total = carry
        vector, scalar = value_of(item)
        off = jax.tree.map(jnp.subtract, vector, mean)
        mean = jax.tree.map(lambda m, d: m + d / (count + 1), mean, off)
        leaves = zip(*map(jax.tree.leaves, (off, vector, mean)))
        spread += sum(jnp.vdot(d, v - m) for d, v, m in leaves)
        return (count + 1, mean, spread, total + scalar), None

    _, mean, spread, total = jax.lax.scan(step, (0.0, zero, 0.0, 0.0), items)[0]
    return mean, spread, total


def _components(total, action, trajectory, squares, redraws: int, rollouts: int) -> dict[str, Any]:
    """Return unbiased estimates from the sums of squares; an estimate may be below 0."""
    prompts = len(action)
    within = trajectory.sum() / (prompts * (rollouts - 1))  # of a rollout's mean over its redraws
    between = (squares.sum() - prompts * total) / (prompts - 1)
    of_action = action.sum() / (prompts * rollouts * (redraws - 1)) if redraws > 1 else None
    of_trajectory = within if of_action is None else within - of_action / redraws
    of_prompt = between - within / rollouts
    return {
        "signal": float(total - between / prompts),
        "noise": float(of_prompt + of_trajectory + (of_action or 0.0)),
        "prompt": float(of_prompt),
        "trajectory": float(of_trajectory),
        "action": None if of_action is None else float(of_action),
        "per_prompt": action,
    }


def _columns(states: States, each: Subject) -> TokenInputs:
    """Return the prepared columns of the whole batch; tokens and uniforms are set draw by draw."""
    columns = dataclasses.replace(states.inputs.row, uniforms=None)
    if each.recipe is None:
        return columns
    estimator = bind(each.recipe, each.options, tile=states.spec.estimator.tile)
    spec = dataclasses.replace(states.spec, estimator=estimator)
    return jax.jit(partial(prepared, spec=spec))(states.inputs._replace(row=columns), states.batch)


def num_uniforms(subjects: Sequence[Subject]) -> int:
    """Return how many uniform numbers the redraws of these subjects need at each context."""
    return NUM_REDRAWS * max(each.num_draws for each in subjects)


def _sampled_tokens(states: States, each: Subject):
    """Return the rollouts' tokens `[B, 1, T]` as the only draw, and uniforms of extra draws."""
    extra = each.num_draws - 1
    uniforms = states.inputs.row.uniforms[:, None, :, :extra] if extra else None
    return jnp.asarray(states.batch.tokens)[:, None], uniforms


def _redraws(states: States, each: Subject):
    """Draw new tokens `[B, R, T]` at every context, with uniforms `[B, R, T, M]` of extra draws."""
    first, extra = states.inputs.row.uniforms[:, :, :NUM_REDRAWS], each.num_draws - 1
    tokens = states.per_token(
        lambda student, teacher, row: each.drawn_from(student, teacher).draw(row.uniforms),
        uniforms=first,
    )
    if not extra:
        return jnp.moveaxis(tokens, -1, 1), None
    more = states.inputs.row.uniforms[:, :, NUM_REDRAWS : NUM_REDRAWS * (1 + extra)]
    more = jnp.moveaxis(more.reshape(*more.shape[:2], NUM_REDRAWS, extra), 2, 1)
    return jnp.moveaxis(tokens, -1, 1), more
