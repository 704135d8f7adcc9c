"""Criteria that outlive a step: rubrics frozen before training, or a set of criteria that evolves
from visit to visit of a prompt.

Evolving criteria (RubricEM, arXiv 2605.10899, appendix C): what is in use at a prompt stays, new
ones join it, and where a stage has more than its cap those that tell the rollouts least apart are
dropped.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.judgement import Judgement, RolloutGroup, joined
from opdjax.judge.schema import Criterion, Rubric
from opdjax.judge.scores import share
from opdjax.runs.workdir import append_lines, read_lines

_DEFAULT_CAP = 3  # of a stage
FROZEN = "frozen_rubrics.jsonl"


class CriteriaStore:
    """What is known of each prompt before its rollouts are judged; of the lead process alone."""

    def __init__(self, config: RubricsConfig, workdir: pathlib.Path):
        self._config, self._file = config, workdir / FROZEN
        self._frozen: dict[int, Rubric | None] = {}
        self._in_use: dict[int, tuple[Criterion, ...]] = {}

    def restore(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take up what a run that is continued has written: its frozen rubrics, and in `rows` of
        rubrics.jsonl what was kept.
        """
        if self._config.refresh == "frozen":
            self._frozen = {
                row["prompt_id"]: row["rubric"] and _rubric(row["rubric"])
                for row in read_lines(self._file)
            }
        for row in rows:
            if row.get("kept") is not None:
                self._in_use[row["prompt_id"]] = tuple(
                    c for c in _rubric(row["rubric"]).criteria if c.id in row["kept"]
                )

    def without_frozen_rubric(self, prompt_ids: Iterable[int]) -> list[int]:
        """Those of the prompts whose rubric has not been asked for yet."""
        return [prompt for prompt in prompt_ids if prompt not in self._frozen]

    def freeze(self, rubrics: dict[int, Rubric | None]) -> None:
        """Keep these rubrics for good; None where none could be had, which is then asked for at
        each visit.
        """
        dumped = {
            prompt: rubric and [c.model_dump() for c in rubric.criteria]
            for prompt, rubric in rubrics.items()
        }
        append_lines(
            self._file,
            [{"prompt_id": prompt, "rubric": criteria} for prompt, criteria in dumped.items()],
        )
        self._frozen |= rubrics

    def with_existing(self, group: RolloutGroup, own: Sequence[Criterion] = ()) -> RolloutGroup:
        """The group with what its prompt has from before: its `own` criteria, a frozen rubric,
        criteria in use.
        """
        prompt, rubric = group.prompt_id, self._frozen.get(group.prompt_id)
        if self._config.refresh == "given":
            rubric = joined(own, ())
        return dataclasses.replace(
            group, rubric=rubric, existing=self._in_use.get(prompt, tuple(own))
        )

    def update(self, judgement: Judgement) -> list[str] | None:
        """The ids of the criteria that stay in use at this prompt; None where criteria do not
        evolve or no rollout was held to them.
        """
        if self._config.refresh != "evolving" or not any(judgement.verdicts):
            return None
        kept = pruned(judgement, self._config)
        self._in_use[judgement.group.prompt_id] = kept
        return [criterion.id for criterion in kept]


def pruned(judgement: Judgement, config: RubricsConfig) -> tuple[Criterion, ...]:
    """The criteria of each stage whose shares vary most over the rollouts, up to the stage's cap;
    of equal ones the older.

    The prompt's own criteria are kept, and take no place.
    """
    stages: Sequence[str | None] = config.stage_names or (None,)
    caps = config.stage_caps or (
        (_DEFAULT_CAP,) * len(stages) if config.stage_names else (config.max_criteria,)
    )
    verdicts = [found for found in judgement.verdicts if found is not None]
    spread = {
        criterion.id: statistics.pvariance([share(criterion, found[place]) for found in verdicts])
        for place, criterion in enumerate(judgement.rubric.criteria)
    }
    kept = {criterion.id for criterion in judgement.rubric.criteria if criterion.is_given}
    for stage, cap in zip(stages, caps):
        ranked = sorted(
            (c for c in judgement.rubric.criteria if c.stage == stage and not c.is_given),
            key=lambda c: -spread[c.id],
        )
        kept |= {criterion.id for criterion in ranked[:cap]}
    return tuple(criterion for criterion in judgement.rubric.criteria if criterion.id in kept)


def _rubric(criteria: Sequence[dict[str, Any]]) -> Rubric:
    return Rubric(tuple(Criterion(**criterion) for criterion in criteria))
