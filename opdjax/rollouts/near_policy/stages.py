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
from opdjax.data.chat import as_messages, assistant_header, text_of
from opdjax.data.packing import (
    answer_rows,
    first_fit_decreasing,
    pack,
    packed_lengths,
    to_train_batch,
    unpack,
)
from opdjax.data.prompts import collate
from opdjax.engine.scorer import score
from opdjax.estimators import estimator_of
from opdjax.models.decoder import Params, head_of
from opdjax.ops.multihost import on_process_zero
from opdjax.ops.sharding import num_row_shards, shard_rows, to_host
from opdjax.rollouts.near_policy import ifd, shards
from opdjax.rollouts.near_policy.shards import Shard
from opdjax.rollouts.on_policy import draw
from opdjax.rollouts.rows import right_answers, with_option_columns
from opdjax.rollouts.setup import Setup, Teacher
from opdjax.types import Metrics, PromptBatch, Rollouts, TeacherScores, TrainBatch


def is_annotated(config: Config) -> bool:
    """Whether scores are stored: the recipe reads a few numbers a token, or there is a filter."""
    reads_few = estimator_of(config.estimator).teacher in ("token", "top_k")
    return reads_few or config.near_policy.filter != "none"


def generate(
    setup: Setup,
    params: Params,
    prompts: PromptBatch,
    directory: pathlib.Path,
    number: int,
    step: int,
) -> None:
    """Sample completions of these prompts, with random numbers of the update `step`, and store them
    as shard `number` in the directory of the version of the weights.
    """
    rollouts, config = to_host(draw(setup, params, prompts, step)), setup.config
    mask, count = rollouts.mask, len(rollouts.mask)
    take = lambda x, keep: [row[kept] for row, kept in zip(x, keep)]
    columns = {
        "step": np.full(count, step),
        "policy_version": np.full(count, int(directory.name)),
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
        student = Teacher(setup.student, params, head, setup.tokenizer, setup.decoding, True)
        batch = to_train_batch(rollouts, dataclasses.replace(prompts, teacher_tokens=None))
        own = batch, rollouts.unfiltered_logprobs, columns["tokens"]
        columns |= _mean_nlls(setup, "student", student, *own)[0]
    facts = {
        "student": config.student.path,
        "seed": config.seed,
        "temperature": str(config.sampling.temperature),
    }
    on_process_zero(lambda: shards.write_shard(directory, "samples", number, columns, facts))


def annotate(setup: Setup, samples: Shard) -> None:
    """Store the teacher's scores of a shard of samples beside it, from one pass over packed rows. A
    filter needs a second one, without prompts, and at a temperature other than 1 a third.
    """
    config, teacher = setup.config, setup.teacher
    _, batch = as_batch(setup, [samples])
    mask, count = np.asarray(batch.mask), len(samples)
    found = _scores(setup, teacher, batch, estimator_of(config.estimator).top_k)
    num_tokens = _num_tokens(batch)

    by_row = lambda x: [row[kept].reshape(-1) for row, kept in zip(x, mask)]
    by_token = lambda x: [np.zeros(0)] * count if x is None else by_row(x)
    ids = ("prompt_id", "sample_id", "policy_version")
    columns = {name: samples.columns[name] for name in ids} | {
        "teacher_logprobs": by_token(found.teacher_logprobs),
        "teacher_ids": by_token(found.teacher_top_ids),
        "teacher_top_logprobs": by_token(found.teacher_top_logprobs),
        "teacher_nll": np.full(count, np.nan),
        "teacher_alone_nll": np.full(count, np.nan),
    }
    if config.near_policy.filter != "none":
        own = batch, found.teacher_logprobs, samples.columns["tokens"]
        nlls, num_more = _mean_nlls(setup, "teacher", teacher, *own)
        columns, num_tokens = columns | nlls, num_tokens + num_more
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
    num_tokens = sum(len(row) for shard in samples for row in shard.columns["tokens"])
    read = sum(shard.facts["num_tokens"] for shard in annotations)
    metrics = {"perf/generated_tokens": float(num_tokens), "perf/annotated_tokens": float(read)}
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
        place = {"version": version, "number": number}
        kept = ifd.random_control(int(kept.sum()), len(kept), seed=seed, **place)
    tokens = [row.tolist() for shard in samples for row in shard.columns["tokens"]]
    texts = setup.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def texts_of(i: int) -> tuple[str, str]:
        prompt = setup.prompts.prompts[measured["prompt_id"][i]].prompt
        return text_of(as_messages(prompt)[-1]), texts[i]

    facts = {"version": version, "number": number, "filter": config.filter}
    facts |= {"form": ifd.FORM, "ifd_min": low, "ifd_max": high}
    is_correct = None  # without an evaluation
    if setup.evaluator is not None:
        grader = setup.config.grader
        is_correct = right_answers(setup.prompts, measured["prompt_id"], texts, grader)
        is_correct = None if is_correct is None else is_correct.astype(bool)
    document = ifd.document(facts, kept, measured, is_correct, texts_of, seed)
    on_process_zero(lambda: shards.write_filter(samples[0].path.parent, number, document))
    counts = {"keep_rate": "kept", "degenerate": "degenerate", "disconnected": "disconnected"}
    total = max(len(kept), 1)
    shares = {f"filter/{name}": document[f"num_{count}"] / total for name, count in counts.items()}
    return kept, metrics | shares


def _mean_nlls(
    setup: Setup,
    whose: str,
    model: Teacher,
    batch: TrainBatch,
    logprobs: np.ndarray,
    tokens: Sequence[np.ndarray],
) -> tuple[dict[str, np.ndarray], int]:
    """The columns of mean NLLs `[B]` at temperature 1, of completions after their prompts and after
    nothing but the header of the assistant's turn; and the tokens that were read for them.

    `batch` and `tokens` are those of the completions, `logprobs` at the sampling temperature.
    """
    data = setup.config.data
    model = dataclasses.replace(model, head=dataclasses.replace(model.head, temperature=1.0))
    format, thinking = data.teacher_template if whose == "teacher" else data.student_template
    header = assistant_header(model.tokenizer, format=format, enable_thinking=thinking)
    headers = np.tile(np.array(header, np.int32), (len(tokens), 1))
    prompts = PromptBatch(headers, np.ones(headers.shape, bool), np.zeros(len(tokens), np.int32))
    length = setup.config.sampling.max_completion_length
    alone = to_train_batch(answer_rows(prompts, tokens, length, 0), prompts)
    num_tokens = _num_tokens(alone)
    if setup.config.sampling.temperature != 1:
        logprobs = _scores(setup, model, batch, 0).teacher_logprobs
        num_tokens += _num_tokens(batch)
    without = _scores(setup, model, alone, 0).teacher_logprobs
    found = {"nll": _mean_nll(logprobs, batch), "alone_nll": _mean_nll(without, alone)}
    return {f"{whose}_{name}": nll for name, nll in found.items()}, num_tokens


def _num_tokens(batch: TrainBatch) -> int:
    """Tokens that the teacher reads of a batch."""
    return int(np.count_nonzero((batch.teacher_view or batch).segment_ids))


def _mean_nll(logprobs: np.ndarray, batch: TrainBatch) -> np.ndarray:
    """Mean NLL of each row in nats per token, float64; NaN for a row without tokens."""
    mask = np.asarray(batch.mask)
    total, count = -np.where(mask, logprobs, 0).sum(axis=1, dtype=np.float64), mask.sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _scores(setup: Setup, model: Teacher, batch: TrainBatch, top_k: int) -> TeacherScores:
    """Log-probs of the tokens, and the top k, scored in packed rows, a micro-batch at a time."""
    config, train, shards = setup.config, setup.config.train, num_row_shards(setup.mesh)
    # One micro-batch has as many rows as in the update: memory that suffices there does here.
    unit = -(-config.rows_per_step // train.gradient_accumulation_steps // shards) * shards
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
        model.params,
        model.head,
        shard_rows(packed, setup.mesh),
        config=model.checkpoint.config,
        needs="top_k" if top_k else "token",
        parts=parts,
        mesh=setup.mesh,
        top_k=top_k,
    )
    found = to_host(dataclasses.replace(scores, hidden=None))
    return jax.tree.map(lambda x: unpack(x, origins, batch.tokens.shape), found)


# Loading


def as_batch(
    setup: Setup,
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
    prompts = collate(setup.prompts, own("prompt_id", np.int32))
    length = setup.config.sampling.max_completion_length
    given = answer_rows(prompts, column(samples, "tokens"), length, 0)
    spread = lambda values: _spread(values, given.mask)
    rollouts = dataclasses.replace(
        given,
        behavior_logprobs=spread(column(samples, "behavior_logprobs")),
        unfiltered_logprobs=spread(column(samples, "unfiltered_logprobs")),
        sample_id=own("sample_id", np.int32),
        policy_version=own("policy_version", np.int32),
        is_truncated=own("is_truncated"),
    )
    batch = to_train_batch(rollouts, prompts)
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
    """`as_batch` with what the options read, drawn by the step; and its metrics."""
    rollouts, batch = as_batch(setup, samples, annotations, chosen)
    steps = np.full(len(rollouts.tokens), step, np.int32)
    of_step = dataclasses.replace(rollouts, policy_version=steps)
    options = of_step, setup.config, setup.prompts, setup.tokenizer
    return rollouts, *with_option_columns(batch, *options)


def _spread(values: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Values by token of each row, `[n, ...]` each, at the row's masked columns; 0 elsewhere."""
    joined = np.concatenate(values)
    found = np.zeros((*mask.shape, *joined.shape[1:]), joined.dtype)
    found[mask] = joined
    return found
