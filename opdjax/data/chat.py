"""Tokenizers, and how a prompt reads to a model: through its chat template or as bare text."""

from __future__ import annotations

import bisect
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

import jinja2

# What a template that was not made for such a prompt raises: Jinja's own, and whatever Python says
# of its expressions.
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


class TokenizerError(ValueError):
    """The checkpoint has no tokenizer, or one that cannot be read."""


class TokenizerMismatchError(ValueError):
    """Teacher and student do not share a vocabulary, so their logits cannot be compared."""


def load_tokenizer(path_or_id: str | os.PathLike, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint directory or hub id; TokenizerError where it has none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    advice = "expected tokenizer.json and tokenizer_config.json beside the weights, as they were published"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_id), revision=revision)
    # A file that is damaged, or that holds values of other types, surfaces in any of these ways.
    except (
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        StrictDataclassError,
    ) as error:
        reason = str(error).partition("\n")[0].rstrip(" :")
        raise TokenizerError(
            f"no tokenizer could be read from {path_or_id}: {type(error).__name__}: {reason}; {advice}"
        ) from error
    if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}:
        # transformers makes an empty one where there are no files.
        raise TokenizerError(
            f"no tokenizer could be read from {path_or_id}: it knows no tokens; {advice}"
        )
    return tokenizer


def valid_vocab(tokenizer: Any) -> int:
    """One more than the largest id that stands for a token; embedding rows from there on are
    padding.
    """
    return max(tokenizer.get_vocab().values()) + 1


def check_same_vocabulary(student: Any, teacher: Any, recipe: str) -> None:
    """Raise unless both map the same strings to the same ids and split a probe text alike."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    advice = f"recipe {recipe!r} compares their logits id by id; choose a teacher that shares the student's tokenizer"
    if ours != theirs:
        differing = sorted(
            word for word in ours.keys() | theirs.keys() if ours.get(word) != theirs.get(word)
        )
        shown = ", ".join(
            f"{word!r}: {ours.get(word)} / {theirs.get(word)}" for word in differing[:5]
        )
        raise TokenizerMismatchError(
            f"student and teacher differ in {len(differing)} tokens (student id / teacher id: {shown}); {advice}"
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
) -> list[int]:
    """Token ids of a prompt. `chat` applies the tokenizer's template and opens the assistant's
    turn; `raw` is the bare text.
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
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return _templated(messages, tokenizer, enable_thinking, add_generation_prompt=True)


def assistant_header(tokenizer: Any, *, format: str, enable_thinking: bool | None) -> list[int]:
    """Token ids that an answer without a prompt follows, so that a model can say how likely it is
    on its own.

    `chat`: what the template opens the assistant's turn with, after the BOS where conversations
    begin with one. Else, and for `raw`, BOS, or EOS where there is none. ValueError where the
    tokenizer has none of them.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if format == "chat" and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "1"}]
        closed, opened = (
            _templated(messages, tokenizer, enable_thinking, add_generation_prompt=is_open)
            for is_open in (False, True)
        )
        shared = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(closed, opened))
        )
        # An end of the conversation, or a last token that melts into the opening, may be gone; more
        # would be another conversation.
        if len(closed) - 1 <= shared < len(opened):
            return [bos, *opened[shared:]] if opened[0] == bos else opened[shared:]
    if bos is None and eos is None:
        raise TokenizerError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template that opens an assistant's turn, no BOS and no EOS: "
            "nothing can stand before an answer without its prompt; set near_policy.filter to none, or give it one of them"
        )
    return [eos if bos is None else bos]


def _templated(
    messages: list[dict[str, str]],
    tokenizer: Any,
    enable_thinking: bool | None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    """Token ids of a conversation; ValueError where the template does not take it."""
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    try:
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, **options
        )
    except _TEMPLATE_ERRORS as error:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} does not take this prompt: {type(error).__name__}: {error}; "
            "mend it, or use format 'raw'"
        ) from error
    return tokenizer.encode(text, add_special_tokens=False)


def stage_starts(text: str, markers: Sequence[str]) -> list[int | None]:
    """Where each stage of an answer begins, in characters; None for one that is not there, whose
    text is the stage's before.

    The first begins at 0, every other at the first match of its regular expression in `markers`
    after the beginning of the one found before it. The matched text belongs to the stage that it
    begins.
    """
    starts: list[int | None] = [0]
    reached = 0
    for marker in markers:
        found = re.compile(marker, re.MULTILINE).search(text, reached)
        starts.append(found.start() if found else None)
        reached = max(found.end(), found.start() + 1) if found else reached
    return starts


def stage_ids(tokens: Sequence[int], tokenizer: Any, markers: Sequence[str]) -> list[int]:
    """The stage, counted from 0, of each token of a completion; of a token that spans two stages,
    the later one.

    Special tokens belong to the stage that they follow.
    """
    read = lambda count: tokenizer.decode(tokens[:count], skip_special_tokens=True)
    ids = [0] * len(tokens)
    for stage, start in enumerate(stage_starts(read(len(tokens)), markers)):
        # The first token with which the text grows beyond the stage's first character.
        begins = (
            0
            if not start
            else bisect.bisect_right(
                range(1, len(tokens) + 1), start, key=lambda count: len(read(count))
            )
        )
        if start is not None:
            ids[begins:] = [stage] * (len(tokens) - begins)
    return ids
