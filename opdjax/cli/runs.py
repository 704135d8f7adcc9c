"""Commands for one run: its preparation, its training, its stored rollouts."""

import contextlib
import os
import pathlib
import re
import sys
from dataclasses import replace
from typing import Annotated

from tyro.conf import Positional, arg

from opdjax.cli.parsing import (
    NONE,
    Experiment,
    as_given,
    call,
    call_with_config,
    command,
    load_experiment,
    require_model,
    with_recipe,
)
from opdjax.config import (
    STUDENT,
    AuditConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    NearPolicyConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import ConfigError, require
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import open_output

# The built-in models and their task.
MINI = Config(
    data=DataConfig(max_prompt_length=32), sampling=SamplingConfig(max_completion_length=24)
)


def _all_but(section: type, names: str) -> tuple[str, ...]:
    return tuple(name for name in section.__dataclass_fields__ if name not in names.split())


# The fields that commands read.
_TAUGHT = {
    Config: ("student", "teacher", "data", "sampling", "teach", "api", "mesh", "train", "seed"),
    SamplingConfig: ("stop_strings",),
    TrainConfig: ("dtype",),
}
_AUDITED = {
    Config: ("student", "teacher", "data", "sampling", "estimator", "train", "seed"),
    SamplingConfig: ("max_completion_length", "stop_token_ids", "num_generations"),
    TrainConfig: ("prompts_per_step", "gradient_accumulation_steps"),
}
_PLANNED = {
    Config: _all_but(Config, "rubrics rubricator verifier teach api checkpoint log seed"),
    DataConfig: ("max_prompt_length",),
    SamplingConfig: _all_but(SamplingConfig, "stop_token_ids stop_strings"),
    NearPolicyConfig: ("schedule", "generator", "filter"),
    OptimizerConfig: ("name", "teacher_ema_decay"),
    TrainConfig: _all_but(TrainConfig, "start_from start_with num_epochs early_stopping_patience"),
    EvaluationConfig: ("source", "kind", "num_prompts", "num_samples", "max_completion_length"),
}
_EXAMINED = {
    Config: _all_but(Config, "teach optimizer checkpoint log mesh"),
    NearPolicyConfig: ("schedule", "max_staleness", "filter"),
    TrainConfig: _all_but(TrainConfig, "remat early_stopping_patience"),
    EvaluationConfig: _all_but(EvaluationConfig, "num_samples max_completion_length every"),
}


@command("EXPERIMENT --workdir DIR [--from RUN[@STEP]]")
def train(
    workdir: pathlib.Path, config: Experiment, start: Annotated[str | None, arg(name="from")] = None
):
    """Train a student, or resume a run.

    Args:
        workdir: Directory of this run, or gs://BUCKET/NAME; the same command resumes it.
        start: Work directory of another run that this one goes on with, from its newest checkpoint
            or from STEP, such as --from runs/a@100 --train.num-steps 200; short for
            --train.start-from. --train.start-with student takes its weights alone, as a run with
            a near_policy.schedule must.
    """
    if start is not None:
        config = replace(config, train=replace(config.train, start_from=start))
    # At once: the import of jax and the compilation that follow take seconds to minutes.
    print(f"loading {' and '.join(_require_models(config))}", flush=True)
    from opdjax.train import train as run_training

    with contextlib.suppress(ValueError):  # training names what is wrong
        _print_needs(config)
    result = run_training(config, workdir)
    print(f"the trained student is in {as_given(workdir)}/{result['student']}")


def _require_models(config: Config) -> list[str]:
    """The paths of the models that a run loads; CheckpointError if one cannot be there."""
    need = config.recipe.teacher_need(config.estimator.options)
    paths = [config.student.path, config.teacher.path][: 1 if need == "none" else 2]
    for path in paths:
        if path != STUDENT:
            require_model(path)
    return paths


_WHY = {
    "auto": "forward passes in float32 (train.dtype auto): a CPU is slower in bfloat16",
    "bfloat16": "forward passes in bfloat16 (train.dtype): a CPU is faster in float32",
    "float32": "forward passes in float32",
}


def _print_needs(config: Config) -> None:
    """Say which dtype is used and whether the run fits into memory, if it trains on a CPU."""
    import jax

    from opdjax.config.topology import topology as of_name
    from opdjax.diagnose.plan.estimate import estimate
    from opdjax.diagnose.plan.table import verdict
    from opdjax.diagnose.plan.workload import read_workload

    if config.mesh.processes == 1 and jax.default_backend() == "cpu":
        machine, devices = of_name("cpu"), jax.device_count()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        chip = replace(machine.chip, hbm_bytes=memory // devices)
        machine = replace(machine, chip=chip, chips=devices, chips_per_host=devices)
        memory = verdict(estimate(read_workload(config, machine)))
        print(f"{_WHY[config.train.dtype]}\nmemory of the run: {memory}", flush=True)


@command("EXPERIMENT --topology v5e-8 [--aot]", _PLANNED)
def plan(topology: str, config: Experiment, aot: bool = False):
    """Estimate memory and time of a run.

    The memory and the least time of a step follow from the config.json of its models alone. Exits
    with 1 if the run does not fit.

    Args:
        topology: The machine, such as v5e-8, v6e-16, v5p-8, h100-8, cpu.
        aot: Also compile the programs of the run for it; this takes minutes, and for a TPU it needs
            libtpu but no TPU.
    """
    # Planning needs no accelerator, and must not take one from a run on this machine.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from opdjax.config.topology import topology as of_name
    from opdjax.diagnose.plan.aot import compile_programs
    from opdjax.diagnose.plan.estimate import estimate
    from opdjax.diagnose.plan.table import fits, text
    from opdjax.diagnose.plan.workload import read_workload

    plan = estimate(read_workload(config, of_name(topology)))
    programs = compile_programs(plan.workload) if aot else None
    print(text(plan, programs))
    sys.exit(0 if fits(plan, programs) else 1)


def doctor(arguments: list[str]) -> None:
    """EXPERIMENT: find mistakes that would train without an error; exit with 1 if any."""
    if arguments == ["--list"]:
        from opdjax.diagnose.doctor import describe

        print(describe())
    else:
        usage = "doctor EXPERIMENT [--num-prompts N] [--only NAME,…]"
        call_with_config(_doctor, arguments, usage, _EXAMINED)


def _doctor(config: Experiment, num_prompts: int = 8, only: Annotated[str, NONE] = ""):
    """Find mistakes that would train without an error, also in judges; exit with 1 if any.
    `opdjax doctor --list` prints the checks, what each finds and what to do then.

    Args:
        num_prompts: Number of prompts of the data that go through the models.
        only: Names of checks, separated by commas; empty is all checks that apply.
    """
    _require_models(config)
    from opdjax.diagnose.doctor import run_checks

    has_fault = False
    for finding in run_checks(config, num_prompts, tuple(filter(None, only.split(",")))):
        print(finding, flush=True)
        has_fault |= finding.status == "fault"
    sys.exit(1 if has_fault else 0)


def audit(arguments: list[str]) -> None:
    """[EXPERIMENT] --workdir DIR: measure bias, variance and cost of the estimators."""
    if "--explain" in arguments:
        from opdjax.diagnose.audit.run import explain

        if arguments[:-1] != ["--explain"]:
            raise ConfigError("--explain takes the name of one recipe or pitfall, and nothing else")
        print(explain(arguments[-1]))
        return
    is_given = bool(arguments) and not arguments[0].startswith("-")
    default = with_recipe(load_experiment(arguments[0]), arguments) if is_given else MINI

    def run(
        workdir: pathlib.Path,
        only: Annotated[tuple[str, ...], NONE] = (),
        skip_cost: bool = False,
        audit: AuditConfig = AuditConfig(),
        config: Experiment = default,
    ):
        """Measure bias, variance and cost of the estimators; without EXPERIMENT, on the built-in
        models. `opdjax audit --explain RECIPE` prints the description of a recipe.

        Contexts are sampled at temperature 1 without filters. The experiment's own recipe is
        measured too.

        Args:
            workdir: Directory for audit.json, audit.txt and audit.html; the first two are written
                after each part.
            only: Recipes and pitfalls by name; none is all.
            skip_cost: Leave out seconds and bytes a token.
            audit: Size of the measurement.
        """
        from opdjax.diagnose.audit.run import audit as measure
        from opdjax.diagnose.audit.subjects import choose
        from opdjax.diagnose.audit.table import text
        from opdjax.report.page import write_audit_report
        from opdjax.runs.workdir import write_json

        estimator, own = config.estimator, ()
        if is_given or estimator != MINI.estimator:
            own = (estimator.options, estimator.recipe)

        def save(document):
            tables = text(document)
            with open_output(workdir) as directory:
                directory.mkdir(parents=True, exist_ok=True)
                write_json(directory / "audit.json", document)
                (directory / "audit.txt").write_text(tables + "\n", encoding="utf-8")
                if not document["unfinished"]:
                    print(f"\n{tables}\n")
                    print(write_audit_report(directory).replace(str(directory), as_given(workdir)))

        measure(config, choose(only or None, *own), audit, skip_cost=skip_cost, save=save)

    call(run, arguments[is_given:], "opdjax audit [EXPERIMENT]", _AUDITED)


@command("EXPERIMENT", _TAUGHT)
def references(config: Experiment):
    """Have a teacher answer the prompts, into the file named by data.references.

    The same command resumes. Exits with 1 if some prompts have no usable answer. Of the student
    only the tokenizer is read.
    """
    from opdjax.rollouts.write_references import teach

    counts = teach(config)
    for name, value in counts.items():
        print(f"{name}: {value if isinstance(value, int) else round(value, 6)}")
    sys.exit(1 if counts["prompts without any"] else 0)


def store(arguments: list[str]) -> None:
    """[EXPERIMENT] --store WORKDIR: this form of `opdjax sample` stores a run's rollouts."""
    if arguments[0].startswith("-"):
        call(_store, arguments, "opdjax sample")
    else:
        call_with_config(_store_ahead, arguments, "sample EXPERIMENT --store WORKDIR")


def _store_ahead(store: pathlib.Path, config: Experiment):
    """Sample the rollouts of an experiment and score them with the teacher, before or during its
    training.

    With near_policy.generator = process until the run is finished; otherwise only the rollouts of
    the initial weights.

    Args:
        store: Work directory of the run, which need not exist yet.
    """
    _generate(store, config)


def _store(store: pathlib.Path):
    """Sample the rollouts of a run and score them with the teacher, during its training.

    Args:
        store: Work directory of the run.
    """
    _generate(store)


def _generate(workdir: pathlib.Path, config: Config | None = None):
    from opdjax.rollouts.near_policy.generator_process import generate_for

    print(f"{generate_for(workdir, config)} shards of rollouts were stored")


@command("WORKDIR")
def score(workdir: Positional[pathlib.Path]):
    """Score stored rollouts whose teacher scores are missing or damaged.

    Args:
        workdir: Work directory of a run with stored rollouts.
    """
    from opdjax.rollouts.near_policy.generator_process import annotate_all

    print(f"{annotate_all(workdir)} shards of annotations were stored")


@command("PATH [--samples N]")
def rollouts(path: Positional[pathlib.Path], samples: int = 0):
    """Describe stored rollouts; exit with 1 if any are damaged or missing.

    Prints counts, bytes, decisions of the filter and damage.

    Args:
        path: Work directory of a run, or its directory rollouts/VERSION.
        samples: Number of samples to print, spread evenly over the rollouts.
    """
    from opdjax.rollouts.near_policy.inspection import inspect

    require(samples >= 0, "--samples", samples, "0 or more")
    unread = re.compile(r"(checkpoints|student|student_adapter|published)/")
    with read_only_workdir(path, lambda name: not unread.match(name)) as mirror:
        sys.exit(0 if inspect(mirror.directory, samples) else 1)
