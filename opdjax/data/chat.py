"""Tokenizers, and prompts rendered for a model: through its chat template or as bare text."""

from __future__ import annotations

import bisect
import datetime
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from opdjax.data.tokenizer import FileTokenizer, TokenizerError

# Errors of a template that does not fit the prompt: Jinja's own and those of its expressions.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
)
Messages = tuple[dict[str, str], ...]
_PROBE = "Let x = 12.5; then 3x + 1 = ?\n\tif a<b: return 'né ü 你好'  # 1234567890"


def as_messages(prompt: str | Messages) -> list[dict[str, str]]:
    """The prompt as a conversation: a text is one turn of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


class TokenizerMismatchError(ValueError):
    """Teacher and student do not share a vocabulary, so their logits cannot be compared."""


def valid_vocab(tokenizer: Any) -> int:
    """The largest token id plus 1; embedding rows from there on are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def check_same_vocabulary(student: Any, teacher: Any, recipe: str) -> None:
    """Raise TokenizerMismatchError unless both have the same vocabulary and split a text alike."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    advice = (
        f"recipe {recipe!r} compares their logits id by id; choose a teacher that shares the "
        "student's tokenizer"
    )
    words = ours.keys() | theirs.keys()
    differing = sorted(word for word in words if ours.get(word) != theirs.get(word))
    if differing:
        shown = ", ".join(f"{w!r}: {ours.get(w)} / {theirs.get(w)}" for w in differing[:5])
        raise TokenizerMismatchError(
            f"student and teacher differ in {len(differing)} tokens (student id / teacher id: "
            f"{shown}); {advice}"
        )
    left, right = (t.encode(_PROBE, add_special_tokens=False) for t in (student, teacher))
    if left != right:
        raise TokenizerMismatchError(
            f"student and teacher split the same text differently ({left} / {right}); {advice}"
        )


def render(
    prompt: str | Messages,
    tokenizer: Any,
    *,
    format: str,
    system_prompt: str | None,
    enable_thinking: bool | None,
    date: str | None = None,
) -> list[int]:
    """Token ids of a prompt.

    Format `chat` applies the tokenizer's template and opens the assistant's turn; `raw` encodes the
    bare text. `date` is today, YYYY-MM-DD, for a template that reads the clock; None: the clock.
    Raises ValueError if the prompt does not fit the format.
    """
    if format == "raw":
        if not isinstance(prompt, str):
            raise ValueError(
                "a prompt made of messages needs format 'chat'; format 'raw' takes a string"
            )
        return tokenizer.encode(prompt)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use format 'raw'"
        )
    messages = as_messages(prompt)
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return _apply_template(messages, tokenizer, enable_thinking, date, add_generation_prompt=True)


def reads_clock(tokenizer: Any) -> bool:
    """Whether prompts change with the day on which they are rendered."""
    return "strftime_now" in (tokenizer.chat_template or "")


def with_day(template: str, today: datetime.date) -> str:
    """The template with this day in place of each strftime_now of a literal format."""
    written = lambda found: json.dumps(today.strftime(found[2]), ensure_ascii=False)
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", written, template)


def assistant_header(tokenizer: Any, *, format: str, enable_thinking: bool | None) -> list[int]:
    """Token ids before an answer without its prompt, so that its own likelihood is defined.

    `chat`: the template's opening of the assistant's turn, after the BOS if conversations begin
    with one. `raw`, or no such template: BOS, else EOS. TokenizerError if there is none of them.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if format == "chat" and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "1"}]
        closed, opened = (
            _apply_template(messages, tokenizer, enable_thinking, add_generation_prompt=is_open)
            for is_open in (False, True)
        )
        shared = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(closed, opened))
        )
        # One final token of the closed form may differ (an end of the conversation, or a token that
        # merges with the opening). More would be another conversation.
        if len(closed) - 1 <= shared < len(opened):
            return [bos, *opened[shared:]] if opened[0] == bos else opened[shared:]
    if bos is None and eos is None:
        raise TokenizerError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template that opens an "
            "assistant's turn, no BOS and no EOS: nothing can stand before an answer without its "
            "prompt; set near_policy.filter to none, or give it one of them"
        )
    return [eos if bos is None else bos]


def _apply_template(
    messages: list[dict[str, str]],
    tokenizer: Any,
    enable_thinking: bool | None,
    date: str | None = None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    """Token ids of a conversation; ValueError if the template does not accept it."""
    today = datetime.date.fromisoformat(date) if date else datetime.date.today()
    options: dict[str, Any] = {}
    if reads_clock(tokenizer) and isinstance(tokenizer, FileTokenizer):
        options["strftime_now"] = today.strftime
    elif reads_clock(tokenizer):  # transformers turns options into texts
        options["chat_template"] = with_day(tokenizer.chat_template, today)
    if enable_thinking is not None:
        options["enable_thinking"] = enable_thinking
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **options
        )
    except _TEMPLATE_ERRORS as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} does not take this prompt: "
            f"{type(error).__name__}: {error}; change it, or use format 'raw'"
        ) from error
    return tokenizer.encode(text, add_special_tokens=False)


def stage_starts(text: str, markers: Sequence[str]) -> list[int | None]:
    """First character of each stage of an answer; None: absent, its text is the stage's before.

    The first stage begins at 0, every other one at the first match of its regular expression in
    `markers` after the last stage found. The matched text belongs to the stage it begins.
    """
    starts: list[int | None] = [0]
    reached = 0
    for marker in markers:
        found = re.compile(marker, re.MULTILINE).search(text, reached)
        starts.append(found.start() if found else None)
        reached = max(found.end(), found.start() + 1) if found else reached
    return starts


def stage_ids(tokens: Sequence[int], tokenizer: Any, markers: Sequence[str]) -> list[int]:
    """The stage, counted from 0, of each token of a completion.

    A token that spans two stages belongs to the later one, a special token to the one before it.
    """
    read = lambda count: tokenizer.decode(tokens[:count], skip_special_tokens=True)
    ids, counts = [0] * len(tokens), range(1, len(tokens) + 1)
    for stage, start in enumerate(stage_starts(read(len(tokens)), markers)):
        if start is not None:
            # The first token that extends the text beyond the stage's first character.
            first = bisect.bisect_right(counts, start, key=lambda n: len(read(n))) if start else 0
            ids[first:] = [stage] * (len(tokens) - first)
    return ids
