"""The config: what it refuses and in which words, and that what is written is what is read."""

import dataclasses
import inspect
import json
import math
import pathlib
import subprocess
import sys
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdjax.config import (
    ROPD_CODE,
    ROPD_PAPER,
    RULE_JUDGE,
    ApiConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    JudgeConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    NearPolicyConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TeachConfig,
    TrainConfig,
)
from opdjax.config.recipes import RECIPES, RecipeName
from opdjax.config.validation import ConfigError, differences, from_dict, nearest, to_dict
from opdjax.estimators import TOKEN_LOSSES, bind

JUDGE = JudgeConfig("judge", "http://host:1/v1", 0.5, "low")
# Every leaf differs from its default.
UNUSUAL = Config(
    student=ModelConfig("a"),
    teacher=ModelConfig("b"),
    data=DataConfig(
        "x.jsonl",
        "Q: {prompt}",
        "be short",
        "raw",
        "no_thinking",
        64,
        ("prompt=question", "answer=a.b", "reference=text", "rubric=rubric"),
        None,
        "{prompt}{answer}",
        True,
    ),
    sampling=SamplingConfig(6, 33, 0.7, 0.9, 20, (7, 8), ("Q:",), "teacher", 0.5, 12, "int8"),
    estimator=EstimatorConfig("full_kl", "fixed_denominator", divergence="jsd", beta=0.25),
    optimizer=OptimizerConfig(1e-3, "linear", 3, 0.95, 0.1, 0.0, 0.2, "muon"),
    train=TrainConfig(7, 12, 4, "dots", 40, "bfloat16", "splash"),
    lora=LoraConfig(4, 8.0, ("q", "down")),
    evaluation=EvaluationConfig(
        None, "boxed", 3, 4, (0.8, 0.5), 0.95, 5, 32, 25, ("prompt=problem", "benchmark=of")
    ),
    checkpoint=CheckpointConfig(10, 3, "previous"),
    log=LogConfig(0, ("wandb", "tensorboard"), 3),
    mesh=MeshConfig(2, 2, 2, 2),
    rubricator=JUDGE,
    verifier=JUDGE,
    teach=TeachConfig(2, 0.7, 0.9, 44, "writer", "http://host:2/v1", "low", True),
    api=ApiConfig(
        *("http://host/v1", "JUDGE_KEY", 100, 9.0, 4, (60, 9000), 1),
        *(("judge=0.5/1.5",), 2.5, "replies.sqlite", "max_completion_tokens"),
    ),
    seed=11,
)
# What does not stand beside it, so that every leaf differs from its default in one of them.
OTHERS = [
    Config(teacher=ModelConfig("@student"), optimizer=OptimizerConfig(teacher_ema_decay=0.9)),
    Config(
        train=TrainConfig(num_epochs=3, early_stopping_patience=2, frozen_weights="int8"),
        evaluation=EvaluationConfig(every=10, kind="both"),
    ),
    Config(data=DataConfig(date="2026-11-30")),
    Config(data=DataConfig(references="answers.jsonl")),
    Config(estimator=EstimatorConfig("opd", task_reward_coef=0.1), sampling=SamplingConfig(2)),
    *(
        Config(estimator=estimator)
        for estimator in (
            EstimatorConfig(
                "opd",
                power_alpha=0.5,
                importance="token_mask",
                importance_cap=4.0,
            ),
            EstimatorConfig(
                "vopd",
                discount=0.5,
                return_to_go="expected",
                reward_floor=-2.0,
                prefix_weight=0.5,
                extra_draws=3,
                baseline="student_topk",
                support_top_k=10,
            ),
            EstimatorConfig(
                "topk_kl",
                support="teacher",
                support_top_k=9,
                renormalize="none",
                outside="tail",
            ),
            EstimatorConfig("opd", importance="ppo_clip", clip_low=0.1, clip_high=0.3),
            EstimatorConfig("full_kl", divergence="skew_forward", beta=0.3),
            EstimatorConfig("topk_kl", weight="p_student"),
            EstimatorConfig("topk_kl", convention="verl"),
        )
    ),
    Config(
        estimator=EstimatorConfig(
            "ropd_stages",
            "stage_token_mean",
            advantage="mean_std",
            dual_clip=2.5,
            reference_kl_coef=0.001,
            reference_kl="k2",
            stage_credit="decay",
        ),
        sampling=SamplingConfig(4),
        rubrics=RubricsConfig(
            *(2, (3, 9), "graded", "signed", "group", False, "evolving"),
            *(("a", "b=;"), (2, 3), 3, "mine"),
        ),
        rubricator=JUDGE,
        verifier=JUDGE,
    ),
    Config(
        data=DataConfig(references="taught.jsonl"),
        teach=TeachConfig(2, 0.5, 0.9, 99),
        estimator=EstimatorConfig("ropd_stages", stage_credit=(1.0, 0.8, 0.0, 1.0)),
        sampling=SamplingConfig(4),
        rubrics=RubricsConfig(rubric_of="student", stages=("a", "b=;")),
        rubricator=JUDGE,
        verifier=JUDGE,
    ),
    Config(
        near_policy=NearPolicyConfig(
            "refresh",
            4,
            (2, 3),
            generator="process",
            filter="ifd",
            ifd_min=-0.1,
            ifd_quantile=0.5,
        ),
        estimator=EstimatorConfig("npd", kd_weight=0.25),
    ),
    Config(train=TrainConfig(start_from="runs/a@3", start_with="optimizer")),
    Config(
        near_policy=NearPolicyConfig(
            "continuous",
            max_staleness=3,
            lag="free",
            generator="thread",
            filter="random",
            ifd_min=None,
            ifd_max=1.5,
        )
    ),
]


