"""The prompts of a run, how each model sees them, and how a teacher answers them beforehand.
Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Literal

from opdjax.config.validation import require, require_types

TEACHER_FIELDS = ("prompt", "answer", "reference")  # of a row, in data.teacher_prompt_format
JUDGED_FIELDS = (
    "rubric",
    "verdicts",
    "reflection",
)  # of a rollout, there as well: what judges say of it


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts and how each model sees them."""

    # arithmetic:SPLIT for the built-in task, a .jsonl file, parquet:PATH (file, directory or
    # pattern), hf:NAME[@CONFIG]#SPLIT, or tfds:NAME[/CONFIG][:VERSION]#SPLIT. NAME may be a
    # directory (./DIR, /DIR, gs://BUCKET/DIR), SPLIT a slice such as train[:10%], of the built-in
    # task one of rows such as train[:640].
    source: str = "arithmetic:train"
    prompt_format: str = (
        "{prompt}"  # wrapped around a prompt that is a string; must contain {prompt}
    )
    system_prompt: str | None = None  # put before the messages; needs a chat format
    format: Literal["chat", "raw"] = "chat"  # the tokenizer's chat template, or the bare text
    enable_thinking: bool | None = (
        None  # handed to the chat template; None: the template's own default
    )
    teacher_format: Literal["chat", "raw"] | None = (
        None  # None: the teacher sees what the student sees
    )
    teacher_enable_thinking: bool | None = None  # None: as enable_thinking
    max_prompt_length: int = 512  # tokens, template included
    overlong: Literal["skip", "error"] = (
        "skip"  # what to do with longer prompts: leave them out, counted, or refuse the data
    )
    # Of any source: a string, or a list of messages, of which the assistant's turn that it may end
    # in becomes a reference. `a.b` is field b of column a (reward_model.ground_truth), `a.0` the
    # first item of a list (prompt.0.content).
    prompt_column: str = "prompt"
    answer_column: str | None = (
        None  # the value to grade by, a string or a number; None: `answer`, where there is one
    )
    reference_column: str | None = (
        # worked answers: text, texts or messages; None: `references` or `reference`, where there is
        # one
        None
    )
    # A prompt's own criteria, which every rubric of it has: texts, or {text (or description),
    # weight (or points), stage}; None: none
    rubric_column: str | None = None
    references: str | None = (
        None  # in their place a teacher's answers to all prompts: the file that opdjax teach writes
    )
    # What the teacher reads in the place of prompt_format: {prompt} (in messages the last turn of
    # the user), and what only it is shown, {answer} and {reference}, the row's first, and of each
    # rollout {rubric}, {verdicts} and {reflection}, which judges write (rubricator, verifier).
    # Other braces stay as they are. None: as prompt_format.
    teacher_prompt_format: str | None = None
    max_teacher_prompt_length: int = (
        2048  # tokens, with what judges say; a rollout whose teacher would read more is left out
    )

    def __post_init__(self):
        require_types(self, "data.")
        require(
            "{prompt}" in self.prompt_format,
            "data.prompt_format",
            self.prompt_format,
            "a text that contains {prompt}",
        )
        self._check_teacher_prompt_format()
        for name in ("max_prompt_length", "max_teacher_prompt_length"):
            require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "at least 1")
        for name in ("prompt_column", "answer_column", "reference_column", "rubric_column"):
            require(getattr(self, name) != "", f"data.{name}", "", "the name of a column")
        require(self.references != "", "data.references", "", "the name of a file, or none")
        is_one = self.references is None or self.reference_column is None
        require(
            is_one, "data.references", self.references, "none where data.reference_column is given"
        )
        is_teacher_chat = (self.teacher_format or self.format) == "chat"
        is_chat, thinking = self.format == "chat" or is_teacher_chat, self.teacher_enable_thinking
        require(
            is_chat or self.system_prompt is None,
            "data.system_prompt",
            self.system_prompt,
            "none where no format is chat",
        )
        require(
            is_chat or self.enable_thinking is None,
            "data.enable_thinking",
            self.enable_thinking,
            "none where no format is chat",
        )
        require(
            is_teacher_chat or thinking is None,
            "data.teacher_enable_thinking",
            thinking,
            "none where the teacher's format is raw",
        )

    def _check_teacher_prompt_format(self):
        text = "{prompt}" if self.teacher_prompt_format is None else self.teacher_prompt_format
        require(
            "{prompt}" in text, "data.teacher_prompt_format", text, "a text that contains {prompt}"
        )
        # A misspelt field would be shown to the teacher as it stands, and no error would tell.
        fields = (*TEACHER_FIELDS, *JUDGED_FIELDS)
        for name in set(re.findall(r"\{(\w+)\}", text)) - set(fields):
            close = difflib.get_close_matches(name, fields, n=1)
            require(
                not close,
                "data.teacher_prompt_format",
                text,
                f"{{{''.join(close)}}} in place of {{{name}}}",
            )


@dataclasses.dataclass(frozen=True)
class TeachConfig:
    """How `opdjax teach` has prompts answered by a teacher."""

    num_answers: int = 4  # of each prompt; more of them may be asked for later
    batch_size: int = (
        64  # prompts asked at a time; what they are answered is kept before the next are asked
    )
    # Of a checkpoint, teacher.path; a model behind teacher_api is sampled as that section says, and
    # these are refused.
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    max_completion_length: int = (
        512  # tokens, stop token included; an answer that is cut off there is never used
    )

    def __post_init__(self):
        require_types(self, "teach.")
        require(self.num_answers > 0, "teach.num_answers", self.num_answers, "at least 1")
        require(self.batch_size > 0, "teach.batch_size", self.batch_size, "at least 1")
        require(self.temperature >= 0, "teach.temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "teach.top_p", self.top_p, "more than 0 and at most 1")
        require(
            self.max_completion_length > 0,
            "teach.max_completion_length",
            self.max_completion_length,
            "at least 1",
        )
