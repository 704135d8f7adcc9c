"""Verbs of many runs, and of what came of them."""

from __future__ import annotations

import contextlib
import pathlib
import re
from typing import Annotated, Literal

import tyro

from opdjax.cli.parsing import call, named
from opdjax.config.experiments import load_sweep
from opdjax.config.fleet import FleetConfig
from opdjax.config.grid import SweepPoint
from opdjax.config.validation import ConfigError
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import open_output


def sweep(arguments: list[str]) -> None:
    """FILE --workdir DIR [--jobs N] [--only GLOB] [--status] [--launch ENGINE]: run every point of
    a sweep, or go on with it.
    """

    def run(
        file: Annotated[str, tyro.conf.Positional],
        workdir: pathlib.Path,
        jobs: int = 1,
        shard: str = "1/1",
        only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
        dry_run: bool = False,
        retry_failed: bool = False,
        retries: int = 0,
        status: bool = False,
        watch: float = 0.0,
        launch: Literal["skypilot", "xpk"] | None = None,
        fleet: FleetConfig = FleetConfig(),  # noqa: B008
    ):
        """Run every point of a sweep, or go on with it.

        Args:
            file: Python file with get_sweep()
            workdir: directory of the sweep, or gs://…; each point is a run in a directory below it
            jobs: points run at a time; they share out this machine's cores
            shard: i/n, every n-th point from the i-th on, for n machines that write one directory
            only: points by id, or by parts such as estimator=vopd,seed=1, with * and ?; may be
            given several times dry_run: print the points, their number and an estimate, and run
            nothing; with launch, what would be submitted retry_failed: run the points that failed
            in earlier calls once more retries: times that a point that fails is tried again in this
            call status: print how far every point is, on whichever machine it runs, and run nothing
            watch: with --status, print it again every so many seconds, until nothing is left to do
            launch: submit the shards to an engine that finds the machines, and return fleet: which
            machines
        """
        from opdjax.sweeps.runner import run_sweep
        from opdjax.sweeps.status import describe
        from opdjax.sweeps.status import watch as show_status

        points = _checked_points(file, only)
        first, count = _shard_of(shard)
        _require_at_least(0, {"--retries": retries, "--watch": watch})
        _require_at_least(1, {"--jobs": jobs})
        if watch and not status:
            raise ConfigError(
                f"--watch is {watch} without --status; expected both: a sweep that runs tells how far it is by itself"
            )
        if launch is None and fleet != FleetConfig():
            raise ConfigError("--fleet is set without --launch; expected --launch skypilot or xpk")
        if launch is not None:
            if count != 1 or jobs != 1 or status:
                raise ConfigError(
                    "--shard, --jobs and --status do not go with --launch; expected --fleet.shards: a machine runs one point at a time"
                )
            options = [f"--only={glob}" for glob in only] + ["--retry-failed"] * retry_failed
            _launch(
                launch,
                file,
                str(workdir),
                points,
                fleet,
                options + [f"--retries={retries}"] * (retries > 0),
                dry_run,
            )
        elif status:
            show_status(points[first - 1 :: count], workdir, watch, _say)
        elif dry_run:
            print(describe(points[first - 1 :: count], workdir, jobs))
        else:
            _tell(
                run_sweep(
                    points,
                    workdir,
                    jobs=jobs,
                    shard=(first, count),
                    retry_failed=retry_failed,
                    retries=retries,
                    say=_say,
                )
            )

    call(run, arguments, "opdjax sweep")


def _tell(counts: dict[str, int]) -> None:
    print(", ".join(f"{number} {name}" for name, number in counts.items()))
    if counts["failed"]:
        raise RuntimeError(
            f"{counts['failed']} points failed: see failure.json in their directories; --retry-failed runs them again"
        )
    if counts["stopped"]:
        raise RuntimeError(
            f"{counts['stopped']} points were stopped; the same command continues them"
        )


def _require_at_least(least: int, given: dict[str, float]) -> None:
    for name, value in given.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; expected {least} or more")


def _say(line: str) -> None:
    print(line, flush=True)