def leaves(value, path=""):
    if not isinstance(value, dict):
        return [path.rstrip(".")]
    return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{path}{name}.")]


# Written and read


def test_every_leaf_survives_the_file():
    changed = set()
    for config in (UNUSUAL, *OTHERS, Config()):
        written = json.loads(json.dumps(to_dict(config)))
        changed |= {line.split(":")[0] for line in differences(to_dict(Config()), written)}
        assert from_dict(Config, written) == config
    assert changed == set(leaves(to_dict(Config())))


def test_the_place_that_a_run_starts_from():
    fresh, named = TrainConfig(), TrainConfig(start_from="gs://b/a@home/run@120")
    assert (fresh.first_step, named.first_step) == (0, 120)
    assert named.start == ("gs://b/a@home/run", "120")
    assert TrainConfig(start_from="runs/a@x").start == ("runs/a@x", "latest")
    assert TrainConfig(start_from="runs/a@3", start_with="student").first_step == 0


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        OptimizerConfig,
        learning_rate=st.floats(1e-12, 1e3),
        warmup_steps=st.integers(0, 10**9),
        weight_decay=st.floats(0, 1e300),
    ),
    st.text(max_size=10),
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3, unique=True),
)
def test_any_number_and_text_survives_the_file(optimizer, text, temperatures):
    config = Config(
        optimizer=optimizer,
        data=DataConfig(prompt_format=text + "{prompt}"),
        evaluation=EvaluationConfig(temperatures=tuple(temperatures)),
    )
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_missing_fields_keep_their_defaults():
    config = from_dict(Config, {"train": {"num_steps": 3}, "seed": 5})
    assert config == Config(train=TrainConfig(num_steps=3), seed=5)
    assert from_dict(Config, {}) == Config()


def test_a_whole_number_is_read_as_a_float_where_one_is_expected():
    rate = from_dict(OptimizerConfig, {"learning_rate": 1}).learning_rate
    assert isinstance(rate, float)
    found = from_dict(EvaluationConfig, {"temperatures": [1, 0.5]}).temperatures
    assert found == (1.0, 0.5)
    assert [type(value) for value in found] == [float, float]


MOST_SETTINGS = 146  # a user reads them all in the help


def test_settings_are_few():
    assert len(leaves(to_dict(Config()))) <= MOST_SETTINGS


# Refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "unknown field 'trian'; did you mean 'train'?"),
        ({"data": {"sorce": "x"}}, "unknown field 'data.sorce'; did you mean 'source'?"),
        (
            {"evaluation": {"max_completion": 3}},
            "unknown field 'evaluation.max_completion'; did you mean 'max_completion_length'?",
        ),
        ({"student": {"pth": "x"}}, "unknown field 'student.pth'; did you mean 'path'?"),
        (
            {"log": {"zzz": 1}},
            "unknown field 'log.zzz'; expected one of ['diagnostics_every', 'samples_every', ",
        ),
        ({"train": 3}, "train is 3; expected a section with named fields"),
        ({"train": None}, "train is None; expected a section with named fields"),
        ({"train": {"num_steps": "5"}}, "train.num_steps is '5'; expected int"),
        ({"train": {"num_steps": 5.0}}, "train.num_steps is 5.0; expected int"),
        ({"train": {"num_steps": True}}, "train.num_steps is True; expected int"),
        ({"train": {"num_steps": None}}, "train.num_steps is None; expected int"),
        (
            {"train": {"remat": True}},
            "train.remat is True; expected one of ['dots', 'layer', 'none']",
        ),
        ({"student": {"path": 3}}, "student.path is 3; expected str"),
        ({"log": {"trackers": True}}, "log.trackers is True; expected a list"),
        (
            {"log": {"trackers": ["wandb", "tensorbord"]}},
            "log.trackers[1] is 'tensorbord'; did you mean 'tensorboard'?",
        ),
        ({"log": {"trackers": ["wandb", "wandb"]}}, "expected one or more of tensorboard, wandb, "),
        ({"optimizer": {"name": "moun"}}, "optimizer.name is 'moun'; did you mean 'muon'?"),
        (
            {"optimizer": {"name": "lion", "b2": 0.99}},
            "optimizer.b2 is 0.99; expected 0.999 where optimizer.name is lion: it does not ",
        ),
        (
            {"optimizer": {"schedule": "constant", "min_lr_ratio": 0.1}},
            "optimizer.min_lr_ratio is 0.1; expected 0.0 where the schedule is constant",
        ),
        (
            {"train": {"num_steps": 50, "num_epochs": 2}},
            "train.num_steps is 50; expected 100 where train.num_epochs is given",
        ),
        (
            {"train": {"early_stopping_patience": 2}},
            "evaluation.every is 0; expected more than 0, with an evaluation.source: early ",
        ),
        (
            {"train": {"num_epochs": 2}, "near_policy": {"schedule": "refresh"}},
            "train.num_epochs is 2; expected none where near_policy.schedule is refresh",
        ),
        ({"api": {"per_minute": [1]}}, "api.per_minute is [1]; expected 2 values"),
        (
            {"estimator": {"stage_credit": ["paper"]}},
            "estimator.stage_credit[0] is 'paper'; expected float",
        ),
        (
            {"estimator": {"stage_credit": "papers"}},
            "estimator.stage_credit is 'papers'; did you mean 'paper'?",
        ),
        (
            {"optimizer": {"learning_rate": "1e-5"}},
            "optimizer.learning_rate is '1e-5'; expected float",
        ),
        ({"optimizer": {"learning_rate": True}}, "optimizer.learning_rate is True; expected float"),
        (
            {"optimizer": {"learning_rate": math.nan}},
            "optimizer.learning_rate is nan; expected a finite number",
        ),
        (
            {"optimizer": {"max_grad_norm": math.inf}},
            "optimizer.max_grad_norm is inf; expected a finite number",
        ),
        ({"estimator": {"beta": "x"}}, "estimator.beta is 'x'; expected float"),
        ({"estimator": {"recipe": "vodp"}}, "estimator.recipe is 'vodp'; did you mean 'vopd'?"),
        (
            {"estimator": {"recipe": 3}},
            "estimator.recipe is 3; expected one of ['full_kl', 'grpo', 'npd', 'opd', 'ropd', ",
        ),
        ({"estimator": {"recipe": ["opd"]}}, "estimator.recipe is ['opd']; "),
        ({"estimator": {"baseline": "ful"}}, "estimator.baseline is 'ful'; did you mean 'full'?"),
        ({"sampling": {"stop_token_ids": 3}}, "sampling.stop_token_ids is 3; expected a list"),
        (
            {"sampling": {"stop_token_ids": [3, "x"]}},
            "sampling.stop_token_ids[1] is 'x'; expected int",
        ),
        (
            {"evaluation": {"temperatures": ["hot"]}},
            "evaluation.temperatures[0] is 'hot'; expected float",
        ),
        ({"seed": "0"}, "seed is '0'; expected int"),
        ([], "the config is []; expected a section with named fields"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(values, message):
    with pytest.raises(ConfigError) as error:
        from_dict(Config, values)
    assert message in str(error.value)


def test_nearest_also_takes_an_iterator():
    assert nearest("trian", iter(["train", "sample"])) == "did you mean 'train'?"
    assert nearest("xyz", iter(["train", "sample"])) == "expected one of ['sample', 'train']"


REFUSED = [
    (
        DataConfig,
        {"prompt_format": "Q: {}"},
        "data.prompt_format is 'Q: {}'; expected a text that contains {prompt}",
    ),
    *(
        (
            DataConfig,
            {"columns": columns},
            f"data.columns is {columns}; expected NAME=COLUMN, each NAME once, one of prompt, "
            "answer, reference, rubric",
        )
        for columns in (
            ("question",),
            ("prompt=",),
            ("=question",),
            ("promt=question",),
            ("prompt=a", "prompt=b"),
        )
    ),
    (
        EvaluationConfig,
        {"columns": ("reference=r",)},
        "evaluation.columns is ('reference=r',); expected NAME=COLUMN, each NAME once, one of "
        "prompt, answer, benchmark",
    ),
    (DataConfig, {"max_prompt_length": 0}, "data.max_prompt_length is 0; expected at least 1"),
    (
        DataConfig,
        {"format": "raw", "system_prompt": "x"},
        "data.system_prompt is 'x'; expected none where no format is chat",
    ),
    (SamplingConfig, {"num_generations": 0}, "sampling.num_generations is 0; expected at least 1"),
    (
        SamplingConfig,
        {"max_completion_length": 0},
        "sampling.max_completion_length is 0; expected at least 1",
    ),
    (SamplingConfig, {"temperature": 0.0}, "sampling.temperature is 0.0; expected more than 0"),
    (
        SamplingConfig,
        {"temperature": math.nan},
        "sampling.temperature is nan; expected a finite number",
    ),
    (SamplingConfig, {"top_p": 0.0}, "sampling.top_p is 0.0; expected more than 0 and at most 1"),
    (SamplingConfig, {"top_p": 1.1}, "sampling.top_p is 1.1; expected more than 0 and at most 1"),
    (SamplingConfig, {"top_k": -1}, "sampling.top_k is -1; expected 0 (off) or more"),
    (EstimatorConfig, {"discount": -0.1}, "estimator.discount is -0.1; expected from 0 to 1"),
    (EstimatorConfig, {"discount": 1.1}, "estimator.discount is 1.1; expected from 0 to 1"),
    (
        EstimatorConfig,
        {"recipe": "full_kl", "beta": -0.1},
        "estimator.beta is -0.1; expected from 0 to 1",
    ),
    (
        EstimatorConfig,
        {"recipe": "full_kl", "beta": 1.1},
        "estimator.beta is 1.1; expected from 0 to 1",
    ),
    (
        EstimatorConfig,
        {"recipe": "npd", "kd_weight": -0.1},
        "estimator.kd_weight is -0.1; expected from 0 to 1",
    ),
    (
        EstimatorConfig,
        {"recipe": "npd", "kd_weight": 1.1},
        "estimator.kd_weight is 1.1; expected from 0 to 1",
    ),
    (
        EstimatorConfig,
        {"recipe": "npd", "divergence": "jsd"},
        "divergence is 'jsd'; expected reverse or forward where the recipe",
    ),
    (
        EstimatorConfig,
        {"recipe": "npd", "support_top_k": 0},
        "estimator.support_top_k is 0; expected at least 1",
    ),
    (
        EstimatorConfig,
        {"recipe": "npd", "kd_weight": 0.0, "support_top_k": 3},
        "support_top_k is 3; expected none where kd_weight is 0.0",
    ),
    (
        Config,
        {"estimator": EstimatorConfig("npd", kd_weight=0.0)},
        "estimator.kd_weight is 0.0; expected more than 0, or rollouts that near_policy.filter "
        "chose",
    ),
    (EstimatorConfig, {"support_top_k": 0}, "estimator.support_top_k is 0; expected at least 1"),
    (
        EstimatorConfig,
        {"support_top_k": 5},
        "estimator.support_top_k is 5; expected none unless baseline is student_topk",
    ),
    (
        EstimatorConfig,
        {"recipe": "grpo", "discount": 0.5},
        "recipe 'grpo' has no option 'discount'; it has advantage, clip_low, clip_high, dual_clip, "
        "reference_kl_coef, reference_kl",
    ),
    (
        EstimatorConfig,
        {"recipe": "sft", "discount": 0.5},
        "recipe 'sft' has no option 'discount'; it has none",
    ),
    (
        EstimatorConfig,
        {"aggregation": "stage_token_mean"},
        "estimator.aggregation is 'stage_token_mean'; expected another one where the recipe is "
        "vopd: it has no stages",
    ),
    (
        EstimatorConfig,
        {"return_to_go": "expected"},
        "estimator.return_to_go is 'expected'; expected none unless discount is more than 0",
    ),
    (
        EstimatorConfig,
        {"return_to_go": "sampled", "discount": 0.0},
        "return_to_go is 'sampled'; expected none unless discount is more",
    ),
    (
        EstimatorConfig,
        {"reward_floor": 0.0},
        "estimator.reward_floor is 0.0; expected less than 0 (nats)",
    ),
    (
        EstimatorConfig,
        {"reward_floor": 1.0},
        "estimator.reward_floor is 1.0; expected less than 0 (nats)",
    ),
    (EstimatorConfig, {"power_alpha": 0.0}, "estimator.power_alpha is 0.0; expected more than 0"),
    (
        EstimatorConfig,
        {"reward_floor": -1.0, "power_alpha": 0.5},
        "reward_floor is -1.0; expected none where power_alpha is 0.5",
    ),
    (
        EstimatorConfig,
        {"prefix_weight": -0.1},
        "estimator.prefix_weight is -0.1; expected 0 (off) or more",
    ),
    (EstimatorConfig, {"extra_draws": -1}, "estimator.extra_draws is -1; expected 0 (off) or more"),
    (
        EstimatorConfig,
        {"extra_draws": 2, "importance": "token_mask"},
        "estimator.extra_draws is 2; expected 0 where importance is token_mask",
    ),
    (
        EstimatorConfig,
        {"importance_cap": 2.0},
        "estimator.importance_cap is 2.0; expected none unless importance is token_truncate or",
    ),
    (
        EstimatorConfig,
        {"importance": "ppo_clip", "importance_cap": 2.0},
        "importance_cap is 2.0; expected none unless importance is token",
    ),
    (
        EstimatorConfig,
        {"importance": "token_truncate", "importance_cap": 0.0},
        "estimator.importance_cap is 0.0; expected more than 0",
    ),
    (
        EstimatorConfig,
        {"importance": "token_mask", "importance_cap": 1.0},
        "estimator.importance_cap is 1.0; expected more than 1 where importance is token_mask",
    ),
    (
        EstimatorConfig,
        {"importance": "token_mask", "clip_low": 0.2},
        "estimator.clip_low is 0.2; expected none unless importance is",
    ),
    (
        EstimatorConfig,
        {"clip_high": 0.2},
        "estimator.clip_high is 0.2; expected none unless importance is ppo_clip",
    ),
    (
        EstimatorConfig,
        {"importance": "ppo_clip", "clip_low": 1.0},
        "estimator.clip_low is 1.0; expected more than 0 and less than 1",
    ),
    *(
        (
            EstimatorConfig,
            {"recipe": recipe, "importance": kind},
            f"estimator.importance is '{kind}'; expected none or prefix_truncate",
        )
        for recipe in ("full_kl", "topk_kl", "npd")
        for kind in ("token_truncate", "token_mask", "sequence_mask", "ppo_clip")
    ),
    (
        Config,
        {
            "estimator": EstimatorConfig("full_kl", importance="prefix_truncate"),
            "sampling": SamplingConfig(completions_from="teacher"),
        },
        "estimator.importance is 'prefix_truncate'; expected none where the completions are not "
        "the student's",
    ),
    *(
        (
            Config,
            {
                "estimator": EstimatorConfig(recipe),
                "sampling": SamplingConfig(
                    completions_from="teacher", student_fraction=0.5, num_generations=2
                ),
            },
            f"sampling.student_fraction is 0.5; expected 0: {reason}",
        )
        for recipe, reason in (
            ("vopd", "vopd averages over the student's samples"),
            ("grpo", "grpo averages over the student's samples"),
            ("sft", "cross-entropy on its own samples teaches a student nothing"),
        )
    ),
    (SamplingConfig, {"stop_strings": ("Q:", "")}, "sampling.stop_strings is ('Q:', '')"),
    (
        Config,
        {
            "estimator": EstimatorConfig("full_kl"),
            "sampling": SamplingConfig(student_fraction=0.5),
        },
        "sampling.student_fraction is 0.5; expected 0 where sampling.completions_from is student",
    ),
    (
        Config,
        {"estimator": EstimatorConfig("opd", task_reward_coef=0.5)},
        "sampling.num_generations is 1; expected at least 2 where estimator.task_reward_coef is "
        "given",
    ),
    (
        OptimizerConfig,
        {"learning_rate": 0.0},
        "optimizer.learning_rate is 0.0; expected more than 0",
    ),
    (
        OptimizerConfig,
        {"learning_rate": math.nan},
        "optimizer.learning_rate is nan; expected a finite number",
    ),
    (
        Config,
        {"optimizer": OptimizerConfig(teacher_ema_decay=0.9)},
        "optimizer.teacher_ema_decay is 0.9; expected 0 unless teacher.path is @student",
    ),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps is -1; expected 0 or more"),
    (OptimizerConfig, {"b2": 1.0}, "optimizer.b2 is 1.0; expected at least 0 and less than 1"),
    (OptimizerConfig, {"b2": -0.1}, "optimizer.b2 is -0.1; expected at least 0 and less than 1"),
    (
        OptimizerConfig,
        {"weight_decay": -0.1},
        "optimizer.weight_decay is -0.1; expected 0 (off) or more",
    ),
    (
        OptimizerConfig,
        {"max_grad_norm": -1.0},
        "optimizer.max_grad_norm is -1.0; expected 0 (off) or more",
    ),
    (TrainConfig, {"num_steps": 0}, "train.num_steps is 0; expected at least 1"),
    (TrainConfig, {"prompts_per_step": 0}, "train.prompts_per_step is 0; expected at least 1"),
    (
        TrainConfig,
        {"gradient_accumulation_steps": 0},
        "train.gradient_accumulation_steps is 0; expected at least 1",
    ),
    (EvaluationConfig, {"num_prompts": 0}, "evaluation.num_prompts is 0; expected at least 1"),
    (EvaluationConfig, {"num_samples": 0}, "evaluation.num_samples is 0; expected at least 1"),
    (
        EvaluationConfig,
        {"top_p": 1.1},
        "evaluation.top_p is 1.1; expected more than 0 and at most 1",
    ),
    (EvaluationConfig, {"top_k": -1}, "evaluation.top_k is -1; expected 0 (off) or more"),
    (
        EvaluationConfig,
        {"max_completion_length": 0},
        "evaluation.max_completion_length is 0; expected at least 1",
    ),
    (
        EvaluationConfig,
        {"temperatures": (0.5, 0.0)},
        "evaluation.temperatures is (0.5, 0.0); expected one or more different numbers above 0",
    ),
    (
        EvaluationConfig,
        {"temperatures": ()},
        "evaluation.temperatures is (); expected one or more different numbers",
    ),
    # A score is known by its temperature: a second one of the same would take its place.
    (
        EvaluationConfig,
        {"temperatures": (1.0, 0.5, 1.0)},
        "evaluation.temperatures is (1.0, 0.5, 1.0); expected one or more different numbers",
    ),
    (EvaluationConfig, {"every": -1}, "evaluation.every is -1; expected 0 (off) or more"),
    (CheckpointConfig, {"every": 0}, "checkpoint.every is 0; expected at least 1"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep is 0; expected at least 1"),
    (LoraConfig, {"rank": -1}, "lora.rank is -1; expected 0 (off) or more"),
    (LoraConfig, {"alpha": 0.0}, "lora.alpha is 0.0; expected more than 0"),
    (
        LoraConfig,
        {"targets": ()},
        "lora.targets is (); expected one or more of q, k, v, o, gate, up, down, each once",
    ),
    (
        LoraConfig,
        {"targets": ("q", "v", "q")},
        "lora.targets is ('q', 'v', 'q'); expected one or more of q, k,",
    ),
    (
        LoraConfig,
        {"alpha": 32.0},
        "lora.alpha is 32.0; expected 16.0 where lora.rank is 0: no adapters",
    ),
    (
        LoraConfig,
        {"targets": ("q",)},
        "lora.targets is ('q',); expected ('q', 'k', 'v', 'o', 'gate', 'up', 'down') where "
        "lora.rank is 0",
    ),
    (LoraConfig, {"targets": ("q", "gates")}, "lora.targets[1] is 'gates'; did you mean 'gate'?"),
    (LogConfig, {"samples_every": -1}, "log.samples_every is -1; expected 0 (off) or more"),
    (MeshConfig, {"data": 0}, "mesh.data is 0; expected -1 (all there are) or at least 1"),
    (MeshConfig, {"data": -2}, "mesh.data is -2; expected -1 (all there are) or at least 1"),
    (Config, {"seed": -1}, "seed is -1; expected from 0 to 2147483647"),
    (Config, {"seed": 2**31}, "seed is 2147483648; expected at most 2147483647"),
    # Sections made in Python, whose types nothing else checks.
    (
        Config,
        {"student": "Qwen/Qwen3-0.6B"},
        "student is 'Qwen/Qwen3-0.6B'; expected a section with named fields",
    ),
    (
        Config,
        {"student": ModelConfig(pathlib.PurePosixPath("a"))},
        "student.path is PurePosixPath('a'); expected str",
    ),
    (
        TrainConfig,
        {"dtype": "fp32"},
        "train.dtype is 'fp32'; expected one of ['auto', 'bfloat16', 'float32']",
    ),
    (TrainConfig, {"num_steps": 1.5}, "train.num_steps is 1.5; expected int"),
    (
        OptimizerConfig,
        {"max_grad_norm": math.inf},
        "optimizer.max_grad_norm is inf; expected a finite number",
    ),
    (EstimatorConfig, {"recipe": "oppd"}, "estimator.recipe is 'oppd'; did you mean 'opd'?"),
]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    REFUSED,
    ids=[f"{s.__name__}-{'-'.join(v)}-{i}" for i, (s, v, _) in enumerate(REFUSED)],
)
def test_a_value_out_of_range_is_refused_by_name(section, values, message):
    with pytest.raises(ConfigError) as error:
        section(**values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (DataConfig, {"format": "raw", "teacher_format": "chat", "system_prompt": "x"}),
        (DataConfig, {"max_prompt_length": 1}),
        (SamplingConfig, {"top_p": 1e-9, "top_k": 1, "temperature": 1e-9}),
        (EstimatorConfig, {"discount": 0.0}),
        (EstimatorConfig, {"recipe": "full_kl", "divergence": "jsd", "beta": 0.0}),
        (EstimatorConfig, {"discount": 1.0}),
        (EstimatorConfig, {"recipe": "full_kl", "divergence": "jsd", "beta": 1.0}),
        (EstimatorConfig, {"baseline": "student_topk", "support_top_k": 1}),
        (
            EstimatorConfig,
            {
                "prefix_weight": 0.0,
                "extra_draws": 0,
                "task_reward_coef": 0.0,
                "reward_floor": -1e-9,
                "importance": "none",
            },
        ),
        (
            EstimatorConfig,
            {"recipe": "full_kl", "importance": "prefix_truncate", "importance_cap": 1e9},
        ),
        (EstimatorConfig, {"extra_draws": 2, "importance": "none"}),
        (EstimatorConfig, {"recipe": "npd", "kd_weight": 0.0}),
        (
            EstimatorConfig,
            {
                "recipe": "npd",
                "kd_weight": 1.0,
                "support_top_k": 1,
                "importance": "prefix_truncate",
            },
        ),
        (
            OptimizerConfig,
            {"b2": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "warmup_steps": 0},
        ),
        (EvaluationConfig, {"every": 0, "temperatures": (1e-9,)}),
        (MeshConfig, {"data": 1}),
        (Config, {"seed": 2**31 - 1}),
    ],
)
def test_the_ends_of_the_ranges_are_accepted(section, values):
    made = section(**values)
    assert {name: getattr(made, name) for name in values} == values


