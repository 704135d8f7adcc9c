"""The stages of near-policy data: generate, annotate, filter. Each reads what the one before
stored, and stores its own result.

A stage is a function of its inputs, random numbers included: it continues where it was stopped, and
damaged output is made again. Packing, the last stage, happens when rollouts are loaded.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from opdjax.config import Config
from opdjax.data.chat import assistant_header
from opdjax.data.packing import (
    answer_rows,
    first_fit_decreasing,
    pack,
    packed_lengths,
    to_train_batch,
    unpack,
)
from opdjax.data.prompts import PromptSet, collate
from opdjax.engine.evaluate import graded_texts
from opdjax.engine.scorer import score
from opdjax.estimators import estimator_of
from opdjax.models.decoder import DecoderConfig, Params, head_of
from opdjax.ops.multihost import on_process_zero
from opdjax.ops.sharding import num_row_shards, shard_rows, to_host
from opdjax.ops.tile import Head
from opdjax.ops.vocab import TILE
from opdjax.rollouts.near_policy import ifd, shards
from opdjax.rollouts.near_policy.shards import Shard
from opdjax.rollouts.on_policy import draw
from opdjax.rollouts.rows import with_option_columns
from opdjax.rollouts.setup import Setup
from opdjax.types import Metrics, PromptBatch, Rollouts, TeacherScores, TrainBatch


def is_annotated(config: Config) -> bool:
    """Whether the teacher's scores are stored before training: if the recipe reads one number or a
    few per token, or if there is a filter.
    """
    reads_few = estimator_of(config.estimator).teacher in ("token", "top_k")
    return reads_few or config.near_policy.filter != "none"


def generate(
    setup: Setup,
    params: Params,
    prompts: PromptBatch,
    directory: pathlib.Path,
    *,
    number: int,
    step: int,
    version: int,
) -> None:
    """Sample completions of these prompts with weights of `version` updates, and store them as
    shard `number`.

    `step`: the update that they are sampled for; it selects the random numbers.
    """
    rollouts, config = to_host(draw(setup, params, prompts, step)), setup.config
    mask, count = rollouts.mask, len(rollouts.mask)
    take = lambda x, keep: [row[kept] for row, kept in zip(x, keep)]
    columns = {
        "step": np.full(count, step),
        "policy_version": np.full(count, version),
        "prompt_id": rollouts.prompt_id,
        "sample_id": rollouts.sample_id,
        "is_truncated": rollouts.is_truncated,
        "prompt_tokens": take(rollouts.tokens, (rollouts.segment_ids > 0) & ~mask),
        "tokens": take(rollouts.tokens, mask),
        "behavior_logprobs": take(rollouts.behavior_logprobs, mask),
        "unfiltered_logprobs": take(rollouts.unfiltered_logprobs, mask),
        "student_nll": np.full(count, np.nan),
        "student_alone_nll": np.full(count, np.nan),
    }
    if config.near_policy.filter != "none":
        head = head_of(params, valid_vocab=setup.decoding.valid_vocab)
        student = _Scorer(setup, setup.student.config, params, head)
        batch = to_train_batch(rollouts, dataclasses.replace(prompts, teacher_tokens=None))
        alone = _without_prompts(setup, columns["tokens"], of_teacher=False)
        columns |= student.nlls("student", batch, rollouts.unfiltered_logprobs, alone)
    facts = {
        "student": config.student.path,
        "seed": config.seed,
        "temperature": str(config.sampling.temperature),
    }
    on_process_zero(lambda: shards.write_shard(directory, "samples", number, columns, facts))


def annotate(setup: Setup, samples: Shard) -> None:
    """Store the teacher's scores of a shard of samples beside it, from one pass over prompts and
    completions in packed rows.

    A filter needs a second pass, over completions without prompts, and at a sampling temperature
    other than 1 a third.
    """
    config, teacher = setup.config, setup.teacher
    scorer = _Scorer(setup, teacher.checkpoint.config, teacher.params, teacher.head)
    _, batch = as_batch(setup.prompts, config.sampling.max_completion_length, [samples])
    mask, count = np.asarray(batch.mask), len(samples)
    found = scorer.scores(batch, estimator_of(config.estimator).top_k)
    num_tokens = _num_tokens(batch)

    def by_token(x: np.ndarray | None) -> list[np.ndarray]:
        if x is None:
            return [np.zeros(0)] * count
        return [row[kept].reshape(-1) for row, kept in zip(x, mask)]

    ids = ("prompt_id", "sample_id", "policy_version")
    columns = {name: samples.columns[name] for name in ids} | {
        "teacher_logprobs": by_token(found.teacher_logprobs),
        "teacher_ids": by_token(found.teacher_top_ids),
        "teacher_top_logprobs": by_token(found.teacher_top_logprobs),
        "teacher_nll": np.full(count, np.nan),
        "teacher_alone_nll": np.full(count, np.nan),
    }
    if config.near_policy.filter != "none":
        alone = _without_prompts(setup, samples.columns["tokens"], of_teacher=True)
        columns |= scorer.nlls("teacher", batch, found.teacher_logprobs, alone)
        num_tokens *= 1 if config.sampling.temperature == 1 else 2
        num_tokens += _num_tokens(alone)
    facts = {
        "teacher": config.teacher.path,
        "temperature": str(config.sampling.temperature),
        "num_tokens": num_tokens,
        "top_k": 0 if found.teacher_top_ids is None else found.teacher_top_ids.shape[2],
    }
    place = samples.path.parent, "annotations", samples.facts["number"]
    on_process_zero(lambda: shards.write_shard(*place, columns, facts))


def select(
    setup: Setup, samples: Sequence[Shard], annotations: Sequence[Shard], number: int
) -> tuple[np.ndarray, Metrics]:
    """Apply the run's filter to samples [n] of one version. Return which are kept [n], bool, and
    the metrics of the first step that trains on them. The decision is stored beside the samples as
    `filter-NUMBER.json` (see `ifd.document`).
    """
    config, seed = setup.config.near_policy, setup.config.seed
    metrics = stored_token_counts(samples, annotations)
    if config.filter == "none":
        return np.ones(sum(map(len, samples)), bool), metrics
    joined = lambda shards, name: np.concatenate([shard.columns[name] for shard in shards])
    measure = lambda shards, who: ifd.ifd(
        joined(shards, f"{who}_nll"), joined(shards, f"{who}_alone_nll")
    )
    measured = {name: joined(samples, name) for name in ("prompt_id", "sample_id")} | {
        "student_ifd": measure(samples, "student"),
        "teacher_ifd": measure(annotations, "teacher"),
    }
    version = int(samples[0].columns["policy_version"][0])
    delta = measured["teacher_ifd"] - measured["student_ifd"]
    low, high = config.ifd_min, config.ifd_max
    if config.ifd_quantile is not None:
        high = ifd.quantile_bound(delta, low, config.ifd_quantile)
    kept = ifd.zones(delta, low, high) == "kept"
    if config.filter == "random":
        num_kept, stream = int(kept.sum()), {"seed": seed, "version": version, "number": number}
        kept = ifd.random_control(num_kept, len(kept), **stream)
    tokens = [row.tolist() for shard in samples for row in shard.columns["tokens"]]
    texts = setup.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def texts_of(i: int) -> tuple[str, str]:
        prompt = setup.prompts.prompts[measured["prompt_id"][i]].prompt
        return prompt if isinstance(prompt, str) else prompt[-1]["content"], texts[i]

    facts = {"version": version, "number": number, "filter": config.filter}
    facts |= {"form": ifd.FORM, "ifd_min": low, "ifd_max": high}
    is_correct = _is_correct(setup, measured["prompt_id"], texts)
    document = ifd.document(facts, kept, measured, is_correct, texts_of, seed)
    on_process_zero(lambda: shards.write_filter(samples[0].path.parent, number, document))
    counts = {"keep_rate": "kept", "degenerate": "degenerate", "disconnected": "disconnected"}
    total = max(len(kept), 1)
    shares = {f"filter/{name}": document[f"num_{count}"] / total for name, count in counts.items()}
    return kept, metrics | shares


def _without_prompts(setup: Setup, tokens: Sequence[np.ndarray], *, of_teacher: bool) -> TrainBatch:
    """The completions after nothing but the header of the assistant's turn."""
    data, length = setup.config.data, setup.config.sampling.max_completion_length
    tokenizer = setup.teacher.tokenizer if of_teacher else setup.tokenizer
    format, thinking = data.teacher_template if of_teacher else data.student_template
    header = assistant_header(tokenizer, format=format, enable_thinking=thinking)
    count = len(tokens)
    headers = np.tile(np.array(header, np.int32), (count, 1))
    prompts = PromptBatch(headers, np.ones(headers.shape, bool), np.zeros(count, np.int32))
    return to_train_batch(answer_rows(prompts, tokens, length, 0), prompts)


