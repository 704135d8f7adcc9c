"""Experiments at the papers' size, which need the hub and an accelerator: each is planned at its
own size for the hardware that it states, and run for a step on small models of the same
architecture, with every setting read.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys

import pytest
from hub_models import local_source, small_id, with_models, write_config, write_tiny
from tiny_runs import vary

from opdjax.config import Config, JudgeConfig, MeshConfig, ModelConfig
from opdjax.config.experiments import load_config, load_sweep
from opdjax.config.topology import topology
from opdjax.config.validation import Section
from opdjax.diagnose.plan.estimate import estimate
from opdjax.diagnose.plan.table import fits, verdict
from opdjax.diagnose.plan.workload import read_workload
from opdjax.rollouts.write_references import teach
from opdjax.runs.workdir import read_lines
from opdjax.train import train

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
HARDWARE = {  # as the docstrings state it; vOPD's and NPD's fit H200 too
    **dict.fromkeys(("opd_math", "vopd_math", "full_kl_math", "topk_kl_math"), "a100-1"),
    **dict.fromkeys(("vopd_tables", "npd_math", "npd_tables"), "a100-1"),
    **dict.fromkeys(("ropd_math", "ropd_science", "ropd_black_box"), "a100-8"),
    **dict.fromkeys(("ropd_white_box", "rubricem_stages"), "a100-8"),
}
EVERY = pytest.mark.parametrize("name", HARDWARE)
PACKAGE = pathlib.Path(sys.modules["opdjax"].__file__).parent
_CHECKS = {"__post_init__", "require_types", "to_dict", "replace", "__eq__", "__hash__"}
pytestmark = pytest.mark.long


@functools.cache
def configs_of(name):
    """Id -> config of an experiment, or of a sweep's points, one of each arm and pair."""
    if (file := EXPERIMENTS / f"{name}.py").exists():
        return {name: load_config(str(file))}
    points = load_sweep(str(EXPERIMENTS / "sweeps" / f"{name}.py"))
    return {point.id: point.config for point in points if point.config.seed == 0}


def set_fields(config):
    """Names of the fields that differ from their defaults, SECTION.FIELD."""
    found, plain = set(), Config()
    for section in dataclasses.fields(config):
        own, default = getattr(config, section.name), getattr(plain, section.name)
        for field in dataclasses.fields(own) if dataclasses.is_dataclass(own) else ():
            if getattr(own, field.name) != getattr(default, field.name):
                found.add(f"{section.name}.{field.name}")
    return found


def distinct(configs):
    """The runs, in order, each of which has a recipe, a source of data or a setting that no earlier
    one has.
    """
    seen, kept = set(), {}
    for id, config in configs.items():
        kind = (config.estimator.recipe, config.sampling.completions_from)
        kind += (config.near_policy.schedule, config.near_policy.filter)
        features = set_fields(config) | {kind, config.data.format, config.data.source}
        features.add(config.evaluation.source)
        if not features <= seen:
            seen |= features
            kept[id] = config
    return kept


@contextlib.contextmanager
def recorded_reads():
    """Names of the fields that are read, other than where settings are checked or copied."""
    read = set()

    def get(self, name):
        if name in type(self).__dataclass_fields__:
            frame = sys._getframe(1)
            while frame.f_code.co_name not in _CHECKS and _is_config(frame):
                frame = frame.f_back
            if frame.f_code.co_name not in _CHECKS:
                read.add(f"{type(self).__name__}.{name}")
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        for owner in (Section, JudgeConfig, ModelConfig):
            patch.setattr(owner, "__getattribute__", get, raising=False)
        yield read


def _is_config(frame):
    file = frame.f_code.co_filename
    return file.startswith("<") or (PACKAGE / "config") in pathlib.Path(file).parents


def tiny(config, directory, judge):
    """The config with small models, rows and lengths, and the judge at that address."""
    near, data, train = config.near_policy, config.data, config.train
    models = directory.parent / "models"

    def model(name):
        path = models / name
        return str(path) if path.exists() else write_tiny(name, path)

    is_refresh = near.schedule == "refresh"
    sections = {
        "data": {
            "source": local_source(data.source, directory),
            "max_prompt_length": 256,
            "references": data.references and str(directory / "references.jsonl"),
        },
        "sampling": {
            "num_generations": min(config.sampling.num_generations, 4),
            "max_completion_length": 8,
            "slots": 4,
            "stop_token_ids": tuple(map(small_id, config.sampling.stop_token_ids)),
        },
        "train": {
            "num_steps": 2 if is_refresh else 1,
            "prompts_per_step": 2,
            "gradient_accumulation_steps": 2,
            "pack_length": train.pack_length and 288,
        },
        "evaluation": {
            "source": local_source(config.evaluation.source, directory),
            "num_prompts": 2,
            "num_samples": 2,
            "max_completion_length": 8,
            "every": min(config.evaluation.every, 1),
        },
        "checkpoint": {"every": 1},
        "log": {"samples_every": 1},
    }
    if is_refresh:
        epochs = (1,) if near.refresh_epochs else ()
        sections["near_policy"] = {"num_epochs": 2, "refresh_epochs": epochs}
    if config.api.base_url:
        sections["api"] = {"base_url": judge}
    config = with_models(config, model)
    return dataclasses.replace(vary(config, **sections), mesh=MeshConfig(data=1))


@EVERY
def test_every_point_fits_the_hardware_that_is_stated(name, tmp_path):
    place = functools.cache(lambda model: write_config(model, tmp_path / model))
    for id, config in configs_of(name).items():
        workload = read_workload(with_models(config, place), topology(HARDWARE[name]))
        assert fits(plan := estimate(workload)), f"{id}: {verdict(plan)}"


@EVERY
def test_a_step_reads_every_setting(name, tmp_path, judge_server, shared_programs, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    for number, (id, config) in enumerate(distinct(configs_of(name)).items()):
        directory = tmp_path / str(number)
        directory.mkdir()
        small = tiny(config, directory, judge_server)
        with recorded_reads() as read:
            if small.data.references:
                assert teach(small)["answers"] == 8 * small.teach.num_answers
            train(small, directory / "run")
        rows = read_lines(directory / "run" / "metrics.jsonl")
        assert len(rows) == small.train.num_steps, id
        assert len(read_lines(directory / "run" / "eval.jsonl")) >= 2, id  # before and after
        sections = [(type(getattr(small, section)), name) for section, name in _split(config)]
        assert {f"{kind.__name__}.{name}" for kind, name in sections} - read == set(), id


def _split(config):
    return [name.split(".") for name in set_fields(config)]
