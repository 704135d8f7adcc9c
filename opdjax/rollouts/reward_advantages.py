"""From what judges said to a batch: advantages of rollouts or of their stages, and a mask over what
nobody could score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.config import Config
from opdjax.config.recipes import RECIPES
from opdjax.data.chat import stage_ids
from opdjax.estimators.advantage import (
    credit_matrix,
    group_advantage,
    spread_stages,
    stage_advantage,
    stage_balance,
)
from opdjax.types import Rollouts, TrainBatch


def least_scored(config: Config) -> int:
    """How many rollouts of a prompt must have a score for any of them to be of use: a group's are
    compared with each other.
    """
    return 1 if reward_of(config) == "none" else 2


def reward_of(config: Config) -> str:
    """What the recipe's reward is made of; none where judges only tell the teacher something."""
    return RECIPES[config.estimator.recipe].reward


def usable(scores: np.ndarray, config: Config) -> np.ndarray:
    """Which rollouts `[B]` have a score (not NaN) in a group with enough of them."""
    size = config.sampling.num_generations
    is_scored = np.isfinite(scores)
    return is_scored & np.repeat(
        is_scored.reshape(-1, size).sum(axis=1) >= least_scored(config), size
    )


def only(batch: TrainBatch, is_kept: np.ndarray) -> TrainBatch:
    """The batch without the other rollouts `[B]`: they count in no numerator and in no denominator."""
    mask = np.asarray(batch.mask) & is_kept[:, None]
    return dataclasses.replace(
        batch, mask=mask, segment_ids=np.where(is_kept[:, None], np.asarray(batch.segment_ids), 0)
    )


def credited(
    batch: TrainBatch,
    rollouts: Rollouts,
    scores: np.ndarray,
    by_stage: np.ndarray,
    config: Config,
    tokenizer: Any,
) -> TrainBatch:
    """The batch with its advantages, from scores `[B]` and scores of stages `[B, K]`, NaN where
    there are none.
    """
    is_scored, size = usable(scores, config), config.sampling.num_generations
    batch, scale = only(batch, is_scored), config.estimator.advantage or "mean"
    if reward_of(config) == "stages":
        advantages = _by_stage(
            rollouts, batch.mask, np.nan_to_num(by_stage), is_scored, scale, config, tokenizer
        )
    else:
        advantages = np.asarray(group_advantage(np.nan_to_num(scores), is_scored, size, scale))[
            :, None
        ]
    return dataclasses.replace(
        batch, advantages=np.where(batch.mask, advantages, 0).astype(np.float32)
    )


def _by_stage(
    rollouts: Rollouts, mask, scores, is_scored, scale: str, config: Config, tokenizer: Any
) -> np.ndarray:
    """`[B, T]`: each token's advantage is that of its stage (RubricEM, arXiv 2605.10899, section
    3.3).
    """
    size, count, estimator = (
        config.sampling.num_generations,
        len(config.rubrics.stage_names),
        config.estimator,
    )
    ids = token_stages(rollouts, tokenizer, config.rubrics.stage_markers)
    has_stage = np.stack([(ids == stage).any(axis=1) for stage in range(count)], axis=1)
    credit = credit_matrix(estimator.stage_credit, count, estimator.stage_credit_matrix or ())
    advantages = spread_stages(
        stage_advantage(scores, has_stage, is_scored, credit, size, scale), ids
    )
    return np.asarray(
        advantages * stage_balance(ids, mask, count) if estimator.stage_token_mean else advantages
    )


def token_stages(rollouts: Rollouts, tokenizer: Any, markers: Sequence[str]) -> np.ndarray:
    """`[B, T]`: the stage of each sampled token, counted from 0; -1 elsewhere."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    found = np.full(tokens.shape, -1, np.int32)
    for row, keep in enumerate(mask):
        found[row, keep] = stage_ids(tokens[row, keep].tolist(), tokenizer, markers)
    return found
