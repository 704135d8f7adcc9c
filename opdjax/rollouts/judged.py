"""The source of rollouts that are judged by their text: drawn from the student as it is, held to
rubrics over HTTP, scored.

A step's prompts are drawn in parts, and one part is judged while the next is drawn; the update
waits for all of them, so that it stays strictly on-policy. Of several hosts the lead alone asks
judges.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import jax
import numpy as np

from opdjax.config import Config
from opdjax.data.packing import to_train_batch
from opdjax.data.prompt_rows import Prompt
from opdjax.data.prompts import collate, indices_at
from opdjax.engine.evaluate import completions, graded
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
from opdjax.judge.reflection import reflect
from opdjax.judge.replies import ApiError
from opdjax.judge.schema import Criterion
from opdjax.models.decoder import Params
from opdjax.ops.multihost import from_process_zero, on_process_zero
from opdjax.ops.sharding import num_row_shards, to_host
from opdjax.rollouts.on_policy import draw, packed, prompts_of, with_credit
from opdjax.rollouts.privileged import with_context
from opdjax.rollouts.reward_advantages import credited, least_scored, only, reward_of, usable
from opdjax.rollouts.setup import Setup
from opdjax.rollouts.source import SourceStoppedError, StepData
from opdjax.runs.metrics import Timer
from opdjax.runs.workdir import WorkdirError, append_lines, read_lines
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch

ROLES = ("rubricator", "verifier")
ROWS = "rubrics.jsonl"  # what judges said, by step


@dataclasses.dataclass(frozen=True)
class JudgeScores:
    """What judges said of a step's rollouts; NaN where they could not."""

    scores: np.ndarray  # [B], in [0, 1]
    by_stage: np.ndarray  # [B, K]
    judged: list[list[Judgement]] | None  # by prompt; of the lead process alone
    told: Metrics


@contextlib.contextmanager
def open_judged(setup: Setup, workdir: pathlib.Path, first: int) -> Iterator[JudgedSource]:
    """The source, from update `first` on; its calls end with it."""
    with contextlib.ExitStack() as opened:
        background = on_process_zero(
            lambda: opened.enter_context(background_judge(setup.config, workdir))
        )
        yield JudgedSource(setup, workdir, first, background)


def background_judge(
    config: Config, workdir: pathlib.Path
) -> contextlib.AbstractContextManager[BackgroundJudge]:
    """The judge of the config, on a background thread."""
    return open_background_judge(
        {role: getattr(config, role) for role in ROLES}, config.api, config.rubrics, workdir
    )


