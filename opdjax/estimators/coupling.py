"""Options that couple tokens: one pass over the vocabulary first, then columns that the token loss
reads pointwise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from opdjax.estimators import advantage, importance
from opdjax.estimators.grpo import CREDIT_OPTIONS
from opdjax.estimators.opd import REWARD_OPTIONS, needed, sampled_reward
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs


def is_coupled(options: dict[str, Any]) -> bool:
    """Whether the options need columns prepared by a pass of their own."""
    corrected = options.get("importance") in importance.SEQUENCE_CORRECTIONS
    return (
        corrected
        or bool(options.get("discount") or options.get("prefix_weight"))
        or needs_totals(options)
    )


def needs_totals(options: dict[str, Any]) -> bool:
    """Whether a row's columns depend on the other rows of the batch."""
    return options.get("baseline") == "batch_mean"


def token_stats(
    student: VocabTile, teacher: VocabTile | None, row: TokenInputs, options: dict[str, Any]
) -> dict[str, Float[Array, " n"]]:
    """What `prepare` wants to know of each token: log-prob of the student, rewards, and what could
    be expected there.
    """
    student_logprob = student.logprob(row.token)
    stats = {"student_logprob": student_logprob}
    teacher_logprob = row.teacher_logprob if teacher is None else teacher.logprob(row.token)
    if teacher_logprob is not None:
        how = {name: options.get(name) for name in REWARD_OPTIONS}
        stats |= {
            "gap": sampled_reward(teacher_logprob, student_logprob),
            "reward": sampled_reward(teacher_logprob, student_logprob, **how),
        }
        if options.get("return_to_go") == "expected":
            teacher = needed(teacher, "teacher", "return_to_go expected")
            stats["expected"] = student.expect(
                sampled_reward(teacher.logprobs, student.logprobs, **how)
            )
    return stats


def prepare(
    columns: TokenInputs,
    stats: dict[str, Float[Array, "B T"]],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    options: dict[str, Any],
    *,
    is_policy_gradient: bool,
    totals: tuple[Float[Array, ""], Float[Array, ""]] | None = None,
) -> TokenInputs:
    """`columns` with what the options ask for; `totals` of the whole batch where these rows are a
    part of it.
    """
    found: dict[str, Any] = {}
    if options.get("discount"):
        later = stats["expected" if options.get("return_to_go") == "expected" else "reward"]
        found["future_reward"] = advantage.future_reward(
            later, mask, segment_ids, options["discount"]
        )
    if needs_totals(options):
        found["mean_reward"] = advantage.mean_of_other_sequences(
            stats["reward"], mask, segment_ids, totals
        )
    weights = []
    if options.get("prefix_weight"):
        weights.append(
            advantage.prefix_weight(stats["gap"], mask, segment_ids, options["prefix_weight"])
        )
    if options.get("importance") in importance.SEQUENCE_CORRECTIONS:
        behavior_logprob = needed(
            columns.behavior_logprob, "behavior_logprob", f"importance {options['importance']}"
        )
        log_ratio = stats["student_logprob"] - behavior_logprob
        weights.append(
            sequence_importance(log_ratio, mask, segment_ids, options, is_policy_gradient)
        )
    if weights:
        found["loss_weight"] = math.prod(weights)
    return dataclasses.replace(columns, **found)


def sequence_importance(
    log_ratio, mask, segment_ids, options, is_policy_gradient
) -> Float[Array, "B T"]:
    """The weight of each token under a correction of whole sequences; `log_ratio` = log student(y)
    - log behavior(y).
    """
    cap = options.get("importance_cap") or importance.DEFAULT_CAPS[options["importance"]]
    if options["importance"] == "sequence_mask":
        return importance.sequence_mask(log_ratio, mask, segment_ids, cap)
    # An exact divergence draws no action of its own: only how the context was reached is stale.
    return importance.prefix_truncate(
        log_ratio, mask, segment_ids, cap, is_inclusive=is_policy_gradient
    )


def pointwise(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the token loss itself reads: those turned into columns are left out."""
    outside = {"return_to_go", "prefix_weight", *CREDIT_OPTIONS}
    if options.get("importance", "none") in ("none", *importance.SEQUENCE_CORRECTIONS):
        outside |= {"importance", "importance_cap"}
    return {name: value for name, value in options.items() if name not in outside}
