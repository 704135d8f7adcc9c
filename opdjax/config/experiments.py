"""Loads Python files that define an experiment, `get_config()`, or a sweep, `get_sweep()`."""

import importlib.util
import pathlib
import re
import traceback
from typing import Any

from opdjax.config.grid import SweepPoint
from opdjax.config.run import Config
from opdjax.config.validation import ConfigError


def load_config(file: str | pathlib.Path) -> Config:
    """The config that the file's `get_config()` returns; ConfigError if it returns none."""
    config = _call_in_file(file, "get_config")
    if not isinstance(config, Config):
        raise ConfigError(
            f"get_config() of {file} returned a {type(config).__name__}; expected a Config"
        )
    return config


def load_sweep(file: str | pathlib.Path) -> list[SweepPoint]:
    """The points that the file's `get_sweep()` returns; ConfigError if an id is not unique or is no
    valid directory name.
    """
    found = _call_in_file(file, "get_sweep")
    is_list = isinstance(found, list) and all(isinstance(point, SweepPoint) for point in found)
    if not found or not is_list:
        raise ConfigError(
            f"get_sweep() of {file} returned {str(found)[:80]!r}; expected a list of points, "
            "as opdjax.config.grid.points makes it"
        )
    ids = [point.id for point in found]
    valid = re.compile(r"[\w,=+-][\w.,=+-]*")
    wrong = sorted({id for id in ids if ids.count(id) > 1 or not valid.fullmatch(id)})
    if wrong:
        raise ConfigError(
            f"get_sweep() of {file} returned points called {wrong}, which are repeated or no valid "
            "directory names; join their overrides with chain and call opdjax.config.grid.points "
            "once"
        )
    return found


def config_beside(file: str, name: str) -> Config:
    """The config of another experiment file, `name`, relative to the directory of `file`."""
    return load_config(pathlib.Path(file).parent / name)


def sweeps_beside(file: str, *names: str) -> list[SweepPoint]:
    """The points of several sweep files, in order, equal points once; `names` are relative to the
    directory of `file`.

    Different points with one id stay in the list; `load_sweep` then refuses them.
    """
    found: list[SweepPoint] = []
    for name in names:
        points = load_sweep(pathlib.Path(file).parent / name)
        found += [point for point in points if point not in found]
    return found


def _call_in_file(file: str | pathlib.Path, function: str) -> Any:
    path = pathlib.Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(
            f"there is no file {str(file)!r}; expected a Python file with {function}()"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if function not in vars(module):
            raise ConfigError(f"{file} defines no {function}()")
        return vars(module)[function]()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's and may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f" (line {lines[-1]})" if lines else ""
        raise ConfigError(f"{file} does not run: {type(error).__name__}: {error}{place}") from error
