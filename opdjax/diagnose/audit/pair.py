"""The audit on a real pair of models, at the contexts that the student visits: the tiled pass
enumerates the whole vocabulary at each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from opdjax.config import AuditConfig
from opdjax.config.recipes import PLAIN
from opdjax.config.validation import ConfigError, require
from opdjax.data.packing import to_train_batch
from opdjax.diagnose.audit.contexts import measure, summarise
from opdjax.diagnose.audit.subjects import Part, Progress, Subject, subject
from opdjax.engine.sampler import extra_uniforms, sample
from opdjax.engine.scorer import score, token_scores
from opdjax.engine.update import UpdateSpec, VocabularyInputs, vocabulary_loss
from opdjax.estimators import bind
from opdjax.estimators.divergence import reverse_kl
from opdjax.models.decoder import Params, head_of
from opdjax.models.hf import load_params
from opdjax.ops.masked import rank_in_sequence
from opdjax.ops.vocab import TILE, TokenInputs, tiled_stats
from opdjax.rollouts.on_policy import prompts_of
from opdjax.rollouts.setup import Setup, update_spec, with_current_teacher
from opdjax.runs.statistics import ratio_with_interval
from opdjax.types import TrainBatch

# Of the contexts by their KL. Most of it is in few contexts: equal shares would hide it.
KL_QUANTILES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
_NUM_BUCKETS = 6  # of positions
_REPEATS = 5  # runs that are timed
# Columns of scores by what a recipe reads from the teacher.
_COLUMNS = {"token": ("teacher_logprobs",), "top_k": ("teacher_top_ids", "teacher_top_logprobs")}


@dataclasses.dataclass(frozen=True)
class States:
    """Rollouts of the student with both models' hidden states. Rows of a prompt are adjacent."""

    params: Params  # float32 as in training, whatever the forward pass uses
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
        """Return `stat(student, teacher, row with columns)` of the sampled tokens `[B, T, ...]`."""
        run = jax.jit(lambda *operands: tiled_stats(stat, *operands, tile=self.spec.estimator.tile))
        row, inputs = dataclasses.replace(self.inputs.row, **columns), self.inputs
        found = run(inputs.hidden, inputs.head, self.batch.mask, row, inputs.teacher)
        return jax.tree.map(np.asarray, found)


