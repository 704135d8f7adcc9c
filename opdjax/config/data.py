"""The prompts of a run, how each model sees them, and how a teacher writes references. Standard
library only.
"""

import datetime
import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from opdjax.config.api import RULE_JUDGE, ApiConfig, Endpoint, ReasoningEffort
from opdjax.config.validation import Section, pairs_of, require

# What data.teacher_prompt_format may contain: fields of a row, and judges' texts about a rollout.
TEACHER_FIELDS = ("prompt", "answer", "reference")
JUDGED_FIELDS = ("rubric", "verdicts", "reflection")
COLUMNS = ("prompt", "answer", "reference", "rubric")  # what columns hold
# Tokens of judges' texts in a teacher's prompt: a rubric of twelve criteria, or the verdicts on it,
# take about half of them.
_MAX_JUDGED_LENGTH = 1536
PromptFormat = Literal["chat", "thinking", "no_thinking", "raw"]
_TEMPLATES: Mapping[str, tuple[Literal["chat", "raw"], bool | None]] = {
    "chat": ("chat", None),
    "thinking": ("chat", True),
    "no_thinking": ("chat", False),
    "raw": ("raw", None),
}


class DataConfig(Section):
    """The prompts and how each model sees them."""

    # arithmetic:SPLIT for the built-in task, stories:SPLIT for built-in word problems,
    # instructions:SPLIT for built-in instructions without answers, tasks:NAME#SPLIT for a task of
    # reasoning-gym, a .jsonl, .json, .csv or .parquet file, parquet:PATH (directory or pattern),
    # hf:NAME[@CONFIG]#SPLIT, or
    # tfds:NAME[/CONFIG][:VERSION]#SPLIT. NAME may be a directory (./DIR, /DIR, gs://BUCKET/DIR).
    # SPLIT may be a slice such as train[:10%]; of what is built in a slice of rows such as
    # train[:640]. preset:NAME: published data, such as preset:dapo_math_17k (preset:NAME=SOURCE: a
    # copy; preset:NAME:plain: the bare questions); mix:0.7*SOURCE+0.3*SOURCE: a mixture, as large
    # as the scarcest part allows; "SOURCE without OTHER": the rows that share no 13 words in a row
    # ("... by 8": 8) with OTHER, such as an evaluation.
    source: str = "arithmetic:train"
    # Template of prompts that are strings; must contain {prompt}. The default is a row's own
    # template where it has one: the column prompt_format, and that of a preset.
    prompt_format: str = "{prompt}"
    # System message before the prompt; needs a chat format.
    system_prompt: str | None = None
    # chat: the tokenizer's chat template; thinking, no_thinking: the same with enable_thinking true
    # or false; raw: the bare text.
    format: PromptFormat = "chat"
    # The same for the teacher; None: the teacher reads what the student reads.
    teacher_format: PromptFormat | None = None
    # Longest prompt in tokens, template included. Longer ones are left out, and their number is
    # printed.
    max_prompt_length: Annotated[int, "at least 1"] = 512
    # Columns whose names differ from the defaults, NAME=COLUMN. NAME is prompt: texts, or lists of
    # messages (if the last message is the assistant's, it becomes a reference); answer: for
    # grading, texts or numbers; reference: worked answers, a text, texts or messages (default:
    # references or reference, if one exists); rubric: a prompt's own criteria, which are part of
    # all its rubrics, texts or {text (or description), weight (or points), stage} (default: none).
    # COLUMN may be `a.b`, field b of column a (answer=reward_model.ground_truth), or `a.0`, the
    # first item of a list. A column named tools, JSON schemas, is shown to the chat template.
    columns: tuple[str, ...] = ()
    # File of a teacher's answers, written by opdjax references; it replaces a column.
    references: str | None = None
    # Template of the teacher's prompts, in place of prompt_format. It may contain {prompt} (in
    # messages: the last turn of the user), what only the teacher is shown, {answer} and {reference}
    # (the first of the row), and judges' texts about each rollout, {rubric}, {verdicts} and
    # {reflection}. Other braces stay unchanged. None: as prompt_format.
    teacher_prompt_format: str | None = None
    # Skip rows that cannot be read or shown (broken JSON, an empty prompt), here and in
    # evaluation.source, and print their number. Otherwise the first one ends the command.
    skip_bad_rows: bool = False
    # The day that is today for a chat template that reads the clock (strftime_now), YYYY-MM-DD.
    # None: the day on which the run began, or the sweep it belongs to; it is recorded.
    date: str | None = None

    def __post_init__(self):
        super().__post_init__()
        expected = "a text that contains {prompt}"
        self.require("{prompt}" in self.prompt_format, "prompt_format", expected)
        self._check_teacher_prompt_format()
        self._check_date()
        names = self.column_names
        self.require(self.references != "", "references", "the name of a file, or none")
        is_one = self.references is None or "reference" not in names
        self.require(is_one, "references", "none where data.columns has a reference")
        formats = (self.student_template[0], self.teacher_template[0])
        is_free = self.system_prompt is None or "chat" in formats
        self.require(is_free, "system_prompt", "none where no format is chat")

    @property
    def column_names(self) -> dict[str, str]:
        """The columns that are named, by what they hold."""
        return columns_of("data.columns", self.columns, COLUMNS)

    @property
    def max_teacher_prompt_length(self) -> int:
        """Longest teacher prompt with judges' texts, in tokens; longer ones are dropped."""
        return self.max_prompt_length + _MAX_JUDGED_LENGTH

    @property
    def student_template(self) -> tuple[Literal["chat", "raw"], bool | None]:
        """Whether the student's prompts have a chat template, and its enable_thinking."""
        return _TEMPLATES[self.format]

    @property
    def teacher_template(self) -> tuple[Literal["chat", "raw"], bool | None]:
        """The same for the teacher."""
        return _TEMPLATES[self.teacher_format or self.format]

    def _check_date(self):
        is_day = self.date is None or re.fullmatch(r"\d{4}-\d\d-\d\d", self.date) is not None
        try:
            datetime.date.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            is_day = False
        self.require(is_day, "date", "a day such as 2026-11-30, or none")

    def _check_teacher_prompt_format(self):
        field = "data.teacher_prompt_format"
        text = "{prompt}" if self.teacher_prompt_format is None else self.teacher_prompt_format
        require("{prompt}" in text, field, text, "a text that contains {prompt}")
        # A misspelt field would be shown to the teacher unchanged, without any error.
        fields = (*TEACHER_FIELDS, *JUDGED_FIELDS)
        for name in set(re.findall(r"\{(\w+)\}", text)) - set(fields):
            close = difflib.get_close_matches(name, fields, n=1)
            require(not close, field, text, f"{{{''.join(close)}}} in place of {{{name}}}")


