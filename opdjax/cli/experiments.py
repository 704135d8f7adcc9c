"""Loads the experiment that a command line names: an experiment file, or the config that a run or a
point of a sweep saved.
"""

from __future__ import annotations

import json
import pathlib

from opdjax.config import Config
from opdjax.config.experiments import load_config
from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError, from_dict
from opdjax.runs.object_store import local_copy


def load_experiment(file: str) -> Config:
    """The config of an experiment file, of a run's config.json or of a point's point.json;
    ConfigError if there is none.
    """
    if pathlib.Path(file).suffix == ".json":
        return _read_saved_config(local_copy(file))
    return load_config(file)


def _read_saved_config(path: pathlib.Path) -> Config:
    try:
        saved = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as the config of a run: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise ConfigError(
            f"{path} has no 'config'; expected the config.json of a run or the point.json of a "
            "sweep"
        )
    return from_dict(Config, upgrade(saved["config"]))
