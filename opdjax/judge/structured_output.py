"""A request to a judge for a JSON reply, repeated with the error until the reply is usable."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.prompts import Block, fill, load_template
from opdjax.judge.replies import ApiRequestError, ApiUnavailableError, Reply
from opdjax.judge.reply_object import ReplyError, require_own_object

T = TypeVar("T")
# Errors without a reply -> their name among a tally's problems.
UNANSWERED = {ApiUnavailableError: "unavailable", ApiRequestError: "refused"}
NO_USABLE_REPLY = (ReplyError, *UNANSWERED)  # errors of `ask` that fail a judgement, not the run
_COMPLETE = ("validation_error", "answer_index")  # errors in an object that has ended
_TOO_LONG = "the reply reached its length limit before the JSON object ended; be brief"
# Further requests after an unusable reply, each with what was wrong: a judge that has not repaired
# its reply by then seldom does.
MAX_REASKS = 2
_MAX_ECHO = 4000  # characters of an unusable reply that are shown to the judge again


@dataclasses.dataclass(frozen=True)
class Judge:
    """How to reach the judge's roles (`ApiClient.complete`), and the settings of its prompts."""

    complete: Callable[..., Awaitable[Reply]]
    config: RubricsConfig

    def prompt(self, name: str, words: Mapping[str, str], blocks: Mapping[str, Block]) -> str:
        """The filled template of that name, from rubrics.templates if it is there."""
        return fill(load_template(name, self.config.templates), words, blocks)


@dataclasses.dataclass
class Tally:
    """Counts over the replies about one group: problems and repairs by kind, repeated requests."""

    problems: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    repairs: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    num_reasks: int = 0
    last_problem: str = ""  # in the words of the server, or of what was wrong with the reply


def described(tallies: Iterable[Tally]) -> str:
    """The number of problems of each kind, and the last one in words; "none" without any."""
    tallies = list(tallies)
    problems = sum((+tally.problems for tally in tallies), collections.Counter())
    counts = ", ".join(f"{name} {count}" for name, count in sorted(problems.items()))
    last = [tally.last_problem for tally in tallies if tally.last_problem]
    return "; the last one: ".join([counts or "none", *last[-1:]])


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """A request to a role: the template of its prompt, and the JSON schema of the reply."""

    role: str
    template: str
    words: Mapping[str, str]
    blocks: Mapping[str, Block]
    schema: dict[str, Any]
    schema_name: str


async def ask(
    judge: Judge,
    request: JudgeRequest,
    parse: Callable[[str], tuple[T, tuple[str, ...]]],
    tally: Tally,
) -> T:
    """The parsed reply; `parse` returns (value, repairs) or raises ReplyError.

    After a ReplyError the request is repeated with its message, up to MAX_REASKS times, then the
    error is raised.
    """
    content = judge.prompt(request.template, request.words, request.blocks)
    prompt = {"role": "user", "content": content}
    messages = [prompt]
    for attempt in range(MAX_REASKS + 1):
        tally.num_reasks += attempt > 0
        try:
            reply = await judge.complete(
                request.role, messages, schema=request.schema, schema_name=request.schema_name
            )
        except tuple(UNANSWERED) as error:
            tally.problems[UNANSWERED[type(error)]] += 1
            tally.last_problem = str(error)
            raise
        try:
            value, repairs = parse(reply.text)
            if "prose" in repairs:
                require_own_object(reply.text, content)
        except ReplyError as error:
            problem = error
            if reply.finish_reason == "length" and error.kind not in _COMPLETE:
                problem = ReplyError("truncated", _TOO_LONG)
            tally.problems[problem.kind] += 1
            tally.last_problem = str(problem)
            correction = judge.prompt("reask", {"problem": str(problem).rstrip(".")}, {})
            echo = reply.text.encode("utf-8", "replace").decode("utf-8")[:_MAX_ECHO].strip()
            echo = {"role": "assistant", "content": echo or "(empty)"}
            messages = [prompt, echo, {"role": "user", "content": correction}]
            continue
        tally.repairs.update(repairs)
        return value
    raise problem
