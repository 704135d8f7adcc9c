"""Tokenizers of checkpoints: ids are those of tokenizer.json, chats those of the chat template.

transformers takes seconds to import, changes the pre-tokenizer of some model types and may ask to
run code of the checkpoint: only a checkpoint without tokenizer.json needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from opdjax.data.templates import render_template
from opdjax.runs.bounds import (
    CONFIG_BYTES,
    TEMPLATE_CHARS,
    TOKENIZER_BYTES,
    BoundedError,
    parse_json,
    read_bytes,
)

_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "*.model")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a turn's reasoning
_MAX_GROWTH = 100  # published tokenizers replace a character by one character
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class TokenizerError(BoundedError):
    """The checkpoint has no tokenizer, or an unreadable one."""


@dataclasses.dataclass
class FileTokenizer:
    """The tokenizer of a directory, with the methods of transformers' tokenizers that are used."""

    backend_tokenizer: Any  # tokenizers.Tokenizer
    name_or_path: str
    chat_template: str | None
    special_tokens_map: dict[str, str]  # bos_token, eos_token, …
    tool_template: str | None = None  # for conversations with tools, if it is another

    # Ids of the tokens that open and end a text, fill a row, and stand for what is unknown.
    bos_token_id = property(lambda self: self._id("bos_token"))
    eos_token_id = property(lambda self: self._id("eos_token"))
    pad_token_id = property(lambda self: self._id("pad_token"))
    unk_token_id = property(lambda self: self._id("unk_token"))

    def _id(self, role: str) -> int | None:
        token = self.special_tokens_map.get(role)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; with `add_special_tokens`, what the tokenizer puts around it too."""
        with _named_errors(f"the tokenizer of {self.name_or_path} fails on a text"):
            return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        ids = [int(each) for each in ids]
        return self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = False
    ) -> list[str]:
        """The text of each sequence of ids."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of an id, or of each."""
        if isinstance(ids, Sequence):
            return [self.convert_ids_to_tokens(each) for each in ids]
        return self.backend_tokenizer.id_to_token(int(ids))

    def get_chat_template(self, tools: Sequence[dict[str, Any]] | None = None) -> str:
        """The chat template, for conversations with tools or without."""
        has_own = tools is not None and self.tool_template is not None
        return self.tool_template if has_own else self.chat_template

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tokenize: bool = False,
        **options: Any,
    ) -> Any:
        """The text of a conversation, or with `tokenize` its ids; errors as `chat_text`."""
        text = chat_text(self, messages, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text


def chat_text(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    today: str | None = None,
    **options: Any,
) -> str:
    """A conversation as the chat template of any tokenizer writes it, within limits.

    Raises jinja2.TemplateError. `today`: for a template that reads the clock; None: the clock.
    """
    special = tokenizer.special_tokens_map.items()
    variables = {name: token for name, token in special if isinstance(token, str)} | options
    variables |= {"tools": tools and list(tools), "documents": None}
    variables["messages"] = [_with_reasoning(message) for message in messages]
    variables["add_generation_prompt"] = add_generation_prompt
    return render_template(tokenizer.get_chat_template(tools=tools), variables, today)


def load_tokenizer(path_or_id: str | os.PathLike, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint directory or hub id; TokenizerError if it has none."""
    with _named_errors(f"no tokenizer could be read from {path_or_id}"):
        return _load(_directory(str(path_or_id), revision), str(path_or_id))


@contextlib.contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """TokenizerError for every error: `tokenizers` raises bare exceptions, damaged files raise any
    of these, and a panic of Rust is not even an Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = str(error).partition("\n")[0].rstrip(" :")
        raise TokenizerError(
            f"{what}: {type(error).__name__}: {reason}; expected tokenizer.json and "
            "tokenizer_config.json next to the weights, as published"
        ) from error


def _directory(path_or_id: str, revision: str | None) -> pathlib.Path:
    if os.path.isdir(path_or_id):
        return pathlib.Path(path_or_id)
    from huggingface_hub import snapshot_download

    return pathlib.Path(snapshot_download(path_or_id, revision=revision, allow_patterns=_FILES))


def _load(directory: pathlib.Path, name: str) -> Any:
    import tokenizers

    file = directory / "tokenizer.json"
    if not file.exists():
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        if not found.get_vocab().keys() - {*found.all_special_tokens}:
            # transformers returns an empty one if there are no files.
            raise ValueError("it knows no tokens")
        return found
    data = read_bytes(file, TOKENIZER_BYTES)
    # First: reading a file already applies its normalizer, to the tokens that it adds.
    written = parse_json(data)
    if (times := _growth([written.get("normalizer"), written.get("decoder")])) > _MAX_GROWTH:
        raise ValueError(f"its replacements make a text {times:.3g} times as long")
    backend = tokenizers.Tokenizer.from_buffer(data)
    # A file may set truncation and padding; rows here have the length they have.
    backend.no_padding()
    backend.no_truncation()
    if not backend.get_vocab_size():
        raise ValueError("it knows no tokens")
    config, listed = (
        parse_json(read_bytes(path, CONFIG_BYTES)) if path.exists() else {}
        for path in map(directory.joinpath, ("tokenizer_config.json", "special_tokens_map.json"))
    )
    given = {role: config.get(role) or listed.get(role) for role in _ROLES}
    texts = {
        role: each["content"] if isinstance(each, dict) else each
        for role, each in given.items()
        if each
    }
    templates = _templates(directory, config)
    for field, text in {**templates, **texts}.items():
        if not isinstance(text, (str, type(None))):
            raise ValueError(f"{field} is {text!r}, expected a text")
    return FileTokenizer(
        backend, name, templates.get("default"), texts, tool_template=templates.get("tool_use")
    )


def _growth(part: Any) -> float:
    """How many times as long the replacements in a tokenizer.json can make a text."""
    if not isinstance(part, (dict, list)):
        return 1.0
    own = 1.0
    if isinstance(part, dict) and part.get("type") == "Replace":
        own = max(len(part["content"]) / len(part["pattern"].get("String") or "."), 1.0)
    return own * math.prod(map(_growth, part.values() if isinstance(part, dict) else part))


def _templates(directory: pathlib.Path, config: dict[str, Any]) -> dict[str, str | None]:
    """Templates by name: of their own files, else those of tokenizer_config.json."""
    file, found = directory / "chat_template.jinja", config.get("chat_template")
    if file.exists():
        more = (directory / "additional_chat_templates").glob("*.jinja")
        files = {path.stem: path for path in more} | {"default": file}
        read = lambda path: read_bytes(path, 4 * TEMPLATE_CHARS).decode()
        return {name: read(path) for name, path in files.items()}
    if isinstance(found, list):
        return {each["name"]: each["template"] for each in found}
    return {"default": found}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The turn with its reasoning under each name that templates read, as in transformers."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}
