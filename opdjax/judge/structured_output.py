"""One question to a judge, asked again with what was wrong until its reply can be used."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from opdjax.config.rubrics import RubricsConfig
from opdjax.judge.prompts import fill, load_template
from opdjax.judge.replies import ApiRequestError, ApiUnavailableError, Reply
from opdjax.judge.schema import ReplyError

T = TypeVar("T")
UNANSWERED = {
    ApiUnavailableError: "unavailable",
    ApiRequestError: "refused",
}  # why there is no reply at all
_MAX_ECHO = 4000  # characters of a reply that is shown to its writer again


class Complete(Protocol):
    """`ApiClient.complete`."""

    def __call__(
        self,
        role: str,
        messages: list[dict[str, str]],
        *,
        schema: dict | None = None,
        schema_name: str = "reply",
        sample: int = 0,
    ) -> Awaitable[Reply]:
        """The reply of whoever has the role."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """Whom to ask, and how the questions read."""

    complete: Complete
    config: RubricsConfig

    def template(self, name: str) -> str:
        """The prompt of that name, the user's own where there is one."""
        return load_template(name, self.config.templates)


@dataclasses.dataclass
class Tally:
    """What was wrong with the replies about one group, by class, and what was put right."""

    problems: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    repairs: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    num_reasks: int = 0


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """What is asked of a role, and the form of the answer."""

    role: str
    text: str
    schema: dict[str, Any]
    name: str  # of the schema


async def ask(
    judge: Judge,
    question: JudgeRequest,
    parse: Callable[[str], tuple[T, tuple[str, ...]]],
    tally: Tally,
) -> T:
    """What `parse` makes of the reply; a reply that it refuses is asked for again, `max_reasks`
    times, with the reason.

    ReplyError where the last one cannot be used either. A reply that was cut off at its length
    limit is told apart, since more room and not another attempt is what helps.
    """
    first = [{"role": "user", "content": question.text}]
    messages = first
    for attempt in range(judge.config.max_reasks + 1):
        tally.num_reasks += attempt > 0
        try:
            reply = await judge.complete(
                question.role, messages, schema=question.schema, schema_name=question.name
            )
        except tuple(UNANSWERED) as error:
            tally.problems[UNANSWERED[type(error)]] += 1
            raise
        try:
            found, repairs = parse(reply.text)
        except ReplyError as error:
            wrong = error
            if reply.finish_reason == "length" and error.kind != "validation_error":
                wrong = ReplyError(
                    "truncated",
                    "the reply reached its length limit before the JSON object ended; be brief",
                )
            tally.problems[wrong.kind] += 1
            messages = [*first, *_reask(judge, reply.text, wrong)]
            continue
        tally.repairs.update(repairs)
        return found
    raise wrong


def _reask(judge: Judge, text: str, wrong: ReplyError) -> list[dict[str, str]]:
    """The reply as its writer's own turn, and what is wrong with it."""
    words = fill(judge.template("reask"), {"problem": str(wrong).rstrip(".")}, {})
    echo = text.encode("utf-8", "replace").decode("utf-8")[:_MAX_ECHO].strip() or "(empty)"
    return [{"role": "assistant", "content": echo}, {"role": "user", "content": words}]
