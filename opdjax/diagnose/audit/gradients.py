"""The audit in parameter space: how much of the gradient of one rollout is chance, and where that
chance comes from.

P prompts, G rollouts of each, R redraws of every token at the contexts of each rollout: an analysis
of variance with three levels. What differs between redraws is the noise of actions, between
rollouts of a prompt also that of trajectories, between prompts also that of the data. Squared norms
over all parameters; a rollout is a micro-batch of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.diagnose.audit.pair import States, kl_bins, ratio_with_interval
from opdjax.diagnose.audit.subjects import Subject
from opdjax.engine.update import prepared, vocabulary_inputs
from opdjax.estimators import bind
from opdjax.ops.vocab import TokenInputs, tiled_loss
from opdjax.types import TrainBatch

NUM_REDRAWS = 2
_LEAST_SHARE = 1e-4  # of opd's noise, that a ratio is told of
BATCH = 64  # rollouts of the batch that a signal-to-noise ratio is told for


def audit_gradients(
    states: States, subjects: Sequence[Subject], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Signal and the parts of the noise of each subject, with the ratio of its noise to that of
    `opd`.

    Every subject sees the same redraws. A coupled one is measured on the tokens that were drawn:
    its action noise cannot be told from that of trajectories. The recipes whose expectation is that
    of the exact reverse KL share its signal, which is the least noisy estimate of one and the same
    number; None: not told apart from 0. `by_kl`: for the baselines, the action noise of the
    contexts between neighbouring quantiles of the KL, relative to `opd` there; redraws at different
    contexts are independent, so that the noise of a rollout is the sum of that of its contexts.
    """
    batch = _by_prompt(states, states.batch)
    bins = kl_bins(states.kl, states.mask)
    rows, by_bin = {}, {}
    for each in subjects:
        tell(f"  {each.name}")
        run = _measure(states, batch, each)
        rows[each.name] = run(states.mask)
        if each.name == "opd" or (each.recipe == "vopd" and not each.is_coupled):
            by_bin[each.name] = [run(inside)["per_prompt"] for inside in bins]
    _share_signal(subjects, rows)
    plain = rows["opd"]
    for row in rows.values():
        row["signal_to_noise"] = (
            float(np.sqrt(row["signal"] / (row["noise"] / BATCH)))
            if min(row["signal"], row["noise"]) > 0
            else None
        )
        row["noise_ratio"] = row["noise"] / plain["noise"]
        if row["action"] is not None and plain["action"]:
            row["action_ratio"] = ratio_with_interval(row["per_prompt"], plain["per_prompt"])
    told = {
        name: {key: value for key, value in row.items() if key != "per_prompt"}
        for name, row in rows.items()
    }
    return {"num_redraws": NUM_REDRAWS, "batch": BATCH, "rows": told, "by_kl": _by_kl(by_bin)}


def _share_signal(subjects: Sequence[Subject], rows: dict[str, dict[str, Any]]) -> None:
    exact = next(
        (
            rows[each.name]
            for each in subjects
            if not each.is_sampled and each.advertises == "reverse"
        ),
        None,
    )
    for each in subjects if exact is not None else ():
        if each.recipe is not None and each.advertises == "reverse" and not each.is_coupled:
            rows[each.name]["signal"] = exact["signal"]


