"""Generate, annotate, filter: each reads what the one before it stored, and stores its own.

A stage is a function of its inputs alone, draws included: one that was stopped is taken up where it
stopped, and one whose output is damaged is made again. Packing, the last of the four, happens when
rollouts are loaded.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opdjax.config import Config
from opdjax.data.chat import Messages, assistant_header
from opdjax.data.packing import (
    answer_rows,
    first_fit_decreasing,
    pack,
    packed_lengths,
    to_train_batch,
    unpack,
)
from opdjax.engine.evaluate import graded_texts
from opdjax.engine.scorer import score
from opdjax.estimators import estimator_of
from opdjax.models.decoder import DecoderConfig, Params, head_of
from opdjax.ops.multihost import on_process_zero
from opdjax.ops.sharding import num_row_shards, shard_rows, to_host
from opdjax.ops.tile import Head
from opdjax.rollouts.near_policy import ifd, shards
from opdjax.rollouts.near_policy.batches import as_batch
from opdjax.rollouts.near_policy.shards import Shard
from opdjax.rollouts.on_policy import draw
from opdjax.rollouts.setup import Setup
from opdjax.types import PromptBatch, TeacherScores, TrainBatch


def is_annotated(config: Config) -> bool:
    """Whether the teacher reads the rollouts once, before training: where a number a token, or a
    few, are all that is asked of it.
    """
    return (
        estimator_of(config.estimator).teacher in ("token", "top_k")
        or config.near_policy.filter != "none"
    )


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
    """Draw the completions of these prompts with weights of `version` updates, and store them as
    shard `number`.

    `step`: the update that they are drawn for, after which the draws are named.
    """
    rollouts = to_host(draw(setup, params, prompts, step))
    mask, config = rollouts.mask, setup.config
    of_rows = lambda x, keep: [row[kept] for row, kept in zip(x, keep)]
    count, missing = len(mask), np.full(len(mask), np.nan)
    columns = {
        "step": np.full(count, step),
        "policy_version": np.full(count, version),
        "prompt_id": rollouts.prompt_id,
        "sample_id": rollouts.sample_id,
        "is_truncated": rollouts.is_truncated,
        "prompt_tokens": of_rows(rollouts.tokens, (rollouts.segment_ids > 0) & ~mask),
        "tokens": of_rows(rollouts.tokens, mask),
        "behavior_logprobs": of_rows(rollouts.behavior_logprobs, mask),
        "unfiltered_logprobs": of_rows(rollouts.unfiltered_logprobs, mask),
        "student_nll": missing,
        "student_alone_nll": missing,
    }
    if config.near_policy.filter != "none":
        student = _Scorer.of(setup, setup.student.config, params)
        columns["student_nll"] = (
            _mean_nll(rollouts.unfiltered_logprobs, mask)
            if config.sampling.temperature == 1
            else student.nll(
                to_train_batch(rollouts, dataclasses.replace(prompts, teacher_tokens=None))
            )
        )
        columns["student_alone_nll"] = student.nll(
            _alone(setup, columns["tokens"], of_teacher=False)
        )
    facts = {
        "student": config.student.path,
        "seed": config.seed,
        "temperature": str(config.sampling.temperature),
    }
    on_process_zero(lambda: shards.write_shard(directory, "samples", number, columns, facts))


def annotate(setup: Setup, samples: Shard, directory: pathlib.Path) -> None:
    """Store what the teacher says of the samples of a shard: one pass over prompts and completions,
    in packed rows.

    With a filter a second pass, without the prompts; with a filter and a sampling temperature other
    than 1 also a third.
    """
    config, teacher = setup.config, setup.teacher
    scorer = _Scorer.of(setup, teacher.checkpoint.config, teacher.params, teacher.head)
    _, batch = as_batch(setup, [samples])
    top_k = estimator_of(config.estimator).top_k
    mask, count = np.asarray(batch.mask), len(samples)
    found, num_tokens = scorer.scores(batch, top_k), _num_tokens(batch)
    of_tokens = lambda x: [row[kept].reshape(-1) for row, kept in zip(x, mask)]
    nothing, missing = [np.zeros(0)] * count, np.full(count, np.nan)
    columns = {
        name: samples.columns[name] for name in ("prompt_id", "sample_id", "policy_version")
    } | {
        "teacher_logprobs": of_tokens(found.teacher_logprobs),
        "teacher_ids": of_tokens(found.teacher_top_ids) if top_k else nothing,
        "teacher_top_logprobs": of_tokens(found.teacher_top_logprobs) if top_k else nothing,
        "teacher_nll": missing,
        "teacher_alone_nll": missing,
    }
    if config.near_policy.filter != "none":
        plain = dataclasses.replace(scorer, head=dataclasses.replace(scorer.head, temperature=1.0))
        is_scored = config.sampling.temperature == 1
        columns["teacher_nll"] = (
            _mean_nll(found.teacher_logprobs, mask) if is_scored else plain.nll(batch)
        )
        alone = _alone(setup, samples.columns["tokens"], of_teacher=True)
        columns["teacher_alone_nll"] = plain.nll(alone)
        num_tokens += _num_tokens(alone) + (not is_scored) * _num_tokens(batch)
    facts = {
        "teacher": config.teacher.path,
        "temperature": str(config.sampling.temperature),
        "num_tokens": num_tokens,
    }
    facts["top_k"] = 0 if found.teacher_top_ids is None else found.teacher_top_ids.shape[2]
    on_process_zero(
        lambda: shards.write_shard(
            directory, "annotations", samples.facts["number"], columns, facts
        )
    )


def select(
    setup: Setup,
    samples: Sequence[Shard],
    annotations: Sequence[Shard],
    directory: pathlib.Path,
    number: int,
) -> dict[str, Any]:
    """Which of these samples, drawn together, the run's filter keeps; also stored as
    `filter-NUMBER.json` (see `ifd.document`).
    """
    config, seed = setup.config.near_policy, setup.config.seed
    joined = lambda shards, name: np.concatenate([shard.columns[name] for shard in shards])
    measure = lambda shards, who: ifd.ifd(
        joined(shards, f"{who}_nll"), joined(shards, f"{who}_alone_nll"), config.ifd_form
    )
    student, teacher = measure(samples, "student"), measure(annotations, "teacher")
    version, prompt_id = int(samples[0].columns["policy_version"][0]), joined(samples, "prompt_id")
    delta, low, high = ifd.delta_ifd(teacher, student), config.ifd_min, config.ifd_max
    if config.ifd_quantile is not None:
        high = ifd.quantile_bound(delta, low, config.ifd_quantile)
    kept = ifd.zones(delta, low, high) == "kept"
    if config.filter == "random":
        kept = ifd.random_control(
            int(kept.sum()), len(kept), seed=seed, version=version, number=number
        )
    tokens = [row.tolist() for shard in samples for row in shard.columns["tokens"]]
    texts = setup.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    document = ifd.document(
        version=version,
        number=number,
        filter=config.filter,
        form=config.ifd_form,
        low=low,
        high=high,
        student_ifd=student,
        teacher_ifd=teacher,
        kept=kept,
        prompt_id=prompt_id,
        sample_id=joined(samples, "sample_id"),
        is_correct=_graded(setup, prompt_id, texts),
        prompt_text=lambda i: _text(setup.prompts.prompts[prompt_id[i]].prompt),
        completion_text=lambda i: texts[i],
        seed=seed,
    )
    on_process_zero(lambda: shards.write_filter(directory, number, document))
    return document


def _text(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _alone(setup: Setup, tokens: Sequence[np.ndarray], *, of_teacher: bool) -> TrainBatch:
    """The completions with nothing before them but what opens the assistant's turn."""
    data = setup.config.data
    tokenizer = setup.teacher.tokenizer if of_teacher else setup.tokenizer
    format, thinking = data.format, data.enable_thinking
    if of_teacher:
        format, thinking = (
            data.teacher_format or format,
            thinking if data.teacher_enable_thinking is None else data.teacher_enable_thinking,
        )
    header = assistant_header(tokenizer, format=format, enable_thinking=thinking)
    count, length = len(tokens), setup.config.sampling.max_completion_length
    opened = np.tile(np.array(header, np.int32), (count, 1))
    ones = np.ones(opened.shape, bool)
    rows = answer_rows(PromptBatch(opened, ones, np.zeros(count, np.int32)), tokens, length, 0)
    return TrainBatch(rows.tokens, rows.mask, rows.segment_ids, None)


