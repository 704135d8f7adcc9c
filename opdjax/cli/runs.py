"""Verbs of one run: what goes before it, the run itself, what is drawn beside it."""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import sys
from typing import Annotated

import tyro

from opdjax.cli.experiments import load_experiment
from opdjax.cli.parsing import call, experiment_of, named
from opdjax.config import AuditConfig, Config, DataConfig, SamplingConfig
from opdjax.config.validation import ConfigError
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import Folder, is_remote, local_copy, open_output

# The built-in pair on its own task.
MINI = Config(
    data=DataConfig(max_prompt_length=32), sampling=SamplingConfig(max_completion_length=24)
)


def train(arguments: list[str]) -> None:
    """EXPERIMENT --workdir DIR [--section.field VALUE …]: distil a student, or continue a run."""
    default = experiment_of(arguments, "train EXPERIMENT --workdir DIR")

    def run(workdir: pathlib.Path, config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Distil a student.

        Args:
            workdir: directory of this run, or gs://BUCKET/NAME; the same command continues it, on
            any machine that sees it config: every field of the experiment
        """
        from opdjax.train import train as run_training

        result = run_training(config, workdir)
        print(f"the trained student is in {named(workdir)}/{result['student']}")

    call(run, arguments[1:], "opdjax train EXPERIMENT")


def plan(arguments: list[str]) -> None:
    """EXPERIMENT --topology v5e-8 [--aot] [--section.field VALUE …]: foresee memory and time;
    status 1 where it does not fit.
    """
    default = experiment_of(arguments, "plan EXPERIMENT --topology v5e-8 [--aot]")

    def run(
        topology: str,
        aot: bool = False,
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ):
        """Foresee what a run holds and how long a step takes at least, from the config.json of its
        models alone.

        Args:
            topology: the machine, such as v5e-8, v6e-16, v5p-8, h100-8
            aot: also compile the programs of the run for it, which takes minutes and needs libtpu
            but no TPU config: every field of the experiment
        """
        # Planning needs no accelerator, and must not take one from a run on this machine.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from opdjax.config.topology import topology as of_name
        from opdjax.diagnose.plan.aot import compile_programs
        from opdjax.diagnose.plan.arithmetic import foresee
        from opdjax.diagnose.plan.table import fits, text
        from opdjax.diagnose.plan.workload import read_workload

        plan = foresee(read_workload(config, of_name(topology)))
        programs = compile_programs(plan.workload) if aot else None
        print(text(plan, programs))
        sys.exit(0 if fits(plan, programs) else 1)

    call(run, arguments[1:], "opdjax plan EXPERIMENT")


def doctor(arguments: list[str]) -> None:
    """EXPERIMENT [--section.field VALUE …]: look for silent faults before a run; status 1 where
    there is one.
    """
    default = experiment_of(arguments, "doctor EXPERIMENT [--num-prompts N]")

    def run(num_prompts: int = 8, config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Look for silent faults.

        Args:
            num_prompts: of the data, that go through the models
            config: every field of the experiment
        """
        from opdjax.diagnose.doctor import run_checks

        found = run_checks(config, num_prompts)
        if config.is_judged:
            from opdjax.diagnose.judge import examine_judge  # its packages are an extra

            found = itertools.chain(found, examine_judge(config))
        has_fault = False
        for finding in found:
            print(finding, flush=True)
            has_fault |= finding.status == "fault"
        sys.exit(1 if has_fault else 0)

    call(run, arguments[1:], "opdjax doctor EXPERIMENT")


def audit(arguments: list[str]) -> None:
    """[EXPERIMENT] --workdir DIR [--section.field VALUE …]: bias, variance and cost of the
    estimators; --explain RECIPE tells of one.
    """
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
        how: AuditConfig = AuditConfig(),  # noqa: B008
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ):
        """Measure the estimators; without EXPERIMENT, on the built-in pair. `opdjax audit --explain
        RECIPE` prints a recipe's page.

        Read of the fields: student, teacher, data, seed, estimator, sampling.max-completion-length
        and stop-token-ids, and as rows at a time those of a micro-batch. Contexts are sampled at
        temperature 1 without filters.

        Args:
            workdir: directory for audit.json, audit.txt and audit.html
            only: recipes and pitfalls by name; none: all
            how: how much is measured
            config: every field of the experiment; its own recipe is measured too
        """
        from opdjax.diagnose.audit.run import audit as measure
        from opdjax.diagnose.audit.subjects import choose
        from opdjax.diagnose.audit.table import text
        from opdjax.report.page import write_audit_report
        from opdjax.runs.workdir import write_json

        is_asked = is_given or config.estimator != MINI.estimator
        subjects = choose(
            only or None, *((config.estimator.options, config.estimator.recipe) if is_asked else ())
        )
        document = measure(config, subjects, how)
        tables = text(document)
        with open_output(workdir) as place:
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / "audit.json", document)
            (place / "audit.txt").write_text(tables + "\n", encoding="utf-8")
            print(f"\n{tables}\n")
            print(write_audit_report(place).replace(str(place), named(workdir)))

    call(run, arguments[is_given:], "opdjax audit [EXPERIMENT]")


