"""Chat templates, programs that come with a checkpoint: run in a sandbox, with limits on their
time, their memory and what they write.

A child process (`isolated`) imports this file, hence of the package only what has no other imports.
"""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes

from opdjax.data import isolated
from opdjax.runs.bounds import PROMPT_CHARS, TEMPLATE_CHARS

MAX_BYTES, _SECONDS = 400 << 20, 2.0  # of the child process, and of one text
# Templates made of these alone, without a loop in a loop, take time linear in a short input: they
# are run in this process, without a child's start and the way to it. Nothing in them can grow.
_PLAIN = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.CondExpr)
_PLAIN += (nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.Add, nodes.Test)
_PLAIN += (nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not)
_PLAIN_CHARS, _PLAIN_INPUT_CHARS = 8_000, 100_000
# Errors of a template that does not fit its input: Jinja's own and those of its expressions.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError)
TEMPLATE_ERRORS += (AttributeError, RecursionError, SyntaxError)


def render_template(template: str, variables: dict[str, Any], today: str | None = None) -> str:
    """The text that a template writes. `today`: the day of strftime_now, YYYY-MM-DD.

    Raises jinja2.TemplateError for its errors of any kind, and beyond the limits.
    """
    if len(template) > TEMPLATE_CHARS:
        found = f"it has {len(template)} characters; expected at most {TEMPLATE_CHARS}"
        raise jinja2.TemplateError(found)
    today = today or datetime.date.today().isoformat()
    is_short = len(template) < _PLAIN_CHARS and len(repr(variables)) < _PLAIN_INPUT_CHARS
    if is_short and _is_plain(template):
        found = written(template, variables, today)
    else:
        limits = {"module": __name__, "seconds": _SECONDS}
        found = isolated.call("written", template, variables, today, **limits)
    if found is None:
        raise jinja2.TemplateError("it takes more than 2 seconds, or too much memory, for one text")
    text, error = found
    if error is not None:
        raise jinja2.TemplateError(error)
    if len(text) > PROMPT_CHARS:
        raise jinja2.TemplateError(f"it writes more than {PROMPT_CHARS} characters for one prompt")
    return text


def written(template: str, variables: dict[str, Any], today: str) -> tuple[str, str | None]:
    """What a template writes, until it is too long, and the error that it ends in."""
    length, parts = 0, []
    variables = {"strftime_now": datetime.date.fromisoformat(today).strftime} | variables
    try:
        for part in _compiled(template).generate(variables):
            parts.append(part)
            length += len(part)
            if length > PROMPT_CHARS:
                break
    except TEMPLATE_ERRORS as error:
        return "", f"{type(error).__name__}: {error}"
    return "".join(parts), None


@functools.lru_cache(maxsize=64)
def _is_plain(template: str) -> bool:
    try:
        tree = _environment().parse(template)
        is_known = all(isinstance(node, _PLAIN) for node in tree.find_all(nodes.Node))
        has_loop_in_loop = any(loop.find(nodes.For) for loop in tree.find_all(nodes.For))
    except TEMPLATE_ERRORS:
        return False
    return is_known and not has_loop_in_loop


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's turn for trainers on chats; it writes nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@functools.cache
def _environment() -> jinja2.Environment:
    """A sandbox with the functions that published templates expect (as in transformers)."""
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
    return environment


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
