"""The on-policy source: rollouts are sampled from the current student for every step, or given."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from opdjax.config import Config
from opdjax.data.packing import answer_rows, for_teacher, to_train_batch
from opdjax.data.prompts import PromptSet, collate, indices_at
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import sample
from opdjax.models.decoder import Params
from opdjax.ops.sharding import to_host
from opdjax.rollouts.rows import packed, student_rows, with_option_columns
from opdjax.rollouts.setup import Setup, Teacher, with_current_teacher
from opdjax.rollouts.source import RolloutSource, StepData
from opdjax.runs.metrics import Timer
from opdjax.types import PromptBatch, Rollouts


class OnPolicySource(RolloutSource):
    """Samples every step's rollouts from the current student, or takes given answers."""

    def __init__(self, setup: Setup):
        self._setup, self._next_prompts = setup, None

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        setup, config = self._setup, self._setup.config
        prompts = self._next_prompts or prompts_of(setup.prompts, config, step)
        self._next_prompts = None
        with timer.phase("sample"):
            current = with_current_teacher(setup, self.teacher_params)
            rollouts = to_host(step_rollouts(current, self.params, prompts, step))
        with timer.phase("pack"):
            batch, metrics = with_option_columns(
                to_train_batch(rollouts, prompts), rollouts, config, setup.prompts, setup.tokenizer
            )
            rows, packing = packed(batch, config.train, setup.mesh)
        return StepData(rollouts, batch, rows, metrics | packing)

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`."""
        super().prefetch(step)
        self._next_prompts = prompts_of(self._setup.prompts, self._setup.config, step)


def prompts_of(prompts: PromptSet, config: Config, step: int) -> PromptBatch:
    """The prompts of a step."""
    indices = indices_at(step, config.train.prompts_per_step, len(prompts), config.seed)
    return collate(prompts, indices)


def draw(
    setup: Setup,
    params: Params,
    prompts: PromptBatch,
    stream: int,
    teacher: Teacher | None = None,
    is_wanted: np.ndarray | None = None,
) -> Rollouts:
    """Completions of the prompts by the student, or by `teacher`; the same `stream` and prompt give
    the same random numbers. Those that are not wanted (None: all are) stay empty.
    """
    return sample(
        params,
        prompts,
        setup.config.seed,
        stream,
        config=(setup.student if teacher is None else teacher.checkpoint).config,
        decoding=(teacher or setup).decoding,
        num_generations=setup.config.sampling.num_generations,
        mesh=setup.mesh,
        slots=setup.config.sampling.slots,
        prompt_columns=setup.prompts.max_width(of_teacher=teacher is not None),
        is_wanted=is_wanted,
    )


def step_rollouts(setup: Setup, params: Params, prompts: PromptBatch, step: int) -> Rollouts:
    """The completions of a step, each row by the student or otherwise, as `student_rows` says."""
    if setup.config.sampling.completions_from == "student":
        return draw(setup, params, prompts, step)
    is_own = student_rows(setup.config, step)
    if not is_own.any():
        return _given_rollouts(setup, prompts, step)
    own = to_host(draw(setup, params, prompts, step, is_wanted=is_own))
    if setup.config.sampling.student_fraction == 1:
        return own
    given = _given_rollouts(setup, prompts, step, ~is_own)
    # Given rows have no log-probs, so that mixed rollouts have none either.
    own = dataclasses.replace(own, behavior_logprobs=None, unfiltered_logprobs=None)
    pick = lambda own, given: np.where(is_own.reshape(-1, *[1] * (own.ndim - 1)), own, given)
    return jax.tree.map(pick, own, given)


def _given_rollouts(
    setup: Setup, prompts: PromptBatch, step: int, is_wanted: np.ndarray | None = None
) -> Rollouts:
    """The completions of a step that the teacher writes or that the data holds."""
    config, sampling = setup.config, setup.config.sampling
    length, stop = sampling.max_completion_length, setup.decoding.stop_token_ids
    end = setup.tokenizer.eos_token_id  # ends given answers
    end = end if end in stop else stop[0]
    if sampling.completions_from == "references":
        chosen = _chosen_references(setup.prompts, config, prompts, step)
        encode = partial(setup.tokenizer.encode, add_special_tokens=False)
        # A stop string ends an answer by itself, as in a sampled one.
        ends = [[] if text.endswith(setup.student.stop_strings) else [end] for text in chosen]
        answers = [_before_stop(encode(text), stop) + own for text, own in zip(chosen, ends)]
        return answer_rows(prompts, answers, length, step)
    teacher = setup.teacher
    texts = draw(setup, teacher.params, for_teacher(prompts), step, teacher, is_wanted)
    written = to_host(texts)
    answers = _as_student_ids(written, teacher, setup.tokenizer, stop, end)
    rows = answer_rows(prompts, answers, length, step)
    is_truncated = rows.is_truncated | written.is_truncated
    return dataclasses.replace(rows, sample_id=written.sample_id, is_truncated=is_truncated)


def _chosen_references(
    prompts: PromptSet, config: Config, batch: PromptBatch, step: int
) -> list[str]:
    """Cycle through each prompt's references, over its generations and over the epochs."""
    chosen, count = [], config.sampling.num_generations
    for place, index in enumerate(np.asarray(batch.prompt_id)):
        texts = prompts.prompts[index].references
        epoch = (step * config.train.prompts_per_step + place) // len(prompts)
        chosen += [texts[(epoch * count + number) % len(texts)] for number in range(count)]
    return chosen


def _before_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids before the first stop token: the student ends its own answers there."""
    return list(itertools.takewhile(lambda token: token not in stops, ids))


def _as_student_ids(
    written: Rollouts, teacher: Teacher, tokenizer: Any, stops: Sequence[int], end: int
) -> list[list[int]]:
    """The teacher's answers as ids of the student's tokenizer, with the student's stop token."""
    answers, texts, own = [], [None] * len(written.tokens), teacher.decoding.stop_token_ids
    if not teacher.shares_vocabulary:
        texts = completions(written, teacher.tokenizer)
    for text, row, keep in zip(texts, written.tokens, written.mask):
        # A truncated answer has no end to learn, nor has one that ends in a stop string; a stop
        # token at which the student does not stop would teach it to run on.
        ids = row[keep].tolist()
        is_ended = bool(ids) and ids[-1] in own
        body = ids[:-1] if is_ended else ids
        body = body if text is None else tokenizer.encode(text, add_special_tokens=False)
        kept = _before_stop(body, stops)
        answers.append([*kept, end] if is_ended or kept != body else body)
    return answers