def _num_tokens(batch: TrainBatch) -> int:
    """Tokens that the teacher reads of a batch."""
    return int(np.count_nonzero((batch.teacher_view or batch).segment_ids))


def _mean_nll(logprobs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean NLL of each row in nats per token, float64; NaN for a row without tokens."""
    total, count = -np.where(mask, logprobs, 0).sum(axis=1, dtype=np.float64), mask.sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _is_correct(setup: Setup, prompt_id: np.ndarray, texts: list[str]) -> np.ndarray | None:
    """Which completions are right; None without an evaluation or without answers in the data."""
    answers = [setup.prompts.prompts[index].answer for index in prompt_id]
    if setup.evaluator is None or any(answer is None for answer in answers):
        return None
    return graded_texts(texts, answers, setup.config.evaluation.grader).astype(bool)


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """A model that scores rollouts in packed rows, one micro-batch at a time."""

    setup: Setup
    model: DecoderConfig
    params: Params
    head: Head

    def nlls(
        self, whose: str, batch: TrainBatch, logprobs: np.ndarray, alone: TrainBatch
    ) -> dict[str, np.ndarray]:
        """The columns of mean NLLs `[B]` in nats per token at temperature 1: of the completions
        after their prompts, whose `logprobs` are at the sampling temperature, and `alone`.
        """
        plain = dataclasses.replace(self, head=dataclasses.replace(self.head, temperature=1.0))
        of = lambda rows: plain.scores(rows, 0).teacher_logprobs
        logprobs = logprobs if self.setup.config.sampling.temperature == 1 else of(batch)
        return {
            f"{whose}_nll": _mean_nll(logprobs, np.asarray(batch.mask)),
            f"{whose}_alone_nll": _mean_nll(of(alone), np.asarray(alone.mask)),
        }

    def scores(self, batch: TrainBatch, top_k: int) -> TeacherScores:
        """Log-probs of the tokens, and the top k, in the columns of the batch."""
        train, mesh = self.setup.config.train, self.setup.mesh
        shards, rows_per_step = num_row_shards(mesh), self.setup.config.rows_per_step
        # One micro-batch has as many rows as in the update: memory that suffices there does here.
        unit = -(-rows_per_step // train.gradient_accumulation_steps // shards) * shards
        view = batch.tokens if batch.teacher_view is None else batch.teacher_view.tokens
        length, rows = max(batch.tokens.shape[1], view.shape[1]), np.arange(len(batch.tokens))
        if train.pack_length:
            length = train.pack_length
            rows = first_fit_decreasing(packed_lengths(batch), length)
        # Powers of two keep the number of compiled programs small; empty micro-batches are skipped.
        parts = 1 << (int(rows.max()) // unit).bit_length()
        packed, origins = pack(
            batch, length, parts=parts, shards=shards, rows=rows, num_rows=parts * unit
        )
        scores = score(
            self.params,
            self.head,
            shard_rows(packed, mesh),
            config=self.model,
            needs="top_k" if top_k else "token",
            tile=TILE,
            parts=parts,
            mesh=mesh,
            top_k=top_k,
        )
        found = to_host(dataclasses.replace(scores, hidden=None))
        return jax.tree.map(lambda x: unpack(x, origins, batch.tokens.shape), found)


# Loading


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
