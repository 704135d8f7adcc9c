"""How a judge that reads only text scores answers."""

import re
from typing import Annotated, Literal

from opdjax.config.validation import Section, require

# A larger share of a step's groups without a reward stops the run: the judge is then at fault, not
# single answers.
MAX_FAILED_SHARE = 0.4


class RubricsConfig(Section):
    """Rubrics of answers (ROPD, arXiv 2605.07396) and of stages (RubricEM, arXiv 2605.10899)."""

    # Number of the teacher's answers that a group is compared with: the first N, or all if there
    # are fewer; 0: none.
    num_references: Annotated[int, "0 (none) or more"] = 4
    # Smallest and largest number of criteria in a rubric.
    num_criteria: tuple[int, int] = (4, 12)
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
    # (RubricEM). given: never; only the prompt's own criteria (data.columns) are used. In the
    # other modes these are added to the written ones.
    refresh: Literal["every_step", "frozen", "evolving", "given"] = "every_step"
    # An answer's stages in order, NAME=MARKER; a stage begins at the first match of its marker, a
    # regular expression, after the start of the stage before it. The first stage has only a NAME.
    # (): answers are not divided. Judges never see hidden reasoning, whatever stage it is in.
    stages: tuple[str, ...] = ()
    # evolving: largest number of criteria kept for each stage (one number for undivided answers);
    # (): 3, or the largest of num_criteria for undivided answers.
    stage_caps: tuple[int, ...] = ()
    # Rollouts of a pool that the verifier reads in one request, references not counted; 0: all.
    answers_per_call: Annotated[int, "0 (all) or more"] = 0
    # Directory whose files replace the package's judge prompts of the same name.
    templates: str = ""

    def __post_init__(self):
        super().__post_init__()
        low, high = self.num_criteria
        expected = "two numbers of at least 1, the smallest first"
        self.require(1 <= low <= high, "num_criteria", expected)
        is_possible = self.rubric_of == "group" or self.refresh == "every_step"
        expected = f"group where rubrics.refresh is {self.refresh}: a rubric that outlives a step "
        expected += "belongs to a prompt, not to a single rollout"
        self.require(is_possible, "rubric_of", expected)
        self._check_stages()

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the stages; (): answers are not divided."""
        return tuple(stage.partition("=")[0] for stage in self.stages)

    @property
    def stage_markers(self) -> tuple[str, ...]:
        """Where each stage but the first begins."""
        return tuple(stage.partition("=")[2] for stage in self.stages[1:])

    def _check_stages(self):
        names, caps = self.stage_names, self.stage_caps
        is_set = len(set(names)) == len(names) != 1
        self.require(is_set, "stages", "two or more different names, or none")
        is_marked = [bool(stage.partition("=")[2]) for stage in self.stages]
        expected = "a first stage without a marker, and NAME=MARKER for each of the others"
        self.require(is_marked == [i > 0 for i in range(len(names))], "stages", expected)
        for stage, marker in zip(self.stages[1:], self.stage_markers):
            try:
                re.compile(marker)
            except re.error:
                require(
                    False, "rubrics.stages", stage, "NAME=MARKER, a regular expression of Python"
                )
        count = max(len(names), 1)
        is_read = not caps or self.refresh == "evolving"
        self.require(is_read, "stage_caps", "none unless rubrics.refresh is evolving")
        self.require(len(caps) in (0, count), "stage_caps", f"{count} numbers")
        self.require(all(cap > 0 for cap in caps), "stage_caps", "at least 1 each")
