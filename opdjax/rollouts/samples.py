"""Rows of samples.jsonl: a few rollouts of a step, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from opdjax.engine.evaluate import completions
from opdjax.models.decoder import Params
from opdjax.ops.sharding import num_row_shards, to_host
from opdjax.rollouts.rows import scored
from opdjax.rollouts.setup import Setup
from opdjax.rollouts.source import StepData

_NUM_SAMPLES = 4  # rollouts of a step: as many as a reader looks at
_COLUMNS = ("advantages", "rewards", "kl", "student_logprobs", "teacher_logprobs")


def sample_rows(
    setup: Setup, examine: Callable, params: Params, data: StepData, step: int
) -> list[dict[str, Any]]:
    """The first rollouts of a step; each token with the recipe's outputs and the tokens that the
    teacher prefers. `examine` comes from `make_examine`.
    """
    wanted, shards = _NUM_SAMPLES, num_row_shards(setup.mesh)
    # The scorer takes multiples of the row shards: at least _NUM_SAMPLES, at most all rollouts.
    count = min(-(-wanted // shards), data.rollouts.tokens.shape[0] // shards) * shards
    if not count:
        return []
    first, batch = jax.tree.map(lambda x: np.asarray(x)[:count], (data.rollouts, data.batch))
    is_comparable = setup.teacher is not None and setup.teacher.shares_vocabulary
    batch, teacher_head = scored(setup, batch, "vocabulary" if is_comparable else "none")
    outputs = to_host(examine(params, batch, teacher_head))
    texts = completions(first, setup.tokenizer)
    rows = []
    for row in range(min(wanted, count)):
        prompt, mask = int(first.prompt_id[row]), first.mask[row]
        own = {name: value[row] for name, value in outputs.items()}
        rows.append(
            {
                "step": step,
                "prompt_id": prompt,
                "sample_id": int(first.sample_id[row]),
                "prompt": setup.prompts.prompts[prompt].prompt,
                "completion": texts[row],
                "length": int(mask.sum()),
                "is_truncated": bool(first.is_truncated[row]),
                **_token_columns(setup.tokenizer, first.tokens[row], mask, own),
            }
        )
    return rows


def _token_columns(
    tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, outputs: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Lists over the completion's tokens: text, values in nats, the teacher's likeliest tokens."""
    decode = lambda token: tokenizer.decode([token])
    columns: dict[str, Any] = {"tokens": [*map(decode, tokens[mask].tolist())]}
    finite = lambda v: round(v, 4) if np.isfinite(v) else None  # JSON has no NaN and no infinity
    for name in _COLUMNS:
        columns[name] = [*map(finite, outputs[name][mask].tolist())] if name in outputs else None
    columns["teacher_top"] = None
    if "alternatives" in outputs:
        ids, logprobs = (outputs[n][mask] for n in ("alternatives", "alternative_logprobs"))
        columns["teacher_top"] = [
            [[decode(token), round(p, 4)] for token, p in zip(*pairs)]
            for pairs in zip(ids.tolist(), np.exp(logprobs).tolist())
        ]
    return columns