def collect_states(
    setup: Setup, settings: AuditConfig, num_uniforms: int, rows_at_once: int, progress: Progress
) -> States:
    """Sample answers to prompts in the order of training and score them with both models."""
    # A repeated prompt would count as two.
    num_prompts, available = settings.num_prompts, len(setup.prompts)
    expected = f"at most {available}, the number of prompts in {setup.config.data.source}"
    require(num_prompts <= available, "audit.num_prompts", num_prompts, expected)
    config, seed, params = setup.config, setup.config.seed, load_params(setup.student, setup.dtype)
    teacher = with_current_teacher(setup, params).teacher
    most = min(max(rows_at_once // settings.num_generations, 1), num_prompts)
    at_once = next(n for n in range(most, 0, -1) if num_prompts % n == 0)
    prompts = prompts_of(setup.prompts, config, 0)
    how = {"decoding": setup.decoding, "num_generations": settings.num_generations}
    answers = []
    for i in progress(range(0, num_prompts, at_once)):
        part = jax.tree.map(lambda x, i=i: x[i : i + at_once], prompts)
        answers.append(sample(params, part, seed, 0, config=setup.student.config, **how))
    rollouts = jax.tree.map(lambda *rows: jnp.concatenate(rows), *answers)
    batch, spec = to_train_batch(rollouts, prompts), update_spec(setup)
    run = partial(score, needs="vocabulary", tile=TILE, parts=len(answers))
    scores = run(teacher.params, teacher.head, batch, config=teacher.checkpoint.config)
    head = head_of(params, valid_vocab=spec.valid_vocab, temperature=spec.temperature)
    hidden = run(params, head, batch, config=setup.student.config).hidden
    uniforms = extra_uniforms(rollouts, seed, num_uniforms)
    row = TokenInputs(batch.tokens, behavior_logprobs=batch.behavior_logprobs, uniforms=uniforms)
    return States(
        optax.tree.cast(params, jnp.float32),
        dataclasses.replace(spec, gradient_accumulation_steps=1, mesh=None),
        dataclasses.replace(batch, teacher=scores, uniforms=uniforms),
        VocabularyInputs(hidden, head, row, (scores.hidden, teacher.head)),
        settings.num_generations,
        at_once * settings.num_generations,
    )


def audit_contexts(states: States, subjects: list[Subject], progress: Progress = iter) -> Part:
    """Return bias, cosine and action variance of the uncoupled subjects at the sampled contexts."""
    mask, kl = states.mask, states.kl
    if not kl[mask].any():
        same = "student and teacher have the same distribution at every context"
        raise ConfigError(f"{same}; expected a teacher that differs")
    kl_mean, rows = float(kl[mask].mean()), {}
    at = lambda each: states.per_token(lambda s, t, _: measure(each, s, t, -kl_mean))
    plain = at(subject(PLAIN))["variance"]
    quantiles = ({"from": low, "to": high} for low, high in itertools.pairwise(KL_QUANTILES))
    bins, buckets = list(zip(quantiles, kl_bins(kl, mask))), _position_buckets(states)

    def ratio(ours: np.ndarray, inside: np.ndarray) -> tuple:
        per_row = lambda values: np.where(inside, values, 0).sum(axis=1, dtype=np.float64)
        by_prompt = lambda x: per_row(x).reshape(-1, states.num_generations).sum(axis=1)
        return ratio_with_interval(by_prompt(ours), by_prompt(plain))

    for each in progress(subjects):
        stats = at(each)
        row = summarise({name: value[mask] for name, value in stats.items()}, plain[mask])
        if each.is_sampled:
            row["variance_ratio_interval"] = ratio(stats["variance"], mask)[1:]
        if each.is_sampled or each.is_own:
            row["by_kl"] = [ratio(stats["variance"], inside) for _, inside in bins]
            row["by_position"] = [ratio(stats["variance"], inside) for _, inside in buckets]
        rows[each.name] = row
    total = lambda x, where: float(np.sum(x[where], dtype=np.float64))
    # The size of a bin, and its shares of the KL and the variance of all contexts.
    describe = lambda inside: {
        "contexts": int(inside.sum()),
        "kl_mean": total(kl, inside) / max(int(inside.sum()), 1),
        "kl_share": total(kl, inside) / total(kl, mask),
        "variance_share": total(plain, inside) / total(plain, mask),
    }
    return {
        "num_prompts": len(mask) // states.num_generations,
        "num_contexts": int(mask.sum()),
        "kl_mean": kl_mean,
        "bins": [label | describe(inside) for label, inside in bins],
        "buckets": [label | describe(inside) for label, inside in buckets],
        "rows": rows,
    }


def kl_bins(kl: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Return a mask of the contexts between neighbouring KL_QUANTILES, the lowest KL first."""
    order = np.argsort(np.where(mask, kl, np.inf), axis=None, kind="stable")
    rank = np.argsort(order).reshape(mask.shape)  # masked slots rank last
    limits = [round(q * int(mask.sum())) for q in KL_QUANTILES]
    return [(low <= rank) & (rank < high) for low, high in itertools.pairwise(limits)]


def _position_buckets(states: States) -> list[tuple[dict[str, int], np.ndarray]]:
    """Return (first and last position, mask) of buckets of completion tokens, counted from 0."""
    place = np.asarray(rank_in_sequence(states.batch.mask, states.batch.segment_ids))
    longest = int(place[states.mask].max()) + 1
    width = -(-longest // _NUM_BUCKETS)
    inside = lambda low: (place >= low) & (place < low + width) & states.mask
    bounds = lambda low: {"first": low, "last": min(low + width, longest) - 1}
    return [(bounds(low), inside(low)) for low in range(0, longest, width)]


def audit_costs(states: States, recipes: list[Subject], progress: Progress = iter) -> Part:
    """Return seconds and bytes a token of each recipe's pass over the vocabulary.

    The pass goes from hidden states to the loss and its gradients for hidden states and head, and
    includes the teacher's log-probs that a recipe reads, even where training would reuse them. The
    median of alternating runs on one micro-batch, and the temporary memory of the program.
    """
    num_tokens, runs, rows = int(states.mask[: states.rows_at_once].sum()), {}, {}
    seconds: dict[str, list[float]] = {each.name: [] for each in recipes}
    # The first run of each compiles and is not timed.
    for turn, each in progress(list(itertools.product(range(_REPEATS + 1), recipes))):
        if turn == 0:
            compiled, operands = _compile(states, each)
            num_bytes = compiled.memory_analysis().temp_size_in_bytes
            rows[each.name] = {"bytes_per_token": num_bytes / num_tokens}
            runs[each.name] = partial(compiled, *operands)
        start = time.perf_counter()
        jax.block_until_ready(runs[each.name]())
        seconds[each.name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["seconds_per_token"] = statistics.median(seconds[name][1:]) / num_tokens
    return rows


def _compile(states: States, each: Subject):
    tile, extra = states.spec.estimator.tile, each.num_draws - 1
    estimator = bind(each.recipe, each.options, tile=tile)
    spec = dataclasses.replace(states.spec, estimator=estimator)
    uniforms = states.inputs.row.uniforms[:, :, :extra] if extra else None
    row = dataclasses.replace(states.inputs.row, uniforms=uniforms)
    batch = dataclasses.replace(states.batch, teacher=None, uniforms=None)
    first = partial(jax.tree.map, lambda x: x[: states.rows_at_once])
    (teacher_hidden, teacher_head), head = states.inputs.teacher, states.inputs.head

    def gradients(hidden, head, row, teacher, batch):
        weights, names = batch.mask / jnp.sum(batch.mask), _COLUMNS.get(estimator.teacher, ())
        if names:
            top_k = estimator.top_k if estimator.teacher == "top_k" else 0
            scores = token_scores(*teacher, batch, top_k=top_k, tile=tile)
            row = dataclasses.replace(row, **{name: getattr(scores, name) for name in names})
        read = teacher if estimator.teacher == "vocabulary" else None

        def loss(hidden, head):
            inputs, token_loss = VocabularyInputs(hidden, head, row, read), estimator.token_loss
            return vocabulary_loss(inputs, batch, weights, spec, token_loss=token_loss)[0]

        return jax.grad(loss, argnums=(0, 1))(hidden, head)

    teacher = first(teacher_hidden), teacher_head
    operands = first(states.inputs.hidden), head, first(row), teacher, first(batch)
    return jax.jit(gradients).lower(*operands).compile(), operands
