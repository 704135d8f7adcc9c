"""The source of rollouts that are judged by their text: drawn from the student as it is, held to rubrics over HTTP, scored.

A step's prompts are drawn in parts, and one part is judged while the next is drawn; the update waits for all of them, so that it
stays strictly on-policy. Of several hosts the lead alone asks judges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import jax
import numpy as np

from opdjax.api.client import ApiError
from opdjax.config import Config
from opdjax.data.chat import stage_ids
from opdjax.data.packing import to_train_batch
from opdjax.data.prompts import collate
from opdjax.estimators import bind
from opdjax.estimators.advantage import credit_matrix, group_advantage, spread_stages, stage_advantage, stage_balance
from opdjax.evals.evaluate import completions, graded
from opdjax.metrics import Timer
from opdjax.models.decoder import Params
from opdjax.prepare import Setup
from opdjax.processes import from_lead
from opdjax.rollouts import Drawn, SourceStoppedError, draw, packed, prompts_of
from opdjax.rubrics.criteria import FROZEN, CriteriaStore
from opdjax.rubrics.groups import Group, Judgement, as_row, group_of, judge_group, metrics_of, rubric_of
from opdjax.rubrics.line import Line, open_line
from opdjax.sharding import is_lead, num_row_shards, to_host
from opdjax.types import Metrics, PromptBatch, Rollouts, TrainBatch
from opdjax.workdir import WorkdirError, append_lines, read_lines

ROLES = ("rubricator", "verifier")
ROWS = "rubrics.jsonl"  # what judges said, by step


def is_judged(config: Config) -> bool:
    """Whether the config's recipe learns from what judges say of whole answers."""
    return bind(config.estimator.recipe, config.estimator.options)[0].reward in ("scalar", "rubric", "stages")


@contextlib.contextmanager
def open_judged(setup: Setup, workdir: pathlib.Path, first: int) -> Iterator[Judged]:
    """The source, from update `first` on; its calls end with it."""
    with contextlib.ExitStack() as opened:
        config, line = setup.config, None
        if is_lead():
            line = opened.enter_context(open_line({role: getattr(config, role) for role in ROLES}, config.api, config.rubrics, workdir))
        yield Judged(setup, workdir, first, line)


