"""Tokenizers, and prompts rendered for a model: through its chat template or as bare text."""

from __future__ import annotations

import bisect
import contextlib
import datetime
import itertools
import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from opdjax.data.templates import TEMPLATE_ERRORS
from opdjax.data.tokenizer import REASONING, TokenizerError, chat_text
from opdjax.runs.bounds import PROMPT_CHARS

# A turn has a role, a content (a text, text parts, or null beside calls of tools) and any other
# fields that its chat template may read.
Message = dict[str, Any]
Messages = tuple[Message, ...]
CALLS = ("tool_calls", "function_call")
_MARK = "opdjax-7-mark"
_PROBES = (
    "Let x = 12.5; then 3x + 1 = ?\n\tif a<b: return 'né ü 你好'  # 1234567890",
    "The quick brown fox, 'jumps' over 1,234.50 lazy dogs.\n\n  Then?",
    "def f(x):\n\treturn {'a': [x ** 2, -1e-3]}  # done",
    "\\frac{a}{b} = \\sqrt{2}; so \\boxed{42} <think> 你好, мир, naïve 🙂",
)


def as_messages(prompt: str | Messages) -> list[Message]:
    """The prompt as a conversation: a text is one turn of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def text_of(message: Message) -> str:
    """What a turn says: its text, or its parts in a row, and as JSON the calls that it makes."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    calls = [json.dumps(message[name], ensure_ascii=False) for name in CALLS if name in message]
    return "\n".join([text, *calls] if text else calls)


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
    if (found := first_difference(student, teacher)) is not None:
        raise TokenizerMismatchError(
            "student and teacher split the text {!r} differently ({} / {}); ".format(*found)
            + advice
        )


def first_difference(left: Any, right: Any) -> tuple[str, str, str] | None:
    """The first text that two tokenizers split differently, and both splits; None if all probes are
    split alike.
    """
    encode = lambda tokenizer, text: tokenizer.encode(text, add_special_tokens=False)
    for probe in _PROBES:
        # A word is easier to read, but only the whole probe may differ.
        for text in (*re.findall(r"\s*\S+", probe), probe):
            ids = [encode(tokenizer, text) for tokenizer in (left, right)]
            if ids[0] != ids[1]:
                pieces = zip((left, right), ids)
                return text, *(" ".join(map(repr, t.convert_ids_to_tokens(i))) for t, i in pieces)
    return None


def render(
    prompt: str | Messages,
    tokenizer: Any,
    *,
    format: str,
    system_prompt: str | None,
    enable_thinking: bool | None,
    tools: Sequence[dict[str, Any]] = (),
    date: str | None = None,
) -> list[int]:
    """Token ids of a prompt.

    Format `chat` applies the tokenizer's template and opens the assistant's turn; `raw` encodes the
    bare text, without what the tokenizer puts behind it. `tools`: JSON schemas for the template.
    `date`: today, YYYY-MM-DD, for a template that reads the clock; None: the clock. Raises
    ValueError if the prompt does not fit the format, or the template does not read a part.
    """
    if isinstance(prompt, str) and len(prompt) > PROMPT_CHARS:
        found = f"the prompt has {len(prompt)} characters; expected at most {PROMPT_CHARS}"
        raise ValueError(f"{found}: shorten it, or take it out of the data")
    if format == "raw":
        if tools or not isinstance(prompt, str):
            raise ValueError(
                "a prompt made of messages needs format 'chat', as tools do; format 'raw' takes a "
                "string"
            )
        ids, bare = tokenizer.encode(prompt), tokenizer.encode(prompt, add_special_tokens=False)
        ends = range(len(bare), len(ids) + 1)
        # An end-of-sequence token behind the prompt would end the answer before it begins.
        return next((ids[:end] for end in ends if ids[end - len(bare) : end] == bare), ids)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template; use format 'raw'"
        )
    messages = as_messages(prompt)
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return _template_ids(
        messages, tokenizer, enable_thinking, tools, date, add_generation_prompt=True
    )


def reads_clock(tokenizer: Any) -> bool:
    """Whether prompts change with the day on which they are rendered."""
    templates = tokenizer.chat_template, getattr(tokenizer, "tool_template", None)
    return "strftime_now" in str(templates)


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
            _template_ids(messages, tokenizer, enable_thinking, add_generation_prompt=is_open)
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


def _template_ids(
    messages: list[Message],
    tokenizer: Any,
    enable_thinking: bool | None,
    tools: Sequence[dict[str, Any]] = (),
    date: str | None = None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    """Token ids of a conversation; ValueError, which names what the template does not read."""
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    options |= {"add_generation_prompt": add_generation_prompt, "today": date}
    write = lambda messages, tools: chat_text(
        tokenizer, messages, tools=list(tools) or None, **options
    )
    changes = [("'tools'", messages, (), operator.ne)] if tools else []
    changes += [
        (name, [*messages[:place], turn, *messages[place + 1 :]], tools, is_read)
        for place, message in enumerate(messages)
        for name, turn, is_read in _special_parts(message, str(tokenizer.chat_template))
    ]
    begin = f"the chat template of {tokenizer.name_or_path} does not"
    try:
        text = write(messages, tools)
    except TEMPLATE_ERRORS as error:
        note = f" (it holds {', '.join(name for name, *_ in changes)})" if changes else ""
        raise ValueError(
            f"{begin} take this prompt{note}: {error}; change it, or use format 'raw'"
        ) from error
    unread = []
    for name, *changed, is_read in changes:
        with contextlib.suppress(*TEMPLATE_ERRORS):  # an error: the template reads that part
            unread += [] if is_read(text, write(*changed)) else [name]
    if unread:
        raise ValueError(
            f"{begin} read {unread[0]}; remove it from the data, or use a template that reads it"
        )
    return tokenizer.encode(text, add_special_tokens=False)


def _special_parts(
    message: Message, template: str
) -> Iterator[tuple[str, Message, Callable[[str, str], bool]]]:
    """The parts of a turn that not every template reads: (name, the turn with that part changed,
    whether the texts before and after the change show that it is read).
    """
    where, content = f"in a turn of {message['role']!r}", message.get("content", "")
    for field in ("name", *CALLS):
        # Templates may know the call that a tool's turn answers by its place, not its name.
        if field in message and (field, message["role"]) != ("name", "tool"):
            yield f"{field!r} {where}", {**message, field: None}, operator.ne
    for field in (name for name in REASONING if name in message):
        # Templates leave out the reasoning of earlier turns on purpose.
        is_read = any(re.search(rf"\b{name}\b", template) for name in REASONING)
        yield f"{field!r} {where}", message, lambda *_, found=is_read: found
    if content is None:  # str(None) is no text
        is_read = lambda text, other: text.count("None") <= other.count("None")
        yield f"'content' null {where}", {**message, "content": ""}, is_read
    if isinstance(content, list):
        last = {**content[-1], "text": content[-1]["text"] + _MARK}
        is_read = lambda _, other: re.search(_MARK + "(?!['\"])", other) is not None
        name = f"'content' as a list of parts {where}"
        yield name, {**message, "content": [*content[:-1], last]}, is_read


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
