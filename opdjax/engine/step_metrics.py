"""The metrics of a step, from per-token outputs of the training pass over the vocabulary.
Diagnostics, which need whole distributions or a sort of all tokens, are computed every
`log.diagnostics_every` steps and are NaN in between. Nothing here changes an update.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opdjax.estimators import Estimator, diagnostics, importance
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
_STATS = (
    "entropy/student",
    "entropy/teacher",
    "overlap/ratio",
    "overlap/student_mass",
    "overlap/teacher_mass",
)

Outputs = dict[str, Float[Array, "B T"]]


def observed(token_loss: Callable) -> Callable:
    """The token loss with the outputs of `vocabulary_stats`, which are zeros in a step without
    diagnostics.
    """

    def loss_of(student, teacher, row):
        loss, outputs = token_loss(student, teacher, row)
        if row.is_observed is None:
            return loss, outputs
        # Detached outside the cond: differentiating through it would change the update's program.
        tiles = jax.lax.stop_gradient((student, teacher))
        stats = lambda: diagnostics.vocabulary_stats(*tiles, row.tokens)
        # Computed from the loss, so that on a mesh the zeros vary over the same devices as the
        # statistics.
        zero = lambda x: jnp.where(True, 0, loss).astype(x.dtype)
        zeros = lambda: jax.tree.map(zero, jax.eval_shape(stats))
        return loss, outputs | jax.lax.cond(jnp.any(row.is_observed), stats, zeros)

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
    if "rewards" in outputs:
        metrics |= by_position("kl", masked_mean, _kl(outputs), batch, max_length)
    if "advantages" in outputs:
        x = outputs["advantages"]
        metrics |= by_position("advantage/std", masked_std, x, batch, max_length)
    if is_observed is None:
        return metrics

    found = lambda: _diagnostics(outputs, batch, max_length)
    nan = lambda x: jnp.full(x.shape, jnp.nan, x.dtype)
    return metrics | jax.lax.cond(
        is_observed, found, lambda: jax.tree.map(nan, jax.eval_shape(found))
    )


def _kl(outputs: Outputs) -> Float[Array, "B T"]:
    """KL(student || teacher) of each token: exact, or its one-sample estimate k1."""
    return outputs["kl"] if "kl" in outputs else -outputs["rewards"]


def token_metrics(outputs: Outputs, batch: TrainBatch) -> dict[str, Array]:
    """Means over the step's tokens. `kl/student_teacher` is exact if the teacher's distribution is
    available, else it is `kl/k1`.

    k1, k2 and k3 estimate KL(student || teacher) from the sampled tokens. `kl/k3` is not clipped:
    one token that is e^20 times as likely under the teacher as under the student adds 5e8 divided
    by the number of tokens; it may be infinite. `staleness/kl` is KL(student || behaviour) per
    token, with the student before this step's update. `kl/reference` is k3 of KL(student ||
    reference), the student's start, for every form of the penalty.
    """
    mask, rewards, metrics = batch.mask, outputs.get("rewards"), {}
    if rewards is not None:
        metrics["kl/student_teacher"] = masked_mean(_kl(outputs), mask)
        # reward = log teacher - log student
        for name, estimate in (("k1", importance.k1), ("k2", importance.k2), ("k3", importance.k3)):
            metrics[f"kl/{name}"] = masked_mean(estimate(-rewards, jnp.zeros_like(rewards)), mask)
        metrics["reward/mean"] = masked_mean(rewards, mask)
    if (behavior := batch.behavior_logprobs) is not None:
        student = outputs["student_logprobs"]
        log_ratio = student - behavior  # on-policy, the rounding differences of sampler and update
        metrics["rollout/logprob_gap"] = masked_mean(jnp.abs(log_ratio), mask)
        kl = importance.kl_to_behavior(student, behavior)
        metrics["staleness/kl"] = masked_mean(kl, mask)
        size = diagnostics.sequence_sample_size(log_ratio, mask, batch.segment_ids)
        metrics["staleness/effective_sample_size"] = size
    if batch.reference_logprobs is not None:
        kl = importance.k3(outputs["student_logprobs"], batch.reference_logprobs)
        metrics["kl/reference"] = masked_mean(kl, mask)
    if "advantages" in outputs:
        metrics["advantage/mean"] = masked_mean(outputs["advantages"], mask)
        metrics["advantage/std"] = masked_std(outputs["advantages"], mask)
    return metrics


def _importance(outputs: Outputs, batch: TrainBatch, estimator: Estimator) -> dict[str, Array]:
    """With an importance correction: the tokens' ratios, clipped tokens, and the sample size."""
    options = estimator.ratio_options
    if options.get("importance", "none") == "none" or batch.behavior_logprobs is None:
        return {}
    mask = batch.mask
    log_ratio = outputs["student_logprobs"] - batch.behavior_logprobs
    weight, is_cut = diagnostics.applied_importance(
        log_ratio,
        outputs.get("advantages"),
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


def _diagnostics(outputs: Outputs, batch: TrainBatch, max_length: int) -> dict[str, Array]:
    """`advantage/squared_score` is E[A^2 w] without importance weights, w the squared score of the
    sampled token in logit space; `kl/top5pct_share` the share of the 5 % of tokens with the largest
    KL (or |k1|) in the sum.
    """
    mask, metrics = batch.mask, {}
    if "rewards" in outputs:
        quantiles = masked_quantiles(outputs["rewards"], mask, tuple(_QUANTILES.values()))
        metrics |= dict(zip(_QUANTILES, quantiles))
        share = diagnostics.largest_share(jnp.abs(_kl(outputs)), mask, _TOP_SHARE)
        metrics["kl/top5pct_share"] = share
    if "advantages" in outputs:
        noise = jnp.square(outputs["advantages"]) * outputs["squared_score"]
        metrics["advantage/squared_score"] = masked_mean(noise, mask)
    for name in (name for name in _STATS if name in outputs):
        metrics[name] = masked_mean(outputs[name], mask)
        metrics |= by_position(name, masked_mean, outputs[name], batch, max_length)
    return metrics


def by_position(
    name: str, reduce: Callable, x: Float[Array, "B T"], batch: TrainBatch, max_length: int
) -> dict[str, Array]:
    """`NAME/position/AA-BB`: `x` reduced over completion tokens AA to BB, from 0; NaN if none."""
    rank = rank_in_sequence(batch.mask, batch.segment_ids)
    width, digits = -(-max_length // _POSITION_BUCKETS), len(str(max_length - 1))
    starts = range(0, max_length, width)

    def inside(start):
        among = batch.mask & (rank >= start) & (rank < start + width)
        return jnp.where(jnp.any(among), reduce(x, among), jnp.nan)

    last = lambda start: min(start + width, max_length) - 1
    names = [f"{name}/position/{at:0{digits}}-{last(at):0{digits}}" for at in starts]
    return dict(zip(names, jax.vmap(inside)(jnp.arange(0, max_length, width))))
