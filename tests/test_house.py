"""Rules of the house that a program can see."""

import ast
import pathlib

import pytest

from opdjax.cli.experiments import load_experiment
from opdjax.config import Config, EndpointConfig, EstimatorConfig, RubricsConfig, SamplingConfig
from opdjax.config.experiments import load_sweep
from opdjax.config.recipes import RECIPES
from opdjax.config.validation import ConfigError
from opdjax.estimators import estimator_of

ROOT = pathlib.Path(__file__).parents[1]
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
def test_the_config_refuses_altered_sampling_for_just_the_policy_gradients(name):
    altered = SamplingConfig(temperature=0.7)
    if (
        RECIPES[name].reward != "none"
    ):  # its ratio is to the tempered policy: the reward is earned there
        altered, judge = (
            SamplingConfig(2, temperature=0.7),
            EndpointConfig("http://host:1/v1", "judge"),
        )
        asked = {} if name == "grpo" else {"rubricator": judge, "verifier": judge}
        if name == "ropd_stages":
            asked["rubrics"] = RubricsConfig(stage_names=("a", "b"), stage_markers=(";",))
        assert (
            Config(estimator=EstimatorConfig(recipe=name), sampling=altered, **asked).sampling
            == altered
        )
    elif RECIPES[name].is_policy_gradient:
        with pytest.raises(ConfigError, match="sampling.temperature 0.7"):
            Config(estimator=EstimatorConfig(recipe=name), sampling=altered)
    elif name == "sft":  # never reads the student's own draws
        taught = SamplingConfig(temperature=0.7, completions_from="teacher")
        assert Config(estimator=EstimatorConfig(recipe=name), sampling=taught).sampling == taught
    else:
        assert Config(estimator=EstimatorConfig(recipe=name), sampling=altered).sampling == altered


def test_the_readme_names_every_verb_and_file_that_it_should():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    ledger = (ROOT / "experiments" / "README.md").read_text()
    for file in EXPERIMENTS + SWEEPS:
        assert file.name in ledger, file
    for file in (ROOT / "opdjax").rglob("*.py"):
        if (
            file.name != "__init__.py" and file.parent.name != "report"
        ):  # whose parts only its pages use
            assert file.name in text, file
