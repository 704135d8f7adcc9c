"""How completions are sampled, for training and for evaluation."""

import re
from typing import Annotated, Literal

from opdjax.config.data import columns_of
from opdjax.config.validation import Section

# Names of `evaluation.grader`, besides auto, regex:PATTERN and FILE.py:FUNCTION.
GRADERS = ("gsm8k", "last_number", "boxed", "choice", "exact", "tasks", "ifeval")


def is_own_function(grader: str) -> bool:
    """Whether a grader is FILE.py:FUNCTION: a file that is run."""
    return re.fullmatch(r".+\.py:\w+", grader) is not None


class SamplingConfig(Section):
    """The completions that are trained on, and how they are sampled."""

    # Completions per prompt.
    num_generations: Annotated[int, "at least 1"] = 1
    # Longest completion in tokens, including the stop token.
    max_completion_length: Annotated[int, "at least 1"] = 512
    # Temperature of sampling. The student's own samples are also scored at it.
    temperature: Annotated[float, "more than 0"] = 1.0
    # Nucleus sampling: keep the most likely tokens up to this total probability; 1: off.
    top_p: Annotated[float, "more than 0 and at most 1"] = 1.0
    # Keep this many of the most likely tokens; 0: off.
    top_k: Annotated[int, "0 (off) or more"] = 0
    # Further stop tokens, besides the checkpoint's end-of-sequence ids.
    stop_token_ids: tuple[int, ...] = ()
    # Texts that end an answer, be it sampled, given or evaluated; the answer keeps the token that
    # completes one of them. Also those of the checkpoint's generation config.
    stop_strings: tuple[str, ...] = ()
    # Who writes the completions. student: on-policy samples; teacher: samples of the teacher;
    # references: the data's own answers.
    completions_from: Literal["student", "teacher", "references"] = "student"
    # Where completions_from is teacher or references: the share of rows that the student samples
    # instead (lambda of GKD, arXiv 2306.13649), drawn for each row by itself.
    student_fraction: Annotated[float, "from 0 to 1"] = 0.0
    # Rows decoded at a time, also in evaluations; a finished row makes room for the next. Must be a
    # multiple of mesh.data x mesh.fsdp. None: all rows of a step, the fastest if memory allows and
    # lengths are similar; 512 rows of an evaluation.
    slots: Annotated[int | None, "at least 1, or none for all rows"] = None
    # Dtype of cached keys and values; auto: that of the forward pass. int8 halves bfloat16's memory
    # and samples from a slightly different distribution than the trained one: log-probs of the
    # built-in pair differ by 0.004 nats on average.
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"

    def __post_init__(self):
        super().__post_init__()
        self.require(all(self.stop_strings), "stop_strings", "texts of one character or more")

    @property
    def has_filter(self) -> bool:
        """Whether some tokens cannot be sampled."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def student_samples(self) -> bool:
        """Whether the student writes some or all of the completions."""
        return self.completions_from == "student" or self.student_fraction > 0


class EvaluationConfig(Section):
    """Answers to held-out prompts, before, during and after training."""

    # Prompts in the form of data.source, or suite:NAME, such as suite:math500,aime24, of gsm8k,
    # math500, aime24, aime25, amc23, minerva, hmmt25, hmmt25_nov, gpqa_diamond,
    # sciknoweval_chemistry and ifeval; NAME=SOURCE for a copy. None: no evaluation.
    source: str | None = "arithmetic:test"
    # What is read of a completion and compared with the answer: gsm8k (the number after ####),
    # last_number, boxed (the last \boxed{...}, as mathematics), choice (a letter from A to J),
    # exact (the whole text), tasks (the last <answer>...</answer>, or the whole text, by the task's
    # own scorer), regex:PATTERN (its last match, or the first group of it), FILE.py:FUNCTION (your
    # own, called with the completion and the answer), or auto: gsm8k for the built-in task, tasks
    # for tasks:NAME#SPLIT, else last_number.
    grader: str = "auto"
    # Use the first N prompts, of each benchmark if there are several.
    num_prompts: Annotated[int, "at least 1"] = 512
    # Sampled answers per prompt: the 8 of avg@8 and pass@8.
    num_samples: Annotated[int, "at least 1"] = 8
    # Temperatures of the sampled answers. All scores are those of the first; the untrained student
    # is also evaluated at the others.
    temperatures: Annotated[tuple[float, ...], "one or more different numbers above 0"] = (1.0,)
    # Nucleus sampling: keep the most likely tokens up to this total probability; 1: off.
    top_p: Annotated[float, "more than 0 and at most 1"] = 1.0
    # Keep this many of the most likely tokens; 0: off.
    top_k: Annotated[int, "0 (off) or more"] = 0
    # Longest answer in tokens, including the stop token.
    max_completion_length: Annotated[int, "at least 1"] = 512
    # Steps between evaluations; 0: only before and after training.
    every: Annotated[int, "0 (off) or more"] = 0
    # Columns, NAME=COLUMN: prompt and answer, where they differ from data.columns; benchmark, the
    # column with the name of a prompt's benchmark (MATH500, AMC23 ...): scores are then also given
    # for each benchmark, and as their mean.
    columns: tuple[str, ...] = ()
    # answers: grade sampled and greedy answers, which needs right ones; divergence: measure how far
    # the student is from the teacher at each token of answers that it samples, and of answers that
    # the teacher samples; both.
    kind: Literal["answers", "divergence", "both"] = "answers"

    def __post_init__(self):
        super().__post_init__()
        self._check_grader()
        _ = self.column_names

    def _check_grader(self):
        kind, _, pattern = self.grader.partition(":")
        is_known = self.grader in (*GRADERS, "auto") or is_own_function(self.grader)
        expected = f"{', '.join(GRADERS)}, auto, regex:PATTERN or FILE.py:FUNCTION"
        self.require(is_known or kind == "regex", "grader", expected)
        try:
            re.compile(pattern)
        except re.error as error:
            self.require(False, "grader", f"a regular expression after regex: ({error})")

    @property
    def column_names(self) -> dict[str, str]:
        """The columns that are named, by what they hold."""
        found = columns_of("evaluation.columns", self.columns, ("prompt", "answer", "benchmark"))
        is_several = (self.source or "").startswith("suite:") and "," in self.source
        return ({"benchmark": "benchmark"} if is_several else {}) | found

    @property
    def grades(self) -> bool:
        """Whether answers are graded."""
        return self.source is not None and self.kind != "divergence"

    @property
    def measures(self) -> bool:
        """Whether the divergence from the teacher is measured."""
        return self.source is not None and self.kind != "answers"

    @property
    def temperature(self) -> float:
        """Temperature of the answers of all scores."""
        return self.temperatures[0]