class Judged:
    """Every step's rollouts are drawn from the student as it is, and judged before they are trained on."""

    def __init__(self, setup: Setup, workdir: pathlib.Path, first: int, line: Line | None):
        self._setup, self._workdir, self._line, self.params = setup, workdir, line, None
        self._kind = "scalar" if bind(setup.config.estimator.recipe, setup.config.estimator.options)[0].reward == "scalar" else "rubric"
        self._criteria = CriteriaStore(setup.config.rubrics, workdir)
        if is_lead():
            self._criteria.restore(read_lines(workdir / ROWS))

    def publish(self, version: int, weights: Callable[[], Params], timer: Timer) -> None:
        """See `Source`."""
        self.params = weights()

    def take(self, step: int, timer: Timer) -> Drawn:
        """See `Source`."""
        if self._setup.config.rubrics.refresh == "frozen":
            self._freeze(step, timer)
        prompts = prompts_of(self._setup, step)
        rollouts, futures = self._draw(prompts, step, timer)
        with timer.phase("judge_wait"):
            correct = self._correct(rollouts)
            judgements, told = self._heard(futures, prompts, correct, step)
        with timer.phase("pack"):
            batch = self._credited(to_train_batch(rollouts, prompts), rollouts, *judgements)
            rows, filled = packed(self._setup, batch)
        return Drawn(prompts, rollouts, batch, rows, told | filled)

    def look_ahead(self, step: int) -> None:
        """See `Source`: the old weights are let go before there are new ones."""
        self.params = None

    def settle(self, version: int, timer: Timer) -> None:
        """See `Source`: nothing is drawn ahead."""

    def probe(self, step: int) -> None:
        """See `Source`: nothing is left out."""

    def _draw(self, prompts: PromptBatch, name: int, timer: Timer) -> tuple[Rollouts, list[Future]]:
        """The rollouts of the prompts, and what judges are going to say of each prompt's."""
        setup, parts, futures = self._setup, [], []
        for part in _parts(prompts, setup.config.rubrics.draw_parts, num_row_shards(setup.mesh)):
            with timer.phase("sample"):
                rollouts = to_host(draw(setup, self.params, part, name))
            parts.append(rollouts)
            if self._line is not None:
                futures += [self._line.submit(self._judge_one(group)) for group in self._groups(rollouts)]
        return jax.tree.map(lambda *columns: np.concatenate(columns), *parts), futures

    def _groups(self, rollouts: Rollouts) -> list[Group]:
        """The prompts' groups, each with the rubric or the criteria that it has from before."""
        texts, size = completions(rollouts, self._setup.tokenizer), self._setup.config.sampling.num_generations
        ids, is_cut = np.asarray(rollouts.prompt_id), np.asarray(rollouts.is_truncated).tolist()
        groups = []
        for start in range(0, len(texts), size):
            prompt, own = int(ids[start]), slice(start, start + size)
            row = self._setup.prompts.prompts[prompt]
            group = group_of(self._line.judge, prompt, as_question(row.prompt), row.references, texts[own], is_cut[own])
            groups.append(self._criteria.given(group) if self._kind == "rubric" else group)
        return groups

    async def _judge_one(self, group: Group) -> list[Judgement]:
        return await judge_group(self._line.judge, group, self._kind)

    def _correct(self, rollouts: Rollouts) -> np.ndarray | None:
        """1 for each right answer, where all answers are known; for the record alone."""
        answers = [self._setup.prompts.prompts[index].answer for index in np.asarray(rollouts.prompt_id)]
        if any(answer is None for answer in answers):
            return None
        return graded(rollouts, answers, self._setup.tokenizer, self._setup.config.evaluation.grader)

    def _heard(self, futures: list[Future], prompts: PromptBatch, correct, step: int) -> tuple[tuple[np.ndarray, np.ndarray], Metrics]:
        """((scores [B], stage scores [B, K]), what to tell), NaN for what nobody could say; in every process."""
        config = self._setup.config
        shape = (config.rows_per_step, max(len(config.rubrics.stage_names), 1))
        stopped, told = None, {}

        def on_lead() -> np.ndarray:
            nonlocal stopped, told
            found = np.full((shape[0], shape[1] + 2), np.nan, np.float32)
            try:
                per_group = self._line.results(futures)
            except ApiError as error:
                stopped = error
                self._line.keep_usage(step + 1)
            else:
                told = self._record(per_group, correct, step)
                _fill(found, per_group, config.sampling.num_generations)
                share = told["rubric/failed_share"]
                if share > config.rubrics.max_failed_share:
                    stopped = f"{share:.0%} of the groups have no reward ({_causes(told)}), more than rubrics.max_failed_share allows"
            found[:, -1] = 0 if stopped is None else 1
            return found

        found = from_lead(on_lead, np.zeros((shape[0], shape[1] + 2), np.float32))
        if found[0, -1]:
            raise SourceStoppedError(
                f"step {step + 1} has no rewards: {stopped or 'the first process says why'}; what was trained is kept, and the same "
                f"command continues {self._workdir} once the judge can be asked again"
            ) from (stopped if isinstance(stopped, ApiError) else None)
        return (found[:, 0], found[:, 1:-1]), told

    def _record(self, per_group: list[list[Judgement]], correct: np.ndarray | None, step: int) -> Metrics:
        """Write down what was said, and what is to be told of it."""
        config, size = self._setup.config, self._setup.config.sampling.num_generations
        flat = [(place, judgement) for place, judgements in enumerate(per_group) for judgement in judgements]
        right = (
            None if correct is None else [[int(correct[place * size + s]) for s in judgement.group.samples] for place, judgement in flat]
        )
        has_texts = bool(config.log.samples_every) and ((step + 1) % config.log.samples_every == 0 or step == 0)
        rows = []
        for number, (_, judgement) in enumerate(flat):
            kept = self._criteria.learn(judgement)
            row = as_row(judgement, step + 1, right and right[number], has_texts=has_texts)
            rows.append(row if kept is None else row | {"kept": kept})
        append_lines(self._workdir / ROWS, rows)
        is_failed = [sum(s is not None for j in judgements for s in j.scores) < 2 for judgements in per_group]
        told = metrics_of([judgement for _, judgement in flat], right)
        return (
            told
            | {"rubric/failed_groups": float(sum(is_failed)), "rubric/failed_share": float(np.mean(is_failed))}
            | self._line.keep_usage(step + 1)
        )

    def _credited(self, batch: TrainBatch, rollouts: Rollouts, scores: np.ndarray, by_stage: np.ndarray) -> TrainBatch:
        """The batch with its advantages; a rollout without a score is no part of it, in numerators and denominators alike."""
        config, size = self._setup.config, self._setup.config.sampling.num_generations
        is_scored = np.isfinite(scores)
        is_scored &= np.repeat(is_scored.reshape(-1, size).sum(axis=1) >= 2, size)
        scale, mask = config.estimator.advantage or "mean", np.asarray(batch.mask) & is_scored[:, None]
        if bind(config.estimator.recipe, config.estimator.options)[0].reward == "stages":
            advantages = self._by_stage(rollouts, mask, np.nan_to_num(by_stage), is_scored, scale)
        else:
            advantages = np.asarray(group_advantage(np.nan_to_num(scores), is_scored, size, scale))[:, None]
        advantages = np.where(mask, advantages, 0).astype(np.float32)
        segments = np.where(is_scored[:, None], np.asarray(batch.segment_ids), 0)
        return dataclasses.replace(batch, mask=mask, segment_ids=segments, advantages=advantages)

    def _by_stage(self, rollouts: Rollouts, mask: np.ndarray, scores: np.ndarray, is_scored: np.ndarray, scale: str) -> np.ndarray:
        config = self._setup.config
        size, count, estimator = config.sampling.num_generations, len(config.rubrics.stage_names), config.estimator
        ids = token_stages(rollouts, self._setup.tokenizer, config.rubrics.stage_markers)
        has_stage = np.stack([(np.asarray(rollouts.mask) & (ids == stage)).any(axis=1) for stage in range(count)], axis=1)
        credit = credit_matrix(estimator.stage_credit, count, estimator.stage_credit_matrix or ())
        advantages = spread_stages(stage_advantage(scores, has_stage, is_scored, credit, size, scale), ids)
        return np.asarray(advantages * stage_balance(ids, mask, count) if estimator.stage_token_mean else advantages)

    def _freeze(self, step: int, timer: Timer) -> None:
        """Before the first update, a rubric for every prompt that the run visits, from answers of the student as it is then."""
        setup, size = self._setup, self._setup.config.train.prompts_per_step
        visited = np.unique(np.concatenate([prompts_of(setup, s).prompt_id for s in range(setup.config.train.num_steps)]))
        is_missing = from_lead(lambda: np.isin(visited, self._criteria.unfrozen(visited.tolist())), np.zeros(len(visited), bool))
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
        rollouts, stopped = jax.tree.map(lambda x: x[: count * self._setup.config.sampling.num_generations], rollouts), None

        def on_lead() -> np.ndarray:
            nonlocal stopped
            groups = self._groups(rollouts)
            try:
                rubrics = self._line.results([self._line.submit(rubric_of(self._line.judge, group)) for group in groups])
                self._criteria.freeze({group.prompt_id: rubric for group, rubric in zip(groups, rubrics)})
            except ApiError as error:
                stopped = error
            self._line.keep_usage(0)
            return np.array(stopped is not None)

        if from_lead(on_lead, np.array(False)):
            raise SourceStoppedError(
                f"no rubrics can be had: {stopped or 'the first process says why'}; those that were made are kept, and the same command "
                f"continues {self._workdir} once the judge can be asked again"
            ) from stopped


