"""What every verb does with its arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import tyro

from opdjax.cli.experiments import load_experiment
from opdjax.config import Config
from opdjax.runs.object_store import is_remote, url_of


def experiment_of(arguments: list[str], usage: str) -> Config:
    """The config of the experiment that a verb's arguments begin with; tells how the verb is used
    where they do not.
    """
    if arguments and not arguments[0].startswith("-"):
        return load_experiment(arguments[0])
    verb = usage.partition(" ")[0]
    print(
        f"usage: opdjax {usage} [--section.field VALUE …]\n\nEXPERIMENT is a Python file with get_config()."
    )
    print(f"opdjax {verb} EXPERIMENT --help lists every field with its value in that experiment.")
    sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else 2)


def named(path: str | os.PathLike) -> str:
    """A path as the user gave it; of a URL pathlib has dropped a slash."""
    return url_of(path) if is_remote(path) else str(path)


def call(function: Callable, arguments: list[str], program: str) -> None:
    """Parse the arguments by the function's signature and run it."""
    tyro.cli(function, args=arguments, prog=program)
