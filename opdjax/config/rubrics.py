"""How a judge that reads text alone says what an answer is worth. Standard library only."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from opdjax.config.validation import require, require_types


@dataclasses.dataclass(frozen=True)
class RubricsConfig:
    """Rubrics of a prompt's answers (ROPD, arXiv 2605.07396) and of their stages (RubricEM, arXiv
    2605.10899).
    """

    # a group is contrasted with the first so many answers of the teacher (m), or all where there
    # are fewer; 0: none
    num_references: int = 4
    min_criteria: int = 4  # of a rubric
    max_criteria: int = 12
    grades: Literal["binary", "graded"] = "binary"  # a criterion is met or not, or 0, 1, 2
    polarity: Literal["positive", "signed"] = (
        "positive"  # signed: a criterion may also name a flaw, whose absence scores
    )
    rubric_of: Literal["group", "student"] = (
        "group"  # one rubric for all rollouts of a prompt, or one for each (ablation)
    )
    # the verifier sees references and rollouts as one anonymous pool; false: it is told which is
    # which (ablation)
    blind: bool = True
    # every_step: induced from the rollouts at hand. frozen: once for each prompt, from answers of
    # the untrained student (ablation). evolving: criteria of a prompt stay from visit to visit, new
    # ones come, those that tell least apart are pruned (RubricEM). given: the prompt's own
    # (data.rubric_column) alone, no rubricator is asked; with the others they stand beside what is
    # induced
    refresh: Literal["every_step", "frozen", "evolving", "given"] = "every_step"
    # Stages of an answer, in their order, and for each but the first the regular expression whose
    # first match, after the start of the stage before, begins it; (): answers are not divided. Of
    # what is thought aloud judges see nothing, whatever stage it is in
    stage_names: tuple[str, ...] = ()
    stage_markers: tuple[str, ...] = ()
    stage_caps: tuple[
        int, ...
    ] = ()  # evolving: criteria kept of each stage (of an undivided answer, one number); (): 3, or max_criteria
    answers_per_call: int = (
        0  # of a pool that the verifier reads at a time, references not counted; 0: all
    )
    max_answer_chars: int = 24000  # of an answer that a judge is shown
    max_reasks: int = 2  # further asks for a reply that cannot be used, each with what was wrong
    max_failed_share: float = 0.4  # of a step's groups; where more have no reward, the run stops
    templates: str = ""  # directory whose files replace the package's prompts of the same name
    draw_parts: int = (
        2  # a step's prompts are drawn in so many parts: one is judged while the next is drawn
    )

    def __post_init__(self):
        require_types(self, "rubrics.")
        require(
            self.num_references >= 0,
            "rubrics.num_references",
            self.num_references,
            "0 (none) or more",
        )
        for name in ("min_criteria", "max_answer_chars", "draw_parts"):
            require(getattr(self, name) > 0, f"rubrics.{name}", getattr(self, name), "at least 1")
        low, high = self.min_criteria, self.max_criteria
        require(high >= low, "rubrics.max_criteria", high, f"at least rubrics.min_criteria, {low}")
        require(
            self.answers_per_call >= 0,
            "rubrics.answers_per_call",
            self.answers_per_call,
            "0 (all) or more",
        )
        require(self.max_reasks >= 0, "rubrics.max_reasks", self.max_reasks, "0 or more")
        require(
            0 <= self.max_failed_share < 1,
            "rubrics.max_failed_share",
            self.max_failed_share,
            "at least 0 and less than 1",
        )
        is_prompts = self.rubric_of == "group" or self.refresh == "every_step"
        expected = f"group where rubrics.refresh is {self.refresh}: what outlives a step belongs to a prompt, and to no single rollout"
        require(is_prompts, "rubrics.rubric_of", self.rubric_of, expected)
        self._check_stages()

    def _check_stages(self):
        names, markers, caps = self.stage_names, self.stage_markers, self.stage_caps
        require(
            len(set(names)) == len(names) != 1,
            "rubrics.stage_names",
            names,
            "two or more different names, or none",
        )
        expected = (
            f"{max(len(names) - 1, 0)} regular expressions: where each stage but the first begins"
        )
        require(len(markers) == max(len(names) - 1, 0), "rubrics.stage_markers", markers, expected)
        for marker in markers:
            require(
                _compiles(marker), "rubrics.stage_markers", marker, "a regular expression of Python"
            )
        is_evolving, count = self.refresh == "evolving", max(len(names), 1)
        require(
            not caps or is_evolving,
            "rubrics.stage_caps",
            caps,
            "none unless rubrics.refresh is evolving",
        )
        require(len(caps) in (0, count), "rubrics.stage_caps", caps, f"{count} numbers")
        require(all(cap > 0 for cap in caps), "rubrics.stage_caps", caps, "at least 1 each")


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return True
