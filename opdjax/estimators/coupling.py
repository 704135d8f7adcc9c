"""Options that couple tokens: one pass over the vocabulary first, then columns that the token loss
reads pointwise.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from opdjax.config.recipes import DEFAULT_CAPS
from opdjax.estimators import advantage, importance
from opdjax.estimators.grpo import CREDIT_OPTIONS
from opdjax.estimators.opd import REWARD_OPTIONS, needed, sampled_reward
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs


def is_coupled(options: dict[str, Any]) -> bool:
    """Whether the options need columns that a pass of its own prepares."""
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
    """What `prepare` reads of each token: student log-prob, rewards, expected rewards."""
    student_logprobs = student.logprob(row.tokens)
    stats = {"student_logprobs": student_logprobs}
    teacher_logprobs = row.teacher_logprobs if teacher is None else teacher.logprob(row.tokens)
    if teacher_logprobs is not None:
        transform = {name: options.get(name) for name in REWARD_OPTIONS}
        stats |= {
            "gap": sampled_reward(teacher_logprobs, student_logprobs),
            "rewards": sampled_reward(teacher_logprobs, student_logprobs, **transform),
        }
        if options.get("return_to_go") == "expected":
            teacher = needed(teacher, "teacher", "return_to_go expected")
            stats["expected"] = student.expect(
                sampled_reward(teacher.logprobs, student.logprobs, **transform)
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
    """`columns` with those that the options need.

    `totals`: (sum of rewards, tokens) of the whole batch where these rows are a part of it.
    """
    found: dict[str, Any] = {}
    if options.get("discount"):
        later = stats["expected" if options.get("return_to_go") == "expected" else "rewards"]
        found["future_rewards"] = advantage.future_reward(
            later, mask, segment_ids, options["discount"]
        )
    if needs_totals(options):
        found["mean_rewards"] = advantage.mean_of_other_sequences(
            stats["rewards"], mask, segment_ids, totals
        )
    weights = []
    if options.get("prefix_weight"):
        weights.append(
            advantage.prefix_weight(stats["gap"], mask, segment_ids, options["prefix_weight"])
        )
    if options.get("importance") in importance.SEQUENCE_CORRECTIONS:
        behavior_logprobs = needed(
            columns.behavior_logprobs, "behavior_logprobs", f"importance {options['importance']}"
        )
        log_ratio = stats["student_logprobs"] - behavior_logprobs
        weights.append(
            sequence_importance(log_ratio, mask, segment_ids, options, is_policy_gradient)
        )
    if weights:
        found["loss_weights"] = math.prod(weights)
    return dataclasses.replace(columns, **found)


def sequence_importance(
    log_ratio, mask, segment_ids, options, is_policy_gradient
) -> Float[Array, "B T"]:
    """The weight of each token under a correction of whole sequences.

    `log_ratio` = log student(y) - log behavior(y), nats.
    """
    cap = options.get("importance_cap") or DEFAULT_CAPS[options["importance"]]
    if options["importance"] == "sequence_mask":
        return importance.sequence_mask(log_ratio, mask, segment_ids, cap)
    # An exact divergence samples no action: only the ratio of reaching the context is stale.
    return importance.prefix_truncate(
        log_ratio, mask, segment_ids, cap, is_inclusive=is_policy_gradient
    )


def pointwise(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the token loss itself reads: those turned into columns are left out."""
    outside = {"return_to_go", "prefix_weight", *CREDIT_OPTIONS}
    if options.get("importance", "none") in ("none", *importance.SEQUENCE_CORRECTIONS):
        outside |= {"importance", "importance_cap"}
    return {name: value for name, value in options.items() if name not in outside}