def test_passes_over_the_prompts_are_a_number_of_steps():
    """64 prompts, 24 a step: three passes are 192 prompts, eight whole steps; two are 5 1/3."""
    steps = [TrainConfig(num_epochs=n, prompts_per_step=24).steps_over(64) for n in (1, 2, 3)]
    assert steps == [3, 6, 8]
    assert TrainConfig(7).steps_over(64) == 7
    found = Config(train=TrainConfig(num_epochs=2)).with_steps_over(320)
    assert found == Config(train=TrainConfig(num_steps=10))


def test_micro_batches_divide_the_rows_of_a_step():
    changes = {"train": TrainConfig(prompts_per_step=6, gradient_accumulation_steps=4)}
    with pytest.raises(
        ConfigError,
        match="train.gradient_accumulation_steps is 4; expected a divisor of the 6 rows a step",
    ):
        Config(**changes)
    # With two samples a prompt there are twelve rows.
    assert (
        Config(
            **changes, sampling=SamplingConfig(num_generations=2)
        ).train.gradient_accumulation_steps
        == 4
    )


ALTERED = [
    {"temperature": 0.7},
    {"temperature": 1.3},
    {"top_p": 0.9},
    {"top_k": 20},
]


@pytest.mark.parametrize("sampling", ALTERED, ids=str)
def test_policy_gradients_want_unaltered_sampling(sampling):
    for recipe in ("opd", "vopd"):
        with pytest.raises(
            ConfigError,
            match=f"recipe '{recipe}' with .*sample with temperature 1 and no filter, use an exact "
            f"divergence .full_kl., or set estimator.importance",
        ) as e:
            Config(sampling=SamplingConfig(**sampling), estimator=EstimatorConfig(recipe=recipe))
        name, value = next(iter(sampling.items()))
        assert f"{name} {value}" in str(e.value)
        with pytest.raises(
            ConfigError, match="does not have the expected gradient that it advertises"
        ):
            Config(
                sampling=SamplingConfig(**sampling),
                estimator=EstimatorConfig(recipe=recipe, importance="none"),
            )
        corrected = EstimatorConfig(recipe=recipe, importance="token_truncate")
        assert (
            Config(sampling=SamplingConfig(**sampling), estimator=corrected).estimator == corrected
        )
    config = Config(
        sampling=SamplingConfig(**sampling), estimator=EstimatorConfig(recipe="full_kl")
    )
    assert config.sampling.has_filter is ("temperature" not in sampling)


