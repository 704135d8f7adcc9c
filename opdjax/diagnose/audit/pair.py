"""The audit on a real pair of models, at the contexts that the student visits.

At every context the whole vocabulary is enumerated, through the tiled pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opdjax.config.recipes import PLAIN
from opdjax.config.validation import ConfigError
from opdjax.data.packing import to_train_batch
from opdjax.data.prompts import collate, indices_at
from opdjax.diagnose.audit.contexts import measure, summarise
from opdjax.diagnose.audit.subjects import Subject, subject
from opdjax.engine.sampler import extra_uniforms, sample
from opdjax.engine.scorer import score
from opdjax.engine.update import UpdateSpec, VocabularyInputs, vocabulary_inputs
from opdjax.estimators.divergence import reverse_kl
from opdjax.models.decoder import Params
from opdjax.models.hf import load_params
from opdjax.ops.masked import rank_in_sequence
from opdjax.ops.sharding import merge_rows, split_rows
from opdjax.ops.vocab import TILE, tiled_stats
from opdjax.rollouts.setup import Setup, update_spec, with_current_teacher
from opdjax.types import TrainBatch

# Of the contexts, ordered by their KL. Most of the KL is in few contexts, so equal shares would
# hide it.
KL_QUANTILES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
_NUM_BUCKETS = 6  # of positions
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class States:
    """Rollouts of the student with both models' hidden states. Rows of a prompt are adjacent."""

    params: Params
    spec: UpdateSpec
    batch: TrainBatch  # with the teacher's hidden states
    inputs: VocabularyInputs
    num_generations: int
    rows_at_once: int  # rows that fit into memory when they are differentiated; divides B

    @property
    def mask(self) -> np.ndarray:
        """Tokens that the student sampled, `[B, T]`."""
        return np.asarray(self.batch.mask)

    @functools.cached_property
    def kl(self) -> np.ndarray:
        """KL(student || teacher) at every sampled token, `[B, T]`, nats."""
        return self.per_token(lambda student, teacher, _: reverse_kl(student, teacher))

    def per_token(self, stat, **columns) -> Any:
        """Return `stat(student, teacher, row)` at every sampled token, `[B, T, ...]`.

        `columns` replace columns of the row.
        """
        run = jax.jit(lambda *operands: tiled_stats(stat, *operands, tile=self.spec.estimator.tile))
        row, inputs = dataclasses.replace(self.inputs.row, **columns), self.inputs
        found = run(inputs.hidden, inputs.head, self.batch.mask, row, inputs.teacher)
        return jax.tree.map(np.asarray, found)


