"""Progress of a sweep: before it runs, while it runs, and across all machines that share its
directory. No jax.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence

from opdjax.config.grid import SweepPoint
from opdjax.runs.object_store import in_parallel
from opdjax.runs.results import RESULT, is_number, mean, status_of
from opdjax.runs.statistics import score_label
from opdjax.runs.workdir import num_cores, read_json, read_lines, read_run_config
from opdjax.sweeps.claims import ATTEMPTS, Heartbeat, SweepDirectory, open_sweep


def states_of(points: Sequence[SweepPoint], sweep: SweepDirectory) -> dict[str, str]:
    """`status_of` each point, by id."""
    return {p.id: status_of(sweep.path / p.id) for p in points}


def status_line(
    points: Sequence[SweepPoint], sweep: SweepDirectory, running: Sequence[SweepPoint], jobs: int
) -> str:
    """Such as `12/60 done, 1 failed, 2 running (a, b), about 21 min left`."""
    states = list(states_of(points, sweep).values())
    num_done, num_failed = states.count("done"), states.count("failed")
    parts = [f"{num_done}/{len(points)} done"]
    parts += [f"{num_failed} failed"] if num_failed else []
    parts += [f"{len(running)} running ({', '.join(p.id for p in running)})"] if running else []
    if (seconds := seconds_per_point(points, sweep)) is not None:
        left = len(points) - num_done - num_failed
        parts.append(f"about {_duration(left * seconds / jobs)} left")
    return ", ".join(parts)


def _planned(point: SweepPoint, sweep: SweepDirectory) -> int:
    """Updates of a point's run; those of train.num_epochs are known once its data is read."""
    train, directory = point.config.train, sweep.path / point.id
    if train.num_epochs is None or not (directory / "config.json").exists():
        return train.num_steps
    return train.steps_over(read_run_config(directory)["data"]["num_prompts"])


def seconds_per_point(points: Sequence[SweepPoint], sweep: SweepDirectory) -> float | None:
    """Mean duration of finished points, summed over their attempts; None if none has finished."""
    done = [id for id, state in states_of(points, sweep).items() if state == "done"]
    rows = [read_lines(sweep.path / id / ATTEMPTS) for id in done]
    seconds = lambda row: row["seconds"] if is_number(row.get("seconds")) else 0.0
    spent = (sum(map(seconds, attempts)) for attempts in rows)
    return mean(filter(None, spent))


def describe(points: Sequence[SweepPoint], workdir: str | os.PathLike, jobs: int) -> str:
    """Output of `--dry-run`: every point and its state, their number, and the remaining work."""
    with open_sweep(workdir) as sweep:
        sweep.refresh([p.id for p in points])
        state, seconds = states_of(points, sweep), seconds_per_point(points, sweep)
    left = [p for p in points if state[p.id] != "done"]
    counted = [p.config for p in left if p.config.train.num_epochs is None]
    steps = sum(config.train.num_steps for config in counted)
    completions = sum(config.train.num_steps * config.rows_per_step for config in counted)
    work = f"{steps} steps, {completions} completions"
    if others := len(left) - len(counted):
        work += f", and the train.num_epochs of {others} points, whose data is not read yet"
    time_left = "no point has finished here yet, so the remaining time is unknown"
    if seconds is not None:
        time_left = (
            f"about {_duration(len(left) * seconds / jobs)} with --jobs {jobs}, at {seconds:.0f} s "
            f"per point, the mean of the finished ones ({num_cores()} cores)"
        )
    lines = [f"{state[p.id]:8}{p.id}" for p in points]
    lines.append(f"{len(points)} points, {len(left)} not done: {work}")
    return "\n".join([*lines, time_left])


def status_table(points: Sequence[SweepPoint], workdir: str | os.PathLike) -> str:
    """Output of `--status`: a line per point, whichever machine it runs on, and a summary."""
    with open_sweep(workdir) as sweep:
        sweep.refresh([p.id for p in points])
        states = states_of(points, sweep)
        open_ids = [id for id, state in states.items() if state != "done"]
        beats = dict(zip(open_ids, in_parallel(sweep.heartbeat, open_ids)))
        for id, beat in beats.items():
            if beat is not None:
                states[id] = "stalled" if beat.is_stalled else "running"
            elif states[id] == "begun":  # interrupted, to be resumed
                states[id] = "waiting"
        width = max(len(p.id) for p in points)
        rows = [_line(p, states[p.id], beats.get(p.id), sweep, width) for p in points]
    every_k = {p.config.evaluation.num_samples for p in points}
    score = score_label("avg@k", every_k.pop() if len(every_k) == 1 else None)
    head = f"{'point':{width}}  {'state':8} {'host':16} {'step':>11} {'last seen':>9}  {score}"
    order = ("done", "failed", "running", "stalled", "waiting")
    counts = collections.Counter(states.values())
    listed = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    return "\n".join([head, *rows, f"{listed} of {len(points)}"])


def _line(
    point: SweepPoint, state: str, beat: Heartbeat | None, sweep: SweepDirectory, width: int
) -> str:
    host = step = age = score = ""
    if beat is not None:
        host, age = beat.host[:16], _duration(beat.age)
        step = f"{beat.step}/{_planned(point, sweep)}"
    if state == "done":
        scores = scores_after(sweep, point.id)
        score = f"{scores['avg@k']:.3f}" if "avg@k" in scores else ""
    return f"{point.id:{width}}  {state:8} {host:16} {step:>11} {age:>9}  {score}".rstrip()


def scores_after(sweep: SweepDirectory, id: str) -> dict[str, float]:
    """Scores of a finished point after training; WorkdirError if its result is damaged."""
    advice = "delete it, and the run writes it again"
    return read_json(sweep.path / id / RESULT, advice).get("eval_after", {})


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
