"""Loads the experiment that a command line names: an experiment file, or the config that a run or a
point of a sweep saved.
"""

from __future__ import annotations

import ast
import json
import pathlib
import shutil

from opdjax.config import Config
from opdjax.config.experiments import BUILT_IN, load_config, path_of
from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError, from_dict, nearest
from opdjax.runs.object_store import local_copy


def load_experiment(file: str) -> Config:
    """The config of an experiment file, of a run's config.json or of a point's point.json;
    ConfigError if there is none.
    """
    if pathlib.Path(file).suffix == ".json":
        return _read_saved_config(local_copy(file))
    return load_config(file)


def experiments(arguments: list[str]) -> None:
    """List the built-in experiments; NAME …: copy them into this directory, to edit."""
    if any(argument.startswith("-") for argument in arguments):
        print("usage: opdjax experiments [NAME …]\n\nWithout a name, list the built-in ones, which")
        print("commands take as @NAME. With names, copy their files into this directory.")
        return
    for name in arguments:
        source = path_of(f"@{name.removeprefix('@')}")
        target = pathlib.Path(source.name)
        if not source.is_file():
            known = [_name_of(path) for path in BUILT_IN.rglob("*.py")]
            raise ConfigError(f"there is no built-in experiment {name!r}; {nearest(name, known)}")
        if target.exists():
            raise ConfigError(f"{target} exists; move it, or copy {name} in another directory")
        shutil.copyfile(source, target)
        print(f"wrote {target}")
    for path in () if arguments else sorted(BUILT_IN.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        summary = " ".join(text.partition("\n\n")[0].split()).partition(". ")[0]
        print(f"@{_name_of(path):26}{summary.removesuffix('.')}")


def _name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(BUILT_IN).with_suffix(""))


def _read_saved_config(path: pathlib.Path) -> Config:
    try:
        saved = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as the config of a run: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise ConfigError(
            f"{path} has no 'config'; expected the config.json of a run or the point.json of a "
            "sweep"
        )
    return from_dict(Config, upgrade(saved["config"]))