class JudgedSource:
    """Every step's rollouts are drawn from the student as it is, and judged before they are trained
    on.
    """

    def __init__(
        self, setup: Setup, workdir: pathlib.Path, first: int, background: BackgroundJudge | None
    ):
        self._setup, self._workdir, self._background, self.params = setup, workdir, background, None
        self._kind = "scalar" if reward_of(setup.config) == "scalar" else "rubric"
        self._criteria, self._is_frozen = CriteriaStore(setup.config.rubrics, workdir), False
        on_process_zero(lambda: self._criteria.restore(read_lines(workdir / ROWS)))

    def publish(self, version: int, weights: Callable[[], Params], timer: Timer) -> None:
        """See `RolloutSource`."""
        self.params = weights()

    def next(self, step: int, timer: Timer) -> StepData:
        """See `RolloutSource`."""
        if self._setup.config.rubrics.refresh == "frozen" and not self._is_frozen:
            self._freeze(step, timer)
            self._is_frozen = True
        prompts = prompts_of(self._setup, step)
        rollouts, futures = self._draw(prompts, step, timer)
        with timer.phase("judge_wait"):
            heard = self._heard(futures, self._correct(rollouts), step)
        with timer.phase("pack"):
            batch = self._batch(prompts, rollouts, heard)
            rows, filled = packed(self._setup, batch)
        return StepData(prompts, rollouts, batch, rows, heard.told | filled)

    def prefetch(self, step: int) -> None:
        """See `RolloutSource`: the old weights are let go before there are new ones."""
        self.params = None

    def commit(self, version: int, timer: Timer) -> None:
        """See `RolloutSource`: nothing is drawn ahead."""

    def probe(self, step: int) -> None:
        """See `RolloutSource`: nothing is left out."""

    def _batch(self, prompts: PromptBatch, rollouts: Rollouts, heard: JudgeScores) -> TrainBatch:
        """Rows with their advantages, or with a teacher that is told what judges say."""
        setup = self._setup
        if reward_of(setup.config) != "none":
            batch, _ = with_credit(setup, to_train_batch(rollouts, prompts), rollouts)
            return credited(
                batch, rollouts, heard.scores, heard.by_stage, setup.config, setup.tokenizer
            )
        rows, is_told = with_context(setup, prompts, heard.judged)
        batch, _ = with_credit(setup, to_train_batch(rollouts, rows), rollouts)
        return only(batch, is_told & usable(heard.scores, setup.config))

    def _draw(self, prompts: PromptBatch, name: int, timer: Timer) -> tuple[Rollouts, list[Future]]:
        """The rollouts of the prompts, and what judges are going to say of each prompt's."""
        setup, parts, futures = self._setup, [], []
        for part in _parts(prompts, setup.config.rubrics.draw_parts, num_row_shards(setup.mesh)):
            with timer.phase("sample"):
                rollouts = to_host(draw(setup, self.params, part, name))
            parts.append(rollouts)
            if self._background is not None:
                futures += [
                    self._background.submit(self._judge_one(group))
                    for group in self._groups(rollouts)
                ]
        return jax.tree.map(lambda *columns: np.concatenate(columns), *parts), futures

    def _groups(self, rollouts: Rollouts) -> list[RolloutGroup]:
        """The prompts' groups, each with the rubric or the criteria that it has from before."""
        texts, size = (
            completions(rollouts, self._setup.tokenizer),
            self._setup.config.sampling.num_generations,
        )
        ids, is_cut = np.asarray(rollouts.prompt_id), np.asarray(rollouts.is_truncated).tolist()
        groups = []
        for start in range(0, len(texts), size):
            prompt, own = int(ids[start]), slice(start, start + size)
            row = self._setup.prompts.prompts[prompt]
            group = group_of(
                self._background.judge,
                prompt,
                as_question(row.prompt),
                row.references,
                texts[own],
                is_cut[own],
            )
            groups.append(
                self._criteria.with_existing(group, self._own_criteria(row))
                if self._kind == "rubric"
                else group
            )
        return groups

    def _own_criteria(self, row: Prompt) -> tuple[Criterion, ...]:
        """The prompt's own criteria, as a rubric has them."""
        grade = self._setup.config.rubrics.grades
        polarity = {False: "positive", True: "negative"}
        return tuple(
            Criterion(
                id=f"c{place + 1}",
                category="given",
                text=given.text,
                weight=given.weight,
                polarity=polarity[given.is_flaw],
                grade=grade,
                stage=given.stage,
                is_given=True,
            )
            for place, given in enumerate(row.criteria)
        )

    def judge(self, rollouts: Rollouts) -> list[list[Judgement]]:
        """What judges say of the rollouts (on the host), by prompt; of the lead alone, whose errors
        are the client's.
        """
        return self._background.results(
            [self._background.submit(self._judge_one(group)) for group in self._groups(rollouts)]
        )

    async def _judge_one(self, group: RolloutGroup) -> list[Judgement]:
        found = await judge_group(self._background.judge, group, self._kind)
        if "reflection" not in self._setup.config.judged_fields:
            return found
        return list(
            await asyncio.gather(
                *(reflect(self._background.judge, judgement) for judgement in found)
            )
        )

    def _correct(self, rollouts: Rollouts) -> np.ndarray | None:
        """1 for each right answer, where all answers are known; for the record alone."""
        answers = [
            self._setup.prompts.prompts[index].answer for index in np.asarray(rollouts.prompt_id)
        ]
        if any(answer is None for answer in answers):
            return None
        return graded(
            rollouts, answers, self._setup.tokenizer, self._setup.config.evaluation.grader
        )

    def _heard(self, futures: list[Future], correct: np.ndarray | None, step: int) -> JudgeScores:
        """What judges said of the step, in every process; SourceStoppedError where they cannot be
        asked or say too little.
        """
        config = self._setup.config
        shape = (config.rows_per_step, max(len(config.rubrics.stage_names), 1) + 2)
        judged, stopped, told = None, None, {}

        def on_process_zero() -> np.ndarray:
            nonlocal judged, stopped, told
            found = np.full(shape, np.nan, np.float32)
            try:
                judged = self._background.results(futures)
            except ApiError as error:
                stopped = error
                self._background.record_usage(step + 1)
            else:
                told = self._record(judged, correct, step)
                _fill(found, judged, config.sampling.num_generations)
                if told["rubric/failed_share"] > config.rubrics.max_failed_share:
                    stopped = f"of {told['rubric/failed_share']:.0%} of the groups nothing could be said ({_causes(told)})"
            found[:, -1] = stopped is not None
            return found

        found = from_process_zero(on_process_zero, np.zeros(shape, np.float32))
        if found[0, -1]:
            raise SourceStoppedError(
                f"step {step + 1} has no rewards: {stopped or 'the first process says why'}; what was trained is kept, and the same "
                f"command continues {self._workdir} once the judge can be asked again"
            ) from (stopped if isinstance(stopped, ApiError) else None)
        return JudgeScores(found[:, 0], found[:, 1:-1], judged, told)

    def _record(
        self, per_group: list[list[Judgement]], correct: np.ndarray | None, step: int
    ) -> Metrics:
        """Write down what was said, and what is to be told of it."""
        config, size = self._setup.config, self._setup.config.sampling.num_generations
        flat = [
            (place, judgement)
            for place, judgements in enumerate(per_group)
            for judgement in judgements
        ]
        right = (
            None
            if correct is None
            else [
                [int(correct[place * size + s]) for s in judgement.group.samples]
                for place, judgement in flat
            ]
        )
        has_texts = bool(config.log.samples_every) and (
            (step + 1) % config.log.samples_every == 0 or step == 0
        )
        rows = []
        for number, (_, judgement) in enumerate(flat):
            kept = self._criteria.update(judgement)
            row = as_row(judgement, step + 1, right and right[number], has_texts=has_texts)
            rows.append(row if kept is None else row | {"kept": kept})
        append_lines(self._workdir / ROWS, rows)
        least = least_scored(config)
        is_failed = [
            sum(s is not None for j in judgements for s in j.scores) < least
            for judgements in per_group
        ]
        told = metrics_of([judgement for _, judgement in flat], right)
        return (
            told
            | {
                "rubric/failed_groups": float(sum(is_failed)),
                "rubric/failed_share": float(np.mean(is_failed)),
            }
            | self._background.record_usage(step + 1)
        )

    def _freeze(self, step: int, timer: Timer) -> None:
        """Before the first update, a rubric for every prompt that the run visits, from answers of
        the student as it is then.
        """
        setup, size = self._setup, self._setup.config.train.prompts_per_step
        visited = np.unique(
            indices_at(
                0, size * setup.config.train.num_steps, len(setup.prompts), setup.config.seed
            )
        )
        is_missing = from_process_zero(
            lambda: np.isin(visited, self._criteria.without_frozen_rubric(visited.tolist())),
            np.zeros(len(visited), bool),
        )
        missing = visited[is_missing]
        if len(missing) and step:
            raise WorkdirError(
                f"{self._workdir / FROZEN} lacks the rubrics of {len(missing)} prompts, and the untrained student that they are made "
                "from is gone; put the file back or start in a new work directory"
            )
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            with timer.phase("sample"):
                rollouts = to_host(draw(setup, self.params, collate(setup.prompts, some, size), 0))
            with timer.phase("judge_wait"):
                self._keep_frozen(rollouts, len(some))

    def _keep_frozen(self, rollouts: Rollouts, count: int) -> None:
        """Rubrics of the first `count` prompts, asked for and kept."""
        rollouts, stopped = (
            jax.tree.map(
                lambda x: x[: count * self._setup.config.sampling.num_generations], rollouts
            ),
            None,
        )

        def on_process_zero() -> np.ndarray:
            nonlocal stopped
            groups = self._groups(rollouts)
            try:
                found = self._background.results(
                    [
                        self._background.submit(induce_or_none(self._background.judge, group))
                        for group in groups
                    ]
                )
                rubrics = {group.prompt_id: rubric for group, rubric in zip(groups, found)}
                lacking = [prompt for prompt, rubric in rubrics.items() if rubric is None]
                # A missing rubric is frozen too; where nobody answers, it is not the prompt that
                # has none.
                if len(lacking) > self._setup.config.rubrics.max_failed_share * len(rubrics):
                    stopped = f"{len(lacking)} of {len(rubrics)} prompts got none"
                    rubrics = {
                        prompt: rubric for prompt, rubric in rubrics.items() if rubric is not None
                    }
                self._criteria.freeze(rubrics)
            except ApiError as error:
                stopped = error
            self._background.record_usage(0)
            return np.array(stopped is not None)

        if from_process_zero(on_process_zero, np.array(False)):
            raise SourceStoppedError(
                f"no rubrics can be had: {stopped or 'the first process says why'}; those that were made are kept, and the same command "
                f"continues {self._workdir} once the judge can be asked again"
            ) from (stopped if isinstance(stopped, ApiError) else None)


