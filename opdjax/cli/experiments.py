"""Experiments and sweeps as they are named on the command line: Python files that return them, or
what a run or a point has saved.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import traceback
from typing import Any

from opdjax.config import Config
from opdjax.config.grid import SweepPoint
from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError, from_dict
from opdjax.runs.object_store import local_copy


def load_experiment(file: str) -> Config:
    """The config that an experiment file's `get_config()` returns, or that a run's config.json or a
    point's point.json holds.
    """
    if pathlib.Path(file).suffix == ".json":
        return _read_saved_config(local_copy(file))
    config = _call_in_file(file, "get_config")
    if not isinstance(config, Config):
        raise ConfigError(
            f"get_config() of {file} returned a {type(config).__name__}; expected a Config"
        )
    return config


def load_sweep(file: str) -> list[SweepPoint]:
    """The points that a sweep file's `get_sweep()` returns."""
    found = _call_in_file(file, "get_sweep")
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(point, SweepPoint) for point in found)
    ):
        raise ConfigError(
            f"get_sweep() of {file} returned {str(found)[:80]!r}; expected a list of points, as opdjax.config.grid.points makes it"
        )
    ids = [point.id for point in found]
    wrong = sorted(
        {
            name
            for name in ids
            if ids.count(name) > 1 or not re.fullmatch(r"[\w,=+-][\w.,=+-]*", name)
        }
    )
    if wrong:
        raise ConfigError(
            f"get_sweep() of {file} returned points called {wrong}, twice or by no name of a directory; join their overrides with chain "
            "and call opdjax.config.grid.points once"
        )
    return found


def sweeps_beside(file: str, *names: str) -> list[SweepPoint]:
    """The points of several sweep files in the directory of `file`, one after the other, for a
    sweep that is made of them.
    """
    found: list[SweepPoint] = []
    for name in names:
        # What several ask for in the same words is one point; in other words under one name it is a
        # mistake that the caller hears of.
        found += [
            point
            for point in load_sweep(str(pathlib.Path(file).with_name(name)))
            if point not in found
        ]
    return found


def _read_saved_config(path: pathlib.Path) -> Config:
    try:
        saved = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as the config of a run: {error}") from error
    if not isinstance(saved, dict) or "config" not in saved:
        raise ConfigError(
            f"{path} has no 'config'; expected the config.json of a run or the point.json of a sweep"
        )
    return from_dict(Config, upgrade(saved["config"]))


def _call_in_file(file: str, function: str) -> Any:
    path = pathlib.Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"there is no file {file!r}; expected a Python file with {function}()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if function not in vars(module):
            raise ConfigError(f"{file} defines no {function}()")
        return vars(module)[function]()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # it is the user's program and may raise anything
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        place = f" (line {lines[-1]})" if lines else ""
        raise ConfigError(f"{file} does not run: {type(error).__name__}: {error}{place}") from error
