"""Rows of samples.jsonl: a few rollouts of a step, token by token."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from opdjax.engine.evaluate import completions
from opdjax.models.decoder import Params
from opdjax.ops.sharding import num_row_shards, to_host
from opdjax.rollouts.on_policy import scored
from opdjax.rollouts.setup import Setup
from opdjax.rollouts.source import StepData


def _sample_rows(
    setup: Setup, examine, params: Params, drawn: StepData, step: int
) -> list[dict[str, Any]]:
    """The first rollouts of a step, each token with what the recipe makes of it and what the
    teacher would have preferred.
    """
    devices = num_row_shards(setup.mesh)
    # As many as are asked for, and there are, in whole rows of devices.
    count = (
        min(-(-setup.config.log.num_samples // devices), drawn.rollouts.tokens.shape[0] // devices)
        * devices
    )
    if not count:
        return []
    first, few = jax.tree.map(lambda x: np.asarray(x)[:count], (drawn.rollouts, drawn.batch))
    is_comparable = setup.teacher is not None and setup.teacher.shares_vocabulary
    few, teacher_head = scored(setup, few, "vocabulary" if is_comparable else "none")
    seen = to_host(examine(params, few, teacher_head))
    texts = completions(first, setup.tokenizer)
    rows = []
    for row in range(min(setup.config.log.num_samples, count)):
        prompt = int(first.prompt_id[row])
        rows.append(
            {
                "step": step,
                "prompt_id": prompt,
                "sample_id": int(first.sample_id[row]),
                "prompt": setup.prompts.prompts[prompt].prompt,
                "completion": texts[row],
                "length": int(first.mask[row].sum()),
                "is_truncated": bool(first.is_truncated[row]),
                **_token_columns(
                    setup.tokenizer,
                    first.tokens[row],
                    first.mask[row],
                    {name: value[row] for name, value in seen.items()},
                ),
            }
        )
    return rows


def _token_columns(
    tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, seen: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Lists over the completion's tokens: the pieces of text, nats, and the teacher's alternatives
    with their probabilities.
    """
    names = ("advantages", "rewards", "kl", "student_logprobs", "teacher_logprobs")
    columns: dict[str, Any] = {
        "tokens": [tokenizer.decode([token]) for token in tokens[mask].tolist()]
    }
    for name in names:
        # JSON has no NaN and no infinity.
        finite = lambda v: round(v, 4) if np.isfinite(v) else None
        columns[name] = [*map(finite, seen[name][mask].tolist())] if name in seen else None
    columns["teacher_top"] = None
    if "alternatives" in seen:
        pairs = zip(
            seen["alternatives"][mask].tolist(), np.exp(seen["alternative_logprobs"][mask]).tolist()
        )
        columns["teacher_top"] = [
            [[tokenizer.decode([i]), round(p, 4)] for i, p in zip(ids, probs)]
            for ids, probs in pairs
        ]
    return columns
