"""Tokenizers of checkpoints: ids are those of tokenizer.json, chats those of the chat template.

transformers takes seconds to import, changes the pre-tokenizer of some model types and may ask to
run code of the checkpoint: only a checkpoint without tokenizer.json needs it.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "*.model")
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a turn's reasoning
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class TokenizerError(ValueError):
    """The checkpoint has no tokenizer, or an unreadable one."""


@dataclasses.dataclass
class FileTokenizer:
    """The tokenizer of a directory, with the methods of transformers' tokenizers that are used."""

    backend_tokenizer: Any  # tokenizers.Tokenizer
    name_or_path: str
    chat_template: str | None
    special_tokens: dict[str, str]  # bos_token, eos_token, …
    tool_template: str | None = None  # for conversations with tools, if it is another

    # Ids of the tokens that open and end a text, fill a row, and stand for what is unknown.
    bos_token_id = property(lambda self: self._id("bos_token"))
    eos_token_id = property(lambda self: self._id("eos_token"))
    pad_token_id = property(lambda self: self._id("pad_token"))
    unk_token_id = property(lambda self: self._id("unk_token"))

    def _id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; with `add_special_tokens`, what the tokenizer puts around it too."""
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

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **options: Any,
    ) -> Any:
        """The text of a conversation, or with `tokenize` its ids. Errors are the template's own."""
        has_tools = options.get("tools") is not None and self.tool_template is not None
        template = _compiled(self.tool_template if has_tools else self.chat_template)
        options = {"tools": None, "documents": None} | self.special_tokens | options
        text = template.render(
            messages=[_with_reasoning(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **options,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text


def load_tokenizer(path_or_id: str | os.PathLike, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint directory or hub id; TokenizerError if it has none."""
    try:
        return _load(_directory(str(path_or_id), revision), str(path_or_id))
    # `tokenizers` raises bare exceptions, and damaged files or values of other types any of these.
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(" :")
        raise TokenizerError(
            f"no tokenizer could be read from {path_or_id}: {type(error).__name__}: {reason}; "
            "expected tokenizer.json and tokenizer_config.json next to the weights, as published"
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
    backend = tokenizers.Tokenizer.from_file(str(file))
    # A file may set truncation and padding; rows here have the length they have.
    backend.no_padding()
    backend.no_truncation()
    if not backend.get_vocab_size():
        raise ValueError("it knows no tokens")
    config, listed = (
        json.loads((directory / each).read_text("utf-8")) if (directory / each).exists() else {}
        for each in ("tokenizer_config.json", "special_tokens_map.json")
    )
    given = {role: config.get(role) or listed.get(role) for role in _ROLES}
    texts = {
        role: each["content"] if isinstance(each, dict) else each
        for role, each in given.items()
        if each
    }
    for role, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{role} is {text!r}, expected the text of a token")
    templates = _templates(directory, config)
    return FileTokenizer(
        backend, name, templates.get("default"), texts, tool_template=templates.get("tool_use")
    )


def _templates(directory: pathlib.Path, config: dict[str, Any]) -> dict[str, str | None]:
    """Templates by name: of their own files, else those of tokenizer_config.json."""
    file, found = directory / "chat_template.jinja", config.get("chat_template")
    if file.exists():
        more = (directory / "additional_chat_templates").glob("*.jinja")
        return {path.stem: path.read_text("utf-8") for path in more} | {
            "default": file.read_text("utf-8")
        }
    if isinstance(found, list):
        return {each["name"]: each["template"] for each in found}
    return {"default": found}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The turn with its reasoning under each name that templates read, as in transformers."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's turn for trainers on chats; it writes nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """In a sandbox, with the functions that published templates expect (as in transformers)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    # Jinja's own filter escapes HTML, which a prompt must not be.
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    environment.globals["raise_exception"] = _raise
    # What these write differs from call to call: a prompt is decided by files and seeds.
    del environment.filters["random"], environment.globals["lipsum"]
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
