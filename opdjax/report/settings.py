"""The settings section of a run's page: its config, environment, and digests of its data."""

from __future__ import annotations

from typing import Any

from opdjax.config import Config
from opdjax.config.validation import to_dict
from opdjax.report.markup import (
    Html,
    count,
    details,
    group_row,
    section,
    shown,
    table,
    table_row,
    tag,
)
from opdjax.report.measures import leaves
from opdjax.runs.results import Run

_MODELS = ("student.path", "teacher.path")


def settings_section(run: Run) -> Html:
    """Settings that differ from the defaults, all settings, environment and digests."""
    defaults, given = leaves(to_dict(Config())), leaves(run.config)
    changed = [name for name, value in given.items() if not _is_default(name, value, defaults)]
    rows = [[name, shown(given[name]), _default(name, defaults)] for name in changed]
    differ = f"{len(changed)} of {count(len(given), 'setting')} differ from the defaults"
    every, current = [], None
    for name, value in given.items():
        head, _, field = name.rpartition(".")
        if head != current:
            every.append(group_row(head or "run", 3))
            current = head
        mark = "changed" if name in changed else None
        every.append(table_row([field, shown(value), mark or ""], class_=mark))
    environment = [(name, shown(value)) for name, value in run.environment.items()]
    data = [(name, tag("code", shown(value))) for name, value in run.data.items()]
    about = "Digests: runs with equal digests used the same prompts or weights."
    facts = {
        "All settings": table(["setting", "value", ""], every, class_="words"),
        "Environment": table(["", "value"], environment, class_="words"),
        "Data and models": table(["", "value"], data, class_="words", caption=about),
    }
    return section(
        "settings",
        "Settings",
        tag("p", differ + (":" if changed else ".")),
        table(["setting", "value", "default"], rows, class_="words") if changed else None,
        *(details(name, box) for name, box in facts.items()),
    )


def _default(name: str, defaults: dict[str, Any]) -> str:
    if name in _MODELS:
        return f"the built-in {name.removesuffix('.path')}"
    return shown(defaults[name]) if name in defaults else "no such setting in this version"


def _is_default(name: str, value: Any, defaults: dict[str, Any]) -> bool:
    # Earlier versions saved the directory of a built-in model, which is the default too.
    built_in = f"/assets/mini_pair/{name.removesuffix('.path')}"
    if name in _MODELS and str(value).endswith(built_in):
        return True
    return name in defaults and defaults[name] == value
