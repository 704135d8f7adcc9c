"""Why a sweep cannot test a claim, from what its runs recorded: each function returns the reason,
or an empty text. No jax.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping

from opdjax.config.saved import upgrade
from opdjax.runs.results import Run, is_number
from opdjax.runs.workdir import NUMBER, read_lines

Runs = Mapping[int, Run]  # by seed
_OVERLAP_TOP_K = 16  # of the metrics overlap/*_mass
_ALL_MASS = 0.999
_COSTS = ("time/", "perf/", "api/")  # metrics that are not of the training itself


def spent_at(run: Run, step: int, spent: str) -> float:
    """Prompts or seconds of training up to and with a step."""
    prompts = step * run.config["train"]["prompts_per_step"]
    return float(prompts if spent == "prompts" else run.total_at("seconds", step))


def bounded_ratio(left: Runs, right: Runs, read: str, spent: str, margin: float) -> str:
    """A ratio of costs until a score is at most (all of left's) / (right's at its first evaluation
    after a step).
    """
    bounds = [
        spent_at(left[seed], left[seed].planned_steps, spent) / spent_at(right[seed], first, spent)
        for seed in left.keys() & right.keys()
        for first in [step for step, _ in right[seed].curve(read) if step > 0][:1]
    ]
    if not bounds or max(bounds) >= margin:
        return ""
    return f"the evaluations bound the ratio at {max(bounds):.3g}, below {margin:g}"


def out_of_reach(shares: Mapping[str, float], margin: float) -> str:
    """`shares`: of the gap, by arm."""
    best = max(shares, key=shares.get, default=None)
    if best is None or shares[best] >= margin:
        return ""
    return f"no arm closes {margin:g} of the gap; the best, {best}, closes {shares[best]:.3g}"


def loaded_machine(runs: Iterable[Run], directories: Iterable[pathlib.Path]) -> str:
    """Whether one of these runs overlapped in time with another of the directories on one machine,
    or nothing recorded when it ran.
    """
    spans = {directory: attempts(directory) for directory in directories}
    for run in runs:
        own = spans.get(run.workdir) or attempts(run.workdir)
        if not own:
            return "no record says whether the timed runs had the machine to themselves"
        others = (span for each, found in spans.items() if each != run.workdir for span in found)
        for host, start, end in others:
            if any(host == at and start < last and first < end for at, first, last in own):
                return "timed runs overlapped in time with others on one machine"
    return ""


def attempts(directory: pathlib.Path) -> list[tuple[str, float, float]]:
    """(host, start, end) of each recorded attempt of a point, seconds since the epoch."""
    found = []
    for row in read_lines(directory / "attempts.jsonl", event=str, time=NUMBER):
        if row["event"] == "start":
            found.append((row.get("host", ""), row["time"], float("inf")))
        elif found:
            found[-1] = (*found[-1][:2], row["time"])
    return found


def never_binds(left: Runs, right: Runs) -> str:
    """Whether the arms trained alike: all recorded metrics are identical, or they differ in a
    number of ids that all hold nearly all of the probability.
    """
    pairs = [(left[seed], right[seed]) for seed in left.keys() & right.keys()]
    trained = lambda run: [
        {name: value for name, value in row.items() if not name.startswith(_COSTS)}
        for row in run.metrics
    ]
    if pairs and all(one.metrics and trained(one) == trained(two) for one, two in pairs):
        return "the option never binds: all recorded metrics of both arms are identical"
    ids = [_largest_support(run) for pair in pairs for run in pair]
    if len(set(ids)) < 2 or min(ids) < _OVERLAP_TOP_K:
        return ""
    names = ("overlap/student_mass", "overlap/teacher_mass")
    mass = [run.median(name) or 0 for pair in pairs for run in pair for name in names]
    if min(mass) < _ALL_MASS:
        return ""
    return f"k never binds: {_OVERLAP_TOP_K} ids hold {min(mass):.2%} of the probability"


def _largest_support(run: Run) -> float:
    """The number of ids that a run's estimator keeps; infinite: all of them."""
    return upgrade(run.config)["estimator"]["support_top_k"] or float("inf")


def other_rollouts(left: Runs, right: Runs, read: str) -> str:
    """Norms of gradients compare estimators only on identical rollouts, such as those of the first
    step: same weights, prompts and draws, to be seen by lengths and the student's entropy.
    """
    if not read.endswith("grad/norm"):
        return ""
    pairs = [(left[seed], right[seed]) for seed in left.keys() & right.keys()]
    if read.startswith("first:") and all(_same_rollouts(one, two) for one, two in pairs):
        return ""
    return "no gradient norms of identical rollouts are recorded"


def _same_rollouts(left: Run, right: Run) -> bool:
    one, two = (run.metrics[0] if run.metrics else {} for run in (left, right))
    names = {name for name in one if name.startswith("rollout/")} | {"entropy/student"}
    is_close = lambda x, y: is_number(x) and is_number(y) and math.isclose(x, y, rel_tol=1e-4)
    same = all(is_close(one.get(name), two.get(name)) for name in names)
    return same and left.data.get("prompts") == right.data.get("prompts")
