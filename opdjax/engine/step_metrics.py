"""The numbers of a step, from per-token outputs of the same pass over the vocabulary that trains.

What takes only the recipe's own outputs is told every step. What takes whole distributions
(entropies, the overlap of student and teacher) or a sort of all tokens is told every
`log.diagnostics_every` steps and NaN between them. Nothing here changes an update.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opdjax.estimators import Estimator, diagnostics, importance
from opdjax.estimators.divergence import reverse_kl
from opdjax.ops.masked import (
    masked_mean,
    masked_quantiles,
    masked_std,
    rank_in_sequence,
    zero_where_masked,
)
from opdjax.types import TrainBatch

_POSITION_BUCKETS = 8
_QUANTILES = {"reward/p05": 0.05, "reward/p50": 0.5, "reward/p95": 0.95}
_TOP_SHARE = 0.05

Outputs = dict[str, Float[Array, "B T"]]


def observed(token_loss: Callable) -> Callable:
    """The token loss with more outputs: `kl`, exact wherever the teacher's tile is there, and in an
    observed step the diagnostics.
    """

    def loss_of(student, teacher, row):
        loss, outputs = token_loss(student, teacher, row)
        tiles = jax.lax.stop_gradient((student, teacher))
        if teacher is not None and "kl" not in outputs:
            outputs = outputs | {"kl": reverse_kl(*tiles)}
        if row.is_observed is None:
            return loss, outputs
        stats = lambda: diagnostics.vocabulary_stats(*tiles, row.token)
        # Made of the loss, so that on a mesh they differ between devices where the statistics do.
        nothing = lambda: jax.tree.map(
            lambda x: jnp.where(True, 0, loss).astype(x.dtype), jax.eval_shape(stats)
        )
        return loss, outputs | jax.lax.cond(jnp.any(row.is_observed), stats, nothing)

    return loss_of


def step_metrics(
    outputs: Outputs,
    batch: TrainBatch,
    is_observed: Bool[Array, ""] | None,
    max_length: int,
    estimator: Estimator,
) -> dict[str, Array]:
    """All scalars of a step that are computed from its tokens."""
    metrics = token_metrics(outputs, batch) | _importance(outputs, batch, estimator)
    if "reward" in outputs:
        metrics |= by_position("kl", masked_mean, _kl(outputs), batch, max_length)
    if "advantage" in outputs:
        metrics |= by_position("advantage/std", masked_std, outputs["advantage"], batch, max_length)
    if is_observed is None:
        return metrics

    def found():
        return _observed_metrics(outputs, batch, max_length)

    def unknown():
        return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(found))

    return metrics | jax.lax.cond(is_observed, found, unknown)


def _kl(outputs: Outputs) -> Float[Array, "B T"]:
    return outputs["kl"] if "kl" in outputs else -outputs["reward"]


def token_metrics(outputs: Outputs, batch: TrainBatch) -> dict[str, Array]:
    """Means over the step's tokens. `kl/student_teacher` is exact where the teacher's whole
    distribution is read, else `kl/k1`.

    k1, k2 and k3 are estimates of KL(student || teacher) from the sampled tokens. `kl/k3` is not
    clipped: one token that the teacher finds e^20 times as likely as the student makes it 5e8 over
    its share of the tokens; it may be infinite. `staleness/kl` is KL(student || behaviour) of a
    token, the student as it is before this step's update; `kl/reference` k3 of KL(student ||
    reference), the student's start, whatever form its penalty has.
    """
    mask, reward, metrics = batch.mask, outputs.get("reward"), {}
    if reward is not None:
        metrics["kl/student_teacher"] = masked_mean(_kl(outputs), mask)
        # reward = log teacher - log student
        for name, estimate in (("k1", importance.k1), ("k2", importance.k2), ("k3", importance.k3)):
            metrics[f"kl/{name}"] = masked_mean(estimate(-reward, jnp.zeros_like(reward)), mask)
        metrics["reward/mean"] = masked_mean(reward, mask)
    if batch.behavior_logprobs is not None:
        metrics |= _staleness(outputs["student_logprob"], batch)
    if batch.reference_logprobs is not None:
        metrics["kl/reference"] = masked_mean(
            importance.k3(outputs["student_logprob"], batch.reference_logprobs), mask
        )
    if "advantage" in outputs:
        metrics["advantage/mean"] = masked_mean(outputs["advantage"], mask)
        metrics["advantage/std"] = masked_std(outputs["advantage"], mask)
    return metrics


def _staleness(student_logprob: Float[Array, "B T"], batch: TrainBatch) -> dict[str, Array]:
    """How far the student has moved from the policy that drew the tokens; on-policy, how far
    sampler and update differ in rounding.
    """
    log_ratio, mask = student_logprob - batch.behavior_logprobs, batch.mask
    return {
        "rollout/logprob_gap": masked_mean(jnp.abs(log_ratio), mask),
        "staleness/kl": masked_mean(
            importance.kl_to_behavior(student_logprob, batch.behavior_logprobs), mask
        ),
        "staleness/effective_sample_size": diagnostics.sequence_sample_size(
            log_ratio, mask, batch.segment_ids
        ),
    }


def _importance(outputs: Outputs, batch: TrainBatch, estimator: Estimator) -> dict[str, Array]:
    """Under an importance correction: each token's own ratio to the behaviour policy, how many were
    cut, what their weights are worth.
    """
    options = estimator.ratio_options
    if options.get("importance", "none") == "none" or batch.behavior_logprobs is None:
        return {}
    mask = batch.mask
    log_ratio = outputs["student_logprob"] - batch.behavior_logprobs
    weight, is_cut = diagnostics.applied_importance(
        log_ratio,
        outputs.get("advantage"),
        mask,
        batch.segment_ids,
        options,
        is_policy_gradient=estimator.recipe.is_policy_gradient,
    )
    ratio = jnp.exp(zero_where_masked(log_ratio, mask))
    return {
        "importance/ratio_mean": masked_mean(ratio, mask),
        "importance/ratio_max": jnp.max(zero_where_masked(ratio, mask)),
        "importance/clip_fraction": masked_mean(is_cut.astype(ratio.dtype), mask),
        "importance/effective_sample_size": diagnostics.effective_sample_size(weight, mask),
    }


def _observed_metrics(outputs: Outputs, batch: TrainBatch, max_length: int) -> dict[str, Array]:
    """`advantage/squared_score` is E[A^2 w], w the squared score in logit space, of the sampled
    token and before importance weights.

    `kl/top5pct_share`: what the 5 % of tokens with the largest KL make up of its sum, exact KL
    where it is known, else |k1|.
    """
    mask, metrics = batch.mask, {}
    if "reward" in outputs:
        metrics |= dict(
            zip(_QUANTILES, masked_quantiles(outputs["reward"], mask, tuple(_QUANTILES.values())))
        )
        metrics["kl/top5pct_share"] = diagnostics.largest_share(
            jnp.abs(_kl(outputs)), mask, _TOP_SHARE
        )
    if "advantage" in outputs:
        metrics["advantage/squared_score"] = masked_mean(
            jnp.square(outputs["advantage"]) * outputs["squared_score"], mask
        )
    names = (
        "entropy/student",
        "entropy/teacher",
        "overlap/ratio",
        "overlap/student_mass",
        "overlap/teacher_mass",
    )
    for name in (name for name in names if name in outputs):
        metrics[name] = masked_mean(outputs[name], mask)
        metrics |= by_position(name, masked_mean, outputs[name], batch, max_length)
    return metrics


def by_position(
    name: str, reduce: Callable, x: Float[Array, "B T"], batch: TrainBatch, max_length: int
) -> dict[str, Array]:
    """`NAME/position/AA-BB`: `x` reduced over completion tokens AA to BB, counted from 0; NaN where
    there are none.
    """
    rank = rank_in_sequence(batch.mask, batch.segment_ids)
    width, digits = -(-max_length // _POSITION_BUCKETS), len(str(max_length - 1))
    starts = range(0, max_length, width)

    def inside(start):
        among = batch.mask & (rank >= start) & (rank < start + width)
        return jnp.where(jnp.any(among), reduce(x, among), jnp.nan)

    ends = (min(start + width, max_length) - 1 for start in starts)
    names = [
        f"{name}/position/{start:0{digits}}-{end:0{digits}}" for start, end in zip(starts, ends)
    ]
    return dict(zip(names, jax.vmap(inside)(jnp.arange(0, max_length, width))))
