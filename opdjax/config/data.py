"""The prompts of a run, how each model sees them, and how a teacher writes references. Standard
library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Literal

from opdjax.config.validation import require, require_ranges, require_types

# What data.teacher_prompt_format may contain: fields of a row, and judges' texts about a rollout.
TEACHER_FIELDS = ("prompt", "answer", "reference")
JUDGED_FIELDS = ("rubric", "verdicts", "reflection")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts and how each model sees them."""

    # arithmetic:SPLIT for the built-in task, a .jsonl file, parquet:PATH (file, directory or
    # pattern), hf:NAME[@CONFIG]#SPLIT, or tfds:NAME[/CONFIG][:VERSION]#SPLIT. NAME may be a
    # directory (./DIR, /DIR, gs://BUCKET/DIR). SPLIT may be a slice such as train[:10%]; for the
    # built-in task a slice of rows such as train[:640].
    source: str = "arithmetic:train"
    # Template of prompts that are strings; must contain {prompt}.
    prompt_format: str = "{prompt}"
    # System message before the prompt; needs a chat format.
    system_prompt: str | None = None
    # chat: the tokenizer's chat template; raw: the bare text.
    format: Literal["chat", "raw"] = "chat"
    # Passed to the chat template; None: the template's own default.
    enable_thinking: bool | None = None
    # The same as format, for the teacher; None: the teacher reads what the student reads.
    teacher_format: Literal["chat", "raw"] | None = None
    # The same as enable_thinking, for the teacher; None: as for the student.
    teacher_enable_thinking: bool | None = None
    # Longest prompt in tokens, template included.
    max_prompt_length: int = 512
    # Longer prompts: skip leaves them out and prints their number, error refuses the data.
    overlong: Literal["skip", "error"] = "skip"
    # Column of the prompts: a string, or a list of messages. If the last message is the
    # assistant's, it becomes a reference. In all columns, `a.b` is field b of column a
    # (reward_model.ground_truth), and `a.0` is the first item of a list (prompt.0.content).
    prompt_column: str = "prompt"
    # Column of the answers for grading, strings or numbers; None: `answer`, if it exists.
    answer_column: str | None = None
    # Column of worked answers: a text, texts or messages; None: `references` or `reference`, if one
    # exists.
    reference_column: str | None = None
    # Column of a prompt's own criteria, which are part of all its rubrics: texts, or {text (or
    # description), weight (or points), stage}; None: none.
    rubric_column: str | None = None
    # File of a teacher's answers, written by opdjax references; it replaces reference_column.
    references: str | None = None
    # Template of the teacher's prompts, in place of prompt_format. It may contain {prompt} (in
    # messages: the last turn of the user), what only the teacher is shown, {answer} and {reference}
    # (the first of the row), and judges' texts about each rollout, {rubric}, {verdicts} and
    # {reflection}. Other braces stay unchanged. None: as prompt_format.
    teacher_prompt_format: str | None = None
    # Longest teacher prompt with judges' texts, in tokens. Rollouts with a longer one are dropped.
    max_teacher_prompt_length: int = 2048

    def __post_init__(self):
        require_types(self, "data.")
        expected = "a text that contains {prompt}"
        is_template = "{prompt}" in self.prompt_format
        require(is_template, "data.prompt_format", self.prompt_format, expected)
        self._check_teacher_prompt_format()
        lengths = ("max_prompt_length", "max_teacher_prompt_length")
        require_ranges(self, "data.", dict.fromkeys(lengths, "at least 1"))
        for name in ("prompt_column", "answer_column", "reference_column", "rubric_column"):
            require(getattr(self, name) != "", f"data.{name}", "", "the name of a column")
        require(self.references != "", "data.references", "", "the name of a file, or none")
        is_one = self.references is None or self.reference_column is None
        expected = "none where data.reference_column is given"
        require(is_one, "data.references", self.references, expected)
        is_teacher_chat = (self.teacher_format or self.format) == "chat"
        is_chat = self.format == "chat" or is_teacher_chat
        expected = "none where no format is chat"
        for name in ("system_prompt", "enable_thinking"):
            value = getattr(self, name)
            require(is_chat or value is None, f"data.{name}", value, expected)
        value, expected = self.teacher_enable_thinking, "none where the teacher's format is raw"
        require(is_teacher_chat or value is None, "data.teacher_enable_thinking", value, expected)

    def _check_teacher_prompt_format(self):
        field = "data.teacher_prompt_format"
        text = "{prompt}" if self.teacher_prompt_format is None else self.teacher_prompt_format
        require("{prompt}" in text, field, text, "a text that contains {prompt}")
        # A misspelt field would be shown to the teacher unchanged, without any error.
        fields = (*TEACHER_FIELDS, *JUDGED_FIELDS)
        for name in set(re.findall(r"\{(\w+)\}", text)) - set(fields):
            close = difflib.get_close_matches(name, fields, n=1)
            require(not close, field, text, f"{{{''.join(close)}}} in place of {{{name}}}")


@dataclasses.dataclass(frozen=True)
class TeachConfig:
    """How opdjax references has a teacher answer the prompts."""

    # Answers per prompt. A later command may ask for more.
    num_answers: int = 4
    # Prompts per batch; the answers of a batch are saved before the next one starts.
    batch_size: int = 64
    # Temperature of a checkpoint (teacher.path); 0: greedy. A model behind teacher_api is sampled
    # by the fields of that section, and this field and the next two are refused.
    temperature: float = 1.0
    # Nucleus sampling of a checkpoint; 1: off.
    top_p: float = 1.0
    # Longest answer of a checkpoint in tokens, including the stop token. Truncated answers are
    # never used.
    max_completion_length: int = 512

    def __post_init__(self):
        require_types(self, "teach.")
        names = ("num_answers", "batch_size", "max_completion_length")
        ranges = dict.fromkeys(names, "at least 1") | {"temperature": "0 (greedy) or more"}
        require_ranges(self, "teach.", ranges | {"top_p": "more than 0 and at most 1"})
