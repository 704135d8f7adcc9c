"""Loads Python files that define an experiment, `get_config()`, or a sweep, `get_sweep()`."""

import contextlib
import difflib
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from opdjax.config.grid import SweepPoint
from opdjax.config.model import PACKAGE
from opdjax.config.run import Config
from opdjax.config.validation import ConfigError, Section, nearest

BUILT_IN = PACKAGE / "assets" / "experiments"  # `@NAME` is NAME.py there


def path_of(file: str | pathlib.Path) -> pathlib.Path:
    """The absolute path of a file, or of a built-in experiment such as `@mini_vopd`."""
    if str(file).startswith("@"):
        return BUILT_IN / f"{str(file)[1:]}.py"
    return pathlib.Path(file).absolute()


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
    """The config of the experiment `name` beside `file`, or of the built-in one of that name."""
    return load_config(_beside(file, name))


def sweeps_beside(file: str, *names: str) -> list[SweepPoint]:
    """The points of the sweep files `names` beside `file`, in order, equal points once."""
    found: list[SweepPoint] = []
    for name in names:
        points = load_sweep(_beside(file, name))
        found += [point for point in points if point not in found]
    return found


def _beside(file: str, name: str) -> pathlib.Path:
    path = (pathlib.Path(file).parent / name).resolve()
    of_built_in = [other for other in BUILT_IN.rglob("*.py") if other.name == path.name]
    return of_built_in[0] if of_built_in and not path.exists() else path


def load_function(file: str | pathlib.Path, name: str) -> Callable:
    """The function of a Python file, which is run; ConfigError if there is none or it fails."""
    path = path_of(file)
    if not path.is_file() or path.suffix != ".py":
        known = {other.name: f"@{other.stem}" for other in BUILT_IN.glob("*.py")}
        if not str(file).startswith("@"):
            near = pathlib.Path(file).parent
            known |= {other.name: str(near / other.name) for other in path.parent.glob("*.py")}
        close = difflib.get_close_matches(f"{path.stem}.py", known, 1)
        hint = "".join(f" (did you mean {known[name]}?)" for name in close)
        raise ConfigError(
            f"there is no file {str(file)!r}{hint}; expected a Python file with {name}()"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with errors_of(file), _neighbours_of(path.parent):
        spec.loader.exec_module(module)
    if not callable(vars(module).get(name)):
        raise ConfigError(f"{file} defines no {name}()")
    return vars(module)[name]


@contextlib.contextmanager
def _neighbours_of(directory: pathlib.Path) -> Iterator[None]:
    """Imports find the files of the directory; another directory's file of that name is another."""
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and pathlib.Path(file).parent == directory:
                del sys.modules[name]


def _call_in_file(file: str | pathlib.Path, function: str) -> Any:
    loaded = load_function(file, function)
    with errors_of(file):
        return loaded()


@contextlib.contextmanager
def errors_of(file: str | pathlib.Path) -> Iterator[None]:
    """Whatever the user's file raises becomes a ConfigError with the line of the file."""
    path = path_of(file)
    try:
        yield
    except (Exception, SystemExit) as error:  # the file is the user's and may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = f"{file}, line {lines[-1]}: " if lines else ""
        if isinstance(error, ConfigError):
            raise ConfigError(f"{place}{error}") from error
        place = f" (line {lines[-1]})" if lines else ""
        text = _unknown_field(error) or f"{type(error).__name__}: {error}"
        raise ConfigError(f"{file} does not run: {text}{place}") from error


def _unknown_field(error: BaseException) -> str:
    """A sentence with the nearest field, if a section was made with one that it does not have."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    sections = {section.__name__: section for section in Section.__subclasses__()}
    if not found or found[1] not in sections:
        return ""
    fields = sections[found[1]].__dataclass_fields__
    return f"{found[1]} has no field {found[2]!r}; {nearest(found[2], fields)}"
