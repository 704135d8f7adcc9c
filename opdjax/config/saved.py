"""Reads the `config.json` of earlier versions."""

from __future__ import annotations

from typing import Any

from opdjax.config.model import MINI_STUDENT, MINI_TEACHER
from opdjax.config.run import Config
from opdjax.config.validation import from_dict, to_dict

# Keys that earlier versions wrote, and their names today.
RENAMED_KEYS = {"sampling.source": "sampling.completions_from"}


def upgrade(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with today's keys and values; fields added since have their defaults."""
    sections = {name: dict(value) for name, value in saved.items() if isinstance(value, dict)}
    for old, new in RENAMED_KEYS.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        if key in sections.get(section, {}):
            sections.setdefault(new_section, {})[new_key] = sections[section].pop(key)
    train = sections.get("train", {})
    if isinstance(train.get("remat"), bool):  # remat used to be a flag
        train["remat"] = "layer" if train["remat"] else "none"
    config = to_dict(from_dict(Config, {**saved, **sections}))
    for role in ("student", "teacher"):
        config[role]["path"] = _built_in_name(config[role]["path"])
    return config


def _built_in_name(path: str) -> str:
    """`@mini_teacher` or `@mini_student` for the paths that early versions saved for them."""
    directory, _, role = path.rpartition("/")
    names = {"teacher": MINI_TEACHER, "student": MINI_STUDENT}
    is_built_in = directory.endswith("/opdjax/assets/mini_pair") and role in names
    return names[role] if is_built_in else path
