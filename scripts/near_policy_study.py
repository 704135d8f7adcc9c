"""What the near-policy sweep says: python scripts/near_policy_study.py RUNS [--out
experiments/results/near_policy]

Reads the runs of experiments/sweeps/near_policy.py and writes OUT.md and OUT.json. Where BEST_RATE
in the sweep file differs from what the grid says, it prints the grid and refuses.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import pathlib
import statistics

from benchmark_vocab import cpu_model
from white_box_study import judge, markdown, paired, paired_ratio, spread

from opdjax.runs.results import Run, read_filters, read_points, read_run

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("sample", "annotate", "pack", "teacher", "update", "wait")
ONCE = ("sample", "annotate")  # stages that a near-policy run has at its refreshes alone
STALENESS = {
    "behavior_kl": "staleness/kl",
    "behavior_kl_all": "staleness/kl_all",
    "sample_size": "staleness/effective_sample_size",
}
SCORES = {"avg@k": "avg@8", "greedy": "greedy", "pass@k": "pass@8"}


def load_sweep(name: str):
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "experiments" / "sweeps" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Clock:
    """Processor seconds of a method on one core, without its compilations
    (scripts/near_policy_seconds.py).
    """

    step: dict[str, float]  # stage -> of an update
    drawing: dict[str, float]  # stage -> of an answer to every prompt
    drawn_before: tuple[int, ...]  # steps

    def stages(self, step: int) -> dict[str, float]:
        """Seconds of each stage up to and including `step`."""
        drawings = sum(start < step for start in self.drawn_before)
        return {
            name: step * self.step[name] + drawings * self.drawing.get(name, 0.0) for name in STAGES
        }

    def seconds(self, step: int) -> float:
        """All stages together."""
        return sum(self.stages(step).values())


def clock_of(method: str, run: Run) -> Clock | None:
    """None of a method that was not timed."""
    file = ROOT / "experiments" / "results" / "near_policy_seconds.json"
    found = json.loads(file.read_text()).get(method)
    near, steps = run.config["near_policy"], run.config["train"]["num_steps"]
    starts = tuple(epoch * steps // near["num_epochs"] for epoch in (0, *near["refresh_epochs"]))
    return found and Clock(found["step"], found["drawing"], starts)


def timed(method: str, run: Run) -> dict:
    """What hangs on seconds."""
    clock, last = clock_of(method, run), run.metrics[-1]["step"]
    if clock is None:
        return {}
    trained, learner = (
        run.total_at("trained tokens", last),
        sum(clock.step[name] for name in ("pack", "update")) * last,
    )
    return {
        "curve": [
            (row["step"], clock.seconds(row["step"]), row["avg@k"]) for row in run.evaluations
        ],
        "stages": clock.stages(last),
        "seconds": clock.seconds(last),
        "learner_rate": trained / learner,
        "whole_rate": trained / clock.seconds(last),
    }


def median_of(values: list[float | None]) -> float | None:
    """Of those that are known: a mean of a few hundred ratios has too heavy a tail to be averaged."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def numbers(method: str, run: Run) -> dict:
    last = run.metrics[-1]["step"]
    by = [
        document["by_correctness"]
        for document in read_filters(run.workdir)
        if document["by_correctness"]
    ]
    shares = {
        side: sum(d[side]["kept"] for d in by) / max(sum(d[side]["num"] for d in by), 1)
        if by
        else None
        for side in ("right", "wrong")
    }
    return {
        **{name: run.score(name) for name in SCORES},
        "gain": run.gain,
        "start": run.result["eval_before"]["avg@k"],
        **timed(method, run),
        "packed": run.median("perf/packing_efficiency"),
        "keep_rate": run.keep_rate,
        "kept_right": shares["right"],
        "kept_wrong": shares["wrong"],
        **{name: median_of(run.column(column)[40:50]) for name, column in STALENESS.items()},
        **{
            name: run.total_at(name, last)
            for name in ("generated tokens", "trained tokens", "teacher tokens")
        },
        "commit": run.environment["commit"],
    }


def read_all(directory: pathlib.Path) -> tuple[list[dict], list[str]]:
    rows, missing = [], []
    for point in read_points(directory):
        if point.status != "done":
            missing.append(point.id)
            continue
        named = {
            "id": point.id,
            "method": point.overrides["estimator"],
            "rate": point.config["optimizer"]["learning_rate"],
            "seed": point.config["seed"],
            "is_grid": "evaluation.source" in point.overrides,
        }
        rows.append(named | numbers(named["method"], read_run(point.workdir)))
    return rows, missing


