"""The console command `opdjax`: one short function per verb. Heavy imports happen inside the verbs, so that help is instant."""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Annotated, Literal

import tyro

from opdjax.config import AuditConfig, Config, DataConfig, EvaluationConfig, ModelConfig, SamplingConfig
from opdjax.experiments import load_experiment, load_sweep
from opdjax.fields import ConfigError, nearest

# The built-in pair on its own task.
_MINI = Config(data=DataConfig(max_prompt_length=32), sampling=SamplingConfig(max_completion_length=24))


def main() -> None:
    """Run `opdjax VERB …`; a mistake of the user's ends in one line on stderr and status 2, never in a traceback."""
    # transformers serves tokenizers here; that torch is absent is as intended and needs no advice on every run.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    verb = arguments[0]
    if verb not in VERBS:
        sys.exit(_complain(f"there is no verb {verb!r}; {nearest(verb, VERBS)}"))
    try:
        VERBS[verb](arguments[1:])
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        _complain(f"{type(error).__name__}: {error}")
        sys.exit(getattr(error, "exit_status", 2))
    except KeyboardInterrupt:
        _complain("interrupted; run the same command again to continue")
        sys.exit(130)  # as shells say of SIGINT


def _complain(message: str) -> int:
    print(f"opdjax: {message}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [f"  {name:<10}{function.__doc__.splitlines()[0]}" for name, function in VERBS.items()]
    return "usage: opdjax VERB …   (opdjax VERB --help tells more)\n\n" + "\n".join(lines)


def _experiment(arguments: list[str], usage: str) -> Config:
    """The config of the experiment that a verb's arguments begin with; tells how the verb is used where they do not."""
    if arguments and not arguments[0].startswith("-"):
        return load_experiment(arguments[0])
    verb = usage.partition(" ")[0]
    print(f"usage: opdjax {usage} [--section.field VALUE …]\n\nEXPERIMENT is a Python file with get_config().")
    print(f"opdjax {verb} EXPERIMENT --help lists every field with its value in that experiment.")
    sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else 2)


