"""Commands for many runs, and for their results."""

import contextlib
import functools
import pathlib
import re
from typing import Literal

from tyro.conf import Positional, UseAppendAction

from opdjax.cli.parsing import as_given, command
from opdjax.config.experiments import load_sweep
from opdjax.config.fleet import FleetConfig
from opdjax.config.grid import select
from opdjax.config.validation import ConfigError, require
from opdjax.runs.mirror import read_only_workdir
from opdjax.runs.object_store import open_output

_log = functools.partial(print, flush=True)


@command("FILE --workdir DIR [--jobs N] [--only GLOB] [--status] [--launch ENGINE]")
def sweep(
    file: Positional[str],
    workdir: pathlib.Path,
    jobs: int = 1,
    shard: str = "1/1",
    only: UseAppendAction[tuple[str, ...]] = (),
    dry_run: bool = False,
    retry_failed: bool = False,
    retries: int = 0,
    status: bool = False,
    launch: Literal["skypilot", "xpk"] | None = None,
    fleet: FleetConfig = FleetConfig(),
):
    """Run a sweep; the same command runs the points that are unfinished.

    Args:
        file: Python file with get_sweep(), or @NAME, a built-in one.
        workdir: Directory of the sweep, or gs://BUCKET/NAME; each point has a subdirectory.
        jobs: Points to run at a time; they share the CPU cores of this machine.
        shard: i/n runs every n-th point from the i-th on, for n machines that share one directory.
        only: Points by id, or by parts such as estimator=vopd,seed=1; * and ? are wildcards.
        dry_run: Print the points and the remaining time (with launch: the jobs); run nothing.
        retry_failed: Run the points again that failed in earlier calls.
        retries: Number of times to run a point again that fails in this call.
        status: Print the state of every point, on whichever machine it runs, and run nothing.
        launch: Submit the shards to an engine that finds machines, and return.
        fleet: Machines to launch.
    """
    from opdjax.sweeps import runner
    from opdjax.sweeps.status import describe, status_table

    points = load_sweep(file)
    points = select(points, only) if only else points
    first, count = _shard(shard)
    require(retries >= 0, "--retries", retries, "0 or more")
    require(jobs >= 1, "--jobs", jobs, "1 or more")
    if launch is None and fleet != FleetConfig():
        raise ConfigError("--fleet is set without --launch; expected --launch skypilot or xpk")
    if launch is not None:
        if count != 1 or jobs != 1 or status:
            raise ConfigError(
                "--shard, --jobs and --status cannot be used with --launch; expected "
                "--fleet.shards: a machine runs one point at a time"
            )
        from opdjax.sweeps.fleet import shards, skypilot, xpk

        options = [f"--only={glob}" for glob in only] + ["--retry-failed"] * retry_failed
        options += [f"--retries={retries}"] * (retries > 0)
        url = as_given(workdir)
        made = shards.make_fleet(file, url, points, fleet, options)
        submitted = {"skypilot": skypilot, "xpk": xpk}[launch].launch(made, _log, is_dry=dry_run)
        if not dry_run:
            print(f"{submitted} of {fleet.shards} shards were submitted. To see their progress:")
            print(f"opdjax sweep {file} --workdir {url} --status")
    elif status:
        print(status_table(points[first - 1 :: count], workdir))
    elif dry_run:
        print(describe(points[first - 1 :: count], workdir, jobs))
    else:
        how = {"jobs": jobs, "shard": (first, count), "retry_failed": retry_failed}
        counts = runner.run_sweep(points, workdir, **how, retries=retries, log=_log)
        print(", ".join(f"{number} {name}" for name, number in counts.items()))
        runner.require_complete(counts)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(match[1]), int(match[2])) if match else (0, 0)
    require(1 <= part[0] <= part[1], "--shard", text, "i/n with i from 1 to n, such as 2/3")
    return part


@command("DIR [--paper NAME | all] [--format F] [--output FILE]")
def table(
    directory: Positional[pathlib.Path | None] = None,
    paper: str | None = None,
    papers: bool = False,
    format: Literal["markdown", "json"] = "markdown",
    output: pathlib.Path | None = None,
):
    """Print a sweep's or a paper's table.

    That of a sweep has scores, mean ± 95 % interval over seeds; that of a paper also its own
    numbers.

    Args:
        directory: Directory of a sweep.
        paper: A paper's table, such as vopd_table1, with its numbers, ours, and its claims; all is
            every paper that the sweep has points of.
        papers: List the tables of papers instead.
        format: Format of the table; json has all facts, such as the numbers of each seed.
        output: File to write; None prints the table.
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


@command("DIR [--against RUN] [--json]")
def report(
    directory: Positional[pathlib.Path],
    against: pathlib.Path | None = None,
    json: bool = False,
    output: pathlib.Path | None = None,
):
    """Write an HTML page on a run, a sweep, an audit, or two runs.

    Args:
        directory: Directory of a run (finished or not), a sweep or an audit.
        against: Another run, to compare config, data, environment and scores.
        json: Write the facts of the page (its numbers and texts) as JSON instead.
        output: File to write; None is report.html or against-RUN.html in the directory.
    """
    from opdjax.report.page import page_name, write_report

    output = output or directory / page_name(against, as_json=json)
    with contextlib.ExitStack() as stack:
        mirror = stack.enter_context(read_only_workdir(directory))
        other = against and stack.enter_context(read_only_workdir(against)).directory
        file = stack.enter_context(open_output(output))
        write_report(mirror.directory, file, against=other, as_json=json)
    print(f"wrote {as_given(output)}")
