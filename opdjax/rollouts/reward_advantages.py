"""From judges' scores to advantages of rollouts or of their stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.config import Config
from opdjax.data.chat import stage_ids
from opdjax.estimators.advantage import (
    credit_matrix,
    group_advantage,
    spread_stages,
    stage_advantage,
    stage_balance,
)
from opdjax.rollouts.rows import keep_rollouts
from opdjax.types import Rollouts, TrainBatch


def min_scored(config: Config) -> int:
    """Rollouts of a prompt that must have a score; two, if the scores of a group are compared."""
    return 1 if config.recipe.reward == "none" else 2


def has_usable_score(scores: np.ndarray, config: Config) -> np.ndarray:
    """Which rollouts `[B]` have a score (not NaN) in a group with enough scores."""
    size = config.sampling.num_generations
    is_scored = np.isfinite(scores)
    is_enough = is_scored.reshape(-1, size).sum(axis=1) >= min_scored(config)
    return is_scored & np.repeat(is_enough, size)


def with_advantages(
    batch: TrainBatch, rollouts: Rollouts, scores: np.ndarray, config: Config, tokenizer: Any
) -> TrainBatch:
    """The batch with its advantages, from scores `[B, 1 + K]` of rollouts and of their K stages.
    NaN: judging failed, and the rollout is dropped.

    With stages, each token's advantage is that of its stage (RubricEM, arXiv 2605.10899, section
    3.3).
    """
    is_scored, size = has_usable_score(scores[:, 0], config), config.sampling.num_generations
    scores, estimator = np.nan_to_num(scores), config.estimator
    batch, scale = keep_rollouts(batch, is_scored), estimator.advantage or "mean"
    if config.recipe.has_stages:
        count = len(config.rubrics.stage_names)
        ids = token_stages(rollouts, tokenizer, config.rubrics.stage_markers)
        has_stage = np.stack([(ids == stage).any(axis=1) for stage in range(count)], axis=1)
        credit = credit_matrix(estimator.stage_credit, count)
        advantages = stage_advantage(scores[:, 1:], has_stage, is_scored, credit, size, scale)
        advantages = spread_stages(advantages, ids)
        if estimator.aggregation == "stage_token_mean":
            advantages = advantages * stage_balance(ids, batch.mask, count)
    else:
        advantages = np.asarray(group_advantage(scores[:, 0], is_scored, size, scale))[:, None]
    advantages = np.where(batch.mask, np.asarray(advantages), 0).astype(np.float32)
    return dataclasses.replace(batch, advantages=advantages)


def token_stages(rollouts: Rollouts, tokenizer: Any, markers: Sequence[str]) -> np.ndarray:
    """`[B, T]`: the stage of each sampled token, from 0; -1 elsewhere."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    found = np.full(tokens.shape, -1, np.int32)
    for row, keep in enumerate(mask):
        found[row, keep] = stage_ids(tokens[row, keep].tolist(), tokenizer, markers)
    return found
