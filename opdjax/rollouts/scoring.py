"""Adds the scores of the teacher and of the reference policy to a batch."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from opdjax.config import Config
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
    config, teacher = setup.config, setup.teacher
    is_missing = is_unscored(batch, needs)
    batch = with_reference_logprobs(
        shard_rows(batch, setup.mesh), setup.reference_policy, config, setup.mesh
    )
    if not is_missing:
        return batch, None
    top_k = estimator_of(config.estimator).top_k if needs == "top_k" else 0
    scores = _scores(teacher, batch, needs, config, setup.mesh, top_k)
    return dataclasses.replace(batch, teacher=scores), (
        teacher.head if needs == "vocabulary" else None
    )


def is_unscored(batch: TrainBatch, needs: str) -> bool:
    """Whether the batch lacks what the recipe reads of the teacher."""
    scores = batch.teacher or TeacherScores()
    stored = {"token": scores.teacher_logprobs, "top_k": scores.teacher_top_ids}
    return needs != "none" and stored.get(needs) is None


def with_reference_logprobs(
    batch: TrainBatch, reference_policy: Teacher | None, config: Config, mesh: Mesh
) -> TrainBatch:
    """Return the batch (on the devices) with its tokens' log-probs under the reference policy;
    unchanged without one.
    """
    if reference_policy is None:
        return batch
    own_view = dataclasses.replace(batch, teacher_view=None)
    scores = _scores(reference_policy, own_view, "token", config, mesh)
    return dataclasses.replace(batch, reference_logprobs=scores.teacher_logprobs)


def _scores(
    model: Teacher, batch: TrainBatch, needs: str, config: Config, mesh: Mesh, top_k: int = 0
) -> TeacherScores:
    """Score in as many parts as the update has micro-batches; in one if the rows do not divide."""
    parts = config.train.gradient_accumulation_steps
    if batch.tokens.shape[0] % (parts * num_row_shards(mesh)):
        parts = 1
    return score(
        model.params,
        model.head,
        batch,
        config=model.checkpoint.config,
        needs=needs,
        tile=TILE,
        parts=parts,
        mesh=mesh,
        top_k=top_k,
    )