def _by_kl(by_bin: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    plain = by_bin.pop("opd")
    total = sum(part.sum() for part in plain)
    shares = [float(part.sum() / total) if total else 0.0 for part in plain]

    def ratio(ours: np.ndarray, theirs: np.ndarray, share: float):
        # Where next to nothing is left of the noise, redraws never see the rare draws that it is
        # made of.
        return ratio_with_interval(ours, theirs) if share > _LEAST_SHARE else (None, None, None)

    return {
        "variance_share": shares,
        "rows": {
            name: [ratio(*each) for each in zip(parts, plain, shares)]
            for name, parts in by_bin.items()
        },
    }


def _by_prompt(states: States, tree: Any) -> Any:
    """Leaves `[B, ...]` as `[P, G, ...]`."""
    return jax.tree.map(lambda x: jnp.reshape(x, (-1, states.num_generations, *x.shape[1:])), tree)


def _measure(
    states: States, batch: TrainBatch, each: Subject
) -> Callable[[np.ndarray], dict[str, Any]]:
    """`measure(mask) -> row`: the parts of the variance of one rollout's gradient of the tokens in
    `mask`; compiled once.
    """
    is_split = each.is_sampled and not each.is_coupled
    columns = _by_prompt(states, _columns(states, each))
    draws = _by_prompt(states, _redraws(states, each) if is_split else _as_drawn(states, each))
    run = jax.jit(partial(_scan_prompts, each, states.spec))
    # As in training: the master copy is float32 and so are all sums, whatever type the forward pass
    # is in.
    params = jax.tree.map(lambda x: x.astype(jnp.float32), states.params)

    def measure(mask: np.ndarray) -> dict[str, Any]:
        # fixed_denominator: a rollout's gradient then does not depend on the lengths of others, and
        # their mean is the batch's.
        weights = _by_prompt(
            states, jnp.asarray(mask / states.spec.max_completion_length, jnp.float32)
        )
        found = run(params, states.inputs.teacher[1], (batch, columns, weights), draws)
        total, *per_prompt = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        return _split(total, *per_prompt, draws[0].shape[2], states.num_generations)

    return measure


def _scan_prompts(each: Subject, spec, params, teacher_head, rows, draws):
    """(|mean gradient|^2, and for each prompt the sums of squares between redraws and between
    rollouts, and |its mean|^2).

    One gradient at a time: beside it stand the running means of a rollout and of a prompt, and the
    sum over prompts.
    """

    def gradient(row, draw):
        (batch, columns, weights), (token, uniform) = jax.tree.map(lambda x: x[None], (row, draw))

        def loss(params):
            inputs = vocabulary_inputs(params, batch, teacher_head, spec)
            drawn = dataclasses.replace(columns, token=token, uniform=uniform)
            operands = inputs.hidden, inputs.head, weights, drawn, inputs.teacher
            return tiled_loss(each.token_loss(), *operands, tile=spec.estimator.tile)[0]

        return jax.grad(loss)(params)

    zero = jax.tree.map(jnp.zeros_like, params)

    def of_rollout(row, draws):
        """(mean over redraws, their sum of squares around it)."""
        return _running_mean(lambda draw: (gradient(row, draw), 0.0), zero, draws)[:2]

    def of_prompt(sums, prompt):
        center, trajectory, action = _running_mean(lambda x: of_rollout(*x), zero, prompt)
        return jax.tree.map(jnp.add, sums, center), (action, trajectory, _square(center))

    sums, per_prompt = jax.lax.scan(of_prompt, zero, (rows, draws))
    return _square(jax.tree.map(lambda x: x / rows[-1].shape[0], sums)), *per_prompt


def _square(tree: Any) -> jax.Array:
    return sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree))


def _running_mean(value_of: Callable, zero: Any, items: Any):
    """(mean of vectors, sum of squares around it, sum of what came along), `value_of(item) ->
    (vector, along)`; Welford's update.
    """

    def step(carry, item):
        count, mean, spread, along = carry
        vector, more = value_of(item)
        off = jax.tree.map(jnp.subtract, vector, mean)
        mean = jax.tree.map(lambda m, d: m + d / (count + 1), mean, off)
        spread += sum(
            jnp.vdot(d, v - m) for d, v, m in zip(*map(jax.tree.leaves, (off, vector, mean)))
        )
        return (count + 1, mean, spread, along + more), None

    _, mean, spread, along = jax.lax.scan(step, (0.0, zero, 0.0, 0.0), items)[0]
    return mean, spread, along


def _split(total, action, trajectory, squares, redraws: int, rollouts: int) -> dict[str, Any]:
    """Unbiased estimates from the sums of squares; a part that is estimated below 0 is told as it
    is.
    """
    prompts = len(action)
    within = trajectory.sum() / (
        prompts * (rollouts - 1)
    )  # variance of a rollout's mean over its redraws
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
    """The columns of the whole batch, prepared where the subject asks for it; tokens and uniforms
    are set draw by draw.
    """
    columns = dataclasses.replace(states.inputs.row, uniform=None)
    if each.recipe is None:
        return columns
    spec = dataclasses.replace(states.spec, estimator=bind(each.recipe, each.options))
    return jax.jit(partial(prepared, spec=spec))(states.inputs._replace(row=columns), states.batch)


def num_uniforms(subjects: Sequence[Subject]) -> int:
    """Uniform numbers a context that the redraws of these subjects use up."""
    return NUM_REDRAWS * max(each.num_draws for each in subjects)


def _as_drawn(states: States, each: Subject):
    """(tokens `[B, 1, T]`, uniforms of extra draws or None): one draw, that of the rollouts
    themselves.
    """
    extra = each.num_draws - 1
    return jnp.asarray(states.batch.tokens)[:, None], states.inputs.row.uniform[
        :, None, :, :extra
    ] if extra else None


def _redraws(states: States, each: Subject):
    """(tokens `[B, R, T]`, uniforms of extra draws `[B, R, T, M]` or None), drawn anew at every
    context.
    """
    first, extra = states.inputs.row.uniform[:, :, :NUM_REDRAWS], each.num_draws - 1
    tokens = states.per_token(
        lambda student, teacher, row: each.drawn_from(student, teacher).draw(row.uniform),
        uniform=first,
    )
    if not extra:
        return jnp.moveaxis(tokens, -1, 1), None
    more = states.inputs.row.uniform[:, :, NUM_REDRAWS : NUM_REDRAWS * (1 + extra)]
    more = jnp.moveaxis(more.reshape(*more.shape[:2], NUM_REDRAWS, extra), 2, 1)
    return jnp.moveaxis(tokens, -1, 1), more
