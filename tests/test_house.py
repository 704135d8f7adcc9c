"""Rules of the house that a program can see."""

import ast
import pathlib

import pytest

from opdjax.cli import load_experiment
from opdjax.config import Config, ConfigError, EstimatorConfig, SamplingConfig
from opdjax.estimators import RECIPES, bind

ROOT = pathlib.Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_an_experiment_is_data(file):
    imported = {node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)}
    assert imported == {"opdjax.config"}
    config = load_experiment(str(file))
    bind(config.estimator.recipe, config.estimator.options)


@pytest.mark.parametrize("name", RECIPES)
def test_the_config_refuses_altered_sampling_for_just_the_policy_gradients(name):
    altered = SamplingConfig(temperature=0.7)
    if RECIPES[name].is_policy_gradient:
        with pytest.raises(ConfigError, match="sampling.temperature 0.7"):
            Config(estimator=EstimatorConfig(recipe=name), sampling=altered)
    else:
        assert Config(estimator=EstimatorConfig(recipe=name), sampling=altered).sampling == altered


def test_the_readme_names_every_verb_and_file_that_it_should():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    for file in EXPERIMENTS:
        assert file.name in text, file
    for file in (ROOT / "opdjax").rglob("*.py"):
        if file.name != "__init__.py":
            assert file.name in text, file
