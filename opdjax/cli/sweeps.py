"""Commands for many runs, and for their results."""

from __future__ import annotations

import contextlib
import pathlib
import re
from typing import Annotated, Literal

import tyro

from opdjax.cli.parsing import as_given, call
from opdjax.config.experiments import load_sweep
from opdjax.config.fleet import FleetConfig
from opdjax.config.grid import SweepPoint, select
from opdjax.config.validation import ConfigError
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import open_output


def sweep(arguments: list[str]) -> None:
    """FILE --workdir DIR [--jobs N] [--only GLOB] [--status] [--launch ENGINE]: run a sweep."""

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
        """Run the unfinished points of a sweep; the same command resumes it.

        Args:
            file: Python file with get_sweep()
            workdir: directory of the sweep, or gs://BUCKET/NAME; each point has a subdirectory
            jobs: points to run at a time; they share the CPU cores of this machine
            shard: i/n: every n-th point from the i-th on, for n machines that share one directory
            only: points by id, or by parts such as estimator=vopd,seed=1; * and ? are wildcards
            dry_run: print the points and the remaining time (with launch: the jobs); run nothing
            retry_failed: run the points again that failed in earlier calls
            retries: number of times to run a point again that fails in this call
            status: print the state of every point, on whichever machine it runs, and run nothing
            watch: with status, seconds between repeats until no point is left; 0: print once
            launch: submit the shards to an engine that finds machines, and return
            fleet: machines to launch
        """
        from opdjax.sweeps import runner
        from opdjax.sweeps.status import describe
        from opdjax.sweeps.status import watch as show_status

        points = load_sweep(file)
        points = select(points, only) if only else points
        first, count = _shard(shard)
        _require_at_least(0, {"--retries": retries, "--watch": watch})
        _require_at_least(1, {"--jobs": jobs})
        if watch and not status:
            raise ConfigError(
                f"--watch is {watch} without --status; expected both: a running sweep prints its "
                "progress anyway"
            )
        if launch is None and fleet != FleetConfig():
            raise ConfigError("--fleet is set without --launch; expected --launch skypilot or xpk")
        if launch is not None:
            if count != 1 or jobs != 1 or status:
                raise ConfigError(
                    "--shard, --jobs and --status cannot be used with --launch; expected "
                    "--fleet.shards: a machine runs one point at a time"
                )
            options = [f"--only={glob}" for glob in only] + ["--retry-failed"] * retry_failed
            options += [f"--retries={retries}"] * (retries > 0)
            _launch(launch, file, as_given(workdir), points, fleet, options, is_dry=dry_run)
        elif status:
            show_status(points[first - 1 :: count], workdir, watch, _log)
        elif dry_run:
            print(describe(points[first - 1 :: count], workdir, jobs))
        else:
            counts = runner.run_sweep(
                points,
                workdir,
                jobs=jobs,
                shard=(first, count),
                retry_failed=retry_failed,
                retries=retries,
                log=_log,
            )
            print(", ".join(f"{number} {name}" for name, number in counts.items()))
            runner.require_complete(counts)

    call(run, arguments, "opdjax sweep")


def _require_at_least(least: int, given: dict[str, float]) -> None:
    for name, value in given.items():
        if value < least:
            raise ConfigError(f"{name} is {value}; expected {least} or more")


def _log(line: str) -> None:
    print(line, flush=True)


def _shard(text: str) -> tuple[int, int]:
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
    *,
    is_dry: bool,
) -> None:
    from opdjax.sweeps.fleet import skypilot, xpk
    from opdjax.sweeps.fleet.shards import make_fleet

    fleet = make_fleet(file, url, points, config, options)
    submitted = {"skypilot": skypilot, "xpk": xpk}[engine].launch(fleet, _log, is_dry=is_dry)
    if not is_dry:
        print(f"{submitted} of {config.shards} shards were submitted. To see their progress:")
        print(f"opdjax sweep {file} --workdir {url} --status")


def table(arguments: list[str]) -> None:
    """DIR [--paper NAME | all] [--format F] [--output FILE]: print a sweep's or a paper's table."""

    def run(
        directory: Annotated[pathlib.Path | None, tyro.conf.Positional] = None,
        paper: str | None = None,
        papers: bool = False,
        format: Literal["markdown", "latex", "csv", "json"] = "markdown",
        output: pathlib.Path | None = None,
    ):
        """Print a sweep's scores, mean ± 95 % interval over seeds, or a paper's table with its own
        numbers beside them.

        Args:
            directory: directory of a sweep
            paper: a paper's table, such as vopd_table1: its numbers, ours, and its claims; all: the
                claims and tables of all papers that the sweep has points of
            papers: list the tables of papers instead
            format: of the table; json: all facts, such as the numbers of each seed
            output: file to write; none: print it
        """
        from opdjax.report.table import list_of_papers, paper_table
        from opdjax.report.table import table as make_table

        if papers:
            text = list_of_papers()
        elif directory is None:
            raise ConfigError("no directory given; expected that of a sweep, or --papers")
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
                file.write_text(f"{text}\n", "utf-8")
            print(f"wrote {as_given(output)}")

    call(run, arguments, "opdjax table")


def report(arguments: list[str]) -> None:
    """DIR [--paper NAME | --against RUN] [--json]: write an HTML page on a run or sweep."""

    def run(
        directory: Annotated[pathlib.Path, tyro.conf.Positional],
        paper: str | None = None,
        against: pathlib.Path | None = None,
        json: bool = False,
        output: pathlib.Path | None = None,
    ):
        """Write one self-contained HTML page on a run, a sweep, an audit, or two runs.

        Args:
            directory: directory of a run (finished or not), a sweep or an audit
            paper: for a sweep: only the points of this table of a paper, such as vopd_table1
            against: another run, to compare config, data, environment and scores
            json: write the facts of the page (its numbers and texts) as JSON instead
            output: file; none: report.html, report-PAPER.html or against-RUN.html in the directory
        """
        from opdjax.cli.grade_samples import grade_sample
        from opdjax.report.page import page_name, write_report

        if paper is not None and against is not None:
            raise ConfigError(
                "--paper is for a sweep and --against for a run; expected one of them"
            )
        output = output or directory / page_name(paper, against, as_json=json)
        with contextlib.ExitStack() as stack:
            mirror = stack.enter_context(read_only_workdir(directory))
            other = against and stack.enter_context(read_only_workdir(against)).directory
            file = stack.enter_context(open_output(output))
            options = {"paper": paper, "against": other, "as_json": json}
            write_report(mirror.directory, file, mark=grade_sample, **options)
        print(f"wrote {as_given(output)}")

    call(run, arguments, "opdjax report")
