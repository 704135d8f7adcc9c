"""Commands for one run: its preparation, its training, its stored rollouts."""

from __future__ import annotations

import os
import pathlib
import re
import sys
from typing import Annotated

import tyro

from opdjax.cli.experiments import load_experiment
from opdjax.cli.parsing import as_given, call, experiment_of
from opdjax.config import AuditConfig, Config, DataConfig, SamplingConfig
from opdjax.config.validation import ConfigError
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import Folder, is_remote, local_copy, open_output

# The built-in models and their task.
MINI = Config(
    data=DataConfig(max_prompt_length=32), sampling=SamplingConfig(max_completion_length=24)
)


def train(arguments: list[str]) -> None:
    """EXPERIMENT --workdir DIR [--section.field VALUE …]: train a student, or resume a run."""
    default = experiment_of(arguments, "train EXPERIMENT --workdir DIR")

    def run(workdir: pathlib.Path, config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Train a student, or resume a run.

        Args:
            workdir: directory of this run, or gs://BUCKET/NAME; the same command resumes it
            config: every field of the experiment
        """
        # At once: the import of jax and the compilation that follow take seconds to minutes.
        need = config.recipe.teacher_need(config.estimator.options)
        teacher = "" if need == "none" else f" and {config.teacher.path}"
        print(f"loading {config.student.path}{teacher}", flush=True)
        from opdjax.train import train as run_training

        result = run_training(config, workdir)
        print(f"the trained student is in {as_given(workdir)}/{result['student']}")

    call(run, arguments[1:], "opdjax train EXPERIMENT")


def plan(arguments: list[str]) -> None:
    """EXPERIMENT --topology v5e-8 [--aot]: estimate memory and time of a run."""
    default = experiment_of(arguments, "plan EXPERIMENT --topology v5e-8 [--aot]")

    def run(
        topology: str,
        aot: bool = False,
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ):
        """Estimate the memory of a run and the least time of a step, from the config.json of its
        models alone; exit with 1 if it does not fit.

        Args:
            topology: the machine, such as v5e-8, v6e-16, v5p-8, h100-8, cpu
            aot: also compile the programs of the run for it; takes minutes, for a TPU needs libtpu
                but no TPU
            config: every field of the experiment
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

    call(run, arguments[1:], "opdjax plan EXPERIMENT")


def doctor(arguments: list[str]) -> None:
    """EXPERIMENT: find mistakes that would train without an error; status 1 if it finds any."""
    if arguments == ["--list"]:
        from opdjax.diagnose.doctor import describe

        print(describe())
        return
    default = experiment_of(arguments, "doctor EXPERIMENT [--num-prompts N] [--only NAME,…]")

    def run(
        num_prompts: int = 8,
        only: str = "",
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ):
        """Find mistakes that would train without an error, also in judges; exit with 1 if any.
        `opdjax doctor --list` prints the checks, what each finds and what to do then.

        Args:
            num_prompts: prompts of the data that go through the models
            only: names of checks, separated by commas; empty: all checks that apply
            config: every field of the experiment
        """
        from opdjax.diagnose.doctor import run_checks

        has_fault = False
        for finding in run_checks(config, num_prompts, tuple(filter(None, only.split(",")))):
            print(finding, flush=True)
            has_fault |= finding.status == "fault"
        sys.exit(1 if has_fault else 0)

    call(run, arguments[1:], "opdjax doctor EXPERIMENT")


def audit(arguments: list[str]) -> None:
    """[EXPERIMENT] --workdir DIR: measure bias, variance and cost of the estimators."""
    if "--explain" in arguments:
        from opdjax.diagnose.audit.run import explain

        if arguments[:-1] != ["--explain"]:
            raise ConfigError("--explain takes the name of one recipe or pitfall, and nothing else")
        print(explain(arguments[-1]))
        return
    is_given = bool(arguments) and not arguments[0].startswith("-")
    default = load_experiment(arguments[0]) if is_given else MINI

    def run(
        workdir: pathlib.Path,
        only: tuple[str, ...] = (),
        skip_cost: bool = False,
        audit: AuditConfig = AuditConfig(),  # noqa: B008
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ):
        """Measure bias, variance and cost of the estimators; without EXPERIMENT, on the built-in
        models. `opdjax audit --explain RECIPE` prints the description of a recipe.

        Only these fields are used: student, teacher, data, seed, estimator,
        sampling.max-completion-length and stop-token-ids, and the number of rows per micro-batch.
        Contexts are sampled at temperature 1 without filters.

        Args:
            workdir: directory for audit.json, audit.txt and audit.html; the first two are written
                after each part
            only: recipes and pitfalls by name; none: all
            skip_cost: leave out seconds and bytes a token
            audit: size of the measurement
            config: every field of the experiment; its own recipe is measured too
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

    call(run, arguments[is_given:], "opdjax audit [EXPERIMENT]")


def references(arguments: list[str]) -> None:
    """EXPERIMENT: have a teacher answer the prompts, into the file named by data.references."""
    default = experiment_of(arguments, "references EXPERIMENT")

    def run(config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Have a teacher answer the prompts of the data; the same command resumes. Exits with 1 if
        some prompts have no usable answer.

        Only these fields are used: data, teach, teacher, api, mesh, train.dtype, seed and the
        student's tokenizer.

        Args:
            config: every field of the experiment
        """
        from opdjax.rollouts.write_references import teach

        counts = teach(config)
        for name, value in counts.items():
            print(f"{name}: {value if isinstance(value, int) else round(value, 6)}")
        sys.exit(1 if counts["prompts without any"] else 0)

    call(run, arguments[1:], "opdjax references EXPERIMENT")


def store(arguments: list[str]) -> None:
    """[EXPERIMENT] --store WORKDIR: this form of `opdjax sample` stores a run's rollouts."""
    is_given = not arguments[0].startswith("-")
    default = load_experiment(arguments[0]) if is_given else None

    def generate(workdir: pathlib.Path, config: Config | None = None):
        from opdjax.rollouts.near_policy.generator_process import generate_for

        print(f"{generate_for(workdir, config)} shards of rollouts were stored")

    def of_experiment(
        store: pathlib.Path, config: Annotated[Config, tyro.conf.arg(name="")] = default
    ):
        """Sample the rollouts of an experiment and score them with the teacher, before or during
        its training.

        With near_policy.generator = process until the run is finished; otherwise only the rollouts
        of the initial weights.

        Args:
            store: work directory of the run, which need not exist yet
            config: every field of the experiment
        """
        generate(store, config)

    def of_run(store: pathlib.Path):
        """Sample the rollouts of a run and score them with the teacher, during its training.

        Args:
            store: work directory of the run
        """
        generate(store)

    call(of_experiment if is_given else of_run, arguments[is_given:], "opdjax sample [EXPERIMENT]")


def score(arguments: list[str]) -> None:
    """WORKDIR: score stored rollouts that have no teacher scores yet."""

    def run(workdir: Annotated[pathlib.Path, tyro.conf.Positional]):
        """Score stored rollouts whose teacher scores are missing or damaged.

        Args:
            workdir: work directory of a run with stored rollouts
        """
        from opdjax.rollouts.near_policy.generator_process import annotate_all

        print(f"{annotate_all(workdir)} shards of annotations were stored")

    call(run, arguments, "opdjax score")


def rollouts(arguments: list[str]) -> None:
    """PATH [--samples N]: describe stored rollouts; status 1 if any are damaged or missing."""

    def run(path: Annotated[pathlib.Path, tyro.conf.Positional], samples: int = 0):
        """Describe stored rollouts: counts, bytes, decisions of the filter, damage. Exits with 1 if
        any are damaged or missing.

        Args:
            path: a shard, a directory rollouts/VERSION, or the work directory of a run
            samples: number of samples to print, spread evenly over the rollouts
        """
        from opdjax.rollouts.near_policy.inspection import inspect

        if samples < 0:
            raise ConfigError(f"--samples is {samples}; expected 0 or more")
        if is_remote(path) and Folder(path).tag() is not None:
            path = local_copy(path)
        unread = re.compile(r"(checkpoints|student|student_adapter|published)/")
        with read_only_workdir(path, lambda name: not unread.match(name)) as mirror:
            sys.exit(0 if inspect(mirror.directory, samples) else 1)

    call(run, arguments, "opdjax rollouts")
