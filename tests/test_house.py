"""Rules of the code base that a program can check."""

import ast
import collections
import pathlib

import pytest

from opdjax.cli.parsing import load_experiment
from opdjax.config import (
    ApiConfig,
    Config,
    EstimatorConfig,
    JudgeConfig,
    RubricsConfig,
    SamplingConfig,
)
from opdjax.config.experiments import load_sweep
from opdjax.config.recipes import RECIPES
from opdjax.config.validation import ConfigError
from opdjax.estimators import estimator_of

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "opdjax"
LOWER = {"config", "ops", "estimators", "models", "data", "judge", "engine"}
ROOMS = LOWER | {"rollouts", "runs", "sweeps", "diagnose", "report", "cli"}
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))
SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.py"))


@pytest.mark.parametrize("file", EXPERIMENTS + SWEEPS, ids=lambda file: file.stem)
def test_an_experiment_is_data(file):
    nodes = list(ast.walk(ast.parse(file.read_text())))
    assert not any(isinstance(node, ast.Import) for node in nodes)
    assert {node.module for node in nodes if isinstance(node, ast.ImportFrom)} <= {
        "opdjax.config",
        "opdjax.config.grid",
        "opdjax.config.experiments",
        "dataclasses",
        "functools",
    }
    if file in SWEEPS:
        assert load_sweep(str(file))
        return
    config = load_experiment(str(file))
    estimator_of(config.estimator)


@pytest.mark.parametrize("name", RECIPES)
def test_the_config_refuses_altered_sampling_for_policy_gradients_alone(name):
    recipe, sampling = RECIPES[name], {"temperature": 0.7}
    estimator, sections = EstimatorConfig(recipe=name), {}
    if recipe.is_rewarded:  # its ratio is to the tempered policy, which earned the reward
        sampling["num_generations"] = 2
        if recipe.is_judged:
            judge = JudgeConfig("judge")
            stages = RubricsConfig(stages=("a", "b=;"))
            sections = {
                "rubricator": judge,
                "verifier": judge,
                "api": ApiConfig("http://host:1/v1"),
            }
            sections |= {"rubrics": stages} if recipe.has_stages else {}
    elif recipe.is_policy_gradient:
        with pytest.raises(ConfigError, match="sampling.temperature 0.7"):
            Config(estimator=estimator, sampling=SamplingConfig(**sampling))
        return
    elif name == "sft":  # it never trains on the student's own samples
        sampling["completions_from"] = "teacher"
    altered = SamplingConfig(**sampling)
    assert Config(estimator=estimator, sampling=altered, **sections).sampling == altered


def test_the_readme_names_every_room_and_the_ledger_every_experiment():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    for room in PACKAGE.iterdir():
        if (room / "__init__.py").exists():
            assert f"opdjax/{room.name}/" in text, room
    ledger = (ROOT / "experiments" / "README.md").read_text()
    for file in EXPERIMENTS + SWEEPS:
        assert file.name in ledger, file


def test_the_package_holds_its_rooms_and_nothing_else():
    found = {entry.name for entry in PACKAGE.iterdir()} - {"__pycache__"}
    assert found == ROOMS | {
        "__init__.py",
        "__main__.py",
        "losses.py",
        "py.typed",
        "train.py",
        "types.py",
        "assets",
    }


def test_class_names_are_unique():
    places = collections.defaultdict(list)
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_lines_and_files_are_short():
    found = []
    for folder in ("opdjax", "experiments", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            lines = file.read_text().splitlines()
            if len(lines) > 500:
                found.append(f"{file.relative_to(ROOT)}: {len(lines)} lines; expected at most 500")
            for number, line in enumerate(lines, 1):
                if len(line) > 100:
                    found.append(f"{file.relative_to(ROOT)}:{number}: more than 100 columns")
    assert found == []


def test_recipes_are_known_by_their_rows():
    """No recipe name is a string in the package outside the rooms that define recipes."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith(("config/recipes.py", "estimators/", "report/papers/")):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in tuple(RECIPES):
                found.append(f"opdjax/{name}:{node.lineno} {node.value!r}")
    assert found == []
