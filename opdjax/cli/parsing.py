"""Makes commands of functions, and loads the experiment that a command line names."""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from opdjax.config import Config, EstimatorConfig, ModelConfig
from opdjax.config.experiments import load_config
from opdjax.config.recipes import RECIPES
from opdjax.config.saved import upgrade
from opdjax.config.validation import ConfigError, from_dict
from opdjax.runs.object_store import is_remote, local_copy, url_of

Command = Callable[[list[str]], None]
Experiment = Annotated[Config, tyro.conf.arg(name="")]  # each of its fields is an argument
Reads = Mapping[type, Sequence[str]]  # a section -> its fields that a command reads, if not all
_EVERYTHING: Reads = types.MappingProxyType({})
_HIDDEN = tyro.conf.Suppress
NONE = tyro.conf.arg(help_behavior_hint="(default: none)")  # of an argument whose default is empty


def command(usage: str, reads: Reads = _EVERYTHING) -> Callable[[Callable[..., None]], Command]:
    """Make a function a command, which parses its arguments by the function's signature and
    docstring. `usage` is a short form of them, for the overview; where it begins with EXPERIMENT,
    the parameter `config` is that experiment with the fields that the arguments change.
    """

    def decorate(function: Callable[..., None]) -> Command:
        name = function.__name__

        def run(arguments: list[str]) -> None:
            if usage.startswith("EXPERIMENT"):
                call_with_config(function, arguments, f"{name} {usage}", reads)
            else:
                call(function, arguments, f"opdjax {name}", reads)

        summary = function.__doc__.splitlines()[0]
        run.__doc__ = f"{usage}: {summary[0].lower()}{summary[1:]}"
        return run

    return decorate


def call_with_config(
    function: Callable[..., None], arguments: list[str], usage: str, reads: Reads = _EVERYTHING
) -> None:
    """Call a function of a `config`; without an experiment, print the usage and exit."""
    name = usage.partition(" ")[0]
    if arguments and not arguments[0].startswith("-"):
        config = with_recipe(load_experiment(arguments[0]), arguments)
        function = functools.partial(function, config=config)
        call(function, arguments[1:], f"opdjax {name} EXPERIMENT", reads)
        return
    print(f"usage: opdjax {usage} [--section.field VALUE …]\n")
    print("EXPERIMENT is a Python file with get_config(), the config.json of a run, or @NAME, a")
    print("built-in experiment: opdjax experiments lists them.")
    print(f"opdjax {name} EXPERIMENT --help lists all fields and their values.")
    sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else 2)


def call(
    function: Callable[..., None], arguments: list[str], program: str, reads: Reads = _EVERYTHING
) -> None:
    """Parse the arguments by the function's signature and docstring, and call it. The help lists
    the fields that the command `reads`; the others are accepted, so that commands share options.
    """
    is_help = bool({"-h", "--help"} & set(arguments))
    registry = ConstructorRegistry()
    registry.struct_rule(functools.partial(_described, reads if is_help else _EVERYTHING))
    tyro.cli(function, args=arguments, prog=program, registry=registry)


def _described(reads: Reads, info: StructTypeInfo) -> StructConstructorSpec | None:
    """A rule of tyro for the help of a section."""
    mark = f"described {info.type}"  # ends the recursion
    if mark in map(str, info.markers) or not dataclasses.is_dataclass(info.type):
        return None
    spec = ConstructorRegistry.get_struct_spec(
        dataclasses.replace(info, markers=(*info.markers, mark))
    )
    names = reads.get(info.type, [field.name for field in spec.fields])

    def shown(field: StructFieldSpec) -> StructFieldSpec:
        hint = NONE if field.default in ("", ()) else None
        mark = hint if field.name in names else _HIDDEN
        return dataclasses.replace(field, type=Annotated[field.type, mark]) if mark else field

    fields = list(map(shown, spec.fields))
    if info.type is EstimatorConfig:
        fields = map(_with_recipes, fields)
    return dataclasses.replace(spec, fields=tuple(fields))


def _with_recipes(option: StructFieldSpec) -> StructFieldSpec:
    """The option; its help ends with the recipes that have it, by their defaults."""
    by_default: dict[str, list[str]] = {}
    for name, row in RECIPES.items():
        if option.name in row.options:
            default = row.options[option.name].default
            by_default.setdefault("" if default is None else f": {default}", []).append(name)
    if not by_default:  # the recipe itself, and what all recipes have
        return option
    recipes = "; ".join(f"{', '.join(names)}{text}" for text, names in by_default.items())
    return dataclasses.replace(option, helptext=lambda: f"{option.helptext()} ({recipes})")


def load_experiment(file: str) -> Config:
    """The config of an experiment file, of a config.json or of a point.json; ConfigError."""
    if pathlib.Path(file).suffix != ".json":
        return load_config(file)
    path = local_copy(file)
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


def with_recipe(config: Config, arguments: list[str]) -> Config:
    """The experiment's config without options of another recipe than that of the arguments."""
    text, own = "\0".join(arguments), config.estimator
    chosen = re.findall("--estimator.recipe[=\0]([^\0]+)", text)
    if not chosen or chosen[-1] not in RECIPES or chosen[-1] == own.recipe:
        return config
    given = {"aggregation": own.aggregation} | own.options
    estimator = EstimatorConfig(chosen[-1])
    for name, value in given.items():
        with contextlib.suppress(ConfigError):
            estimator = dataclasses.replace(estimator, **{name: value})
    if left_out := [name for name, value in given.items() if getattr(estimator, name) != value]:
        print(
            f"note: {arguments[0]} sets {', '.join(left_out)} for {own.recipe}; left out for "
            f"{estimator.recipe}",
            file=sys.stderr,
        )
    changed = copy.copy(config)  # checked together with what the other arguments change
    object.__setattr__(changed, "estimator", estimator)
    return changed


def require_model(path: str) -> None:
    """CheckpointError, before jax is imported for seconds, if there can be no model at a path."""
    from opdjax.models.places import require_place

    require_place(ModelConfig(path).place[0])


def as_given(path: str | os.PathLike) -> str:
    """A path as the user wrote it; pathlib drops a slash of a URL."""
    return url_of(path) if is_remote(path) else str(path)