def columns_of(field: str, columns: tuple[str, ...], names: tuple[str, ...]) -> dict[str, str]:
    """Name -> column, of items NAME=COLUMN; ConfigError for another name."""
    expected = f"NAME=COLUMN, each NAME once, one of {', '.join(names)}"
    found = pairs_of(field, columns, expected)
    require(set(found) <= set(names), field, columns, expected)
    return found


class TeachConfig(Section):
    """How opdjax references has a teacher answer the prompts."""

    # Answers per prompt. A later command may ask for more.
    num_answers: Annotated[int, "at least 1"] = 4
    # Temperature, 0: greedy. None: 1 for a checkpoint; not sent to a model behind an API.
    temperature: Annotated[float | None, "0 (greedy) or more"] = None
    # Nucleus sampling. None: off for a checkpoint; not sent to a model behind an API.
    top_p: Annotated[float | None, "more than 0 and at most 1"] = None
    # Longest answer in tokens, including the stop token, or the reasoning of a model behind an API.
    # Truncated answers are never used.
    max_completion_length: Annotated[int, "at least 1"] = 512
    # Name of a model behind an API that writes the answers; empty: the checkpoint teacher.path.
    model: str = ""
    # Address of another server than api.base_url. Its key, if it needs one, is read from the
    # environment variable TEACHER_API_KEY.
    base_url: str = ""
    # Reasoning effort of a model behind an API; None: not sent.
    reasoning_effort: ReasoningEffort | None = None
    # Let opdjax train, too, ask a model behind an API for answers that are missing, which may cost
    # money. A checkpoint is always asked.
    auto: bool = False

    def __post_init__(self):
        super().__post_init__()
        expected = "none without teach.model: a checkpoint has no such setting"
        is_free = self.model or self.reasoning_effort is None
        self.require(is_free, "reasoning_effort", expected)
        expected = "the name of a model: a judge writes no answers"
        self.require(self.model != RULE_JUDGE, "model", expected)

    def endpoint(self, api: ApiConfig) -> Endpoint:
        """The model behind an API that writes the answers."""
        own = {name: getattr(self, name) for name in ("temperature", "top_p", "reasoning_effort")}
        own["max_tokens"] = self.max_completion_length
        return api.endpoint("teacher", self.model, self.base_url, **own)
