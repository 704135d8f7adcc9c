"""From stored samples to rows that are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from opdjax.data.packing import answer_rows, to_train_batch
from opdjax.data.prompts import collate
from opdjax.rollouts.near_policy.shards import Shard
from opdjax.rollouts.setup import Setup
from opdjax.types import Metrics, Rollouts, TeacherScores, TrainBatch


def as_batch(
    setup: Setup,
    samples: Sequence[Shard],
    annotations: Sequence[Shard] = (),
    chosen: np.ndarray | None = None,
) -> tuple[Rollouts, TrainBatch]:
    """Stored samples as rollouts and as rows, one a rollout, with what the teacher said of them;
    `chosen` are places among all of them.

    Both are wide enough for any samples of the run, so that one program reads them all.
    """
    places = _places(samples) if chosen is None else [_places(samples)[place] for place in chosen]
    of = lambda shards, name: [shards[shard].columns[name][row] for shard, row in places]
    prompts = collate(setup.prompts, np.array(of(samples, "prompt_id"), np.int32))
    length = setup.config.sampling.max_completion_length
    given = answer_rows(prompts, of(samples, "tokens"), length, 0)
    spread = partial(_spread, mask=given.mask)
    rollouts = dataclasses.replace(
        given,
        behavior_logprobs=spread(of(samples, "behavior_logprobs")),
        unfiltered_logprobs=spread(of(samples, "unfiltered_logprobs")),
        sample_id=np.array(of(samples, "sample_id"), np.int32),
        policy_version=np.array(of(samples, "policy_version"), np.int32),
        is_truncated=np.array(of(samples, "is_truncated")),
    )
    batch = to_train_batch(rollouts, prompts)
    if not annotations:
        return rollouts, batch
    top_k = annotations[0].facts["top_k"]
    top = lambda name: (
        spread([row.reshape(-1, top_k) for row in of(annotations, name)]) if top_k else None
    )
    scores = TeacherScores(
        spread(of(annotations, "teacher_logprobs")), top("teacher_ids"), top("teacher_top_logprobs")
    )
    return rollouts, dataclasses.replace(batch, teacher=scores)


def _places(shards: Sequence[Shard]) -> list[tuple[int, int]]:
    return [(number, row) for number, shard in enumerate(shards) for row in range(len(shard))]


def _spread(rows: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Values by token of each row `[n, ...]` in the columns of its mask; 0 elsewhere."""
    joined = np.concatenate(rows)
    found = np.zeros((*mask.shape, *joined.shape[1:]), joined.dtype)
    found[mask] = joined
    return found


def without(batch: TrainBatch, is_kept: np.ndarray) -> TrainBatch:
    """The batch with nothing in the rows of the rollouts that are not kept."""
    of_kept = lambda x: np.where(is_kept[:, None], x, 0).astype(np.asarray(x).dtype)
    view = batch.teacher_view
    view = view and dataclasses.replace(view, segment_ids=of_kept(view.segment_ids))
    return dataclasses.replace(
        batch, mask=of_kept(batch.mask), segment_ids=of_kept(batch.segment_ids), teacher_view=view
    )


def drawn_tokens(samples: Sequence[Shard], annotations: Sequence[Shard]) -> Metrics:
    """What was drawn, and read by the teacher once and for all, told of the step that is the first
    to be trained on these samples.
    """
    generated = sum(len(row) for shard in samples for row in shard.columns["tokens"])
    read = sum(shard.facts["num_tokens"] for shard in annotations)
    return {"perf/generated_tokens": float(generated), "perf/annotated_tokens": float(read)}


def filter_metrics(document: dict[str, Any]) -> Metrics:
    """Shares of the samples that the filter kept, and that are outside its bounds on either side."""
    names = {
        "keep_rate": "num_kept",
        "degenerate": "num_degenerate",
        "disconnected": "num_disconnected",
    }
    return {
        f"filter/{name}": document[count] / max(document["num_samples"], 1)
        for name, count in names.items()
    }
