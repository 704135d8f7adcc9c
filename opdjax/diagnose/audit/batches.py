"""The cost of each subject on a real batch, and what a batch's pitfalls do to its gradient."""

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

from opdjax.config.recipes import EXACT
from opdjax.diagnose.audit.pair import States
from opdjax.diagnose.audit.subjects import Subject, subject
from opdjax.engine.scorer import token_logprobs, top_logprobs
from opdjax.engine.update import VocabularyInputs, vocabulary_inputs, vocabulary_loss
from opdjax.estimators import bind
from opdjax.estimators.losses import aggregation_weights, count_denominators
from opdjax.estimators.pitfalls import PITFALLS
from opdjax.ops.vocab import tiled_loss

_REPEATS = 5
_SUM_LENGTHS = (1024, 8192, 32768)  # tokens whose losses are added in bfloat16
_SUM_DRAWS = 20


def audit_costs(states: States, subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return seconds and bytes a token of each recipe's pass over the vocabulary.

    The pass goes from hidden states to the loss and its gradients for hidden states and head; the
    layers of both models are left out, because all recipes share them. It includes the teacher's
    log-probs that a recipe reads, even where training would store and reuse them. Measured on the
    rows of one micro-batch, as medians of alternating runs. `bytes_per_token`: the temporary memory
    of the compiled program over the tokens; None if XLA does not report it.
    """
    num_tokens, runs, rows = int(states.mask[: states.rows_at_once].sum()), {}, {}
    for each in subjects:
        if each.recipe is None:
            continue
        run, operands = _compile(states, each)
        memory = run.memory_analysis()
        num_bytes = None if memory is None else memory.temp_size_in_bytes / num_tokens
        rows[each.name] = {"bytes_per_token": num_bytes}
        runs[each.name] = partial(run, *operands)
        jax.block_until_ready(runs[each.name]())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["seconds_per_token"] = statistics.median(seconds[name]) / num_tokens
    return rows


def _compile(states: States, each: Subject):
    tile = states.spec.estimator.tile
    estimator = bind(each.recipe, each.options, tile=tile)
    spec = dataclasses.replace(states.spec, estimator=estimator)
    extra = each.num_draws - 1
    uniform = states.inputs.row.uniforms[:, :, :extra] if extra else None
    columns = dataclasses.replace(states.inputs.row, uniforms=uniform)
    batch = dataclasses.replace(states.batch, teacher=None, uniforms=None)
    hidden, columns, teacher_hidden, batch = jax.tree.map(
        lambda x: x[: states.rows_at_once],
        (states.inputs.hidden, columns, states.inputs.teacher[0], batch),
    )

    def gradients(hidden, head, columns, teacher_hidden, teacher_head, batch):
        weights = batch.mask / jnp.sum(batch.mask)
        teacher = (teacher_hidden, teacher_head) if estimator.teacher == "vocabulary" else None
        if estimator.teacher == "token":
            logprob = token_logprobs(teacher_hidden, teacher_head, batch, tile=tile)
            columns = dataclasses.replace(columns, teacher_logprobs=logprob)
        if estimator.teacher == "top_k":
            top = top_logprobs(
                teacher_hidden, teacher_head, batch, top_k=estimator.top_k, tile=tile
            )
            columns = dataclasses.replace(
                columns,
                teacher_top_ids=top.teacher_top_ids,
                teacher_top_logprobs=top.teacher_top_logprobs,
            )

        def loss(hidden, head):
            inputs = VocabularyInputs(hidden, head, columns, teacher)
            token_loss = estimator.token_loss
            return vocabulary_loss(inputs, batch, weights, spec, token_loss=token_loss)[0]

        return jax.grad(loss, argnums=(0, 1))(hidden, head)

    head, teacher_head = states.inputs.head, states.inputs.teacher[1]
    operands = (hidden, head, columns, teacher_hidden, teacher_head, batch)
    return jax.jit(gradients).lower(*operands).compile(), operands


def audit_batch_pitfalls(states: States) -> dict[str, Any]:
    """Return what the pitfalls of a batch do.

    Relative error and cosine of the exact reverse KL's gradient under each pitfall's weights, and
    the relative error of sums in bfloat16.
    """
    batch, length = states.batch, states.spec.max_completion_length
    denominators = count_denominators(batch.mask, batch.segment_ids, length)
    right = aggregation_weights(batch.mask, batch.segment_ids, "token_mean", denominators)
    mask, parts = jnp.asarray(batch.mask), batch.mask.shape[0]
    wrong = {
        "mean_of_means": PITFALLS["mean_of_means"].weights(mask, parts=parts),
        "shifted_mask": PITFALLS["shifted_mask"].weights(mask),
    }
    gradient = _gradient_of(states)
    exact, rows = gradient(right), {}
    for name, weights in wrong.items():
        off, along, size, length = map(float, _compare(gradient(weights), exact))
        bias, cosine = float(np.sqrt(off / length)), along / float(np.sqrt(size * length))
        rows[name] = {"bias": bias, "cosine": cosine}
    losses = states.kl[states.mask]
    errors = {str(n): _sum_error(losses, n) for n in _SUM_LENGTHS}
    return rows | {"bfloat16_sums": {"error_by_tokens": errors}}


@jax.jit
def _compare(found, exact):
    """Return (|found - exact|^2, their product, |found|^2, |exact|^2) over all parameters."""
    leaves = lambda left, right: zip(*map(jax.tree.leaves, (left, right)))
    dot = lambda left, right: sum(jnp.vdot(x, y) for x, y in leaves(left, right))
    off = jax.tree.map(jnp.subtract, found, exact)
    return dot(off, off), dot(found, exact), dot(found, found), dot(exact, exact)


def _gradient_of(states: States):
    """Return `gradient(weights)` of the exact reverse KL, computed a micro-batch at a time."""
    loss, tile = subject(EXACT).token_loss(), states.spec.estimator.tile
    split = lambda x: x.reshape(-1, states.rows_at_once, *x.shape[1:])

    @jax.jit
    def run(params, batch, teacher_head, weights):
        def add(total, part):
            batch, weights = part

            def part_loss(params):
                inputs = vocabulary_inputs(params, batch, teacher_head, states.spec)
                operands = inputs.hidden, inputs.head, weights, inputs.row, inputs.teacher
                return tiled_loss(loss, *operands, tile=tile)[0]

            return jax.tree.map(jnp.add, total, jax.grad(part_loss)(params)), None

        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        zero = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zero, jax.tree.map(split, (batch, weights)))[0]

    return lambda weights: run(states.params, states.batch, states.inputs.teacher[1], weights)


def _sum_error(losses: np.ndarray, count: int) -> float:
    """Return the mean relative error of the sum of `count` random ones of these losses."""
    rng, add = np.random.default_rng(0), jax.jit(PITFALLS["bfloat16_sums"].add)
    draws = [rng.choice(losses, count) for _ in range(_SUM_DRAWS)]
    return statistics.fmean(
        float(add(jnp.asarray(drawn))) / float(drawn.sum(dtype=np.float64)) - 1 for drawn in draws
    )