def teach(arguments: list[str]) -> None:
    """EXPERIMENT [--section.field VALUE …]: have a teacher answer the prompts, into the index that
    data.references names.
    """
    default = experiment_of(arguments, "teach EXPERIMENT")

    def run(config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Have a teacher answer every prompt of the data, or go on with it; status 1 where some
        have no answer that a run could use.

        Args:
            config: every field of the experiment; read are data, teach, teacher, teacher_api, api,
            mesh, seed and student's tokenizer
        """
        from opdjax.rollouts.write_references import teach as have_answered

        told = have_answered(config)
        for name, value in told.items():
            print(f"{name}: {value if isinstance(value, int) else round(value, 6)}")
        sys.exit(1 if told["prompts without any"] else 0)

    call(run, arguments[1:], "opdjax teach EXPERIMENT")


def store(arguments: list[str]) -> None:
    """[EXPERIMENT] --store WORKDIR: what `opdjax sample` does with it."""
    is_given = not arguments[0].startswith("-")
    given = load_experiment(arguments[0]) if is_given else None

    def draw(store: pathlib.Path, config: Config | None = None):
        from opdjax.rollouts.near_policy.generator_process import generate_for

        print(f"{generate_for(store, config)} shards of rollouts were stored")

    def of_experiment(
        store: pathlib.Path, config: Annotated[Config, tyro.conf.arg(name="")] = given
    ):
        """Draw the rollouts of an experiment, and have the teacher read them, before or beside its
        training.

        With near_policy.generator process until the run is finished; else those of the weights
        before the first update.

        Args:
            store: work directory of the run, which need not have begun
            config: every field of the experiment
        """
        draw(store, config)

    def of_run(store: pathlib.Path):
        """Draw the rollouts of a run, and have the teacher read them, beside its training.

        Args:
            store: work directory of the run
        """
        draw(store)

    call(of_experiment if is_given else of_run, arguments[is_given:], "opdjax sample [EXPERIMENT]")


def annotate(arguments: list[str]) -> None:
    """WORKDIR: have the teacher read the stored rollouts that it has not read yet."""

    def run(workdir: Annotated[pathlib.Path, tyro.conf.Positional]):
        """Have the teacher read what is stored and was not read yet, or whose reading is damaged.

        Args:
            workdir: work directory of a run whose rollouts are drawn ahead
        """
        from opdjax.rollouts.near_policy.generator_process import annotate_all

        print(f"{annotate_all(workdir)} shards of annotations were stored")

    call(run, arguments, "opdjax annotate")


def inspect(arguments: list[str]) -> None:
    """PATH [--samples N]: what stored rollouts hold; status 1 where they are damaged or not
    accounted for.
    """

    def run(path: Annotated[pathlib.Path, tyro.conf.Positional], samples: int = 0):
        """Print what stored rollouts hold: counts, bytes, what the filter kept, and what is
        damaged.

        Args:
            path: a shard, a directory rollouts/VERSION, or the work directory of a run
            samples: print so many samples, spread evenly over what is there
        """
        from opdjax.rollouts.near_policy.inspection import inspect as look_into

        if samples < 0:
            raise ConfigError(f"--samples is {samples}; expected 0 or more")
        if is_remote(path) and Folder(path).tag() is not None:
            path = local_copy(path)
        unread = re.compile(r"(checkpoints|student|student_adapter|published)/")
        with read_only_workdir(path, lambda name: not unread.match(name)) as mirror:
            sys.exit(0 if look_into(mirror.directory, samples) else 1)

    call(run, arguments, "opdjax inspect")
