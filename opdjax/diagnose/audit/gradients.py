"""The audit in parameter space: the variance of one rollout's gradient, and its causes.

A nested analysis of variance: P prompts, G rollouts of each, R redraws of every token at the
contexts of each rollout. Redraws differ by the noise of actions, rollouts of a prompt also by that
of trajectories, prompts also by that of the data. Variances and signals are squared norms over all
parameters; every rollout is a micro-batch of its own.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opdjax.config.recipes import EXACT, PLAIN, WITH_BASELINE
from opdjax.diagnose.audit.pair import States, kl_bins
from opdjax.diagnose.audit.subjects import Part, Progress, Subject, subject
from opdjax.engine.update import prepared, vocabulary_inputs
from opdjax.estimators import bind
from opdjax.estimators.losses import aggregation_weights, count_denominators
from opdjax.estimators.pitfalls import PITFALLS
from opdjax.ops.vocab import TokenInputs, tiled_loss
from opdjax.runs.statistics import ratio_with_interval

NUM_REDRAWS = 2
_MIN_SHARE = 1e-4  # of opd's noise: no ratio is reported for bins below
BATCH = 64  # rollouts in the batch whose signal-to-noise ratio is reported
_SUM_LENGTHS = (1024, 8192, 32768)  # tokens whose losses are added in bfloat16
_SUM_DRAWS = 20


def audit_gradients(states: States, subjects: list[Subject], progress: Progress = iter) -> Part:
    """Return the signal and the noise components of each subject, and its noise relative to `opd`.

    Every subject sees the same redraws. A coupled subject is measured on the sampled tokens only:
    its action noise is part of its trajectory noise. None: not distinguishable from 0. `by_kl`: the
    action noise of the baselines and of the own recipe, relative to `opd`, between quantiles of the
    KL. Redraws at different contexts are independent, so noises of contexts add up to a rollout's.
    """
    bins, rows, action, by_bin = kl_bins(states.kl, states.mask), {}, {}, {}
    for each in progress(subjects):
        run = _measure(states, each)
        rows[each.name], action[each.name] = run(states.mask)
        is_compared = each.is_own or each.recipe == WITH_BASELINE
        if each.name == PLAIN or (is_compared and not each.is_coupled):
            by_bin[each.name] = [run(inside)[1] for inside in bins]
    _share_signal(subjects, rows)
    plain = rows[PLAIN]
    for name, row in rows.items():
        is_known = min(row["signal"], row["noise"]) > 0
        ratio = float(np.sqrt(row["signal"] / (row["noise"] / BATCH))) if is_known else None
        row |= {"signal_to_noise": ratio, "noise_ratio": row["noise"] / plain["noise"]}
        if row["action"] is not None and plain["action"]:
            row["action_ratio"] = ratio_with_interval(action[name], action[PLAIN])
    noises = by_bin.pop(PLAIN)
    total = sum(part.sum() for part in noises)
    shares = [float(part.sum() / total) if total else 0.0 for part in noises]
    # In a bin with almost no noise, rare tokens make all of it, and redraws miss them.
    known = [part * (share > _MIN_SHARE) for part, share in zip(noises, shares)]
    ratios = {name: list(map(ratio_with_interval, parts, known)) for name, parts in by_bin.items()}
    by_kl = {"variance_share": shares, "rows": ratios}
    return {"num_redraws": NUM_REDRAWS, "batch": BATCH, "rows": rows, "by_kl": by_kl}


def _share_signal(subjects: Sequence[Subject], rows: dict[str, Part]) -> None:
    """Give the exact reverse KL's signal, which has least noise, to all of the same expectation."""
    reverse = [each for each in subjects if each.advertises == "reverse"]
    exact = [rows[each.name]["signal"] for each in reverse if not each.is_sampled]
    for each in reverse:
        if exact and each.recipe is not None and not each.is_coupled:
            rows[each.name]["signal"] = exact[0]