def test_options_are_those_that_were_given():
    assert EstimatorConfig().options == {}
    given = EstimatorConfig(recipe="vopd", discount=0.0, baseline="student_topk", support_top_k=5)
    assert given.options == {"discount": 0.0, "baseline": "student_topk", "support_top_k": 5}
    assert EstimatorConfig(recipe="full_kl", divergence="jsd", beta=0.0).options == {
        "divergence": "jsd",
        "beta": 0.0,
    }


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.num_steps = 3


# Differences


def test_differences_name_the_leaf_and_both_values():
    left = to_dict(Config())
    right = to_dict(
        Config(
            train=TrainConfig(num_steps=7),
            evaluation=EvaluationConfig(source=None, temperatures=(1.0, 0.5)),
            seed=3,
        )
    )
    assert differences(left, right) == [
        "evaluation.source: 'arithmetic:test' -> None",
        "evaluation.temperatures: [1.0] -> [1.0, 0.5]",
        "seed: 0 -> 3",
        "train.num_steps: 100 -> 7",
    ]
    assert differences(left, to_dict(Config())) == []


def test_differences_of_fields_that_one_side_lacks():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == [
        "a.c: 2 -> None",
        "a.d: None -> 3",
    ]
    assert differences({"a": {"b": 1}}, {"a": 5}) == ["a: {'b': 1} -> 5"]


