"""Adds the scores of the teacher and of the reference policy to a batch."""

from __future__ import annotations

import dataclasses

from opdjax.engine.scorer import score
from opdjax.estimators import estimator_of
from opdjax.ops.sharding import num_row_shards, shard_rows
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TILE
from opdjax.rollouts.setup import Setup, Teacher
from opdjax.types import TeacherScores, TrainBatch


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
        tile=TILE,
        parts=parts,
        mesh=setup.mesh,
        top_k=estimator_of(config.estimator).top_k if needs == "top_k" else 0,
    )
