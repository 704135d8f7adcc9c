"""Where the loop's batches come from. This file: drawn from the student as it is for each step, or given.

A source gives what one update is made of with `take(step, timer)`, and is told of new weights by `publish(version, weights)`, whose
second argument makes a copy of them when called. `near_policy.source` has the other ones; the loop cannot tell them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from opdjax.data.packing import answer_rows, as_teacher_sees, filling, pack, to_train_batch
from opdjax.data.prompts import collate, indices_at
from opdjax.estimators import bind
from opdjax.evals.evaluate import completions
from opdjax.metrics import Timer
from opdjax.models.decoder import Params
from opdjax.ops.tile import Head
from opdjax.prepare import Setup, as_of_step, num_score_parts, with_credit, with_reference
from opdjax.sampler import sample
from opdjax.scoring.local import score
from opdjax.sharding import num_row_shards, shard_rows, to_host
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one update is made of; all on the host."""

    prompts: PromptBatch
    rollouts: Rollouts
    batch: TrainBatch  # one rollout a row
    rows: TrainBatch  # as it is trained on: rollouts may share a row, and what the teacher says may be there
    told: Metrics


class SourceStoppedError(RuntimeError):
    """No batch can be had for now; what has been trained is worth keeping, and the same command goes on from there."""


class Source(Protocol):
    """Batches for one update after the other."""

    params: Params | None  # the weights published last, on the learner's mesh, where the source keeps them

    def publish(self, version: int, weights: Callable[[], Params], timer: Timer) -> None:
        """The student after `version` updates; `weights` makes a copy that is the source's own."""

    def take(self, step: int, timer: Timer) -> Drawn:
        """What update `step` (from 0) is made of; SourceStoppedError where it cannot be had for now."""

    def look_ahead(self, step: int) -> None:
        """The update before `step` is under way: do on the host what can be done for this one, if there is one."""

    def settle(self, version: int, timer: Timer) -> None:
        """Return once everything drawn by weights older than `version` is where a run that is killed finds it again."""

    def probe(self, step: int) -> TrainBatch | None:
        """Rows in which nothing was left out, from the policy that drew those of this step; None where none ever is."""


class OnPolicy:
    """Every step's rollouts are drawn from the student as it is, or are answers that are given."""

    def __init__(self, setup: Setup):
        self._setup, self._following, self.params = setup, None, None

    def publish(self, version: int, weights: Callable[[], Params], timer: Timer) -> None:
        """See `Source`."""
        self.params = weights()

    def take(self, step: int, timer: Timer) -> Drawn:
        """See `Source`."""
        setup = self._setup
        prompts, self._following = self._following or prompts_of(setup, step), None
        with timer.phase("sample"):
            rollouts = to_host(_rollouts(as_of_step(setup, self.params), self.params, prompts, step))
        with timer.phase("pack"):
            batch, told = with_credit(setup, to_train_batch(rollouts, prompts), rollouts)
            rows, filled = packed(setup, batch)
        return Drawn(prompts, rollouts, batch, rows, told | filled)

    def look_ahead(self, step: int) -> None:
        """See `Source`."""
        self.params = None  # the old weights are let go before there are new ones
        self._following = prompts_of(self._setup, step)

    def settle(self, version: int, timer: Timer) -> None:
        """See `Source`: nothing is drawn ahead."""

    def probe(self, step: int) -> None:
        """See `Source`: nothing is left out."""


def prompts_of(setup: Setup, step: int) -> PromptBatch:
    """The prompts of a step."""
    config = setup.config
    return collate(setup.prompts, indices_at(step, config.train.prompts_per_step, len(setup.prompts), config.seed))


def packed(setup: Setup, batch: TrainBatch) -> tuple[TrainBatch, Metrics]:
    """The rows that are scored and trained on, and how well they are filled; the batch itself where rows are not shared."""
    train = setup.config.train
    if train.pack_length is None:
        return batch, {}
    packed, source = pack(batch, train.pack_length, parts=train.gradient_accumulation_steps, shards=num_row_shards(setup.mesh))
    return packed, filling(source)


def draw(setup: Setup, params: Params, prompts: PromptBatch, name: int) -> Rollouts:
    """The student's completions of the prompts; `name` is that of the draws, which are the same for the same name and prompt."""
    sampling = setup.config.sampling
    return sample(
        params, prompts, setup.config.seed, name, config=setup.student.config, decoding=setup.decoding,
        num_generations=sampling.num_generations, mesh=setup.mesh, slots=sampling.slots, prompt_columns=setup.prompts.columns(),
    )  # fmt: skip


