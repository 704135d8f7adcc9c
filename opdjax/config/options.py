"""Options of recipes: defaults, accepted values, rules between options. Standard library only."""

from __future__ import annotations

import dataclasses
from typing import Any

from opdjax.config.validation import in_range


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition that an option sets on another one (`other`) when it is given.

    `accepted`: values, or a range in words (`in_range`). With `is_needed` the other option, its
    default included, must have an accepted value; without, it may be left out, and if it is given
    it must have an accepted value. `values`: the rule holds for these values alone; empty: for all.
    """

    other: str
    accepted: tuple[Any, ...] | str = ()
    is_needed: bool = False
    values: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether the other option may have this value."""
        if isinstance(self.accepted, str):
            return value is not None and in_range(value, self.accepted)
        return value in self.accepted

    @property
    def expected(self) -> str:
        """The accepted values in words."""
        if isinstance(self.accepted, str):
            return self.accepted
        return " or ".join(map(str, self.accepted)) or "none"


def needs(other: str, *accepted: Any, values: tuple[Any, ...] = ()) -> Rule:
    """The option is read only where `other` has one of the accepted values."""
    return Rule(other, accepted, True, values)


def fixes(other: str, *accepted: Any, values: tuple[Any, ...] = ()) -> Rule:
    """Where the option is given, `other` is left out or has one of the accepted values."""
    return Rule(other, accepted, False, values)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a recipe: its default, the values it accepts, and what it asks of others."""

    default: Any = None
    choices: tuple[Any, ...] = ()  # empty: all values of the field's type
    range: str | None = None  # in words, see `in_range`
    rules: tuple[Rule, ...] = ()