def grid_of(rows: list[dict]) -> dict[str, dict[float, float]]:
    """method -> rate -> gain in avg@8 on validation prompts."""
    grid: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["is_grid"]:
            grid.setdefault(row["method"], {})[row["rate"]] = row["gain"]
    return grid


def grid_table(grid: dict[str, dict[float, float]]) -> str:
    rates = sorted({rate for gains in grid.values() for rate in gains})
    mark = lambda gains, rate: (
        f"**{gains[rate]:+.3f}**" if gains[rate] == max(gains.values()) else f"{gains[rate]:+.3f}"
    )
    lines = [
        [f"`{name}`", *(mark(gains, rate) if rate in gains else "" for rate in rates)]
        for name, gains in grid.items()
    ]
    return markdown(["method", *(f"{rate:g}" for rate in rates)], lines)


class Found:
    """The runs of the comparison by method, each in paired seeds."""

    def __init__(self, rows: list[dict], rate_of):
        done = [row for row in rows if not row["is_grid"]]
        by = {
            name: [row for row in done if (row["method"], row["rate"]) == (name, rate_of(name))]
            for name in {r["method"] for r in done}
        }
        self.by = {
            name: sorted(found, key=lambda row: row["seed"]) for name, found in by.items() if found
        }

    def difference(self, left: str, right: str, name: str = "avg@k") -> tuple[float, float, int]:
        """(mean of left - right over common seeds, half of its 95 % interval, pairs)."""
        return paired(self.by.get(right, []), self.by.get(left, []), name)

    def ratio(self, left: tuple[str, str], right: tuple[str, str]) -> tuple[float, float]:
        """(geometric mean of one number of a method over one of another, the factor of its 95 %
        interval).
        """
        as_rate = lambda method, name: [
            {"seed": row["seed"], "rate": row[name]} for row in self.by.get(method, [])
        ]
        return paired_ratio(as_rate(*left), as_rate(*right), "rate")


def score_table(found: Found, names, rate_of) -> str:
    lines = []
    for name in filter(found.by.__contains__, names):
        runs = found.by[name]
        beside = [
            "{:+.3f} ± {:.3f}".format(*found.difference(name, other)) if name != other else ""
            for other in ("sft", "npd")
        ]
        scores = [spread(runs, column) for column in SCORES]
        lines.append(
            [f"`{name}`", f"{rate_of(name):g}", str(len(runs)), scores[0], *beside, *scores[1:]]
        )
    return markdown(
        ["method", "rate", "n", "avg@8", "less `sft`", "less `npd`", "greedy", "pass@8"], lines
    )


def at(curve: list[tuple[int, float, float]], seconds: float) -> float:
    """avg@8 at so many seconds, between evaluations by a straight line; of a run that is over, its
    last.
    """
    for (_, start, low), (_, end, high) in itertools.pairwise(curve):
        if start <= seconds <= end:
            return low + (high - low) * (seconds - start) / (end - start)
    return curve[-1][2]


def reached(curve: list[tuple[int, float, float]], target: float) -> float:
    """Seconds to a target; infinite where the run never reached it."""
    for (_, start, low), (_, end, high) in itertools.pairwise(curve):
        if low < target <= high:
            return start + (end - start) * (target - low) / (high - low)
    return math.inf


def time_table(found: Found, names, target: float) -> str:
    names = [name for name in names if "seconds" in found.by.get(name, [{}])[0]]
    shortest = min(found.by[name][0]["seconds"] for name in names)
    header = [
        "method",
        "seconds in all",
        f"seconds to {target:g}",
        f"avg@8 after {shortest:.1f} s",
        "learner, tokens/s",
        "in all, tokens/s",
    ]
    header += [f"{stage}, %" for stage in STAGES]
    lines = []
    for name in names:
        runs = found.by[name]
        middle = lambda of: statistics.median(map(of, runs))  # noqa: B023
        to_target = middle(lambda row: reached(row["curve"], target))
        shares = [
            middle(lambda row: 100 * row["stages"][stage] / row["seconds"]) for stage in STAGES
        ]
        lines.append(
            [
                f"`{name}`",
                f"{middle(lambda row: row['seconds']):.1f}",
                "never" if math.isinf(to_target) else f"{to_target:.1f}",
                f"{middle(lambda row: at(row['curve'], shortest)):.3f}",
                f"{middle(lambda row: row['learner_rate']):,.0f}",
                f"{middle(lambda row: row['whole_rate']):,.0f}",
                *(f"{share:.0f}" for share in shares),
            ]
        )
    return markdown(header, lines)


