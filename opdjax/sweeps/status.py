"""How far a sweep is: before it, while it runs, and of a whole fleet that shares its directory. No
jax.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from opdjax.config.grid import SweepPoint
from opdjax.runs.results import RESULT, status_of
from opdjax.runs.workdir import num_cores, read_json, read_lines
from opdjax.sweeps.claims import ATTEMPTS, Beat, Place, open_place

_HOUR = 3600.0


def status_line(
    points: Sequence[SweepPoint], place: Place, running: Sequence[SweepPoint], jobs: int
) -> str:
    """Such as `12/60 done, 1 failed, 2 running (a 40 %, b 5 %), about 21 min left`."""
    done, failed = (
        [p for p in points if status_of(place.directory / p.id) == wanted]
        for wanted in ("done", "failed")
    )
    shares = {p.id: place.step(p.id) / p.config.train.num_steps for p in running}
    parts = [f"{len(done)}/{len(points)} done"] + ([f"{len(failed)} failed"] if failed else [])
    if running:
        parts.append(
            f"{len(running)} running ({', '.join(f'{p.id} {shares[p.id]:.0%}' for p in running)})"
        )
    left = max(
        0.0, len(points) - len(done) - len(failed) - sum(shares.values())
    )  # one may be done and its process not over
    seconds = seconds_per_point(done, place)
    return ", ".join(parts) + (
        "" if seconds is None else f", about {_duration(left * seconds / jobs)} left"
    )


def seconds_per_point(points: Sequence[SweepPoint], place: Place) -> float | None:
    """The mean over finished points of the time their attempts took; None where nothing has
    finished.
    """
    spent = [
        sum(row.get("seconds", 0.0) for row in read_lines(place.directory / p.id / ATTEMPTS))
        for p in points
    ]
    spent = [seconds for seconds in spent if seconds]
    return sum(spent) / len(spent) if spent else None


def describe(points: Sequence[SweepPoint], workdir: str | os.PathLike, jobs: int) -> str:
    """What `--dry-run` prints: every point and its state, the count, and what is left to do."""
    with open_place(workdir) as place:
        place.refresh([p.id for p in points])
        return _described(points, place, jobs)


def _described(points: Sequence[SweepPoint], place: Place, jobs: int) -> str:
    state = {p.id: status_of(place.directory / p.id) for p in points}
    lines = [f"{state[p.id]:8}{p.id}" for p in points]
    left = [p for p in points if state[p.id] != "done"]
    rollouts = sum(p.config.train.num_steps * p.config.rows_per_step for p in left)
    lines.append(
        f"{len(points)} points, {len(left)} not done: {sum(p.config.train.num_steps for p in left)} steps, {rollouts} completions"
    )
    seconds = seconds_per_point([p for p in points if state[p.id] == "done"], place)
    if seconds is None:
        lines.append(
            "none has finished here yet, so there is no measured time to estimate from; the status tells it after the first"
        )
    else:
        estimate = _duration(len(left) * seconds / jobs)
        lines.append(
            f"about {estimate} with --jobs {jobs}, at {seconds:.0f} s a point as measured on those done ({num_cores()} cores)"
        )
    return "\n".join(lines)


def watch(
    points: Sequence[SweepPoint],
    workdir: str | os.PathLike,
    seconds: float,
    say: Callable[[str], None] = print,
) -> None:
    """What `--status` prints: the table of a fleet; with `seconds` again and again, until nothing
    is left to do.
    """
    with open_place(workdir) as place:
        while True:
            place.refresh([p.id for p in points], is_urgent=True)
            text, is_over = status_table(points, place)
            say(text)
            if not seconds or is_over:
                return
            time.sleep(seconds)


def status_table(points: Sequence[SweepPoint], place: Place) -> tuple[str, bool]:
    """A line for every point (state, host, steps, when it was last heard of, score), the totals;
    and whether all are settled.
    """
    states = {p.id: status_of(place.directory / p.id) for p in points}
    beats = place.beats(
        id for id, state in states.items() if state in ("begun", "waiting", "failed")
    )
    for id, state in states.items():
        if id in beats:
            states[id] = "stalled" if beats[id].is_stalled else "running"
        elif state == "begun":  # nobody has it: it will be continued
            states[id] = "waiting"
    width = max(len(p.id) for p in points)
    lines = [f"{'point':{width}}  {'state':8} {'host':16} {'step':>11} {'heard of':>9}  avg@k"]
    lines += [_line(p, states[p.id], beats.get(p.id), place, width) for p in points]
    counts = {
        state: list(states.values()).count(state)
        for state in ("done", "failed", "running", "stalled", "waiting")
    }
    lines.append(
        ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        + f" of {len(points)}"
        + _pace(points, place)
    )
    return "\n".join(lines), counts["done"] + counts["failed"] == len(points)


def _line(point: SweepPoint, state: str, beat: Beat | None, place: Place, width: int) -> str:
    step = "" if beat is None else f"{beat.step or 0}/{point.config.train.num_steps}"
    host, age = ("", "") if beat is None else (beat.host, _duration(beat.age))
    score = ""
    if state == "done":
        scores = read_json(
            place.directory / point.id / RESULT, "delete it, and the run writes it again"
        ).get("eval_after", {})
        score = f"{scores['avg@k']:.3f}" if "avg@k" in scores else ""
    return f"{point.id:{width}}  {state:8} {host[:16]:16} {step:>11} {age:>9}  {score}".rstrip()


def _pace(points: Sequence[SweepPoint], place: Place) -> str:
    """How many were done in the last hour, and how long the rest takes at that rate."""
    now, open_points = (
        time.time(),
        [p for p in points if status_of(place.directory / p.id) not in ("done", "failed")],
    )
    attempts = [read_lines(place.directory / p.id / ATTEMPTS) for p in points]
    ends = [
        row["time"]
        for rows in attempts
        for row in rows
        if row["event"] == "end" and row["returncode"] == 0
    ]
    recent = [end for end in ends if now - end < _HOUR]
    if not recent:
        return ""
    starts = [
        row["time"]
        for rows in attempts
        for row in rows
        if row["event"] == "start" and now - row["time"] < _HOUR
    ]
    hours = min(max(now - min(starts, default=now - _HOUR), 1.0), _HOUR) / _HOUR
    left = (
        f"; about {_duration(len(open_points) / len(recent) * hours * _HOUR)} left"
        if open_points
        else ""
    )
    return f"; {len(recent)} done in the last {_duration(hours * _HOUR)}{left}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
