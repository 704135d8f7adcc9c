"""What a check found: ok, a warning, or a fault, which makes the results meaningless."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from opdjax.ops.sharding import is_process_zero

Status = Literal["ok", "warning", "fault"]
Problem = tuple[Status, str]
_SIGNS = {"ok": "✓", "warning": "!", "fault": "✗"}  # from the least severe to the most


class FaultError(RuntimeError):
    """A check found a fault that makes the run's results meaningless."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check. The message says what was expected, what was found, what to do."""

    name: str
    status: Status
    message: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{_SIGNS[self.status]} {self.name}: {self.message}"]
        return "\n".join([*lines, *(f"    {line}" for line in self.details)])


def warning(*sentences: str) -> Problem:
    """A problem that may be intended."""
    return "warning", "; ".join(sentences)


def fault(*sentences: str) -> Problem:
    """A problem that makes the run's results meaningless."""
    return "fault", "; ".join(sentences)


def finding(
    name: str, problems: Iterable[Problem], otherwise: str, details: Iterable[str] = ()
) -> Finding:
    """Merge the problems of a check; the worst sets the status.

    `otherwise` is the message of a check without problems.
    """
    problems = list(problems)
    status = max((status for status, _ in problems), key=list(_SIGNS).index, default="ok")
    return Finding(
        name, status, "; ".join(text for _, text in problems) or otherwise, tuple(details)
    )


def enforce(findings: Iterable[Finding]) -> None:
    """Print the warnings on process zero; raise FaultError if there is a fault."""
    findings = list(findings)
    for each in findings:
        if each.status == "warning" and is_process_zero():
            print(each)
    faults = [str(each) for each in findings if each.status == "fault"]
    if faults:
        raise FaultError(
            "the run was stopped: its results would mean nothing:\n" + "\n".join(faults)
        )