# Importing


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_config_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import opdjax.config\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    assert run_python(code) == "['opdjax']"


def test_importing_the_package_starts_nothing():
    # What jax and orbax do to the environment on import is theirs; the test is of what opdjax adds.
    code = (
        "import os, pkgutil, importlib, jax, flax.struct, optax, orbax.checkpoint, tqdm, tyro, "
        "opdjax\n"
        "from jax._src import xla_bridge\n"
        "before, flags = dict(os.environ), dict(jax.config.values)\n"
        "names = [module.name for module in pkgutil.walk_packages(opdjax.__path__, 'opdjax.')]\n"
        "[importlib.import_module(name) for name in names]\n"
        "print(len(names) > 25, dict(os.environ) == before, jax.config.values == flags, "
        "xla_bridge.backends_are_initialized())"
    )
    assert run_python(code) == "True True True False"


# Rewards of whole answers


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dual_clip": 1.0}, "estimator.dual_clip is 1.0; expected 0 .off., or more than 1"),
        ({"dual_clip": -3.0}, "estimator.dual_clip"),
        ({"clip_low": 1.0}, "estimator.clip_low is 1.0; expected more than 0 and less than 1"),
        ({"clip_high": 0.0}, "estimator.clip_high is 0.0; expected more than 0"),
        ({"reference_kl_coef": -0.1}, "estimator.reference_kl_coef"),
        ({"reference_kl": "k2"}, "none unless reference_kl_coef is more than 0"),
        ({"reference_kl_coef": 0.1, "reference_kl": "k1"}, "estimator.reference_kl is 'k1'"),
        ({"advantage": "std"}, "estimator.advantage is 'std'"),
        ({"stage_credit": ()}, "K \\* K numbers"),
        ({"stage_credit": (1.0, 0.5, 1.0)}, "K \\* K numbers"),
    ],
)
def test_options_of_rewards_that_cannot_be(fields, told):
    with pytest.raises(ConfigError, match=told):
        EstimatorConfig("ropd_stages", **fields)


