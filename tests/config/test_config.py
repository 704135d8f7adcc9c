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
    ApiConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EndpointConfig,
    EstimatorConfig,
    EvaluationConfig,
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

ENDPOINT = EndpointConfig(
    "http://host:1/v1",
    "judge",
    "JUDGE_KEY",
    0.5,
    0.9,
    3,
    "low",
    100,
    "max_completion_tokens",
    "text",
    9.0,
    4,
    60,
    9000,
    0.5,
    1.5,
)
# Every leaf differs from its default.
UNUSUAL = Config(
    student=ModelConfig("a", "main", "bfloat16", ("tensor",), "splash"),
    teacher=ModelConfig("b", "v2", "float32", ("fsdp",), "xla"),
    data=DataConfig(
        "x.jsonl",
        "Q: {prompt}",
        "be short",
        "raw",
        True,
        "chat",
        False,
        64,
        "error",
        "question",
        "a.b",
        "text",
        "rubric",
        None,
        "{prompt}{answer}",
        99,
    ),
    sampling=SamplingConfig(6, 33, 0.7, 0.9, 20, 0.1, (7, 8), "teacher", ("fsdp",), 12, "int8"),
    estimator=EstimatorConfig("full_kl", "fixed_denominator", 64, divergence="jsd", beta=0.25),
    optimizer=OptimizerConfig(1e-3, "linear", 3, 0.8, 0.95, 1e-6, 0.1, 0.0),
    train=TrainConfig(7, 12, 4, "dots", 2, 40),
    lora=LoraConfig(4, 8.0, ("q", "down")),
    evaluation=EvaluationConfig(
        None, "boxed", 3, 4, 0.8, 0.95, 5, 32, 16, (0.5, 0.7), 25, 9, "problem", "solution", "of"
    ),
    checkpoint=CheckpointConfig(10, 3, "greedy"),
    log=LogConfig(0, 2, True, 3),
    mesh=MeshConfig(2, 2, 2, 2),
    rubricator=ENDPOINT,
    verifier=ENDPOINT,
    teach=TeachConfig(2, 3, 0.7, 0.9, 44),
    teacher_api=ENDPOINT,
    api=ApiConfig("replies.sqlite", True, 2.5, 1, 2, 0.5),
    seed=11,
)
# What does not stand beside it, so that every leaf differs from its default in one of them.
OTHERS = [
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
                importance_floor=0.25,
            ),
            EstimatorConfig(
                "vopd",
                discount=0.5,
                return_to_go="expected",
                reward_floor=-2.0,
                prefix_weight=0.5,
                extra_draws=3,
                baseline="student_topk",
                baseline_top_k=10,
            ),
            EstimatorConfig(
                "topk_kl",
                support="teacher",
                support_top_k=9,
                renormalize="none",
                outside="tail",
                clamp_at_zero=True,
            ),
            EstimatorConfig("opd", importance="ppo_clip", clip_low=0.1, clip_high=0.3),
            EstimatorConfig("full_kl", divergence="skew_forward", skew_alpha=0.3),
            EstimatorConfig("topk_kl", weight="p_student"),
            EstimatorConfig("topk_kl", convention="verl"),
        )
    ),
    Config(
        estimator=EstimatorConfig(
            "ropd_stages",
            advantage="mean_std",
            dual_clip=2.5,
            reference_kl_coef=0.001,
            reference_kl="k2",
            stage_credit="decay",
            stage_token_mean=True,
        ),
        sampling=SamplingConfig(4),
        rubrics=RubricsConfig(
            2,
            3,
            9,
            "graded",
            "signed",
            "group",
            False,
            "evolving",
            ("a", "b"),
            (";",),
            (2, 3),
            3,
            99,
            1,
            0.3,
            "mine",
            4,
        ),
        rubricator=ENDPOINT,
        verifier=ENDPOINT,
    ),
    Config(
        data=DataConfig(references="taught.jsonl"),
        teach=TeachConfig(2, 8, 0.5, 0.9, 99),
        estimator=EstimatorConfig("ropd_stages", stage_credit_matrix=(1.0, 0.8, 0.0, 1.0)),
        sampling=SamplingConfig(4),
        rubrics=RubricsConfig(rubric_of="student", stage_names=("a", "b"), stage_markers=(";",)),
        rubricator=ENDPOINT,
        verifier=ENDPOINT,
    ),
    Config(
        near_policy=NearPolicyConfig(
            "refresh",
            4,
            (2, 3),
            generator="process",
            filter="ifd",
            ifd_form="perplexity_ratio",
            ifd_min=-0.1,
            ifd_quantile=0.5,
            shard_size=64,
        ),
        estimator=EstimatorConfig("npd", kd_weight=0.25),
    ),
    Config(
        near_policy=NearPolicyConfig(
            "continuous",
            max_staleness=3,
            lag="free",
            generator="thread",
            generator_devices=2,
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


@settings(max_examples=30, deadline=None)
@given(
    st.builds(
        OptimizerConfig,
        learning_rate=st.floats(1e-12, 1e3),
        warmup_steps=st.integers(0, 10**9),
        epsilon=st.floats(5e-324, 1.0),
        weight_decay=st.floats(0, 1e300),
    ),
    st.text(max_size=10),
    st.lists(st.floats(1e-3, 1e3), max_size=3),
)
def test_any_number_and_text_survives_the_file(optimizer, text, temperatures):
    config = Config(
        optimizer=optimizer,
        data=DataConfig(prompt_format=text + "{prompt}"),
        evaluation=EvaluationConfig(extra_temperatures=tuple(temperatures)),
    )
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_missing_fields_keep_their_defaults():
    config = from_dict(Config, {"train": {"num_steps": 3}, "seed": 5})
    assert config == Config(train=TrainConfig(num_steps=3), seed=5)
    assert from_dict(Config, {}) == Config()


def test_a_whole_number_is_read_as_a_float_where_one_is_expected():
    rate = from_dict(OptimizerConfig, {"learning_rate": 1}).learning_rate
    assert isinstance(rate, float)
    found = from_dict(EvaluationConfig, {"extra_temperatures": [1, 0.5]}).extra_temperatures
    assert found == (1.0, 0.5)
    assert [type(value) for value in found] == [float, float]


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
            "unknown field 'log.zzz'; expected one of ['diagnostics_every', 'num_samples', "
            "'samples_every',",
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
        ({"student": {"revision": 3}}, "student.revision is 3; expected str"),
        ({"data": {"enable_thinking": "no"}}, "data.enable_thinking is 'no'; expected bool"),
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
            {"evaluation": {"extra_temperatures": ["hot"]}},
            "evaluation.extra_temperatures[0] is 'hot'; expected float",
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
    (DataConfig, {"prompt_column": ""}, "data.prompt_column is ''; expected the name of a column"),
    (
        EvaluationConfig,
        {"answer_column": ""},
        "evaluation.answer_column is ''; expected the name of a column",
    ),
    (
        EvaluationConfig,
        {"benchmark_column": ""},
        "evaluation.benchmark_column is ''; expected the name of a column",
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
    (
        SamplingConfig,
        {"min_p": -0.1},
        "sampling.min_p is -0.1; expected at least 0 (off) and less than 1",
    ),
    (
        SamplingConfig,
        {"min_p": 1.0},
        "sampling.min_p is 1.0; expected at least 0 (off) and less than 1",
    ),
    (EstimatorConfig, {"tile": 0}, "estimator.tile is 0; expected at least 1"),
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
    (EstimatorConfig, {"baseline_top_k": 0}, "estimator.baseline_top_k is 0; expected at least 1"),
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
        {"importance": "token_truncate", "importance_floor": 0.5},
        "importance_floor is 0.5; expected none unless",
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
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps is -1; expected 0 or more"),
    (
        OptimizerConfig,
        {"b1": 1.0},
        "optimizer.b1, b2 is (1.0, 0.999); expected each at least 0 and less than 1",
    ),
    (
        OptimizerConfig,
        {"b2": -0.1},
        "optimizer.b1, b2 is (0.9, -0.1); expected each at least 0 and less than 1",
    ),
    (OptimizerConfig, {"epsilon": 0.0}, "optimizer.epsilon is 0.0; expected more than 0"),
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
    (
        TrainConfig,
        {"max_nonfinite_steps": 0},
        "train.max_nonfinite_steps is 0; expected at least 1",
    ),
    (EvaluationConfig, {"num_prompts": 0}, "evaluation.num_prompts is 0; expected at least 1"),
    (EvaluationConfig, {"num_samples": 0}, "evaluation.num_samples is 0; expected at least 1"),
    (EvaluationConfig, {"batch_size": 0}, "evaluation.batch_size is 0; expected at least 1"),
    (EvaluationConfig, {"temperature": 0.0}, "evaluation.temperature is 0.0; expected more than 0"),
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
        {"extra_temperatures": (0.5, 0.0)},
        "evaluation.extra_temperatures is (0.5, 0.0); expected more than 0 each",
    ),
    (EvaluationConfig, {"every": -1}, "evaluation.every is -1; expected 0 (off) or more"),
    (EvaluationConfig, {"seed": -1}, "evaluation.seed is -1; expected from 0 to 2147483647"),
    (CheckpointConfig, {"every": 0}, "checkpoint.every is 0; expected at least 1"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep is 0; expected at least 1"),
    (
        CheckpointConfig,
        {"best_metric": "avg"},
        "checkpoint.best_metric is 'avg'; expected avg@k, pass@k or greedy",
    ),
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
    (LogConfig, {"num_samples": 0}, "log.num_samples is 0; expected at least 1"),
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
        Config,
        {"student": ModelConfig("a", dtype="fp32")},
        "student.dtype is 'fp32'; expected one of ['auto', 'bfloat16', 'float32']",
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
        (SamplingConfig, {"top_p": 1e-9, "top_k": 1, "min_p": 0.999, "temperature": 1e-9}),
        (EstimatorConfig, {"discount": 0.0, "tile": 1}),
        (EstimatorConfig, {"recipe": "full_kl", "divergence": "jsd", "beta": 0.0}),
        (EstimatorConfig, {"discount": 1.0}),
        (EstimatorConfig, {"recipe": "full_kl", "divergence": "jsd", "beta": 1.0}),
        (EstimatorConfig, {"baseline": "student_topk", "baseline_top_k": 1}),
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
            {"b1": 0.0, "b2": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "warmup_steps": 0},
        ),
        (EvaluationConfig, {"every": 0, "extra_temperatures": (), "seed": 2**31 - 1}),
        (MeshConfig, {"data": 1}),
        (Config, {"seed": 2**31 - 1}),
    ],
)
def test_the_ends_of_the_ranges_are_accepted(section, values):
    made = section(**values)
    assert {name: getattr(made, name) for name in values} == values


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
    {"min_p": 0.05},
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
    given = EstimatorConfig(recipe="vopd", discount=0.0, baseline="student_topk", baseline_top_k=5)
    assert given.options == {"discount": 0.0, "baseline": "student_topk", "baseline_top_k": 5}
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
            evaluation=EvaluationConfig(source=None, extra_temperatures=(0.5,)),
            seed=3,
        )
    )
    assert differences(left, right) == [
        "evaluation.extra_temperatures: [] -> [0.5]",
        "evaluation.source: 'arithmetic:test' -> None",
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
        ({"stage_credit_matrix": ()}, "K \\* K numbers"),
        ({"stage_credit_matrix": (1.0, 0.5, 1.0)}, "K \\* K numbers"),
        (
            {"stage_credit_matrix": (1.0, 0.5, 0.0, 1.0), "stage_credit": "last"},
            "expected none where stage_credit_matrix is",
        ),
        (
            {"stage_token_mean": True, "aggregation": "fixed_denominator"},
            "token_mean where stage_token_mean is True",
        ),
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
    "rubricator": ENDPOINT,
    "verifier": ENDPOINT,
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampling": SamplingConfig(1)}, "at least 2: ropd compares"),
        ({"verifier": EndpointConfig()}, "verifier.base_url"),
        ({"rubricator": EndpointConfig()}, "rubricator.base_url"),
        (
            {"rubrics": RubricsConfig(stage_names=("a", "b"), stage_markers=(";",))},
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
            {"estimator": EstimatorConfig("tjudge"), "rubrics": RubricsConfig(max_criteria=5)},
            "12 where the recipe is tjudge",
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
    ("fields", "told"),
    [
        ({"base_url": "http://h/v1"}, "endpoint.model"),
        ({"base_url": "h:80", "model": "m"}, "starts with http"),
        ({"api_key_env": "sk-abc123"}, "NAME of an environment variable"),
        ({"temperature": -1.0}, "endpoint.temperature"),
        ({"timeout": 0.0}, "endpoint.timeout"),
        ({"tokens_per_minute": -1}, "endpoint.tokens_per_minute"),
    ],
)
def test_endpoints_that_cannot_be(fields, told):
    with pytest.raises(ConfigError, match=told) as refused:
        EndpointConfig(**fields)
    assert "sk-abc123" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stage_names": ("one",)}, "two or more"),
        ({"rubric_of": "student", "refresh": "frozen"}, "group where rubrics.refresh is frozen"),
        ({"stage_names": ("a", "b")}, "1 regular expressions"),
        ({"stage_names": ("a", "b"), "stage_markers": ("(",)}, "regular expression of Python"),
        ({"stage_caps": (2,)}, "none unless rubrics.refresh is evolving"),
        ({"max_criteria": 3}, "at least rubrics.min_criteria, 4"),
        ({"max_failed_share": 1.0}, "less than 1"),
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
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                assert parameter.default == recipe.options[option].default, (name, option)
