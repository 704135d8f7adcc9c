"""Parsing of arguments, shared by all commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import tyro

from opdjax.cli.experiments import load_experiment
from opdjax.config import Config
from opdjax.runs.object_store import is_remote, url_of


def experiment_of(arguments: list[str], usage: str) -> Config:
    """The config of the experiment that the arguments begin with; prints the usage and exits if
    there is none.
    """
    if arguments and not arguments[0].startswith("-"):
        return load_experiment(arguments[0])
    print(f"usage: opdjax {usage} [--section.field VALUE …]\n")
    print("EXPERIMENT is a Python file with get_config(), the config.json of a run, or @NAME, a")
    print("built-in experiment: opdjax experiments lists them.")
    print(f"opdjax {usage.partition(' ')[0]} EXPERIMENT --help lists all fields and their values.")
    sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else 2)


def as_given(path: str | os.PathLike) -> str:
    """A path as the user wrote it; pathlib drops a slash of a URL."""
    return url_of(path) if is_remote(path) else str(path)


def call(function: Callable, arguments: list[str], program: str) -> None:
    """Parse the arguments by the function's signature and docstring, and call it."""
    tyro.cli(function, args=arguments, prog=program)