def test_the_presets_of_ropd_are_its_release_and_its_paper():
    released, printed = ROPD_CODE, ROPD_PAPER
    assert (released.aggregation, released.advantage) == ("token_mean", "mean")
    assert (printed.aggregation, printed.advantage) == ("sequence_mean_token_mean", "mean_std")
    for preset in (released, printed):
        bind(preset.recipe, preset.options, aggregation=preset.aggregation)
        assert (preset.clip_low, preset.clip_high) == (0.2, 0.28)


# Judges


JUDGED = {
    "estimator": EstimatorConfig("opd"),
    "sampling": SamplingConfig(4),
    "rubricator": JUDGE,
    "verifier": JUDGE,
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampling": SamplingConfig(1)}, "at least 2: ropd compares"),
        ({"verifier": JudgeConfig()}, "verifier.model"),
        ({"rubricator": JudgeConfig()}, "rubricator.model"),
        (
            {
                "estimator": EstimatorConfig("opd"),
                "rubricator": JudgeConfig(),
                "rubrics": RubricsConfig(refresh="given"),
                "data": DataConfig(
                    columns=("rubric=r",), teacher_prompt_format="{prompt}{reflection}"
                ),
            },
            "rubricator.model is ''; expected the name of a model: opd asks this judge",
        ),
        (
            {"rubrics": RubricsConfig(stages=("a", "b=;"))},
            "none where the recipe is ropd: it has no stages",
        ),
        ({"estimator": EstimatorConfig("ropd_stages")}, "two or more names"),
        (
            {"estimator": EstimatorConfig("tjudge"), "rubrics": RubricsConfig(rubric_of="student")},
            "group where the recipe is tjudge",
        ),
        (
            {"estimator": EstimatorConfig("tjudge"), "rubrics": RubricsConfig(blind=False)},
            "True where the recipe is tjudge",
        ),
        (
            {"estimator": EstimatorConfig("tjudge"), "rubrics": RubricsConfig(num_criteria=(4, 5))},
            "12. where the recipe is tjudge",
        ),
        (
            {"estimator": EstimatorConfig("opd"), "rubrics": RubricsConfig(grades="graded")},
            "it asks no judge",
        ),
        ({"near_policy": NearPolicyConfig("continuous", max_staleness=1)}, "near_policy.schedule"),
        (
            {"data": DataConfig(teacher_prompt_format="{prompt} {reference}")},
            "reads no teacher's scores",
        ),
    ],
)
def test_what_judged_runs_need(changes, told):
    with pytest.raises(ConfigError, match=told):
        Config(**({**JUDGED, "estimator": EstimatorConfig("ropd")} | changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"verifier": {"base_url": "http://h/v1"}}, "verifier.model is ''; expected the name"),
        ({"verifier": {"base_url": "h:80", "model": "m"}}, "verifier.base_url is 'h:80'"),
        ({"verifier": {"model": "m"}}, "api.base_url is ''; .*the server of verifier.model, m"),
        ({"verifier": {"temperature": -1.0}}, "verifier.temperature is -1.0; expected 0 or more"),
        ({"rubricator": {"reasoning_effort": "some"}}, "rubricator.reasoning_effort is 'some'"),
        ({"teach": {"model": "m"}}, "api.base_url is ''; .*the server of teach.model, m"),
        ({"teach": {"model": "@rules"}}, "teach.model is '@rules'; .* a judge writes no answers"),
        ({"teach": {"reasoning_effort": "low"}}, "teach.reasoning_effort is 'low'; expected none"),
        ({"api": {"base_url": "h:80"}}, "api.base_url is 'h:80'; .* starts with http"),
        ({"api": {"api_key_env": "sk-abc123"}}, "NAME of an environment variable"),
        ({"api": {"timeout": 0.0}}, "api.timeout is 0.0; expected more than 0"),
        ({"api": {"per_minute": [0, -1]}}, "api.per_minute is .0, -1.; expected 0"),
        ({"api": {"prices": ["m"]}}, "api.prices is .'m',.; expected MODEL=INPUT/OUTPUT"),
        ({"api": {"prices": ["m=1"]}}, "api.prices is 'm=1'; expected MODEL=INPUT/OUTPUT"),
        ({"api": {"prices": ["m=1/-2"]}}, "api.prices is 'm=1/-2'; expected MODEL=INPUT/OUTPUT"),
        ({"api": {"prices": ["m=1/2", "m=1/3"]}}, "each model once"),
    ],
)
def test_errors_about_judges_name_the_field_that_was_set(changes, told):
    with pytest.raises(ConfigError, match=told) as refused:
        from_dict(Config, changes)
    assert "sk-abc123" not in str(refused.value)