def collect_states(
    setup: Setup,
    *,
    num_prompts: int,
    num_generations: int,
    seed: int,
    num_uniforms: int,
    rows_at_once: int,
) -> States:
    """Sample answers to prompts in the order of training and score them with both models.

    ConfigError if the data has fewer prompts: a repeated prompt would count as two.
    """
    if num_prompts > len(setup.prompts):
        source = setup.config.data.source
        raise ConfigError(
            f"audit.num_prompts is {num_prompts}; expected at most {len(setup.prompts)}, the number"
            f" of prompts in {source}"
        )
    params = load_params(setup.student, setup.dtype)
    setup = with_current_teacher(setup, params)
    most = min(max(rows_at_once // num_generations, 1), num_prompts)
    prompts_at_once = next(n for n in range(most, 0, -1) if num_prompts % n == 0)
    prompts = collate(setup.prompts, indices_at(0, num_prompts, len(setup.prompts), seed))
    draw = partial(
        sample,
        config=setup.student.config,
        decoding=setup.decoding,
        num_generations=num_generations,
    )
    parts = [
        jax.tree.map(lambda x, i=i: x[i : i + prompts_at_once], prompts)
        for i in range(0, num_prompts, prompts_at_once)
    ]
    answers = [draw(params, part, seed, 0) for part in parts]
    rollouts = jax.tree.map(lambda *rows: jnp.concatenate(rows), *answers)
    batch, teacher = to_train_batch(rollouts, prompts), setup.teacher
    scores = score(
        teacher.params,
        teacher.head,
        batch,
        config=teacher.checkpoint.config,
        needs="vocabulary",
        tile=TILE,
        parts=len(parts),
    )
    uniforms = extra_uniforms(rollouts, seed, num_uniforms)
    batch = dataclasses.replace(batch, teacher=scores, uniforms=uniforms)
    spec = dataclasses.replace(update_spec(setup), gradient_accumulation_steps=1, mesh=None)
    rows = prompts_at_once * num_generations
    inputs = _inputs_in_parts(params, batch, teacher.head, spec, len(parts))
    return States(params, spec, batch, inputs, num_generations, rows)


@partial(jax.jit, static_argnames=("spec", "parts"))
def _inputs_in_parts(params, batch, teacher_head, spec, parts: int) -> VocabularyInputs:
    """Compute `vocabulary_inputs`, the student's hidden states a few rows at a time."""
    of_part = lambda part: vocabulary_inputs(params, part, teacher_head, spec).hidden
    hidden = merge_rows(jax.lax.map(of_part, split_rows(batch, parts)))
    # The second forward pass is dead code: XLA removes it.
    return vocabulary_inputs(params, batch, teacher_head, spec)._replace(hidden=hidden)


def audit_contexts(states: States, subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return bias, cosine and action variance of the uncoupled subjects at the sampled contexts.

    All contexts together, and binned by KL and by position.
    """
    mask, kl, mean_reward = states.mask, states.kl, -float(states.kl[states.mask].mean())
    plain = states.per_token(lambda s, t, _: measure(subject(PLAIN), s, t))["variance"]
    if not plain[mask].any():
        raise ConfigError(
            "student and teacher have the same distribution at every context; "
            "expected a teacher that differs"
        )
    bins = kl_bins(kl, mask)
    place = np.asarray(rank_in_sequence(states.batch.mask, states.batch.segment_ids))
    edges = _position_edges(place, mask)
    buckets = [(place >= low) & (place <= high) & mask for low, high in edges]
    rows = {}
    for each in subjects:
        stats = states.per_token(lambda s, t, _, each=each: measure(each, s, t, mean_reward))
        row = summarise({name: value[mask] for name, value in stats.items()}, plain[mask])
        if each.is_sampled:
            compare = partial(_compare, stats["variance"], plain, states.num_generations)
            row["variance_ratio_interval"] = compare(mask)[1:]
            row["by_kl"] = [compare(inside) for inside in bins]
            row["by_position"] = [compare(inside) for inside in buckets]
        rows[each.name] = row
    describe = lambda inside: _describe(kl, inside, plain, mask)
    quantiles = zip(KL_QUANTILES, KL_QUANTILES[1:], bins)
    return {
        "num_prompts": len(mask) // states.num_generations,
        "num_contexts": int(mask.sum()),
        "kl_mean": float(kl[mask].mean()),
        "bins": [{"from": low, "to": high} | describe(inside) for low, high, inside in quantiles],
        "buckets": [
            {"first": low, "last": high} | describe(inside)
            for (low, high), inside in zip(edges, buckets)
        ],
        "rows": rows,
    }


def kl_bins(kl: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Return masks of the contexts between neighbouring KL_QUANTILES, the lowest KL first.

    Every context is in exactly one.
    """
    order = np.argsort(np.where(mask, kl, np.inf), axis=None, kind="stable")[: mask.sum()]
    inside = []
    for part in np.split(order, [round(q * len(order)) for q in KL_QUANTILES[1:-1]]):
        chosen = np.zeros(mask.size, bool)
        chosen[part] = True
        inside.append(chosen.reshape(mask.shape))
    return inside


def _position_edges(place: np.ndarray, mask: np.ndarray) -> list[tuple[int, int]]:
    """Return first and last position of each bucket of completion tokens, counted from 0."""
    longest = int(place[mask].max()) + 1
    width = -(-longest // _NUM_BUCKETS)
    return [(start, min(start + width, longest) - 1) for start in range(0, longest, width)]


def _describe(
    kl: np.ndarray, inside: np.ndarray, variance: np.ndarray, mask: np.ndarray
) -> dict[str, float]:
    """Return the size of a bin and its shares of the KL and the variance of all contexts."""
    total = lambda x, where: float(np.sum(x[where], dtype=np.float64))
    return {
        "contexts": int(inside.sum()),
        "kl_mean": total(kl, inside) / max(int(inside.sum()), 1),
        "kl_share": total(kl, inside) / total(kl, mask),
        "variance_share": total(variance, inside) / total(variance, mask),
    }


def _compare(ours: np.ndarray, plain: np.ndarray, num_generations: int, inside: np.ndarray):
    def per_prompt(x: np.ndarray) -> np.ndarray:
        rows = np.where(inside, x, 0).sum(axis=1, dtype=np.float64)
        return rows.reshape(-1, num_generations).sum(axis=1)

    return ratio_with_interval(per_prompt(ours), per_prompt(plain))


def ratio_with_interval(
    ours: np.ndarray, plain: np.ndarray
) -> tuple[float | None, float | None, float | None]:
    """Return (sum of ours / sum of plain, low, high) from values per prompt.

    `low` and `high` bound the 95 % bootstrap interval; prompts are resampled together for both.
    All are None if `plain` sums to 0.
    """
    if not plain.sum():
        return None, None, None
    chosen = np.random.default_rng(0).integers(0, len(ours), (_RESAMPLES, len(ours)))
    below = plain[chosen].sum(axis=1)
    ratios = ours[chosen].sum(axis=1)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(ours.sum() / plain.sum()), float(low), float(high)
