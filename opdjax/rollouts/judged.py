"""The source of rollouts that judges score over HTTP: one part of a step's prompts is judged while
the next is sampled; the update waits for all parts and so stays strictly on-policy. Only process
zero sends requests to judges.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

import jax
import numpy as np

from opdjax.config import Config
from opdjax.config.rubrics import MAX_FAILED_SHARE
from opdjax.data.chat import Messages, text_of
from opdjax.data.packing import to_train_batch
from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import collate, indices_at, padded_width, prompt_ids
from opdjax.engine.evaluate import completions
from opdjax.judge.background import BackgroundJudge, open_background_judge
from opdjax.judge.criteria import FROZEN, CriteriaStore
from opdjax.judge.judgement import (
    Judgement,
    RolloutGroup,
    as_row,
    group_of,
    induce_or_none,
    judge_group,
    metrics_of,
)
from opdjax.judge.reflection import reflect, rubric_text, verdict_text
from opdjax.judge.replies import ApiError
from opdjax.judge.schema import Criterion
from opdjax.judge.structured_output import Tally, described
from opdjax.ops.multihost import agreed, from_process_zero, on_process_zero
from opdjax.ops.sharding import num_row_shards, to_host
from opdjax.rollouts.on_policy import draw, prompts_of
from opdjax.rollouts.rows import (
    has_usable_score,
    keep_rollouts,
    min_scored,
    packed,
    right_answers,
    with_advantages,
    with_option_columns,
)
from opdjax.rollouts.setup import Setup
from opdjax.rollouts.source import RolloutSource, SourceStoppedError, StepData
from opdjax.runs.metrics import Timer
from opdjax.runs.workdir import WorkdirError, append_lines
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch

ROLES = ("rubricator", "verifier")
# A step's prompts are sampled in this many parts: one part is judged while the next is sampled. A
# third part would make the sampler's batches smaller without hiding more of the judges' time.
_DRAW_PARTS = 2
ROWS = "rubrics.jsonl"  # the judgements of every step


def background_judge(
    config: Config,
    workdir: pathlib.Path,
    is_stop_requested: Callable[[], bool] = lambda: False,
) -> contextlib.AbstractContextManager[BackgroundJudge]:
    """The judge of the config, on a background thread; at the end its requests are cancelled."""
    endpoints = {role: config.endpoint(role) for role in ROLES if getattr(config, role).model}
    given = config.api, config.rubrics, workdir, is_stop_requested
    return open_background_judge(endpoints, *given)


class JudgedSource(RolloutSource):
    """Samples every step's rollouts from the current student and has them judged."""

    def __init__(self, setup: Setup, workdir: pathlib.Path, background: BackgroundJudge | None):
        self._setup, self._workdir, self._background = setup, workdir, background
        self._kind = "scalar" if setup.config.recipe.reward == "scalar" else "rubric"
        self._criteria, self._is_frozen = CriteriaStore(setup.config.rubrics, workdir), False
        on_process_zero(lambda: self._criteria.restore(workdir / ROWS))

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        setup, config = self._setup, self._setup.config
        if config.rubrics.refresh == "frozen" and not self._is_frozen:
            self._freeze_rubrics(step, timer)
            self._is_frozen = True
        prompts = prompts_of(setup.prompts, config, step)
        rollouts, futures = self._sample_and_submit(prompts, step, timer)
        with timer.phase("judge_wait"):
            judgements, metrics = self._wait_for_judges(futures, self._is_correct(rollouts), step)
            scores = self._scores(judgements)
        with timer.phase("pack"):
            batch = self._batch(prompts, rollouts, scores, judgements)
            rows, packing = packed(batch, config.train, setup.mesh)
        return StepData(rollouts, batch, rows, metrics | packing)

    def judge(self, rollouts: Rollouts) -> list[list[Judgement]]:
        """The judgements of rollouts, by prompt, on process zero; raises the client's errors."""
        return self._background.results(self._submit(rollouts))

    def _batch(
        self,
        prompts: PromptBatch,
        rollouts: Rollouts,
        scores: np.ndarray,
        judgements: list[list[Judgement]] | None,
    ) -> TrainBatch:
        """Rows with advantages, or with a teacher that reads the judges' texts."""
        setup, config = self._setup, self._setup.config
        is_rewarded, has_context = config.recipe.is_rewarded, None
        if not is_rewarded:
            prompts, has_context = with_context(setup, prompts, judgements)
        batch = to_train_batch(rollouts, prompts)
        batch, _ = with_option_columns(batch, rollouts, config, setup.prompts, setup.tokenizer)
        if not is_rewarded:
            return keep_rollouts(batch, has_context & has_usable_score(scores[:, 0], config))
        return with_advantages(batch, rollouts, scores, config, setup.tokenizer)

    def _sample_and_submit(
        self, prompts: PromptBatch, stream: int, timer: Timer
    ) -> tuple[Rollouts, list[Future]]:
        """The rollouts of the prompts, and the pending judgements of each prompt's group."""
        setup, parts, futures = self._setup, [], []
        for part in _parts(prompts, _DRAW_PARTS, num_row_shards(setup.mesh)):
            with timer.phase("sample"):
                rollouts = to_host(draw(setup, self.params, part, stream))
            parts.append(rollouts)
            if self._background is not None:
                futures += self._submit(rollouts)
        return jax.tree.map(lambda *columns: np.concatenate(columns), *parts), futures

    def _submit(self, rollouts: Rollouts) -> list[Future]:
        submit = self._background.submit
        return [submit(self._judge_group(group)) for group in self._groups(rollouts)]

    async def _judge_group(self, group: RolloutGroup) -> list[Judgement]:
        judge = self._background.judge
        found = await judge_group(judge, group, self._kind)
        if "reflection" not in self._setup.config.judged_fields:
            return found
        return list(await asyncio.gather(*(reflect(judge, judgement) for judgement in found)))

    def _groups(self, rollouts: Rollouts) -> list[RolloutGroup]:
        """The groups of the prompts, with the rubrics or criteria that exist already."""
        setup, size = self._setup, self._setup.config.sampling.num_generations
        texts = completions(rollouts, setup.tokenizer)
        ids = np.asarray(rollouts.prompt_id)
        is_truncated = np.asarray(rollouts.is_truncated).tolist()
        groups = []
        for start in range(0, len(texts), size):
            prompt, own = int(ids[start]), slice(start, start + size)
            row = setup.prompts.prompts[prompt]
            question, judge = as_question(row.with_tools), self._background.judge
            group = group_of(judge, prompt, question, row.references, texts[own], is_truncated[own])
            if self._kind == "rubric":
                group = self._criteria.with_existing(group, self._own_criteria(row))
            groups.append(group)
        return groups

    def _own_criteria(self, row: Prompt) -> tuple[Criterion, ...]:
        """The criteria that come with the prompt, in the form of a rubric's."""
        return tuple(
            Criterion(
                id=f"c{place + 1}",
                category="given",
                text=given.text,
                weight=given.weight,
                polarity="negative" if given.is_flaw else "positive",
                grade=self._setup.config.rubrics.grades,
                stage=given.stage,
                is_given=True,
            )
            for place, given in enumerate(row.criteria)
        )

    def _is_correct(self, rollouts: Rollouts) -> np.ndarray | None:
        """1 for each right answer; only recorded. None if the data lack an answer."""
        texts, setup = completions(rollouts, self._setup.tokenizer), self._setup
        return right_answers(setup.prompts, rollouts.prompt_id, texts, setup.config.grader)

    def _wait_for_judges(
        self, futures: list[Future], is_correct: np.ndarray | None, step: int
    ) -> tuple[list[list[Judgement]] | None, Metrics]:
        """(judgements by prompt, metrics) on process zero; SourceStoppedError if judging failed."""
        judgements, metrics, problem = on_process_zero(
            lambda: self._collect(futures, is_correct, step)
        ) or (None, {}, None)
        self._stop_if(problem, f"step {step + 1} has no rewards", "what was trained is saved")
        return judgements, metrics

    def _scores(self, judgements: list[list[Judgement]] | None) -> np.ndarray:
        """Scores of the rollouts, then of their stages, `[B, 1 + K]`; NaN where judging failed."""
        config, size = self._setup.config, self._setup.config.sampling.num_generations
        shape = (config.rows_per_step, 1 + max(len(config.rubrics.stage_names), 1))

        def read() -> np.ndarray:
            found = np.full(shape, np.nan, np.float32)
            for rollout, judgement, number in scored_rollouts(judgements, size):
                stages = judgement.stage_scores
                found[rollout, 0] = judgement.scores[number]
                found[rollout, 1:] = stages[number] if stages else 0
            return found

        return from_process_zero(read, np.zeros(shape, np.float32))

    def _stop_if(self, problem: ApiError | str | None, found: str, kept: str) -> None:
        if agreed(problem is not None):
            raise SourceStoppedError(
                f"{found}: {problem or 'process zero prints the reason'}; {kept}, and the same "
                f"command continues {self._workdir} once the judge answers again"
            ) from (problem if isinstance(problem, ApiError) else None)

    def _collect(
        self, futures: list[Future], is_correct: np.ndarray | None, step: int
    ) -> tuple[list[list[Judgement]] | None, Metrics, ApiError | str | None]:
        try:
            judgements = self._background.results(futures)
        except ApiError as error:
            self._background.record_usage(step + 1)
            return None, {}, error
        metrics = self._record(judgements, is_correct, step)
        failed = metrics["rubric/failed_share"]
        if failed <= MAX_FAILED_SHARE:
            return judgements, metrics, None
        causes = described(each.tally for group in judgements for each in group)
        return judgements, metrics, f"{failed:.0%} of the groups failed ({causes})"

    def _record(
        self, judgements: list[list[Judgement]], is_correct: np.ndarray | None, step: int
    ) -> Metrics:
        """Append the judgements to rubrics.jsonl and return their metrics."""
        config, size = self._setup.config, self._setup.config.sampling.num_generations
        flat = [(place, each) for place, group in enumerate(judgements) for each in group]
        right = None
        if is_correct is not None:
            marks = lambda place, each: [int(is_correct[place * size + s]) for s in each]
            right = [marks(place, each.group.samples) for place, each in flat]
        every = config.log.samples_every
        has_texts = bool(every) and ((step + 1) % every == 0 or step == 0)
        rows = []
        for number, (_, judgement) in enumerate(flat):
            kept = self._criteria.update(judgement)
            row = as_row(judgement, step + 1, right and right[number], has_texts=has_texts)
            rows.append(row if kept is None else row | {"kept": kept})
        append_lines(self._workdir / ROWS, rows)
        num_scored = [sum(s is not None for j in group for s in j.scores) for group in judgements]
        is_failed = [count < min_scored(config) for count in num_scored]
        metrics = metrics_of([judgement for _, judgement in flat], right)
        metrics["rubric/failed_groups"] = float(sum(is_failed))
        metrics["rubric/failed_share"] = float(np.mean(is_failed))
        return metrics | self._background.record_usage(step + 1)

    def _freeze_rubrics(self, step: int, timer: Timer) -> None:
        """Have a rubric of every prompt of the run written from the untrained student's answers."""
        setup, config = self._setup, self._setup.config
        size = config.train.prompts_per_step
        count = size * config.train.num_steps
        visited = np.unique(indices_at(0, count, len(setup.prompts), config.seed))
        is_missing = from_process_zero(
            lambda: np.isin(visited, self._criteria.without_frozen_rubric(visited.tolist())),
            np.zeros(len(visited), bool),
        )
        missing = visited[is_missing]
        if len(missing) and step:
            raise WorkdirError(
                f"{self._workdir / FROZEN} lacks the rubrics of {len(missing)} prompts, and the "
                "untrained student that they are made from is gone; put the file back or start in "
                "a new work directory"
            )
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            with timer.phase("sample"):
                rollouts = to_host(draw(setup, self.params, collate(setup.prompts, some, size), 0))
            num_rows = len(some) * config.sampling.num_generations
            rollouts = jax.tree.map(lambda x, end=num_rows: x[:end], rollouts)
            with timer.phase("judge_wait"):
                problem = on_process_zero(partial(self._store_rubrics, rollouts))
            self._stop_if(problem, "the frozen rubrics are incomplete", "finished ones are stored")

    def _store_rubrics(self, rollouts: Rollouts) -> ApiError | str | None:
        """Have rubrics written and store them; return why the run must stop."""
        background, groups, problem = self._background, self._groups(rollouts), None
        tally = Tally()
        submit = lambda group: background.submit(induce_or_none(background.judge, group, tally))
        requests = [submit(group) for group in groups]
        try:
            found = background.results(requests)
        except ApiError as error:
            return error
        finally:
            background.record_usage(0)
        rubrics = {group.prompt_id: rubric for group, rubric in zip(groups, found)}
        written = {prompt: rubric for prompt, rubric in rubrics.items() if rubric is not None}
        num_lacking = len(rubrics) - len(written)
        # A missing rubric is frozen too, unless many are missing: then the judge is at fault.
        if num_lacking > MAX_FAILED_SHARE * len(rubrics):
            found = f"{num_lacking} of {len(rubrics)} prompts have no rubric"
            problem = f"{found} ({described([tally])})"
            rubrics = written
        self._criteria.freeze(rubrics)
        return problem