def test_a_role_has_the_shared_server_or_its_own(monkeypatch):
    """The key of the shared server is never sent to another one."""
    monkeypatch.setenv("VERIFIER_API_KEY", "own")
    api = ApiConfig("http://a/v1", "SHARED", 99, prices=("small=1/2",), per_minute=(3, 4))
    verifier = JudgeConfig("small", "http://b/v1", 0.0)
    teach = TeachConfig(temperature=0.7, max_completion_length=44, model="large")
    config = Config(rubricator=JudgeConfig("large"), verifier=verifier, teach=teach, api=api)
    shared, own = config.endpoint("rubricator"), config.endpoint("verifier")
    assert (shared.base_url, shared.model, shared.api_key_env) == ("http://a/v1", "large", "SHARED")
    assert (own.base_url, own.api_key_env) == ("http://b/v1", "VERIFIER_API_KEY")
    assert (own.temperature, own.max_tokens, own.tokens_per_minute) == (0.0, 99, 4)
    assert (own.input_price, own.output_price, shared.output_price) == (1.0, 2.0, 0.0)
    teacher = config.teach.endpoint(config.api)
    assert (teacher.temperature, teacher.max_tokens, teacher.api_key_env) == (0.7, 44, "SHARED")
    assert config.api_keys == {"SHARED", "VERIFIER_API_KEY"}
    monkeypatch.delenv("VERIFIER_API_KEY")
    assert config.endpoint("verifier").api_key_env == ""
    rules = Config(verifier=JudgeConfig(RULE_JUDGE)).endpoint("verifier")
    assert (rules.base_url, rules.model) == (RULE_JUDGE, "rules")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stages": ("one",)}, "two or more"),
        ({"rubric_of": "student", "refresh": "frozen"}, "group where rubrics.refresh is frozen"),
        ({"stages": ("a", "b")}, "NAME=MARKER for each of the others"),
        ({"stages": ("a=x", "b=y")}, "a first stage without a marker"),
        ({"stages": ("a", "b=(")}, "regular expression of Python"),
        ({"stage_caps": (2,)}, "none unless rubrics.refresh is evolving"),
        ({"num_criteria": (4, 3)}, "the smallest first"),
        ({"num_criteria": (0, 3)}, "two numbers of at least 1"),
    ],
)
def test_rubrics_that_cannot_be(fields, told):
    with pytest.raises(ConfigError, match=told):
        RubricsConfig(**fields)


def test_a_teacher_that_is_told_what_judges_say():
    told = DataConfig(teacher_prompt_format="{prompt} {verdicts}")
    config = Config(data=told, **JUDGED)
    assert config.is_judged
    assert config.judged_fields == ("verdicts",)
    with pytest.raises(ConfigError, match=r"\{verdicts\} in place of \{verdict\}"):
        DataConfig(teacher_prompt_format="{prompt} {verdict}")


def test_recipe_rows_agree_with_names_and_signatures():
    """Rows, names and token losses list the same recipes, options and defaults."""
    assert set(typing.get_args(RecipeName)) == set(RECIPES) == set(TOKEN_LOSSES)
    fields = {field.name for field in dataclasses.fields(EstimatorConfig)}
    for name, recipe in RECIPES.items():
        assert set(recipe.options) <= fields, name
        for option, parameter in inspect.signature(TOKEN_LOSSES[name]).parameters.items():
            is_option = parameter.kind is inspect.Parameter.KEYWORD_ONLY
            if is_option and option != "clamp_at_zero":  # only a convention sets that one
                assert parameter.default == recipe.options[option].default, (name, option)
