"""Write the results of the near-policy sweep.

    python scripts/near_policy_study.py RUNS [--out experiments/results/near_policy]

Reads the runs of experiments/sweeps/near_policy.py and writes OUT.md and OUT.json. If BEST_RATE in
the sweep file differs from the grid's best rates, it prints the grid and exits with an error.
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
ONCE = ("sample", "annotate")  # stages that a near-policy run has only at its refreshes
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
    """CPU seconds of a method on one core, without compilation.

    scripts/near_policy_seconds.py measures them.
    """

    step: dict[str, float]  # seconds of an update, by stage
    drawing: dict[str, float]  # seconds of a refresh of all prompts, by stage
    refreshed_before: tuple[int, ...]  # steps

    def stages(self, step: int) -> dict[str, float]:
        """Return the seconds of each stage up to and including `step`."""
        count = sum(start < step for start in self.refreshed_before)
        total = lambda name: step * self.step[name] + count * self.drawing.get(name, 0.0)
        return {name: total(name) for name in STAGES}

    def seconds(self, step: int) -> float:
        """Return the seconds of all stages together."""
        return sum(self.stages(step).values())


def clock_of(method: str, run: Run) -> Clock | None:
    """Return the clock of a method; None if it was not timed."""
    file = ROOT / "experiments" / "results" / "near_policy_seconds.json"
    found = json.loads(file.read_text()).get(method)
    near, steps = run.config["near_policy"], run.config["train"]["num_steps"]
    starts = tuple(epoch * steps // near["num_epochs"] for epoch in (0, *near["refresh_epochs"]))
    return found and Clock(found["step"], found["drawing"], starts)


def timed(method: str, run: Run) -> dict:
    """Return the numbers that depend on seconds."""
    clock, last = clock_of(method, run), run.metrics[-1]["step"]
    if clock is None:
        return {}
    trained = run.total_at("trained tokens", last)
    learner = sum(clock.step[name] for name in ("pack", "update")) * last
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
    """Return the median of the known values; ratios have too heavy a tail for a mean."""
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
    """Return the gain in avg@8 on validation prompts, by method and rate."""
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
    """The runs of the comparison by method, sorted by seed."""

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
        """Return (mean of left - right over common seeds, half its 95 % interval, pairs)."""
        return paired(self.by.get(right, []), self.by.get(left, []), name)

    def ratio(self, left: tuple[str, str], right: tuple[str, str]) -> tuple[float, float]:
        """Return (geometric mean of left / right, the factor of its 95 % interval).

        `left` and `right`: (method, name of a number).
        """
        as_rate = lambda method, name: [
            {"seed": row["seed"], "rate": row[name]} for row in self.by.get(method, [])
        ]
        return paired_ratio(as_rate(*left), as_rate(*right), "rate")


def score_table(found: Found, names, rate_of) -> str:
    lines = []
    for name in filter(found.by.__contains__, names):
        runs = found.by[name]
        differences = [
            "{:+.3f} ± {:.3f}".format(*found.difference(name, other)) if name != other else ""
            for other in ("sft", "npd")
        ]
        first, *others = (spread(runs, column) for column in SCORES)
        cells = [f"`{name}`", f"{rate_of(name):g}", str(len(runs)), first]
        lines.append([*cells, *differences, *others])
    return markdown(
        ["method", "rate", "n", "avg@8", "minus `sft`", "minus `npd`", "greedy", "pass@8"], lines
    )


def at(curve: list[tuple[int, float, float]], seconds: float) -> float:
    """Return avg@8 after some seconds, interpolated linearly; the last value after the end."""
    for (_, start, low), (_, end, high) in itertools.pairwise(curve):
        if start <= seconds <= end:
            return low + (high - low) * (seconds - start) / (end - start)
    return curve[-1][2]


def reached(curve: list[tuple[int, float, float]], target: float) -> float:
    """Return the seconds to a target; infinite if the run never reached it."""
    for (_, start, low), (_, end, high) in itertools.pairwise(curve):
        if low < target <= high:
            return start + (end - start) * (target - low) / (high - low)
    return math.inf


def time_table(found: Found, names, target: float) -> str:
    names = [name for name in names if "seconds" in found.by.get(name, [{}])[0]]
    shortest = min(found.by[name][0]["seconds"] for name in names)
    header = ["method", "total seconds", f"seconds to {target:g}", f"avg@8 after {shortest:.1f} s"]
    header += ["learner, tokens/s", "total, tokens/s", *(f"{stage}, %" for stage in STAGES)]
    lines = []
    for name in names:
        runs = found.by[name]
        middle = lambda of, runs=runs: statistics.median(map(of, runs))
        to_target = middle(lambda row: reached(row["curve"], target))
        shares = [
            middle(lambda row, stage=stage: 100 * row["stages"][stage] / row["seconds"])
            for stage in STAGES
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
    header = ["method", "kept, %", "of right", "of wrong", "row filled, %"]
    header += ["KL(student ‖ behaviour)", "the same, unfiltered", "effective sample size"]
    header += ["generated, thousands", "trained", "read by the teacher"]
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
    """Return a table of the paper's claims, the numbers here, and the verdicts with their rules."""
    lines, above, below = [], (0.0, math.inf), (-math.inf, 0.0)

    def differ(
        claim: str, left: str, right: str, claimed=above, name: str = "avg@k", unit: str = "avg@8"
    ):
        middle, half, count = found.difference(left, right, name)
        text = f"`{left}` minus `{right}`: {middle:+.3f} ± {half:.3f} {unit} ({count} pairs)"
        rule = "above 0" if claimed == above else "below 0"
        lines.append([claim, text, rule, judge(middle - half, middle + half, claimed)])

    differ("NPD is more accurate than SFT (+8.09 points)", "npd", "sft")
    differ("the same without its filter", "npd_no_filter", "sft")
    differ("NPD is more accurate than on-policy distillation", "npd", "opd")
    differ("the same against the control variate", "npd", "vopd")
    differ("the same without its filter", "npd_no_filter", "vopd")
    fresh = "the same against its own loss on fresh answers, the costlier on-policy baseline"
    differ(fresh, "npd_no_filter", "npd_fresh")
    differ("student rollouts that are sampled once gain (+2.84)", "no_filter_no_refresh", "sft")
    differ("the filter gains (+1.15)", "npd", "npd_no_filter")
    differ("the kept rollouts gain more than as many random ones", "npd", "npd_random")
    differ("one refresh gains (+1.59)", "npd", "npd_no_refresh")
    differ("the same without the filter", "npd_no_filter", "no_filter_no_refresh")
    differ("one refresh is better than one every epoch", "npd", "npd_9_refreshes")
    differ("the same without the filter", "npd_no_filter", "no_filter_9_refreshes")
    differ("the teacher's top 10 gain over cross-entropy on the kept answers", "npd", "npd_no_kd")
    nearer = "the filter keeps the student nearer to the behaviour policy (0.10 against 0.12 nats)"
    differ(nearer, "npd", "npd_no_filter", below, "behavior_kl", "nats")
    sides = {
        "the learner's tokens/s over the on-policy run's total": "learner_rate",
        "tokens/s, including generation for both": "whole_rate",
    }
    for claim, ours in sides.items():
        for name in ("npd", "npd_no_packing", "npd_no_filter", "no_filter_no_packing"):
            if name not in found.by:
                continue
            ratio, factor = found.ratio((name, ours), ("opd", "whole_rate"))
            verdict = judge(ratio / factor, ratio * factor, (8.0, math.inf))
            text = f"`{name}` over `opd`: {ratio:.2f} (×/÷ {factor:.2f})"
            lines.append([f"8.1 times the throughput: {claim}", text, "at least 8", verdict])
    return markdown(["claim of arXiv 2605.05940", "found", "claimed", "verdict"], lines)