def token_stages(rollouts: Rollouts, tokenizer, markers: Sequence[str]) -> np.ndarray:
    """`[B, T]`: the stage of each sampled token, counted from 0; -1 elsewhere."""
    tokens, mask = np.asarray(rollouts.tokens), np.asarray(rollouts.mask)
    found = np.full(tokens.shape, -1, np.int32)
    for row, keep in enumerate(mask):
        found[row, keep] = stage_ids(tokens[row, keep].tolist(), tokenizer, markers)
    return found


def as_question(prompt: str | Sequence[dict[str, str]]) -> str:
    """The prompt as judges read it: its text, or the turns of a conversation, each under its role."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in prompt)


def _parts(prompts: PromptBatch, count: int, shards: int) -> list[PromptBatch]:
    """The prompts in `count` parts, or as many fewer as divide them evenly over the devices."""
    size = len(prompts.prompt_id)
    count = max(n for n in range(1, min(count, size) + 1) if size % n == 0 and (n == 1 or size // n % shards == 0))
    return [
        jax.tree.map(lambda x, part=part: np.asarray(x)[part * (size // count) : (part + 1) * (size // count)], prompts)
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
    problems = {name.rpartition("/")[2]: int(count) for name, count in told.items() if name.startswith("rubric/problems/") and count}
    return ", ".join(f"{name} {count}" for name, count in problems.items()) or "too few rollouts were scored"