def _checked_points(file: str, only: tuple[str, ...]) -> list[SweepPoint]:
    from opdjax.config.grid import select
    from opdjax.estimators import bind

    points = select(load_sweep(file), only) if only else load_sweep(file)
    for point in points:  # an option that a recipe does not have would fail every one of them
        bind(point.config.estimator.recipe, point.config.estimator.options)
    return points


def _shard_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= part[0] <= part[1]:
        raise ConfigError(f"--shard is {text!r}; expected i/n with i from 1 to n, such as 2/3")
    return part


def _launch(
    engine: str,
    file: str,
    url: str,
    points: list[SweepPoint],
    config: FleetConfig,
    options: list[str],
    is_dry: bool,
) -> None:
    from opdjax.sweeps.fleet import skypilot, xpk
    from opdjax.sweeps.fleet.shards import fleet_of

    url = named(url)
    submitted = {"skypilot": skypilot, "xpk": xpk}[engine].launch(
        fleet_of(file, url, points, config, options), _say, is_dry=is_dry
    )
    if not is_dry:
        print(
            f"{submitted} of {config.shards} shards were submitted; what they do: opdjax sweep {file} --workdir {url} --status"
        )


def table(arguments: list[str]) -> None:
    """DIR [--paper NAME] [--format markdown|latex|csv] [--output FILE]: a sweep's scores over
    seeds, or a paper's table beside them.
    """

    def run(
        directory: Annotated[pathlib.Path | None, tyro.conf.Positional] = None,
        paper: str | None = None,
        papers: bool = False,
        format: Literal["markdown", "latex", "csv"] = "markdown",
        output: pathlib.Path | None = None,
    ):
        """Print a sweep's scores, mean ± 95 % interval over seeds, or a paper's table with them
        beside its own numbers.

        Args:
            directory: the workdir of a sweep
            paper: name of a paper's table, such as vopd_table1: its numbers, ours, what is missing,
            and what becomes of its claims papers: list the tables of papers instead format: of the
            table output: file to write; none: print it
        """
        from opdjax.report.papers.printing import paper_table, paper_tables
        from opdjax.report.table import table as make_table

        if papers:
            text = paper_tables()
        elif directory is None:
            raise ConfigError(
                "opdjax table needs the directory of a sweep (or --papers, which lists the tables of papers)"
            )
        else:
            with read_only_workdir(directory) as mirror:
                if paper is None:
                    text = make_table(mirror.directory, format)
                else:
                    text = paper_table(mirror.directory, paper, format)
        if output is None:
            print(text)
        else:
            with open_output(output) as file:
                file.write_text(f"{text}\n")
            print(f"wrote {named(output)}")

    call(run, arguments, "opdjax table")


def report(arguments: list[str]) -> None:
    """DIR [--paper NAME | --against RUN] [--output FILE]: one HTML page that explains a run, a
    sweep, an audit, or two runs.
    """

    def run(
        directory: Annotated[pathlib.Path, tyro.conf.Positional],
        paper: str | None = None,
        against: pathlib.Path | None = None,
        output: pathlib.Path | None = None,
    ):
        """Write one self-contained HTML page for a run, a sweep or an audit.

        Args:
            directory: work directory of a run, finished or not, or the directory of a sweep or an
            audit paper: of a sweep, only the points of this table of a paper, such as vopd_table1
            against: work directory of another run: how the two differ in config, data, environment
            and scores output: file to write; none: report.html (report-PAPER.html,
            against-RUN.html) in the directory
        """
        from opdjax.cli.marking import mark
        from opdjax.report.page import page_name, write_report

        if paper is not None and against is not None:
            raise ConfigError("--paper is of a sweep and --against of a run; expected one of them")
        output = output or directory / page_name(paper, against)
        with contextlib.ExitStack() as stack:
            mirror = stack.enter_context(read_only_workdir(directory))
            other = against and stack.enter_context(read_only_workdir(against)).directory
            file = stack.enter_context(open_output(output))
            write_report(mirror.directory, file, paper=paper, against=other, mark=mark)
        print(f"wrote {named(output)}")

    call(run, arguments, "opdjax report")