def _num_tokens(batch: TrainBatch) -> int:
    """Tokens that the teacher reads of a batch."""
    return int(np.count_nonzero((batch.teacher_view or batch).segment_ids))


def _mean_nll(logprobs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Nats a token of each row, in float64; NaN where a row has none."""
    total, count = -np.where(mask, logprobs, 0).sum(axis=1, dtype=np.float64), mask.sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _graded(setup: Setup, prompt_id: np.ndarray, texts: list[str]) -> np.ndarray | None:
    """Which answers are right, where the prompts have answers and the run a grader."""
    answers = [setup.prompts.prompts[index].answer for index in prompt_id]
    if setup.evaluator is None or any(answer is None for answer in answers):
        return None
    return graded_texts(texts, answers, setup.config.evaluation.grader).astype(bool)


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """A model that reads rollouts in rows that they share, a micro-batch at a time."""

    setup: Setup
    model: DecoderConfig
    params: Params
    head: Head

    @classmethod
    def of(
        cls, setup: Setup, model: DecoderConfig, params: Params, head: Head | None = None
    ) -> _Scorer:
        """With the model's own head at temperature 1, or another one."""
        return cls(
            setup, model, params, head or head_of(params, valid_vocab=setup.decoding.valid_vocab)
        )

    def nll(self, batch: TrainBatch) -> np.ndarray:
        """Mean nats a token `[B]`."""
        return _mean_nll(self.scores(batch, 0).teacher_logprobs, np.asarray(batch.mask))

    def scores(self, batch: TrainBatch, top_k: int) -> TeacherScores:
        """Log-probs of the tokens, and the top k, in the columns of the batch."""
        config, mesh = self.setup.config, self.setup.mesh
        shards, count = num_row_shards(mesh), len(batch.tokens)
        # As many rows at a time as an update has: what fits there fits here, where nothing is
        # differentiated.
        unit = (
            -(-config.rows_per_step // config.train.gradient_accumulation_steps // shards) * shards
        )
        view = batch.tokens if batch.teacher_view is None else batch.teacher_view.tokens
        length = config.train.pack_length or max(batch.tokens.shape[1], view.shape[1])
        rows = (
            first_fit_decreasing(packed_lengths(batch), length)
            if config.train.pack_length
            else np.arange(count)
        )
        # Few numbers of micro-batches mean few compiled programs; those that hold nothing cost no
        # time.
        parts = 1 << (int(rows.max()) // unit).bit_length()
        packed, source = pack(
            batch, length, parts=parts, shards=shards, rows=rows, num_rows=parts * unit
        )
        scores = score(
            self.params,
            self.head,
            shard_rows(packed, mesh),
            config=self.model,
            needs="top_k" if top_k else "token",
            tile=config.estimator.tile,
            parts=parts,
            mesh=mesh,
            top_k=top_k,
        )
        found = to_host(dataclasses.replace(scores, hidden=None))
        return jax.tree.map(lambda x: unpack(x, source, batch.tokens.shape), found)
