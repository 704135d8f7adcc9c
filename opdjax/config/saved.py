"""Reads the `config.json` of earlier versions."""

import collections
import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

from opdjax.config.api import RULE_JUDGE
from opdjax.config.model import STUDENT
from opdjax.config.run import Config
from opdjax.config.validation import from_dict, to_dict

# Keys that earlier versions wrote, and their names today.
RENAMED_KEYS = {
    "student.dtype": "train.dtype",
    "student.attention": "train.attention",
    "estimator.baseline_top_k": "estimator.support_top_k",
    "estimator.skew_alpha": "estimator.beta",
    "estimator.stage_credit_matrix": "estimator.stage_credit",
}
# Settings that are constants today: the constant, at the place where it is used.
REMOVED_KEYS: Mapping[str, Any] = {
    "data.overlong": "skip",
    "data.max_teacher_prompt_length": 2048,
    "sampling.min_p": 0.0,
    "near_policy.ifd_form": "nll_ratio",
    "near_policy.shard_size": 1024,
    "estimator.clamp_at_zero": None,
    "rubrics.max_answer_chars": 24000,
    "rubrics.max_reasks": 2,
    "rubrics.max_failed_share": 0.4,
    "optimizer.b1": 0.9,
    "optimizer.epsilon": 1e-8,
    "train.max_nonfinite_steps": 5,
    "checkpoint.best_metric": "avg@k",
    "log.num_samples": 4,
    "evaluation.seed": 0,
}
# Those that said only how a run is computed: a run continues whatever their value was.
REMOVED_EXECUTION_KEYS = (
    *(f"{name}.split_over" for name in ("student", "teacher", "sampling")),
    *("estimator.tile", "rubrics.draw_parts", "teach.batch_size", "near_policy.generator_devices"),
    *("api.breaker_failures", "api.breaker_seconds"),
)
Sections = dict[str, dict[str, Any]]