def as_question(prompt: str | Sequence[dict[str, str]]) -> str:
    """The prompt as judges read it: its text, or the turns of a conversation, each under its role."""
    if isinstance(prompt, str):
        return prompt
    return (
        prompt[0]["content"]
        if len(prompt) == 1
        else "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in prompt)
    )


def _parts(prompts: PromptBatch, count: int, shards: int) -> list[PromptBatch]:
    """The prompts in `count` parts, or as many fewer as divide them evenly over the devices."""
    size = len(prompts.prompt_id)
    count = max(
        n
        for n in range(1, min(count, size) + 1)
        if size % n == 0 and (n == 1 or size // n % shards == 0)
    )
    return [
        jax.tree.map(
            lambda x, part=part: np.asarray(x)[
                part * (size // count) : (part + 1) * (size // count)
            ],
            prompts,
        )
        for part in range(count)
    ]


def _fill(found: np.ndarray, per_group: list[list[Judgement]], size: int) -> None:
    """The scores in column 0 and those of the stages in the next, by rollout."""
    for place, judgements in enumerate(per_group):
        for judgement in judgements:
            for number, sample in enumerate(judgement.group.samples):
                row = found[place * size + sample]
                if judgement.scores[number] is not None:
                    row[0] = judgement.scores[number]
                    row[1:-1] = judgement.stage_scores[number] if judgement.stage_scores else 0


def _causes(told: Metrics) -> str:
    problems = {
        name.rpartition("/")[2]: int(count)
        for name, count in told.items()
        if name.startswith("rubric/problems/") and count
    }
    return (
        ", ".join(f"{name} {count}" for name, count in problems.items())
        or "too few rollouts were scored"
    )