def _measure(states: States, each: Subject) -> Callable[[np.ndarray], tuple[dict, np.ndarray]]:
    """Return `run(mask) -> (variance components of a rollout, action noise of each prompt)`."""
    by_prompt = lambda x: jnp.reshape(x, (-1, states.num_generations, *x.shape[1:]))
    inputs = states.batch, _columns(states, each), _draws(states, each)
    batch, columns, draws = jax.tree.map(by_prompt, inputs)
    scan = partial(jax.jit(partial(_scan_prompts, each, states.spec)), states.params)

    def run(mask: np.ndarray) -> tuple[dict, np.ndarray]:
        # As fixed_denominator: a rollout's gradient does not depend on the lengths of others, and
        # the gradient of a batch is the mean over its rollouts.
        weights = jnp.asarray(mask / states.spec.max_completion_length, jnp.float32)
        rows = batch, columns, by_prompt(weights)
        sums = [np.asarray(x, np.float64) for x in scan(states.inputs.teacher[1], rows, draws)]
        return _components(*sums, draws[0].shape[2], states.num_generations), sums[1]

    return run


def _gradient(spec, token_loss, params, batch, teacher_head, weights, row=None):
    """Return the gradient of `sum(weights * loss)` for all parameters; `row` None: the batch's."""

    def loss(params):
        inputs = vocabulary_inputs(params, batch, teacher_head, spec)
        operands = inputs.hidden, inputs.head, weights, row or inputs.row, inputs.teacher
        return tiled_loss(token_loss, *operands, tile=spec.estimator.tile)[0]

    return jax.grad(loss)(params)


def _scan_prompts(each: Subject, spec, params, teacher_head, rows, draws):
    """Return |mean gradient|^2 and of each prompt the sums of squares between redraws and between
    rollouts, and |mean gradient|^2. One gradient exists at a time, next to running means.
    """
    zero, loss = optax.tree.zeros_like(params), each.token_loss()

    def of_rollout(item):
        row, draws = item

        def of_draw(draw):
            (batch, columns, weights), (token, more) = jax.tree.map(lambda x: x[None], (row, draw))
            columns = dataclasses.replace(columns, tokens=token, uniforms=more)
            return _gradient(spec, loss, params, batch, teacher_head, weights, columns), 0.0

        return _running_mean(of_draw, zero, draws)[:2]

    def of_prompt(sums, prompt):
        center, trajectory, action = _running_mean(of_rollout, zero, prompt)
        return optax.tree.add(sums, center), (action, trajectory, _square(center))

    sums, per_prompt = jax.lax.scan(of_prompt, zero, (rows, draws))
    return _square(jax.tree.map(lambda x: x / rows[-1].shape[0], sums)), *per_prompt


def _square(tree: Any) -> jax.Array:
    return optax.tree.vdot(tree, tree)


def _running_mean(value_of: Callable, zero: Any, items: Any):
    """Return (mean of vectors, sum of squares around it, sum of scalars) of `value_of(item)`."""

    def step(carry, item):  # Welford's update
        count, mean, spread, total = carry
        vector, scalar = value_of(item)
        off = optax.tree.sub(vector, mean)
        mean = jax.tree.map(lambda m, d: m + d / (count + 1), mean, off)
        spread += optax.tree.vdot(off, optax.tree.sub(vector, mean))
        return (count + 1, mean, spread, total + scalar), None

    _, mean, spread, total = jax.lax.scan(step, (0.0, zero, 0.0, 0.0), items)[0]
    return mean, spread, total


def _components(total, action, trajectory, squares, redraws: int, rollouts: int) -> Part:
    """Return unbiased estimates from the sums of squares; an estimate may be below 0."""
    prompts = len(action)
    within = trajectory.sum() / (prompts * (rollouts - 1))  # of a rollout's mean over its redraws
    between = (squares.sum() - prompts * total) / (prompts - 1)
    of_action = action.sum() / (prompts * rollouts * (redraws - 1)) if redraws > 1 else 0.0
    of_trajectory = within - of_action / redraws
    of_prompt = between - within / rollouts
    return {
        "signal": float(total - between / prompts),
        "noise": float(of_prompt + of_trajectory + of_action),
        "prompt": float(of_prompt),
        "trajectory": float(of_trajectory),
        "action": float(of_action) if redraws > 1 else None,
    }


