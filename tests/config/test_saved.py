"""Configs of earlier versions: what they are read as, and what is said of settings that are gone.

`saved_before_130.json` was written by the last version in which every role had its own endpoint.
"""

import copy
import json
import pathlib

import pytest

from opdjax.config import (
    ApiConfig,
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
from opdjax.config import saved as saved_configs
from opdjax.config.saved import lost_settings, upgrade
from opdjax.config.validation import from_dict, to_dict

OLD = json.loads((pathlib.Path(__file__).parent / "saved_before_130.json").read_text())
JUDGED = Config(
    student=ModelConfig("Qwen/Qwen3-1.7B-Base@main"),
    teacher=ModelConfig("Qwen/Qwen3-14B@v2"),
    data=DataConfig(
        "rows.jsonl",
        format="no_thinking",
        max_prompt_length=256,
        columns=("prompt=question", "answer=solution.final", "rubric=criteria"),
        references="answers.jsonl",
    ),
    sampling=SamplingConfig(8, 1024, slots=64),
    estimator=EstimatorConfig(
        "ropd_stages",
        "stage_token_mean",
        advantage="mean_std",
        stage_credit=(1.0, 0.8, 0.0, 1.0),
    ),
    rubrics=RubricsConfig(num_criteria=(3, 9), stages=("plan", "answer=#")),
    rubricator=JudgeConfig("judge-1", temperature=0.7, reasoning_effort="high"),
    verifier=JudgeConfig("judge-2", "http://10.0.0.2:8000/v1", 0.0),
    teach=TeachConfig(2, 1.0, max_completion_length=2048, model="judge-1"),
    api=ApiConfig(
        "https://api.example.com/v1",
        "EXAMPLE_KEY",
        max_tokens=4096,
        timeout=480.0,
        per_minute=(60, 100_000),
        max_retries=2,
        prices=("judge-1=1.5/6",),
        max_dollars=20.0,
        cache="replies.sqlite",
    ),
    optimizer=OptimizerConfig(1e-6, "constant", b2=0.95),
    train=TrainConfig(dtype="bfloat16", attention="splash"),
    lora=LoraConfig(8, 32.0, ("q", "v")),
    evaluation=EvaluationConfig(
        "test.jsonl",
        "boxed",
        64,
        4,
        (1.0, 0.7),
        columns=("prompt=problem", "benchmark=benchmark"),
    ),
    seed=7,
)
TODAY = {
    "judged": JUDGED,
    "continuous": Config(
        data=DataConfig(max_prompt_length=32, teacher_format="thinking"),
        near_policy=NearPolicyConfig(
            "continuous",
            max_staleness=3,
            lag="free",
            generator="thread",
            filter="ifd",
            ifd_max=0.5,
        ),
        estimator=EstimatorConfig("full_kl", divergence="skew_reverse", beta=0.2),
        lora=LoraConfig(4),
        mesh=MeshConfig(data=6),
    ),
    "refresh": Config(
        near_policy=NearPolicyConfig("refresh", 4, (2,), filter="random", ifd_quantile=0.9),
        estimator=EstimatorConfig("npd", support_top_k=5),
        train=TrainConfig(pack_length=1024),
    ),
    "vopd": Config(
        estimator=EstimatorConfig(
            "vopd",
            baseline="student_topk",
            support_top_k=5,
            importance="token_mask",
            importance_cap=4.0,
        )
    ),
}


def old_with(**fields):
    """The saved config without judges, with other values of `section__field`."""
    config = copy.deepcopy(OLD["vopd"])
    for name, value in fields.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config


@pytest.mark.parametrize("name", OLD)
def test_a_config_with_an_endpoint_per_role_is_read_as_todays(name):
    assert from_dict(Config, upgrade(OLD[name])) == TODAY[name]
    assert lost_settings(OLD[name]) == []


def test_a_temperature_that_was_given_twice_is_read_once():
    saved = old_with(evaluation__temperature=0.5, evaluation__extra_temperatures=[0.5, 0.7])
    assert upgrade(saved)["evaluation"]["temperatures"] == [0.5, 0.7]


@pytest.mark.parametrize("name", OLD)
def test_todays_configs_are_read_as_they_are(name):
    today = to_dict(TODAY[name])
    assert upgrade(today) == today
    assert upgrade(copy.deepcopy(today)) == today
    assert lost_settings(today) == []


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"rubrics__max_answer_chars": 99}, "rubrics.max_answer_chars: 99 -> 24000"),
        ({"optimizer__b1": 0.8}, "optimizer.b1: 0.8 -> 0.9"),
        ({"evaluation__seed": 3}, "evaluation.seed: 3 -> 0"),
        ({"sampling__min_p": 0.1}, "sampling.min_p: 0.1 -> 0.0"),
        (
            {"estimator__importance_floor": 0.3},
            "estimator.importance_floor: 0.3 -> 0.25, 1 / importance_cap",
        ),
        ({"teacher__dtype": "float32"}, "teacher.dtype: 'float32' -> 'auto', as train.dtype"),
        (
            {"data__max_teacher_prompt_length": 99},
            "data.max_teacher_prompt_length: 99 -> 2048",
        ),
    ],
)
def test_a_setting_that_no_field_holds_today_is_named(fields, line, capsys):
    saved_configs._print_once.cache_clear()
    saved = old_with(**fields)
    assert lost_settings(saved) == [line]
    upgrade(saved)
    upgrade(saved)
    expected = f"note: an earlier version's setting is a constant today: {line}\n"
    assert capsys.readouterr().err == expected


def test_settings_of_the_execution_change_no_run(capsys):
    saved = old_with(estimator__tile=64, student__split_over=["fsdp"], rubrics__draw_parts=2)
    assert lost_settings(saved) == []
    assert upgrade(saved) == upgrade(OLD["vopd"])
    assert capsys.readouterr().err == ""


def test_sampling_of_judges_that_is_not_sent_today_is_named():
    saved = copy.deepcopy(OLD["judged"])
    saved["verifier"] |= {"seed": 0, "output": "text", "max_tokens": 8192}
    assert lost_settings(saved) == [
        "rubricator.max_tokens: 4096 -> 8192",
        "verifier.seed: 0 -> None",
        "verifier.output: 'text' -> 'json_schema'",
    ]


def test_the_name_of_the_limit_on_a_reply_is_kept():
    saved = copy.deepcopy(OLD["judged"])
    saved["verifier"]["max_tokens_field"] = "max_completion_tokens"
    assert upgrade(saved)["api"]["max_tokens_field"] == "max_completion_tokens"


def test_offline_runs_and_the_built_in_judge_are_read():
    saved = copy.deepcopy(OLD["judged"])
    for role in ("rubricator", "verifier"):
        saved[role] |= {"base_url": "@rules", "model": "rules"}
    saved["teacher_api"] |= {"base_url": "", "model": ""}
    saved["api"]["offline"] = True
    found = upgrade(saved)
    assert found["verifier"]["model"] == "@rules"
    assert (found["api"]["base_url"], found["api"]["concurrency"]) == ("", 0)
    assert (found["teach"]["model"], found["teach"]["temperature"]) == ("", None)


def test_a_run_that_wrote_event_files_has_that_tracker():
    logs = [{"tensorboard": True}, {"tensorboard": False, "samples_every": 3}]
    found = [from_dict(Config, upgrade({"log": log})).log for log in logs]
    assert found == [LogConfig(trackers=("tensorboard",)), LogConfig(3)]
