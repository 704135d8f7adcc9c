"""From rollouts to the rows that are trained on, with their rewards and scores, and the metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opdjax.config import Config, TrainConfig
from opdjax.data.chat import stage_ids
from opdjax.data.packing import pack, packing_metrics
from opdjax.data.prompts import PromptSet
from opdjax.engine.decoding import Decoding
from opdjax.engine.evaluate import completions, graded, last_tokens
from opdjax.engine.sampler import extra_uniforms
from opdjax.engine.scorer import score
from opdjax.estimators import estimator_of
from opdjax.estimators.advantage import (
    credit_matrix,
    group_advantage,
    spread_stages,
    stage_advantage,
    stage_balance,
)
from opdjax.ops.sharding import num_row_shards, shard_rows
from opdjax.ops.tile import Head
from opdjax.rollouts.setup import Setup, Teacher
from opdjax.rollouts.source import StepData
from opdjax.types import Metrics, Rollouts, TeacherScores, TrainBatch


def packed(
    batch: TrainBatch, train: TrainConfig, mesh: Mesh, length: int | None = None, **layout: Any
) -> tuple[TrainBatch, Metrics]:
    """Return the rows that are scored and trained on, and how full they are; without a `length`,
    which is `train.pack_length` if not given, these are the given ones. `layout`: see `pack`.
    """
    length = length or train.pack_length
    if length is None:
        return batch, {}
    parts, shards = train.gradient_accumulation_steps, num_row_shards(mesh)
    rows, origins = pack(batch, length, parts=parts, shards=shards, **layout)
    return rows, packing_metrics(origins)


def keep_rollouts(batch: TrainBatch, is_kept: np.ndarray) -> TrainBatch:
    """Empty the rows of rollouts `[B]` that are not kept: they count nowhere, and are not read."""
    kept = lambda x: np.where(is_kept[:, None], x, 0).astype(np.asarray(x).dtype)
    view = batch.teacher_view
    view = view and dataclasses.replace(view, segment_ids=kept(view.segment_ids))
    return dataclasses.replace(
        batch, mask=kept(batch.mask), segment_ids=kept(batch.segment_ids), teacher_view=view
    )


def with_option_columns(
    batch: TrainBatch, rollouts: Rollouts, config: Config, prompts: PromptSet, tokenizer: Any
) -> tuple[TrainBatch, Metrics]:
    """The batch with what the recipe's options read: uniform numbers for extra draws, the advantage
    of a task reward; and its metrics.
    """
    options, metrics = config.estimator.options, {}
    if options.get("extra_draws"):
        uniforms = extra_uniforms(rollouts, config.seed, options["extra_draws"])
        batch = dataclasses.replace(batch, uniforms=uniforms)
    if options.get("task_reward_coef") or config.recipe.reward == "task":
        texts = completions(rollouts, tokenizer)
        reward = right_answers(prompts, rollouts.prompt_id, texts, config.grader)
        reward = reward.astype(np.float32)
        metrics["rollout/task_reward"] = float(reward.mean())
        size, scale = config.sampling.num_generations, options.get("advantage", "mean")
        advantage = group_advantage(reward, np.ones(len(reward), bool), size, scale)
        batch = dataclasses.replace(batch, advantages=jnp.where(batch.mask, advantage[:, None], 0))
    return batch, metrics


def right_answers(
    prompts: PromptSet, prompt_id: np.ndarray, texts: Sequence[str], grader: str
) -> np.ndarray | None:
    """1 for each completion with a right answer, else 0; `[B]`. None if the data lack an answer."""
    answers = [prompts.prompts[index].answer for index in np.asarray(prompt_id)]
    return None if None in answers else graded(texts, answers, grader)


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
    NaN: judging failed, and the rollout is dropped. With stages, a token has the advantage of its
    stage (RubricEM, arXiv 2605.10899, section 3.3).
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


def scored(setup: Setup, batch: TrainBatch, needs: str) -> tuple[TrainBatch, Head | None]:
    """Return the batch on the devices, with scores of the reference policy and of the teacher.

    `needs`: what the recipe reads of the teacher. Scores that the batch already holds are kept. The
    second value is the teacher's head if the recipe reads whole distributions, else None.
    """
    is_missing = is_unscored(batch, needs)
    batch = shard_rows(batch, setup.mesh)
    if setup.reference_policy is not None:
        own_view = dataclasses.replace(batch, teacher_view=None)
        scores = _scores(setup, setup.reference_policy, own_view, "token")
        batch = dataclasses.replace(batch, reference_logprobs=scores.teacher_logprobs)
    if not is_missing:
        return batch, None
    batch = dataclasses.replace(batch, teacher=_scores(setup, setup.teacher, batch, needs))
    return batch, setup.teacher.head if needs == "vocabulary" else None


def is_unscored(batch: TrainBatch, needs: str) -> bool:
    """Whether the batch lacks what the recipe reads of the teacher."""
    scores = batch.teacher or TeacherScores()
    stored = {"token": scores.teacher_logprobs, "top_k": scores.teacher_top_ids}
    return needs != "none" and stored.get(needs) is None


def _scores(setup: Setup, model: Teacher, batch: TrainBatch, needs: str) -> TeacherScores:
    """Score in as many parts as the update has micro-batches; in one if the rows do not divide."""
    config, parts = setup.config, setup.config.train.gradient_accumulation_steps
    if batch.tokens.shape[0] % (parts * num_row_shards(setup.mesh)):
        parts = 1
    return score(
        model.params,
        model.head,
        batch,
        config=model.checkpoint.config,
        needs=needs,
        parts=parts,
        mesh=setup.mesh,
        top_k=estimator_of(config.estimator).top_k if needs == "top_k" else 0,
    )


def rollout_metrics(rollouts: Rollouts, decoding: Decoding, step: int) -> Metrics:
    """Lengths in tokens, how completions ended, and the age of the sampling policy in updates."""
    mask = np.asarray(rollouts.mask)
    if not len(mask):
        return {}
    lengths, staleness = mask.sum(axis=1), step - np.asarray(rollouts.policy_version)
    is_stopped = np.isin(last_tokens(rollouts), decoding.stop_token_ids)
    if decoding.stop_strings is not None:
        is_stopped |= ~np.asarray(rollouts.is_truncated)
    is_stopped &= lengths > 0
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_min": float(lengths.min()),
        "rollout/length_p50": float(np.median(lengths)),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_ratio": float(np.asarray(rollouts.is_truncated).mean()),
        "rollout/eos_rate": float(is_stopped.mean()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }


def student_rows(config: Config, step: int) -> np.ndarray:
    """`[B]`: which completions of a step the student samples, a draw from (seed, step, row)."""
    bits = np.random.Philox(key=config.seed, counter=[0, 0, 1, step])  # not those of the order
    draws = np.random.Generator(bits).random(config.rows_per_step)
    return draws < config.sampling.student_fraction


def token_counts(config: Config, data: StepData, step: int) -> Metrics:
    """The tokens of a step: generated by the student, trained on, and read or written by the
    teacher, prompts included. Those generated or annotated for many steps count for the first one,
    whose `metrics` contain the numbers.
    """
    batch, sampling = data.batch, config.sampling
    mask, is_own = np.asarray(batch.mask), np.array(True)
    if sampling.completions_from != "student":
        is_own = student_rows(config, step)[:, None]
    own = mask & is_own
    live = np.asarray((batch.teacher_view or batch).segment_ids) > 0
    read = live.sum() if is_unscored(batch, estimator_of(config.estimator).teacher) else 0
    written = (live & ~is_own).sum() if sampling.completions_from == "teacher" else 0
    annotated = data.metrics.get("perf/annotated_tokens", 0.0)
    counts = {
        "perf/generated_tokens": data.metrics.get("perf/generated_tokens", float(own.sum())),
        "perf/trained_tokens": float(mask.sum()),
        "perf/teacher_tokens": float(read + written) + annotated,
    }
    if sampling.student_fraction:
        counts["rollout/student_ratio"] = float(is_own.mean())
    return counts
