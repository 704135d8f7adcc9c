"""Criteria that outlive a step: frozen rubrics, and criteria that evolve between visits, where new
ones are added and a stage over its cap drops those that separate the rollouts least (RubricEM,
arXiv 2605.10899, appendix C).
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.judgement import Judgement
from opdjax.judge.rubricator import joined
from opdjax.judge.schema import Criterion, RolloutGroup, Rubric, first_error
from opdjax.runs.workdir import append_lines, damaged, read_lines, require

_DEFAULT_CAP = 3  # criteria per stage
FROZEN = "frozen_rubrics.jsonl"


class CriteriaStore:
    """Rubrics and criteria of each prompt that outlive a step; used by process zero alone."""

    def __init__(self, config: RubricsConfig, workdir: pathlib.Path):
        self._config, self._file = config, workdir / FROZEN
        self._frozen: dict[int, Rubric | None] = {}
        self._in_use: dict[int, tuple[Criterion, ...]] = {}

    def restore(self, judgements: pathlib.Path) -> None:
        """Load a continued run's frozen rubrics, and from its rubrics.jsonl its criteria;
        WorkdirError at a row that holds no rubric.
        """
        for place, row in _rows(self._file) if self._config.refresh == "frozen" else ():
            self._frozen[row["prompt_id"]] = row["rubric"] and _rubric(row["rubric"], place)
        for place, row in _rows(judgements):
            if (kept := row.get("kept")) is not None:
                require(row, place, prompt_id=int, kept=list, rubric=list)
                criteria = _rubric(row["rubric"], place).criteria
                self._in_use[row["prompt_id"]] = tuple(c for c in criteria if c.id in kept)

    def without_frozen_rubric(self, prompt_ids: Iterable[int]) -> list[int]:
        """The prompts among these whose rubric has not been requested yet."""
        return [prompt for prompt in prompt_ids if prompt not in self._frozen]

    def freeze(self, rubrics: dict[int, Rubric | None]) -> None:
        """Store rubrics for the rest of the run.

        None: no rubric could be induced; one is then induced at each visit.
        """
        rows = [
            {"prompt_id": prompt, "rubric": rubric and [c.model_dump() for c in rubric.criteria]}
            for prompt, rubric in rubrics.items()
        ]
        append_lines(self._file, rows)
        self._frozen |= rubrics

    def with_existing(self, group: RolloutGroup, own: Sequence[Criterion] = ()) -> RolloutGroup:
        """The group with its prompt's frozen rubric, criteria in use, or `own` (given) criteria."""
        rubric = self._frozen.get(group.prompt_id)
        if self._config.refresh == "given":
            rubric = joined(own, ())
        existing = self._in_use.get(group.prompt_id, tuple(own))
        return dataclasses.replace(group, rubric=rubric, existing=existing)

    def update(self, judgement: Judgement) -> list[str] | None:
        """Keep the criteria that separate the rollouts; returns their ids.

        None if criteria do not evolve, or if no rollout has verdicts.
        """
        if self._config.refresh != "evolving" or not any(judgement.verdicts):
            return None
        kept = pruned(judgement, self._config)
        self._in_use[judgement.group.prompt_id] = kept
        return [criterion.id for criterion in kept]


def pruned(judgement: Judgement, config: RubricsConfig) -> tuple[Criterion, ...]:
    """The criteria of each stage whose shares vary most over the rollouts, up to the stage's cap.

    Ties go to the older criterion. Given criteria are always kept and do not count.
    """
    stages: Sequence[str | None] = config.stage_names or (None,)
    default = (_DEFAULT_CAP,) * len(stages) if config.stage_names else (config.num_criteria[1],)
    criteria = judgement.rubric.criteria
    verdicts = [row for row in judgement.verdicts if row is not None]
    variance = {
        criterion.id: statistics.pvariance([criterion.share(row[place]) for row in verdicts])
        for place, criterion in enumerate(criteria)
    }
    kept = {criterion.id for criterion in criteria if criterion.is_given}
    for stage, cap in zip(stages, config.stage_caps or default):
        candidates = [c for c in criteria if c.stage == stage and not c.is_given]
        ranked = sorted(candidates, key=lambda c: -variance[c.id])
        kept |= {criterion.id for criterion in ranked[:cap]}
    return tuple(criterion for criterion in criteria if criterion.id in kept)


def _rows(file: pathlib.Path) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((f"{file}, line {number}", row) for number, row in enumerate(read_lines(file), 1))


def _rubric(criteria: Sequence[dict[str, Any]], place: str) -> Rubric:
    try:
        return Rubric(tuple(Criterion(**criterion) for criterion in criteria))
    except pydantic.ValidationError as error:
        raise damaged(place, first_error(error), "criteria as they were written") from error
    except TypeError as error:  # no object, or keys that are no names
        raise damaged(place, repr(criteria)[:60], "criteria as they were written") from error