def upgrade(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with today's keys and values; fields added since have their defaults. A value
    that no setting of today can hold is left out, and a note on stderr names it.
    """
    config, lost = _read(json.dumps(saved, sort_keys=True))
    for line in lost:
        _print_once(f"note: an earlier version's setting is a constant today: {line}")
    return json.loads(config)


def lost_settings(saved: dict[str, Any]) -> list[str]:
    """`field: value -> constant` of each saved setting that no setting of today can hold."""
    return _read(json.dumps(saved, sort_keys=True))[1].copy()


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr)


@functools.lru_cache(maxsize=4096)  # tables of a sweep read each config many times
def _read(text: str) -> tuple[str, list[str]]:
    """(today's config as JSON, lost settings), from JSON: callers may change what they get."""
    saved = json.loads(text)
    sections = collections.defaultdict(dict)
    sections.update((name, value) for name, value in saved.items() if isinstance(value, dict))
    others = {name: value for name, value in saved.items() if name not in sections}
    lost: list[str] = []
    for reader in (_read_models, _read_data, _read_evaluation, _read_estimator, _read_rubrics):
        reader(sections, lost)
    _read_endpoints(sections, lost)
    for old, new in RENAMED_KEYS.items():
        value = _pop(sections, old)
        if value is not None:
            section, key = new.split(".")
            sections[section][key] = value
    if (tensorboard := _pop(sections, "log.tensorboard")) is not None:
        sections["log"]["trackers"] = ["tensorboard"] if tensorboard else []
    for field in REMOVED_EXECUTION_KEYS:
        _pop(sections, field)
    for field, constant in REMOVED_KEYS.items():
        if (value := _pop(sections, field)) not in (None, constant):
            lost.append(f"{field}: {value!r} -> {constant!r}")
    read = {name: values for name, values in sections.items() if values or name in saved}
    return json.dumps(to_dict(from_dict(Config, read | others))), lost


def _pop(sections: Sections, field: str) -> Any:
    """Remove `section.key`; None where it is not there."""
    section, key = field.split(".")
    return sections[section].pop(key, None)


def _read_models(sections: Sections, lost: list[str]) -> None:
    for model in (sections["student"], sections["teacher"]):
        if revision := model.pop("revision", None):
            model["path"] = f"{model['path']}@{revision}"
    for key in ("dtype", "attention"):
        value, student = sections["teacher"].pop(key, None), sections["student"].get(key)
        if value != student and sections["teacher"].get("path") != STUDENT:
            lost.append(f"teacher.{key}: {value!r} -> {student!r}, as train.{key}")


def _read_data(sections: Sections, lost: list[str]) -> None:
    data = sections["data"]
    thinking = data.pop("enable_thinking", None)
    teacher_thinking = data.pop("teacher_enable_thinking", None)
    format, teacher_format = data.get("format", "chat"), data.get("teacher_format")
    named = {True: "thinking", False: "no_thinking", None: "chat"}
    teacher_thinking = thinking if teacher_thinking is None else teacher_thinking
    is_own = teacher_format or teacher_thinking != thinking
    if is_own and (teacher_format or format) == "chat":
        data["teacher_format"] = named[teacher_thinking]
    if format == "chat" and thinking is not None:
        data["format"] = named[thinking]
    _read_columns(data, ("prompt", "answer", "reference", "rubric"))


def _read_columns(section: dict[str, Any], names: tuple[str, ...]) -> None:
    found = {name: section.pop(f"{name}_column", None) for name in names}
    found = {name: column for name, column in found.items() if column}
    if found.get("prompt") == "prompt" and "rubric" in names:  # the default of data.prompt_column
        del found["prompt"]
    if found:
        section["columns"] = [f"{name}={column}" for name, column in found.items()]


def _read_evaluation(sections: Sections, lost: list[str]) -> None:
    evaluation, sampling = sections["evaluation"], sections["sampling"]
    if "temperature" in evaluation:
        others = evaluation.pop("extra_temperatures", ())
        every = [evaluation.pop("temperature"), *others]
        evaluation["temperatures"] = list(dict.fromkeys(every))
    if evaluation.get("grader") == "final_number":
        is_built_in = str(evaluation.get("source")).startswith("arithmetic:")
        evaluation["grader"] = "auto" if is_built_in else "gsm8k"
    _read_columns(evaluation, ("prompt", "answer", "benchmark"))
    size = evaluation.pop("batch_size", 512)
    if size != 512 and sampling.get("slots") is None:
        sampling["slots"] = size


def _read_estimator(sections: Sections, lost: list[str]) -> None:
    estimator = sections["estimator"]
    if estimator.pop("stage_token_mean", None):
        estimator["aggregation"] = "stage_token_mean"
    is_old, cap = "importance_floor" in estimator, estimator.get("importance_cap") or 2.0
    floor = estimator.pop("importance_floor", None) or 0.5
    if is_old and estimator.get("importance") == "token_mask" and floor != 1 / cap:
        lost.append(f"estimator.importance_floor: {floor} -> {1 / cap}, 1 / importance_cap")


def _read_rubrics(sections: Sections, lost: list[str]) -> None:
    rubrics = sections["rubrics"]
    if "min_criteria" in rubrics:
        rubrics["num_criteria"] = [rubrics.pop("min_criteria"), rubrics.pop("max_criteria")]
    names, markers = rubrics.pop("stage_names", ()), rubrics.pop("stage_markers", ())
    if names:
        pairs = zip(names[1:], markers)
        rubrics["stages"] = [names[0], *(f"{name}={marker}" for name, marker in pairs)]


def _read_endpoints(sections: Sections, lost: list[str]) -> None:
    """One section `api` of what each role's endpoint used to hold."""
    names = ("rubricator", "verifier", "teacher_api")
    roles = {name: sections[name] for name in names if "timeout" in sections[name]}
    api, teach = sections["api"], sections["teach"]
    given = {name: role for name, role in roles.items() if role.get("base_url")}
    if "teacher_api" not in given and "batch_size" in teach:  # what a checkpoint does by default
        for key in ("temperature", "top_p"):
            teach[key] = None if teach.get(key) == 1.0 else teach.get(key)
    if given:
        _share_endpoints(given, api, lost)
    if api.pop("offline", False):
        api["concurrency"] = 0
    for name in roles:
        role = given.get(name, {})
        own = {"model": role.get("model", ""), "base_url": ""}
        if role.get("base_url") == RULE_JUDGE:
            own["model"] = RULE_JUDGE
        elif role and role["base_url"] != api["base_url"]:
            own["base_url"] = role["base_url"]
        own |= {key: role.get(key) for key in ("temperature", "reasoning_effort")}
        if name != "teacher_api":
            sections[name] = own
        elif role:
            length = {"max_completion_length": role["max_tokens"]}
            sections["teach"] = teach | own | length | {"top_p": role.get("top_p")}
    sections.pop("teacher_api", None)


def _share_endpoints(given: Sections, api: dict[str, Any], lost: list[str]) -> None:
    remote = [role for role in given.values() if role["base_url"] != RULE_JUDGE]
    if remote:
        api |= {key: remote[0][key] for key in ("base_url", "api_key_env")}
    most = lambda key: max(role[key] for role in given.values())
    api |= {key: most(key) for key in ("timeout", "concurrency")}
    api["per_minute"] = [most("requests_per_minute"), most("tokens_per_minute")]
    judges = {name: role for name, role in given.items() if name != "teacher_api"}
    if judges:
        is_new = any(r.get("max_tokens_field") == "max_completion_tokens" for r in judges.values())
        api["max_tokens_field"] = "max_completion_tokens" if is_new else "auto"
        api["max_tokens"] = max(role["max_tokens"] for role in judges.values())
    priced = [role for role in given.values() if role["input_price"] or role["output_price"]]
    prices = {r["model"]: f"{r['input_price']:g}/{r['output_price']:g}" for r in priced}
    api["prices"] = [f"{model}={price}" for model, price in prices.items()]
    for name, role in given.items():
        today = {"seed": None}
        if name in judges:
            today |= {"top_p": None, "output": "json_schema", "max_tokens": api["max_tokens"]}
        changed = {key: value for key, value in today.items() if role[key] != value}
        lost += [f"{name}.{key}: {role[key]!r} -> {value!r}" for key, value in changed.items()]
