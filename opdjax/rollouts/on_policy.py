"""Where the loop's batches come from. This file: drawn from the student as it is for each step, or
given.

A source gives what one update is made of with `next(step, timer)`, and is told of new weights by
`publish(version, weights)`, whose second argument makes a copy of them when called.
`near_policy.source` has the other ones; the loop cannot tell them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from opdjax.config.recipes import RECIPES
from opdjax.data.packing import answer_rows, for_teacher, pack, packing_metrics, to_train_batch
from opdjax.data.prompts import collate, indices_at
from opdjax.engine.evaluate import completions, graded, last_tokens
from opdjax.engine.sampler import extra_uniforms, sample
from opdjax.engine.scorer import score
from opdjax.estimators import estimator_of
from opdjax.estimators.advantage import group_advantage
from opdjax.models.decoder import Params
from opdjax.ops.sharding import num_row_shards, shard_rows, to_host
from opdjax.ops.tile import Head
from opdjax.rollouts.setup import Setup, with_current_teacher
from opdjax.rollouts.source import StepData
from opdjax.runs.metrics import Timer
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch


class OnPolicySource:
    """Every step's rollouts are drawn from the student as it is, or are answers that are given."""

    def __init__(self, setup: Setup):
        self._setup, self._following, self.params = setup, None, None

    def publish(self, version: int, weights: Callable[[], Params], timer: Timer) -> None:
        """See `RolloutSource`."""
        self.params = weights()

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        setup = self._setup
        prompts, self._following = self._following or prompts_of(setup, step), None
        with timer.phase("sample"):
            rollouts = to_host(
                _rollouts(with_current_teacher(setup, self.params), self.params, prompts, step)
            )
        with timer.phase("pack"):
            batch, told = with_credit(setup, to_train_batch(rollouts, prompts), rollouts)
            rows, filled = packed(setup, batch)
        return StepData(prompts, rollouts, batch, rows, told | filled)

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`."""
        self.params = None  # the old weights are let go before there are new ones
        self._following = prompts_of(self._setup, step)

    def commit(self, version: int, timer: Timer) -> None:
        """See `RolloutSource`: nothing is drawn ahead."""

    def probe(self, step: int) -> None:
        """See `RolloutSource`: nothing is left out."""


def prompts_of(setup: Setup, step: int) -> PromptBatch:
    """The prompts of a step."""
    config = setup.config
    return collate(
        setup.prompts,
        indices_at(step, config.train.prompts_per_step, len(setup.prompts), config.seed),
    )


def packed(setup: Setup, batch: TrainBatch) -> tuple[TrainBatch, Metrics]:
    """The rows that are scored and trained on, and how well they are filled; the batch itself where
    rows are not shared.
    """
    train = setup.config.train
    if train.pack_length is None:
        return batch, {}
    packed, source = pack(
        batch,
        train.pack_length,
        parts=train.gradient_accumulation_steps,
        shards=num_row_shards(setup.mesh),
    )
    return packed, packing_metrics(source)


def draw(setup: Setup, params: Params, prompts: PromptBatch, name: int) -> Rollouts:
    """The student's completions of the prompts; `name` is that of the draws, which are the same for
    the same name and prompt.
    """
    sampling = setup.config.sampling
    return sample(
        params,
        prompts,
        setup.config.seed,
        name,
        config=setup.student.config,
        decoding=setup.decoding,
        num_generations=sampling.num_generations,
        mesh=setup.mesh,
        slots=sampling.slots,
        prompt_columns=setup.prompts.max_width(),
    )


def _rollouts(setup: Setup, params: Params, prompts: PromptBatch, step: int) -> Rollouts:
    """The step's completions: drawn from the student, or answers written by the teacher or found in
    the data.
    """
    config, sampling = setup.config, setup.config.sampling
    if sampling.completions_from == "student":
        return draw(setup, params, prompts, step)
    if sampling.completions_from == "references":
        return answer_rows(
            prompts, _reference_answers(setup, prompts, step), sampling.max_completion_length, step
        )
    teacher, columns = setup.teacher, setup.prompts.max_width(of_teacher=True)
    written = to_host(
        sample(
            teacher.params,
            for_teacher(prompts),
            config.seed,
            step,
            config=teacher.checkpoint.config,
            decoding=teacher.decoding,
            num_generations=sampling.num_generations,
            mesh=setup.mesh,
            slots=sampling.slots,
            prompt_columns=columns,
        )
    )
    rows = answer_rows(
        prompts, _as_student_ids(setup, written), sampling.max_completion_length, step
    )
    is_truncated = rows.is_truncated | np.asarray(written.is_truncated)
    return dataclasses.replace(
        rows, sample_id=np.asarray(written.sample_id), is_truncated=is_truncated
    )


def _reference_answers(setup: Setup, prompts: PromptBatch, step: int) -> list[list[int]]:
    """Each prompt's references in turn, over its generations and over the epochs."""
    answers, count = [], setup.config.sampling.num_generations
    for place, index in enumerate(np.asarray(prompts.prompt_id)):
        texts = setup.prompts.prompts[index].references
        epoch = (step * setup.config.train.prompts_per_step + place) // len(setup.prompts)
        chosen = [texts[(epoch * count + number) % len(texts)] for number in range(count)]
        answers += [
            [*setup.tokenizer.encode(text, add_special_tokens=False), _end_token(setup)]
            for text in chosen
        ]
    return answers


def _as_student_ids(setup: Setup, written: Rollouts) -> list[list[int]]:
    """The teacher's answers as it wrote them, ended as the student ends; through their text where
    its tokenizer is another one.
    """
    teacher, answers = setup.teacher, []
    texts = (
        [None] * written.tokens.shape[0]
        if teacher.shares_vocabulary
        else completions(written, teacher.tokenizer)
    )
    for text, row, keep, is_cut in zip(
        texts, *map(np.asarray, (written.tokens, written.mask, written.is_truncated))
    ):
        # An answer that was cut off has no end to teach; an end that the student does not stop at
        # would teach it to run on.
        body = row[keep].tolist()[: None if is_cut else -1]
        body = body if text is None else setup.tokenizer.encode(text, add_special_tokens=False)
        answers.append(body if is_cut else [*body, _end_token(setup)])
    return answers


def _end_token(setup: Setup) -> int:
    """The stop token that the student ends its answers with."""
    stop, end = setup.decoding.stop_token_ids, setup.tokenizer.eos_token_id
    return end if end in stop else stop[0]


def scored(setup: Setup, batch: TrainBatch, needs: str) -> tuple[TrainBatch, Head | None]:
    """The batch on the devices with what a recipe needs of the teacher where it is not there yet,
    and of the student's start; and the teacher's head where the recipe wants to use it.
    """
    is_missing, batch = (
        _is_unscored(batch, needs),
        with_reference(setup, shard_rows(batch, setup.mesh)),
    )
    if not is_missing:
        return batch, None
    teacher, estimator = setup.teacher, setup.config.estimator
    top_k = estimator_of(estimator).top_k if needs == "top_k" else 0
    scores = score(
        teacher.params,
        teacher.head,
        batch,
        config=teacher.checkpoint.config,
        needs=needs,
        tile=estimator.tile,
        parts=num_score_parts(setup, batch),
        mesh=setup.mesh,
        top_k=top_k,
    )
    return dataclasses.replace(
        batch, teacher=scores
    ), teacher.head if needs == "vocabulary" else None


def rollout_metrics(setup: Setup, rollouts: Rollouts, step: int) -> Metrics:
    """Lengths in tokens, how completions ended, and by how many updates their policy is older than
    the one trained.
    """
    mask = np.asarray(rollouts.mask)
    if not len(mask):
        return {}
    lengths, staleness = mask.sum(axis=1), step - np.asarray(rollouts.policy_version)
    is_stopped = np.isin(last_tokens(rollouts), setup.decoding.stop_token_ids) & (lengths > 0)
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_min": float(lengths.min()),
        "rollout/length_p50": float(np.median(lengths)),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_ratio": float(np.asarray(rollouts.is_truncated).mean()),
        "rollout/eos_rate": float(is_stopped.mean()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }


def _is_unscored(batch: TrainBatch, needs: str) -> bool:
    """Whether what a recipe needs of the teacher is still to be had of it."""
    stored = (
        {"token": batch.teacher.teacher_logprobs, "top_k": batch.teacher.teacher_top_ids}
        if batch.teacher is not None
        else {}
    )
    return needs != "none" and stored.get(needs) is None


def token_counts(setup: Setup, drawn: StepData) -> Metrics:
    """What the step cost in tokens: drawn from the student, trained on, and read or written by the
    teacher, prompts included.

    What was drawn and read ahead for many steps counts for the one whose `told` tells of it.
    """
    config, batch = setup.config, drawn.batch
    trained, source = float(np.asarray(batch.mask).sum()), config.sampling.completions_from
    needs = estimator_of(config.estimator).teacher
    passes = _is_unscored(batch, needs) + (source == "teacher")
    seen = float((np.asarray((batch.teacher_view or batch).segment_ids) > 0).sum())
    return {
        "perf/generated_tokens": drawn.told.get(
            "perf/generated_tokens", trained if source == "student" else 0.0
        ),
        "perf/trained_tokens": trained,
        "perf/teacher_tokens": passes * seen + drawn.told.get("perf/annotated_tokens", 0.0),
    }


def with_credit(setup: Setup, batch: TrainBatch, rollouts: Rollouts) -> tuple[TrainBatch, Metrics]:
    """The batch with what the recipe's options want of each rollout, and what there is to tell of
    it.

    Uniform numbers for extra draws; the advantage of a task reward, whose mean is
    `rollout/task_reward`.
    """
    options, told = setup.config.estimator.options, {}
    if options.get("extra_draws"):
        batch = dataclasses.replace(
            batch, uniforms=extra_uniforms(rollouts, setup.config.seed, options["extra_draws"])
        )
    if options.get("task_reward_coef") or RECIPES[setup.config.estimator.recipe].reward == "task":
        reward, size = task_reward(setup, rollouts), setup.config.sampling.num_generations
        told["rollout/task_reward"] = float(reward.mean())
        advantage = group_advantage(
            reward, np.ones(len(reward), bool), size, options.get("advantage", "mean")
        )
        batch = dataclasses.replace(batch, advantages=jnp.where(batch.mask, advantage[:, None], 0))
    return batch, told


def task_reward(setup: Setup, rollouts: Rollouts) -> np.ndarray:
    """1 for each completion whose answer is right by the evaluation's grader, 0 for the others;
    `[B]`, float32.
    """
    answers = [setup.prompts.prompts[index].answer for index in np.asarray(rollouts.prompt_id)]
    return graded(rollouts, answers, setup.tokenizer, setup.config.evaluation.grader).astype(
        np.float32
    )


def with_reference(setup: Setup, batch: TrainBatch) -> TrainBatch:
    """A batch on the devices with the log-probs of its tokens under the student's start, where
    there is a penalty on leaving it.
    """
    reference = setup.reference_policy
    if reference is None:
        return batch
    found = score(
        reference.params,
        reference.head,
        dataclasses.replace(batch, teacher_view=None),
        config=reference.checkpoint.config,
        needs="token",
        tile=setup.config.estimator.tile,
        parts=num_score_parts(setup, batch),
        mesh=setup.mesh,
    )
    return dataclasses.replace(batch, reference_logprobs=found.teacher_logprobs)


def num_score_parts(setup: Setup, batch: TrainBatch) -> int:
    """As many parts as an update has micro-batches, for models that score a batch; 1 where its rows
    do not divide into them.
    """
    parts = setup.config.train.gradient_accumulation_steps
    return parts if batch.tokens.shape[0] % (parts * num_row_shards(setup.mesh)) == 0 else 1