def _rollouts(setup: Setup, params: Params, prompts: PromptBatch, step: int) -> Rollouts:
    """The step's completions: drawn from the student, or answers written by the teacher or found in the data."""
    config, sampling = setup.config, setup.config.sampling
    if sampling.source == "student":
        return draw(setup, params, prompts, step)
    if sampling.source == "references":
        return answer_rows(prompts, _reference_answers(setup, prompts, step), sampling.max_completion_length, step)
    teacher, columns = setup.teacher, setup.prompts.columns(of_teacher=True)
    written = to_host(
        sample(
            teacher.params, as_teacher_sees(prompts), config.seed, step, config=teacher.checkpoint.config, decoding=teacher.decoding,
            num_generations=sampling.num_generations, mesh=setup.mesh, slots=sampling.slots, prompt_columns=columns,
        )
    )  # fmt: skip
    rows = answer_rows(prompts, _as_student_ids(setup, written), sampling.max_completion_length, step)
    is_truncated = rows.is_truncated | np.asarray(written.is_truncated)
    return dataclasses.replace(rows, sample_id=np.asarray(written.sample_id), is_truncated=is_truncated)


def _reference_answers(setup: Setup, prompts: PromptBatch, step: int) -> list[list[int]]:
    """Each prompt's references in turn, over its generations and over the epochs."""
    answers, count = [], setup.config.sampling.num_generations
    for place, index in enumerate(np.asarray(prompts.prompt_id)):
        texts = setup.prompts.prompts[index].references
        epoch = (step * setup.config.train.prompts_per_step + place) // len(setup.prompts)
        chosen = [texts[(epoch * count + number) % len(texts)] for number in range(count)]
        answers += [[*setup.tokenizer.encode(text, add_special_tokens=False), _end_token(setup)] for text in chosen]
    return answers


def _as_student_ids(setup: Setup, written: Rollouts) -> list[list[int]]:
    """The teacher's answers as it wrote them, ended as the student ends; through their text where its tokenizer is another one."""
    teacher, answers = setup.teacher, []
    texts = [None] * written.tokens.shape[0] if teacher.shares_vocabulary else completions(written, teacher.tokenizer)
    for text, row, keep, is_cut in zip(texts, *map(np.asarray, (written.tokens, written.mask, written.is_truncated))):
        # An answer that was cut off has no end to teach; an end that the student does not stop at would teach it to run on.
        body = row[keep].tolist()[: None if is_cut else -1]
        body = body if text is None else setup.tokenizer.encode(text, add_special_tokens=False)
        answers.append(body if is_cut else [*body, _end_token(setup)])
    return answers


def _end_token(setup: Setup) -> int:
    """The stop token that the student ends its answers with."""
    stop, end = setup.decoding.stop_token_ids, setup.tokenizer.eos_token_id
    return end if end in stop else stop[0]


def scored(setup: Setup, batch: TrainBatch, needs: str) -> tuple[TrainBatch, Head | None]:
    """The batch on the devices with what a recipe needs of the teacher where it is not there yet, and of the student's start; and
    the teacher's head where the recipe wants to use it.
    """
    is_missing, batch = _is_unscored(batch, needs), with_reference(setup, shard_rows(batch, setup.mesh))
    if not is_missing:
        return batch, None
    teacher, estimator = setup.teacher, setup.config.estimator
    top_k = bind(estimator.recipe, estimator.options)[0].top_k if needs == "top_k" else 0
    scores = score(
        teacher.params, teacher.head, batch, config=teacher.checkpoint.config, needs=needs, tile=estimator.tile,
        parts=num_score_parts(setup, batch), mesh=setup.mesh, top_k=top_k,
    )  # fmt: skip
    return dataclasses.replace(batch, teacher=scores), teacher.head if needs == "vocabulary" else None


def rollout_metrics(setup: Setup, rollouts: Rollouts, step: int) -> Metrics:
    """Lengths in tokens, how completions ended, and by how many updates their policy is older than the one trained."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    if not len(tokens):
        return {}
    lengths, staleness = mask.sum(axis=1), step - np.asarray(rollouts.policy_version)
    last = tokens[np.arange(len(tokens)), mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)]
    return {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_min": float(lengths.min()),
        "rollout/length_p50": float(np.median(lengths)),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated_ratio": float(np.asarray(rollouts.is_truncated).mean()),
        "rollout/eos_rate": float((np.isin(last, setup.decoding.stop_token_ids) & (lengths > 0)).mean()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }


def _is_unscored(batch: TrainBatch, needs: str) -> bool:
    """Whether what a recipe needs of the teacher is still to be had of it."""
    stored = {"token": batch.teacher.token_logprobs, "top_k": batch.teacher.top_ids} if batch.teacher is not None else {}
    return needs != "none" and stored.get(needs) is None


def token_counts(setup: Setup, drawn: Drawn) -> Metrics:
    """What the step cost in tokens: drawn from the student, trained on, and read or written by the teacher, prompts included.

    What was drawn and read ahead for many steps counts for the one whose `told` tells of it.
    """
    config, batch = setup.config, drawn.batch
    trained, source = float(np.asarray(batch.mask).sum()), config.sampling.source
    recipe, _ = bind(config.estimator.recipe, config.estimator.options)
    passes = _is_unscored(batch, recipe.teacher) + (source == "teacher")
    seen = float((np.asarray((batch.teacher_view or batch).segment_ids) > 0).sum())
    return {
        "perf/generated_tokens": drawn.told.get("perf/generated_tokens", trained if source == "student" else 0.0),
        "perf/trained_tokens": trained,
        "perf/teacher_tokens": passes * seen + drawn.told.get("perf/annotated_tokens", 0.0),
    }