def train(arguments: list[str]) -> None:
    """EXPERIMENT --workdir DIR [--section.field VALUE …]: distil a student, or continue a run."""
    default = _experiment(arguments, "train EXPERIMENT --workdir DIR")

    def run(workdir: pathlib.Path, config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Distil a student.

        Args:
            workdir: directory of this run; the same command continues it
            config: every field of the experiment
        """
        from opdjax.train import train as run_training

        result = run_training(config, workdir)
        print(f"the trained student is in {workdir / result['student']}")

    _call(run, arguments[1:], "opdjax train EXPERIMENT")


def plan(arguments: list[str]) -> None:
    """EXPERIMENT --topology v5e-8 [--aot] [--section.field VALUE …]: foresee memory and time; status 1 where it does not fit."""
    default = _experiment(arguments, "plan EXPERIMENT --topology v5e-8 [--aot]")

    def run(topology: str, aot: bool = False, config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Foresee what a run holds and how long a step takes at least, from the config.json of its models alone.

        Args:
            topology: the machine, such as v5e-8, v6e-16, v5p-8, h100-8
            aot: also compile the programs of the run for it, which takes minutes and needs libtpu but no TPU
            config: every field of the experiment
        """
        # Planning needs no accelerator, and must not take one from a run on this machine.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from opdjax.plan.aot import compile_programs
        from opdjax.plan.arithmetic import foresee
        from opdjax.plan.table import fits, text
        from opdjax.plan.topology import topology as of_name
        from opdjax.plan.workload import read_workload

        plan = foresee(read_workload(config, of_name(topology)))
        programs = compile_programs(plan.workload) if aot else None
        print(text(plan, programs))
        sys.exit(0 if fits(plan, programs) else 1)

    _call(run, arguments[1:], "opdjax plan EXPERIMENT")


def doctor(arguments: list[str]) -> None:
    """EXPERIMENT [--section.field VALUE …]: look for silent faults before a run; status 1 where there is one."""
    default = _experiment(arguments, "doctor EXPERIMENT [--num-prompts N]")

    def run(num_prompts: int = 8, config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Look for silent faults.

        Args:
            num_prompts: of the data, that go through the models
            config: every field of the experiment
        """
        from opdjax.doctor import findings_of

        found = findings_of(config, num_prompts)
        if config.is_judged:
            from opdjax.judged.examine import examine_judge  # its packages are an extra

            found = itertools.chain(found, examine_judge(config))
        has_fault = False
        for finding in found:
            print(finding, flush=True)
            has_fault |= finding.status == "fault"
        sys.exit(1 if has_fault else 0)

    _call(run, arguments[1:], "opdjax doctor EXPERIMENT")


def audit(arguments: list[str]) -> None:
    """[EXPERIMENT] --workdir DIR [--section.field VALUE …]: bias, variance and cost of the estimators; --explain RECIPE tells of one."""
    if "--explain" in arguments:
        from opdjax.audit.run import explain

        if arguments[:-1] != ["--explain"]:
            raise ConfigError("--explain takes the name of one recipe or pitfall, and nothing else")
        print(explain(arguments[-1]))
        return
    is_given = bool(arguments) and not arguments[0].startswith("-")
    default = load_experiment(arguments[0]) if is_given else _MINI

    def run(
        workdir: pathlib.Path,
        only: tuple[str, ...] = (),
        how: AuditConfig = AuditConfig(),  # noqa: B008
        config: Annotated[Config, tyro.conf.arg(name="")] = default,
    ):
        """Measure the estimators; without EXPERIMENT, on the built-in pair. `opdjax audit --explain RECIPE` prints a recipe's page.

        Read of the fields: student, teacher, data, seed, estimator, sampling.max-completion-length and stop-token-ids, and as
        rows at a time those of a micro-batch. Contexts are sampled at temperature 1 without filters.

        Args:
            workdir: directory for audit.json, audit.txt and audit.html
            only: recipes and pitfalls by name; none: all
            how: how much is measured
            config: every field of the experiment; its own recipe is measured too
        """
        from opdjax.audit.run import audit as measure
        from opdjax.audit.subjects import choose
        from opdjax.audit.table import text
        from opdjax.report.page import write_audit_report
        from opdjax.workdir import write_json

        is_asked = is_given or config.estimator != _MINI.estimator
        subjects = choose(only or None, *((config.estimator.options, config.estimator.recipe) if is_asked else ()))
        workdir.mkdir(parents=True, exist_ok=True)
        document = measure(config, subjects, how)
        write_json(workdir / "audit.json", document)
        tables = text(document)
        (workdir / "audit.txt").write_text(tables + "\n", encoding="utf-8")
        print(f"\n{tables}\n")
        print(write_audit_report(workdir))

    _call(run, arguments[is_given:], "opdjax audit [EXPERIMENT]")


def sample(arguments: list[str]) -> None:
    """MODEL PROMPT …: print completions of prompts; [EXPERIMENT] --store WORKDIR draws what a run is trained on ahead of it."""
    if "--store" in arguments:
        _store(arguments)
        return

    def run(
        model: Annotated[str, tyro.conf.Positional],
        prompts: Annotated[tuple[str, ...], tyro.conf.Positional],
        data: DataConfig = DataConfig(),  # noqa: B008
        num_generations: int = 1,
        max_completion_length: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        seed: int = 0,
    ):
        """Print completions of prompts.

        Args:
            model: checkpoint directory, hub id, or @mini_student or @mini_teacher
            prompts: texts to complete
            data: how a prompt is rendered
            num_generations: completions of each prompt
            max_completion_length: tokens, stop token included
            temperature: 0 is greedy
            top_p: 1 is off
            top_k: 0 is off
            min_p: 0 is off
            dtype: of the forward pass
            seed: of the draws
        """
        from opdjax.one_model import complete

        if not prompts:
            raise ConfigError("no prompt given; expected one or more texts after the model")
        # The checks of a run's config; a temperature of 0 is greedy here and not for rollouts that are trained on.
        SamplingConfig(num_generations, max_completion_length, temperature or 1.0, top_p, top_k, min_p)
        Config(seed=seed)
        drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        student = ModelConfig(model, dtype=dtype)
        for prompt, text in complete(student, prompts, data, num_generations, max_completion_length, seed, **drawn):
            print(f"{prompt}\t{text}")

    _call(run, arguments, "opdjax sample")


def teach(arguments: list[str]) -> None:
    """EXPERIMENT [--section.field VALUE …]: have a teacher answer the prompts, into the index that data.references names."""
    default = _experiment(arguments, "teach EXPERIMENT")

    def run(config: Annotated[Config, tyro.conf.arg(name="")] = default):
        """Have a teacher answer every prompt of the data, or go on with it; status 1 where some have no answer that a run could use.

        Args:
            config: every field of the experiment; read are data, teach, teacher, teacher_api, api, mesh, seed and student's tokenizer
        """
        from opdjax.teach import teach as have_answered

        told = have_answered(config)
        for name, value in told.items():
            print(f"{name}: {value if isinstance(value, int) else round(value, 6)}")
        sys.exit(1 if told["prompts without any"] else 0)

    _call(run, arguments[1:], "opdjax teach EXPERIMENT")


def inspect(arguments: list[str]) -> None:
    """PATH [--samples N]: what stored rollouts hold; status 1 where they are damaged or not accounted for."""

    def run(path: Annotated[pathlib.Path, tyro.conf.Positional], samples: int = 0):
        """Print what stored rollouts hold: counts, bytes, what the filter kept, and what is damaged.

        Args:
            path: a shard, a directory rollouts/VERSION, or the work directory of a run
            samples: print so many samples, spread evenly over what is there
        """
        from opdjax.near_policy.inspection import inspect as look_into

        if samples < 0:
            raise ConfigError(f"--samples is {samples}; expected 0 or more")
        sys.exit(0 if look_into(path, samples) else 1)

    _call(run, arguments, "opdjax inspect")


def _store(arguments: list[str]) -> None:
    is_given = not arguments[0].startswith("-")
    given = load_experiment(arguments[0]) if is_given else None

    def draw(store: pathlib.Path, config: Config | None = None):
        from opdjax.near_policy.serve import generate_for

        print(f"{generate_for(store, config)} shards of rollouts were stored")

    def of_experiment(store: pathlib.Path, config: Annotated[Config, tyro.conf.arg(name="")] = given):
        """Draw the rollouts of an experiment, and have the teacher read them, before or beside its training.

        With near_policy.generator process until the run is finished; else those of the weights before the first update.

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

    _call(of_experiment if is_given else of_run, arguments[is_given:], "opdjax sample [EXPERIMENT]")


def annotate(arguments: list[str]) -> None:
    """WORKDIR: have the teacher read the stored rollouts that it has not read yet."""

    def run(workdir: Annotated[pathlib.Path, tyro.conf.Positional]):
        """Have the teacher read what is stored and was not read yet, or whose reading is damaged.

        Args:
            workdir: work directory of a run whose rollouts are drawn ahead
        """
        from opdjax.near_policy.serve import annotate_all

        print(f"{annotate_all(workdir)} shards of annotations were stored")

    _call(run, arguments, "opdjax annotate")


def evaluate(arguments: list[str]) -> None:
    """MODEL [--evaluation.field VALUE …]: avg@k, pass@k and greedy accuracy with intervals."""

    def run(
        model: Annotated[str, tyro.conf.Positional],
        data: DataConfig = DataConfig(),  # noqa: B008
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        output: pathlib.Path | None = None,
    ):
        """Print the scores of a checkpoint.

        Args:
            model: checkpoint directory, hub id, or @mini_student or @mini_teacher
            data: how a prompt is rendered; its source is not read
            evaluation: which prompts, how answers are drawn and graded
            dtype: of the forward pass
            output: JSON file for the scores, those of each prompt included
        """
        from opdjax.one_model import scores_of
        from opdjax.workdir import write_json

        if output is not None and not output.parent.is_dir():
            raise ConfigError(f"--output {output}: there is no directory {output.parent}; make it first")
        if output is not None and output.is_dir():
            raise ConfigError(f"--output {output} is a directory; expected the name of a file")
        scores = scores_of(Config(student=ModelConfig(model, dtype=dtype), data=data, evaluation=evaluation))
        for name in ("avg@k", "pass@k", "greedy"):
            print(f"{name.replace('@k', '@' + str(scores['k'])):10}{scores[name]:.4f} ± {scores[name + '_interval']:.4f}")
        print(f"{scores['num_prompts']} prompts, T = {scores['temperature']:g}; ± is half a 95 % interval over prompts")
        if output is not None:
            write_json(output, scores)

    _call(run, arguments, "opdjax evaluate")


def import_(arguments: list[str]) -> None:
    """MODEL: check that a checkpoint can be loaded, and describe it."""

    def run(model: Annotated[str, tyro.conf.Positional]):
        """Check and describe a checkpoint.

        Args:
            model: checkpoint directory, hub id, or @mini_student or @mini_teacher
        """
        from opdjax.one_model import describe

        for name, value in describe(model).items():
            print(f"{name:22}{value}")

    _call(run, arguments, "opdjax import")


def export(arguments: list[str]) -> None:
    """WORKDIR OUT [--step N|latest|best]: a run's student as a Hugging Face checkpoint, its adapters as OUT_adapter."""

    def run(
        workdir: Annotated[pathlib.Path, tyro.conf.Positional],
        out: Annotated[pathlib.Path, tyro.conf.Positional],
        step: str = "latest",
        dtype: Literal["float32", "bfloat16"] | None = None,
    ):
        """Write a run's student as a Hugging Face checkpoint.

        Args:
            workdir: work directory of a run
            out: new directory
            step: a checkpoint's step, `latest`, or `best` by checkpoint.best_metric
            dtype: of the weights; none: that of the student the run started from
        """
        from opdjax.train import export_step

        print(f"wrote {export_step(workdir, step, out, dtype)}")

    _call(run, arguments, "opdjax export")


def report(arguments: list[str]) -> None:
    """DIR [--output FILE]: one HTML page that explains a run, a sweep or an audit."""

    def run(directory: Annotated[pathlib.Path, tyro.conf.Positional], output: pathlib.Path | None = None):
        """Write one self-contained HTML page for a run, a sweep or an audit.

        Args:
            directory: work directory of a run, finished or not, or the directory of a sweep or an audit
            output: file to write; none: report.html in the directory
        """
        from opdjax.report.page import write_report

        print(f"wrote {write_report(directory, output)}")

    _call(run, arguments, "opdjax report")


def sweep(arguments: list[str]) -> None:
    """FILE --workdir DIR [--jobs N] [--shard i/n] [--dry-run] [--retry-failed]: run every point of a sweep, or go on with it."""

    def run(
        file: Annotated[str, tyro.conf.Positional],
        workdir: pathlib.Path,
        jobs: int = 1,
        shard: str = "1/1",
        dry_run: bool = False,
        retry_failed: bool = False,
    ):
        """Run every point of a sweep, or go on with it.

        Args:
            file: Python file with get_sweep()
            workdir: directory of the sweep; each point is a run in a directory below it
            jobs: points run at a time; they share out this machine's cores
            shard: i/n, every n-th point from the i-th on, for n machines that write one directory
            dry_run: print the points, their number and an estimate, and run nothing
            retry_failed: run the points that failed once more
        """
        from opdjax.estimators import bind
        from opdjax.sweep import describe, run_sweep

        points = load_sweep(file)
        for point in points:  # an option that a recipe does not have would fail every one of them
            bind(point.config.estimator.recipe, point.config.estimator.options)
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        part = tuple(map(int, match.groups())) if match else (0, 0)
        if not 1 <= part[0] <= part[1]:
            raise ConfigError(f"--shard is {shard!r}; expected i/n with i from 1 to n, such as 2/3")
        if jobs < 1:
            raise ConfigError(f"--jobs is {jobs}; expected at least 1")
        if dry_run:
            print(describe(points[part[0] - 1 :: part[1]], workdir, jobs))
            return
        counts = run_sweep(points, workdir, jobs=jobs, shard=part, retry_failed=retry_failed, say=lambda line: print(line, flush=True))
        print(", ".join(f"{number} {name}" for name, number in counts.items()))
        if counts["failed"]:
            raise RuntimeError(f"{counts['failed']} points failed: see failure.json in their directories; --retry-failed runs them again")
        if counts["stopped"]:
            raise RuntimeError(f"{counts['stopped']} points were stopped; the same command continues them")

    _call(run, arguments, "opdjax sweep")


def table(arguments: list[str]) -> None:
    """DIR [--format markdown|latex|csv]: a sweep's scores, mean ± 95 % interval over seeds."""

    def run(directory: Annotated[pathlib.Path, tyro.conf.Positional], format: Literal["markdown", "latex", "csv"] = "markdown"):
        """Print a sweep's scores.

        Args:
            directory: the workdir of a sweep
            format: of the table
        """
        from opdjax.table import table as make_table

        print(make_table(directory, format))

    _call(run, arguments, "opdjax table")


def _call(function: Callable, arguments: list[str], program: str) -> None:
    """Parse the arguments by the function's signature and run it."""
    tyro.cli(function, args=arguments, prog=program)


VERBS = {
    "train": train,
    "plan": plan,
    "doctor": doctor,
    "audit": audit,
    "sweep": sweep,
    "table": table,
    "report": report,
    "sample": sample,
    "teach": teach,
    "annotate": annotate,
    "inspect": inspect,
    "evaluate": evaluate,
    "import": import_,
    "export": export,
}
