"""From stored samples to batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.data.packing import answer_rows, to_train_batch
from opdjax.data.prompts import PromptSet, collate
from opdjax.rollouts.near_policy.shards import Shard
from opdjax.rollouts.rows import with_option_columns
from opdjax.rollouts.setup import Setup
from opdjax.types import Metrics, Rollouts, TeacherScores, TrainBatch


def as_batch(
    prompts: PromptSet,
    max_completion_length: int,
    samples: Sequence[Shard],
    annotations: Sequence[Shard] = (),
    chosen: np.ndarray | None = None,
) -> tuple[Rollouts, TrainBatch]:
    """Stored samples as rollouts and as a batch of one rollout per row, with the teacher's scores
    if there are annotations.

    `chosen`: indices into the samples of all shards; None: all samples. The rows have the largest
    width that the run can need, so that one compiled program serves all of them.
    """
    rows = [(shard, row) for shard, held in enumerate(samples) for row in range(len(held))]
    rows = rows if chosen is None else [rows[index] for index in chosen]
    column = lambda shards, name: [shards[shard].columns[name][row] for shard, row in rows]
    own = lambda name, dtype=None: np.array(column(samples, name), dtype)
    batch_prompts = collate(prompts, own("prompt_id", np.int32))
    given = answer_rows(batch_prompts, column(samples, "tokens"), max_completion_length, 0)
    spread = lambda values: _spread(values, given.mask)
    rollouts = dataclasses.replace(
        given,
        behavior_logprobs=spread(column(samples, "behavior_logprobs")),
        unfiltered_logprobs=spread(column(samples, "unfiltered_logprobs")),
        sample_id=own("sample_id", np.int32),
        policy_version=own("policy_version", np.int32),
        is_truncated=own("is_truncated"),
    )
    batch = to_train_batch(rollouts, batch_prompts)
    if not annotations:
        return rollouts, batch
    top_k = annotations[0].facts["top_k"]
    top = lambda name: [values.reshape(-1, top_k) for values in column(annotations, name)]
    scores = TeacherScores(
        teacher_logprobs=spread(column(annotations, "teacher_logprobs")),
        teacher_top_ids=spread(top("teacher_ids")) if top_k else None,
        teacher_top_logprobs=spread(top("teacher_top_logprobs")) if top_k else None,
    )
    return rollouts, dataclasses.replace(batch, teacher=scores)


def step_batch(
    setup: Setup,
    step: int,
    samples: Sequence[Shard],
    annotations: Sequence[Shard],
    chosen: np.ndarray | None = None,
) -> tuple[Rollouts, TrainBatch, Metrics]:
    """`as_batch` with what the recipe's options read, and its metrics.

    The random numbers depend on the step that trains on the samples, not on the age of the weights.
    """
    config, length = setup.config, setup.config.sampling.max_completion_length
    rollouts, batch = as_batch(setup.prompts, length, samples, annotations, chosen)
    steps = np.full(len(rollouts.tokens), step, np.int32)
    of_step = dataclasses.replace(rollouts, policy_version=steps)
    batch, metrics = with_option_columns(batch, of_step, config, setup.prompts, setup.tokenizer)
    return rollouts, batch, metrics


def _spread(values: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Values by token of each row, `[n, ...]` each, at the row's masked columns; 0 elsewhere."""
    joined = np.concatenate(values)
    found = np.zeros((*mask.shape, *joined.shape[1:]), joined.dtype)
    found[mask] = joined
    return found


def stored_token_counts(samples: Sequence[Shard], annotations: Sequence[Shard]) -> Metrics:
    """The tokens that were sampled, and that the teacher read, for these shards. They are metrics
    of the first step that trains on them.
    """
    generated = sum(len(row) for shard in samples for row in shard.columns["tokens"])
    read = sum(shard.facts["num_tokens"] for shard in annotations)
    return {"perf/generated_tokens": float(generated), "perf/annotated_tokens": float(read)}


def filter_metrics(document: dict[str, Any]) -> Metrics:
    """Shares of the samples that the filter kept, and that lie beyond either of its bounds."""
    counts = {"keep_rate": "kept", "degenerate": "degenerate", "disconnected": "disconnected"}
    total = max(document["num_samples"], 1)
    return {f"filter/{name}": document[f"num_{count}"] / total for name, count in counts.items()}