def is_edge(rate: float, gains: dict[float, float]) -> bool:
    """Return whether the rate is the lowest or the highest of the grid."""
    return rate in (min(gains), max(gains))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "experiments" / "results" / "near_policy"
    )
    parser.add_argument("--target", type=float, default=0.5, help="avg@8 whose time is reported")
    args = parser.parse_args()
    sweep = load_sweep("near_policy")
    rows, missing = read_all(args.runs)
    grid = grid_of(rows)
    chosen = {name: max(gains, key=gains.get) for name, gains in grid.items()}
    if chosen != sweep.BEST_RATE:
        print(grid_table(grid))
        raise SystemExit(
            f"BEST_RATE of the sweep differs from the grid's {chosen}; {len(missing)} points are "
            "missing"
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
        edges=", ".join(f"`{name}`" for name, of in grid.items() if is_edge(chosen[name], of))
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

{runs} runs at commit {commits}, {minutes:.0f} minutes of runs in total (two at a time, one core
each); missing points: {missing}. Machine: {machine}, two cores, with other load.

Every run makes 100 updates of 64 prompts, ten epochs of the same 640 prompts, with a cosine
learning rate. It is evaluated on 256 test prompts with 8 samples each at T = 1 and the same random
draws. The untrained student has avg@8 {start:.3f}. `sft`, `opd`, `vopd` and `npd_fresh` (the loss
of NPD) use new answers for every update, `sft` those of the teacher. The others store answers to
all 640 prompts, with the teacher's scores, before the first and the sixth epoch. `npd` is the
setting of the paper: 0 <= Delta <= 0.8, lambda 0.9, k 10, packed rows (here of {pack} tokens). Its
variants change one setting: `npd_random` keeps as many answers as the filter, but random ones;
`npd_upper_only` drops the upper tenth of Delta and nothing below; `npd_no_kd` is cross-entropy on
the kept answers; `npd_9_refreshes` refreshes before every epoch; `no_filter_…` keeps all.

"±" is half a 95 % interval over paired seeds (Student's t; {seeds} seeds). All runs train on the
same 640 prompts and answer the same test prompts, so the interval does not cover the choice of
prompts.

## Learning rates: gain in avg@8 on 512 validation prompts, seed 100, one run each

{grid}

Best at the edge of the grid, so a rate outside may be better: {edges}. `npd` and `npd_no_filter`
have different rates, which affects the comparison of the filter. A variant that is not in this
table uses the rate of `npd`, or of `npd_no_filter` if its name begins with `no_filter`.

## Accuracy on test prompts

{scores}

## Training data

"Of right" and "of wrong" are the kept shares of correct and incorrect answers. The KL is
mean(rho log rho - rho + 1), rho = student / behaviour, in nats a token: the median over the ten
steps before the refresh (or the same steps without a refresh), on the kept answers and on a sample
of all. The effective sample size is that of sequence ratios, as a share.

{data}

## Seconds

CPU seconds of one core, without compilation and evaluation, measured by
`scripts/near_policy_seconds.py` for the methods that it times. avg@8 is interpolated linearly
between evaluations. The learner's rate is trained tokens over the seconds of packing and update;
the total rate is over all seconds, including sampling and annotation.

{times}

## The paper's claims, at this size

Reproduced: the whole 95 % interval is in the claimed range. Contradicted: none of it is.
Inconclusive: the rest. The intervals are not corrected for the number of claims.

{claims}
"""


if __name__ == "__main__":
    main()