def data_table(found: Found, names) -> str:
    header = [
        "method",
        "kept, %",
        "of right",
        "of wrong",
        "row filled, %",
        "KL(student ‖ behaviour)",
        "the same, unfiltered",
    ]
    header += ["effective sample size", "generated, thousands", "trained", "read by the teacher"]
    lines = []
    for name in filter(found.by.__contains__, names):
        runs = found.by[name]

        def cell(column, scale=1.0, digits=3, runs=runs):
            values = [row[column] for row in runs if row[column] is not None]
            return f"{scale * statistics.fmean(values):.{digits}f}" if values else ""

        shares = [cell(column, 100, 0) for column in ("keep_rate", "kept_right", "kept_wrong")] + [
            cell("packed", 100, 1)
        ]
        stale = [cell(column) for column in ("behavior_kl", "behavior_kl_all", "sample_size")]
        lines.append(
            [
                f"`{name}`",
                *shares,
                *stale,
                *(cell(f"{what} tokens", 1e-3, 0) for what in ("generated", "trained", "teacher")),
            ]
        )
    return markdown(header, lines)


def claims(found: Found) -> str:
    """Each claim of the paper, what was found, and the verdict by a rule that is stated with it."""
    lines, above, below = [], (0.0, math.inf), (-math.inf, 0.0)

    def differ(
        claim: str, left: str, right: str, claimed=above, name: str = "avg@k", unit: str = "avg@8"
    ):
        middle, half, count = found.difference(left, right, name)
        text = f"`{left}` less `{right}`: {middle:+.3f} ± {half:.3f} {unit} ({count} pairs)"
        lines.append(
            [
                claim,
                text,
                "above 0" if claimed == above else "below 0",
                judge(middle - half, middle + half, claimed),
            ]
        )

    differ("NPD is more accurate than SFT (+8.09 points)", "npd", "sft")
    differ("the same without its filter", "npd_no_filter", "sft")
    differ("NPD is more accurate than on-policy distillation", "npd", "opd")
    differ("the same beside the control variate", "npd", "vopd")
    differ("the same without its filter", "npd_no_filter", "vopd")
    differ(
        "the same beside its own loss on fresh answers, which is the dearer on-policy baseline",
        "npd_no_filter",
        "npd_fresh",
    )
    differ("student rollouts that are drawn once gain (+2.84)", "no_filter_no_refresh", "sft")
    differ("the filter gains (+1.15)", "npd", "npd_no_filter")
    differ("what it keeps is worth more than as many at random", "npd", "npd_random")
    differ("one refresh gains (+1.59)", "npd", "npd_no_refresh")
    differ("the same without the filter", "npd_no_filter", "no_filter_no_refresh")
    differ("one refresh is better than one every epoch", "npd", "npd_9_refreshes")
    differ("the same without the filter", "npd_no_filter", "no_filter_9_refreshes")
    differ("the teacher's top 10 gain over cross-entropy on what was kept", "npd", "npd_no_kd")
    nearer = "the filter keeps the student nearer to the policy that drew (0.10 beside 0.12 nats)"
    differ(nearer, "npd", "npd_no_filter", below, "behavior_kl", "nats")
    sides = {
        "the learner's tokens/s over all of the on-policy run's": "learner_rate",
        "tokens/s, generation charged to both": "whole_rate",
    }
    for claim, ours in sides.items():
        for name in ("npd", "npd_no_packing", "npd_no_filter", "no_filter_no_packing"):
            if name not in found.by:
                continue
            ratio, factor = found.ratio((name, ours), ("opd", "whole_rate"))
            verdict = judge(ratio / factor, ratio * factor, (8.0, math.inf))
            lines.append(
                [
                    f"8.1 times the throughput: {claim}",
                    f"`{name}` over `opd`: {ratio:.2f} (×/÷ {factor:.2f})",
                    "at least 8",
                    verdict,
                ]
            )
    return markdown(["claim of arXiv 2605.05940", "found", "claimed", "verdict"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "experiments" / "results" / "near_policy"
    )
    parser.add_argument(
        "--target", type=float, default=0.5, help="avg@8 that seconds are counted to"
    )
    args = parser.parse_args()
    sweep = load_sweep("near_policy")
    rows, missing = read_all(args.runs)
    grid = grid_of(rows)
    chosen = {name: max(gains, key=gains.get) for name, gains in grid.items()}
    if chosen != sweep.BEST_RATE:
        print(grid_table(grid))
        raise SystemExit(
            f"BEST_RATE of the sweep differs from the grid, which says {chosen} ({len(missing)} points are missing)"
        )
    found = Found(rows, sweep.rate_of)
    names = tuple(sweep.METHODS)
    attempts = [
        json.loads(line)
        for file in args.runs.glob("*/attempts.jsonl")
        for line in file.read_text().splitlines()
    ]
    text = TEXT.format(
        runs=len(rows),
        missing=", ".join(missing) or "none",
        minutes=sum(row.get("seconds", 0.0) for row in attempts) / 60,
        commits=", ".join(sorted({row["commit"][:10] for row in rows})),
        machine=cpu_model(),
        start=found.by["npd"][0]["start"],
        edges=", ".join(
            f"`{name}`" for name, of in grid.items() if chosen[name] in (min(of), max(of))
        )
        or "none",
        grid=grid_table(grid),
        scores=score_table(found, names, sweep.rate_of),
        times=time_table(found, names, args.target),
        data=data_table(found, names),
        claims=claims(found),
        pack=sweep.PACK_LENGTH,
        seeds=max(map(len, found.by.values())),
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text)
    args.out.with_suffix(".json").write_text(
        json.dumps({"best_rate": chosen, "runs": rows, "missing": missing}, indent=1) + "\n"
    )
    print(text)


TEXT = """# Near-policy distillation on the mini pair

    opdjax sweep experiments/sweeps/near_policy.py --workdir runs/near_policy --jobs 2
    python scripts/near_policy_study.py runs/near_policy

{runs} runs at commit {commits}, {minutes:.0f} minutes of runs added up (two at a time, one core each); missing points: {missing}.
Machine: {machine}, two cores; it did other work as well.
Every run: 100 updates of 64 of the same 640 prompts, ten epochs, cosine learning rate; 256 test prompts, 8 samples each at T = 1,
always the same draws. The untrained student: avg@8 {start:.3f}. `sft`, `opd`, `vopd` and `npd_fresh` (the loss of NPD) have
every update's prompts answered anew, `sft` by the teacher; the others store answers of all 640 prompts before the first epoch
and before the sixth, with what the teacher says of them. `npd` is the setting of the paper: 0 <= Delta <= 0.8, lambda 0.9,
k 10, packed rows (of {pack} tokens here). Its variants change one setting: `npd_random` keeps as many as the filter, whichever;
`npd_upper_only` drops the upper tenth of Delta and nothing below;
`npd_no_kd` is cross-entropy on what the filter kept; `npd_9_refreshes` has one before every epoch; `no_filter_…` keep all.

"±" is half a 95 % interval over paired seeds (Student's t; {seeds} seeds). All runs train on the same 640 prompts and answer the same
test prompts, so that neither's share is in it.

## Learning rates: gain in avg@8 on 512 validation prompts, seed 100, one run each

{grid}

Best at the edge of what was tried, so that a rate beyond may be better: {edges}.
The rates of `npd` and `npd_no_filter` differ,
which is in what is said of the filter.
A variant that is not here takes the rate of `npd`, and of `npd_no_filter` where its name begins with `no_filter`.

## Accuracy on test prompts

{scores}

## What was trained on

"Of right" and "of wrong" are the shares of the right and of the wrong answers that were kept. The KL is
mean(rho log rho - rho + 1), rho = student / behaviour, nats a token, median over the ten steps before the refresh (at the same
steps where there is none), on what was kept and on a probe of all; the effective sample size is of sequence ratios, as a share.

{data}

## Seconds

Processor seconds of one core, without compilation and evaluation, by `scripts/near_policy_seconds.py`, of the methods that it times;
avg@8 between evaluations by a straight line. The learner's rate is tokens trained on by seconds of packing and update alone; "in all"
is by all seconds, drawing and annotation too.

{times}

## The paper's claims, at this size

"Reproduced": the whole 95 % interval lies in the claimed range; "contradicted": none of it does; "inconclusive": the rest, without a
correction for their number.

{claims}
"""


if __name__ == "__main__":
    main()