def as_question(prompt: str | Messages) -> str:
    """The prompt as judges read it: its text, or the turns of a conversation with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return text_of(prompt[0])
    return "\n\n".join(f"[{turn['role']}]\n{text_of(turn)}" for turn in prompt)


def _parts(prompts: PromptBatch, count: int, shards: int) -> list[PromptBatch]:
    """The prompts in at most `count` equal parts that divide evenly over the devices."""
    size = len(prompts.prompt_id)
    divides = lambda n: size % n == 0 and (n == 1 or size // n % shards == 0)
    count = max(n for n in range(1, min(count, size) + 1) if divides(n))
    ends = range(0, size + 1, size // count)
    cut = lambda start, end: jax.tree.map(lambda x: np.asarray(x)[start:end], prompts)
    return [cut(start, end) for start, end in itertools.pairwise(ends)]


# Privileged context: the teacher of each rollout reads its rubric, its verdicts, or a reflection


def with_context(
    setup: Setup, prompts: PromptBatch, judgements: Sequence[Sequence[Judgement]] | None
) -> tuple[PromptBatch, np.ndarray]:
    """The prompts by rollout `[B]` with teacher prompts from judgements, and which have one."""
    repeat = lambda x: np.repeat(np.asarray(x), setup.config.sampling.num_generations, axis=0)
    rows = PromptBatch(repeat(prompts.tokens), repeat(prompts.mask), repeat(prompts.prompt_id))
    count = len(rows.prompt_id)
    ids = on_process_zero(lambda: _context_ids(setup, rows, judgements))
    width = from_process_zero(lambda: np.array(padded_width(max(map(len, ids)) or 1)), np.array(0))

    def padded() -> np.ndarray:
        tokens = np.full((count, int(width)), -1, np.int32)
        for row, found in enumerate(ids):
            tokens[row, int(width) - len(found) :] = found
        return tokens

    tokens = from_process_zero(padded, np.zeros((count, int(width)), np.int32))
    mask = tokens >= 0
    rows = dataclasses.replace(rows, teacher_tokens=np.maximum(tokens, 0), teacher_mask=mask)
    return rows, mask.any(axis=1)


def scored_rollouts(
    judgements: Sequence[Sequence[Judgement]], size: int
) -> Iterator[tuple[int, Judgement, int]]:
    """(rollout, its judgement, its place in that) of each rollout with a score, `size` a prompt."""
    for prompt, group in enumerate(judgements):
        for judgement in group:
            for place, sample in enumerate(judgement.group.samples):
                if judgement.scores[place] is not None:
                    yield prompt * size + sample, judgement, place


def _context_ids(
    setup: Setup, rows: PromptBatch, judgements: Sequence[Sequence[Judgement]]
) -> list[tuple[int, ...]]:
    """Token ids of each rollout's teacher prompt; () if it was not judged, or is too long."""
    data, size = setup.config.data, setup.config.sampling.num_generations
    found: list[tuple[int, ...]] = [()] * len(rows.prompt_id)
    for rollout, judgement, place in scored_rollouts(judgements, size):
        texts = {
            "rubric": rubric_text(judgement),
            "verdicts": verdict_text(judgement, place),
            "reflection": judgement.reflections[place] if judgement.reflections else "",
        }
        row = setup.prompts.prompts[int(rows.prompt_id[rollout])]
        where, tokenizer = f"a prompt of {data.source}", setup.teacher.tokenizer
        ids = prompt_ids(row, data, tokenizer, where, of_teacher=True, judge_texts=texts)
        found[rollout] = ids if len(ids) <= data.max_teacher_prompt_length else ()
    return found
