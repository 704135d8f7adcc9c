"""How a judge that reads only text scores answers. Standard library only."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from opdjax.config.validation import require, require_ranges, require_types


@dataclasses.dataclass(frozen=True)
class RubricsConfig:
    """Rubrics for the answers to a prompt (ROPD, arXiv 2605.07396) and for the stages of an answer
    (RubricEM, arXiv 2605.10899).
    """

    # Number of the teacher's answers that a group is compared with: the first N, or all if there
    # are fewer; 0: none.
    num_references: int = 4
    # Smallest number of criteria in a rubric.
    min_criteria: int = 4
    # Largest number of criteria in a rubric.
    max_criteria: int = 12
    # binary: a criterion is met or not; graded: it is met to degree 0, 1 or 2.
    grades: Literal["binary", "graded"] = "binary"
    # signed: a criterion may also name a flaw, and an answer without it scores.
    polarity: Literal["positive", "signed"] = "positive"
    # group: one rubric for all rollouts of a prompt; student: one for each rollout (ablation).
    rubric_of: Literal["group", "student"] = "group"
    # Show references and rollouts to the verifier as one anonymous pool; false: say which is which
    # (ablation).
    blind: bool = True
    # When rubrics are written. every_step: from the rollouts of the step. frozen: once per prompt,
    # from answers of the untrained student (ablation). evolving: a prompt's criteria are kept from
    # visit to visit, new ones are added, and those that distinguish answers least are pruned
    # (RubricEM). given: never; only the prompt's own criteria (data.rubric_column) are used. In the
    # other modes these are added to the written ones.
    refresh: Literal["every_step", "frozen", "evolving", "given"] = "every_step"
    # Names of an answer's stages, in order; (): answers are not divided. Judges never see hidden
    # reasoning, whatever stage it is in.
    stage_names: tuple[str, ...] = ()
    # Regular expressions, one for each stage but the first. A stage begins at the first match after
    # the start of the stage before it.
    stage_markers: tuple[str, ...] = ()
    # evolving: largest number of criteria kept for each stage (one number for undivided answers);
    # (): 3, or max_criteria for undivided answers.
    stage_caps: tuple[int, ...] = ()
    # Rollouts of a pool that the verifier reads in one request, references not counted; 0: all.
    answers_per_call: int = 0
    # Longest part of an answer that a judge is shown, in characters.
    max_answer_chars: int = 24000
    # Further requests after an unusable reply; each one says what was wrong.
    max_reasks: int = 2
    # Stop the run if a larger share of a step's groups gets no reward.
    max_failed_share: float = 0.4
    # Directory whose files replace the package's judge prompts of the same name.
    templates: str = ""
    # Sample a step's prompts in this many parts: one part is judged while the next is sampled.
    draw_parts: int = 2

    def __post_init__(self):
        require_types(self, "rubrics.")
        ranges = dict.fromkeys(("min_criteria", "max_answer_chars", "draw_parts"), "at least 1")
        ranges |= {"num_references": "0 (none) or more", "answers_per_call": "0 (all) or more"}
        ranges |= {"max_reasks": "0 or more", "max_failed_share": "at least 0 and less than 1"}
        require_ranges(self, "rubrics.", ranges)
        low, high = self.min_criteria, self.max_criteria
        require(high >= low, "rubrics.max_criteria", high, f"at least rubrics.min_criteria, {low}")
        is_possible = self.rubric_of == "group" or self.refresh == "every_step"
        expected = f"group where rubrics.refresh is {self.refresh}: a rubric that outlives a step "
        expected += "belongs to a prompt, not to a single rollout"
        require(is_possible, "rubrics.rubric_of", self.rubric_of, expected)
        self._check_stages()

    def _check_stages(self):
        names, markers, caps = self.stage_names, self.stage_markers, self.stage_caps
        is_set = len(set(names)) == len(names) != 1
        require(is_set, "rubrics.stage_names", names, "two or more different names, or none")
        later, field = max(len(names) - 1, 0), "rubrics.stage_markers"
        expected = f"{later} regular expressions: where each stage but the first begins"
        require(len(markers) == later, field, markers, expected)
        for marker in markers:
            require(_compiles(marker), field, marker, "a regular expression of Python")
        count, field = max(len(names), 1), "rubrics.stage_caps"
        is_read = not caps or self.refresh == "evolving"
        require(is_read, field, caps, "none unless rubrics.refresh is evolving")
        require(len(caps) in (0, count), field, caps, f"{count} numbers")
        require(all(cap > 0 for cap in caps), field, caps, "at least 1 each")


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return True
