"""What a subject costs on a real batch, and what the pitfalls of a batch do to its gradient."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.audit.pair import States
from opdjax.audit.subjects import Subject, subject
from opdjax.estimators import bind
from opdjax.estimators.divergence import reverse_kl
from opdjax.estimators.losses import aggregation_weights, count_denominators
from opdjax.estimators.pitfalls import PITFALLS
from opdjax.ops.vocab import tiled_loss
from opdjax.scoring.local import token_logprobs
from opdjax.train_state import loss_and_grad, passes
from opdjax.types import TeacherScores

_REPEATS = 5
_SUM_LENGTHS = (1024, 8192, 32768)  # tokens whose losses are added in bfloat16


def audit_costs(states: States, subjects: Sequence[Subject]) -> dict[str, Any]:
    """Seconds and bytes a token of loss and gradient, each from what the recipe asks of the teacher; medians of alternating runs.

    `bytes_per_token`: the largest working memory of the compiled program over the tokens of the batch, where XLA tells it.
    """
    runs, rows = {}, {}
    for each in (one for one in subjects if one.recipe is not None):
        run, operands = _compile(states, each)
        memory = run.memory_analysis()
        rows[each.name] = {"bytes_per_token": None if memory is None else memory.temp_size_in_bytes / states.mask.sum()}
        runs[each.name] = partial(run, *operands)
        jax.block_until_ready(runs[each.name]())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["seconds_per_token"] = statistics.median(seconds[name]) / int(states.mask.sum())
    return rows


def _compile(states: States, each: Subject):
    recipe, options = bind(each.recipe, each.options)
    extra = each.num_draws - 1
    batch = dataclasses.replace(states.batch, uniforms=states.batch.uniforms[:, :, :extra] if extra else None)
    scores, head = batch.teacher, states.teacher[1]
    if recipe.teacher == "token":
        scores = TeacherScores(token_logprobs=token_logprobs(scores.hidden, head, batch, tile=states.spec.estimator.tile))
    batch = dataclasses.replace(batch, teacher=None if recipe.teacher == "none" else scores)
    operands = (states.params, batch, head if recipe.teacher == "vocabulary" else None)
    run = jax.jit(lambda params, batch, head: loss_and_grad(params, batch, head, states.spec, recipe, options)[1])
    return run.lower(*operands).compile(), operands


def audit_batch_pitfalls(states: States) -> dict[str, Any]:
    """Relative error and cosine of the exact reverse KL's gradient under each pitfall's weights; error of sums in bfloat16."""
    batch = states.batch
    denominators = count_denominators(batch.mask, batch.segment_ids, states.spec.max_completion_length)
    right = _gradient(states, aggregation_weights(batch.mask, batch.segment_ids, "token_mean", denominators))
    rows: dict[str, Any] = {}
    for name, more in (("mean_of_means", {"parts": batch.mask.shape[0]}), ("shifted_mask", {})):
        wrong = _gradient(states, PITFALLS[name].weights(jnp.asarray(batch.mask), **more))
        error = np.linalg.norm(wrong - right) / np.linalg.norm(right)
        cosine = np.vdot(wrong, right) / (np.linalg.norm(wrong) * np.linalg.norm(right))
        rows[name] = {"bias": float(error), "cosine": float(cosine)}
    losses = states.per_token(lambda s, t, _: reverse_kl(s, t))[states.mask]
    rows["bfloat16_sums"] = {"error_by_tokens": {str(n): _sum_error(losses, n) for n in _SUM_LENGTHS}}
    return rows


def _sum_error(losses: np.ndarray, count: int) -> float:
    """Relative error of the sum of `count` losses drawn from these."""
    drawn = np.random.default_rng(0).choice(losses, count)
    exact = drawn.sum(dtype=np.float64)
    return float(PITFALLS["bfloat16_sums"].add(jnp.asarray(drawn)) / exact - 1)


def _gradient(states: States, weights) -> np.ndarray:
    """All parameters' gradient of the exact reverse KL under these weights, as one vector."""
    loss = subject("full_kl").token_loss()

    @jax.jit
    def run(params, batch, teacher_head, weights):
        def total(params):
            hidden, head, columns, teacher = passes(params, batch, teacher_head, states.spec)
            return tiled_loss(loss, hidden, head, weights, columns, teacher, tile=states.spec.estimator.tile)[0]

        return jax.grad(total)(params)

    found = run(states.params, states.batch, states.teacher[1], weights)
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(found)])
