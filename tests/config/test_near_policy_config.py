"""Rollouts that are drawn ahead: which settings are refused, in which words, and which may stand
together.
"""

import pytest

from opdjax.config import (
    Config,
    EstimatorConfig,
    MeshConfig,
    ModelConfig,
    NearPolicyConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import ConfigError

REFRESH, CONTINUOUS = {"schedule": "refresh"}, {"schedule": "continuous"}
FILTERED = REFRESH | {"filter": "ifd"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (REFRESH | {"num_epochs": 0}, "num_epochs is 0; expected at least 1"),
        (CONTINUOUS | {"max_staleness": -1}, "max_staleness is -1; expected 0 (on-policy) or more"),
        (
            {"schedule": "asynchronous"},
            "schedule is 'asynchronous'; expected one of ['continuous', 'none', 'refresh']",
        ),
        # What is kept
        (
            FILTERED | {"ifd_min": 0.8},
            "ifd_max is 0.8; expected more than near_policy.ifd_min, 0.8",
        ),
        (
            FILTERED | {"ifd_quantile": 0.0},
            "ifd_quantile is 0.0; expected more than 0 and at most 1",
        ),
        (
            FILTERED | {"ifd_quantile": 1.1},
            "ifd_quantile is 1.1; expected more than 0 and at most 1",
        ),
        (
            FILTERED | {"ifd_quantile": 0.5, "ifd_max": 0.9},
            "ifd_max is 0.9; expected 0.8 where near_policy.ifd_qu",
        ),
        (
            FILTERED | {"ifd_max": None, "ifd_quantile": 0.5},
            "ifd_max is None; expected 0.8 where",
        ),
        # When they are drawn
        *(
            (
                REFRESH | {"num_epochs": 4, "refresh_epochs": epochs},
                f"refresh_epochs is {epochs}; expected rising, each at least 1",
            )
            for epochs in ((0,), (4,), (2, 1), (1, 1))
        ),
        # A field that nothing reads
        (
            {"num_epochs": 2},
            "num_epochs is 2; expected 1 unless near_policy.schedule is refresh",
        ),
        (
            CONTINUOUS | {"num_epochs": 3, "refresh_epochs": (1,)},
            "num_epochs is 3; expected 1 unless near_policy.schedule is refresh",
        ),
        (
            REFRESH | {"max_staleness": 2},
            "max_staleness is 2; expected 0 unless near_policy.schedule is continuous",
        ),
        (
            REFRESH | {"lag": "free"},
            "lag is 'free'; expected fixed unless near_policy.schedule is continuous",
        ),
        (
            {"generator": "process"},
            "generator is 'process'; expected inline unless near_policy.schedule is refresh or "
            "continuous",
        ),
        (
            {"filter": "random"},
            "filter is 'random'; expected none unless near_policy.schedule is refresh or "
            "continuous",
        ),
        *(
            (
                REFRESH | {name: value},
                f"{name} is {value!r}; expected {default} unless near_policy.filter is ifd or "
                f"random",
            )
            for name, value, default in (
                ("ifd_min", None, 0.0),
                ("ifd_max", None, 0.8),
                ("ifd_quantile", 0.5, None),
            )
        ),
        # Who draws
        (
            REFRESH | {"generator": "thread"},
            "generator is 'thread'; expected inline or process where near_policy.schedule is "
            "refresh",
        ),
        (
            CONTINUOUS | {"lag": "free"},
            "lag is 'free'; expected fixed where near_policy.generator is inline",
        ),
    ],
    ids=str,
)
def test_a_section_that_is_refused(values, message):
    with pytest.raises(ConfigError) as error:
        NearPolicyConfig(**values)
    assert f"near_policy.{message}" in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        REFRESH,
        REFRESH | {"num_epochs": 4, "refresh_epochs": (1, 3), "generator": "process"},
        FILTERED | {"ifd_min": None, "ifd_max": None},
        FILTERED | {"ifd_min": -2.0, "ifd_max": -1.0},
        FILTERED | {"ifd_quantile": 1.0},
        FILTERED | {"filter": "random"},
        CONTINUOUS,
        CONTINUOUS | {"generator": "thread", "lag": "free", "max_staleness": 4},
        CONTINUOUS | {"generator": "process", "lag": "free", "filter": "ifd"},
    ],
    ids=str,
)
def test_a_section_that_is_accepted(values):
    made = NearPolicyConfig(**values)
    assert {name: getattr(made, name) for name in values} == values


NEAR = NearPolicyConfig("refresh", 2)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {
                "near_policy": NEAR,
                "sampling": SamplingConfig(completions_from="teacher"),
                "estimator": EstimatorConfig("npd"),
            },
            "sampling.completions_from is 'teacher'; expected student where near_policy.schedule "
            "is set",
        ),
        (
            {"near_policy": NEAR, "teacher": ModelConfig("@student")},
            "teacher.path is '@student'; expected a checkpoint where the schedule is refresh",
        ),
        (
            {"near_policy": NEAR, "train": TrainConfig(start_from="runs/a@3")},
            "train.start_with is 'both'; expected student where near_policy.schedule is set, by "
            "--train.start-with student",
        ),
        (
            {"near_policy": NearPolicyConfig("refresh", 3)},
            "near_policy.num_epochs is 3; expected a divisor of train.num_steps, 100: every epoch "
            "has as many steps",
        ),
        *(
            (
                {
                    "near_policy": near,
                    "sampling": SamplingConfig(num_generations=2),
                    "estimator": EstimatorConfig("opd", task_reward_coef=0.5),
                },
                "estimator.task_reward_coef is 0.5; expected none where near_policy may separate "
                "a prompt's rollouts",
            )
            for near in (NEAR, NearPolicyConfig("continuous", filter="ifd"))
        ),
        (
            {
                "near_policy": NearPolicyConfig("continuous", generator="thread"),
                "mesh": MeshConfig(processes=2),
            },
            "near_policy.generator is 'thread'; expected inline or process where mesh.processes is "
            "not 1",
        ),
    ],
)
def test_a_run_that_is_refused(sections, message):
    with pytest.raises(ConfigError) as error:
        Config(**sections)
    assert message in str(error.value)


def test_epochs_of_a_run():
    config = Config(
        near_policy=NearPolicyConfig("refresh", 5, (1, 3)), train=TrainConfig(num_steps=20)
    )
    assert config.steps_per_epoch == 4
    assert config.refresh_steps == (0, 4, 12)
    assert Config().refresh_steps == ()


def test_runs_of_the_recipe_that_are_accepted():
    """On-policy, on given answers, and without a teacher where a filter chose."""
    Config(estimator=EstimatorConfig("npd"))
    Config(
        estimator=EstimatorConfig("npd", importance="prefix_truncate"),
        sampling=SamplingConfig(temperature=0.7, top_p=0.9),
    )
    Config(
        estimator=EstimatorConfig("npd", kd_weight=0.0),
        sampling=SamplingConfig(completions_from="references"),
    )
    for name in ("ifd", "random"):
        Config(
            estimator=EstimatorConfig("npd", kd_weight=0.0),
            near_policy=NearPolicyConfig("continuous", filter=name),
        )