def _columns(states: States, each: Subject) -> TokenInputs:
    """Return the prepared columns of the whole batch; tokens and uniforms are set draw by draw."""
    columns = dataclasses.replace(states.inputs.row, uniforms=None)
    if each.recipe is None:
        return columns
    estimator = bind(each.recipe, each.options, tile=states.spec.estimator.tile)
    spec = dataclasses.replace(states.spec, estimator=estimator)
    return jax.jit(partial(prepared, spec=spec))(states.inputs._replace(row=columns), states.batch)


def _draws(states: States, each: Subject):
    """Return redrawn tokens `[B, R, T]`, the rollouts' own (R = 1) where a redraw has no effect or
    meaning, and uniforms `[B, R, T, M]` of extra draws (None: M = 0).
    """
    tokens, uniforms = jnp.asarray(states.batch.tokens)[:, None], states.inputs.row.uniforms
    if each.is_sampled and not each.is_coupled:
        first, uniforms = uniforms[..., :NUM_REDRAWS], uniforms[..., NUM_REDRAWS:]
        stat = lambda student, teacher, row: each.drawn_from(student, teacher).draw(row.uniforms)
        tokens = jnp.moveaxis(states.per_token(stat, uniforms=first), -1, 1)
    if each.num_draws == 1:
        return tokens, None
    shape = tokens.shape[1], each.num_draws - 1
    more = uniforms[..., : shape[0] * shape[1]].reshape(*uniforms.shape[:2], *shape)
    return tokens, jnp.moveaxis(more, 2, 1)


def audit_batch_pitfalls(states: States, progress: Progress = iter) -> Part:
    """Return relative error and cosine of the exact reverse KL's gradient under each pitfall's
    weights, and the relative error of sums in bfloat16.
    """
    mask, segments = jnp.asarray(states.batch.mask), states.batch.segment_ids
    denominators = count_denominators(mask, segments, states.spec.max_completion_length)
    wrong = {"mean_of_means": {"parts": len(mask)}, "shifted_mask": {}}
    loss, params, rows = subject(EXACT).token_loss(), states.params, {}
    split = lambda x: x.reshape(-1, states.rows_at_once, *x.shape[1:])

    @jax.jit
    def of_parts(params, batch, head, weights):  # one micro-batch at a time
        gradient = lambda part: _gradient(states.spec, loss, params, part[0], head, part[1])
        add = lambda total, part: (optax.tree.add(total, gradient(part)), None)
        parts = jax.tree.map(split, (batch, weights))
        return jax.lax.scan(add, optax.tree.zeros_like(params), parts)[0]

    gradient = partial(of_parts, params, states.batch, states.inputs.teacher[1])
    exact = gradient(aggregation_weights(mask, segments, "token_mean", denominators))
    minus, times = optax.tree.sub, optax.tree.vdot
    compare = jax.jit(lambda x, y: (_square(minus(x, y)), times(x, y), _square(x), _square(y)))
    for name, options in progress(wrong.items()):
        found = gradient(PITFALLS[name].weights(mask, **options))
        off, along, size, length = map(float, compare(found, exact))
        bias, cosine = float(np.sqrt(off / length)), along / float(np.sqrt(size * length))
        rows[name] = {"bias": bias, "cosine": cosine}
    add = jax.jit(PITFALLS["bfloat16_sums"].add)
    losses, errors = states.kl[states.mask], {}
    error = lambda x: float(add(jnp.asarray(x))) / float(x.sum(dtype=np.float64)) - 1
    for count in _SUM_LENGTHS:  # mean relative error of a sum of `count` random losses
        draw = partial(np.random.default_rng(0).choice, losses, count)
        errors[str(count)] = statistics.fmean(error(draw()) for _ in range(_SUM_DRAWS))
    return rows | {"bfloat16_sums": {"error_by_tokens": errors}}
