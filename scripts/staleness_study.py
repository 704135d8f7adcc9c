"""Write the results of the staleness sweep.

    python scripts/staleness_study.py RUNS [--out experiments/results/staleness]

Reads the runs of experiments/sweeps/staleness.py and writes OUT.md and OUT.json.
"""

import argparse
import json
import math
import pathlib

from benchmark_vocab import cpu_model
from near_policy_study import load_sweep, median_of
from white_box_study import markdown, paired, spread

from opdjax.runs.results import Run, read_points, read_run

ROOT = pathlib.Path(__file__).parents[1]
# Pairs of estimators compared at the same lag: (left, right, how they differ).
QUESTIONS = (
    ("forward", "reverse", "direction, exact and recomputed"),
    ("cached_forward", "cached_reverse", "direction, on the ten stored ids"),
    ("reverse", "vopd", "exact instead of sampled, reverse"),
    ("cached_reverse", "reverse", "stored ids instead of all, reverse"),
    ("cached_forward", "forward", "stored ids instead of all, forward"),
    ("opd_token_truncate", "opd", "truncated ratio of the token"),
    ("opd_sequence_mask", "opd", "masked ratio of the sequence"),
    ("vopd_token_truncate", "vopd", "truncated ratio of the token"),
    ("reverse_prefix", "reverse", "truncated ratio of the prefix"),
)


def numbers(run: Run) -> dict:
    """Return the numbers of one run; staleness is the median of the last twenty steps."""
    last = lambda name: median_of(run.column(name)[-20:])
    return {
        **{name: run.score(name) for name in ("avg@k", "greedy", "pass@k")},
        "start": run.result["eval_before"]["avg@k"],
        "behavior_kl": last("staleness/kl"),
        "sample_size": last("staleness/effective_sample_size"),
        "grad_norm": run.median("grad/norm"),
        "commit": run.environment["commit"],
    }


def read_all(directory: pathlib.Path) -> tuple[list[dict], list[str]]:
    rows, missing = [], []
    for point in read_points(directory):
        if point.status != "done":
            missing.append(point.id)
            continue
        lag = point.config["near_policy"]["max_staleness"]
        named = {
            "id": point.id,
            "estimator": point.overrides["estimator"],
            "lag": lag,
            "seed": point.config["seed"],
        }
        rows.append(named | numbers(read_run(point.workdir)))
    return rows, missing


def pick(rows: list[dict], estimator: str, lag: int) -> list[dict]:
    return sorted(
        (row for row in rows if (row["estimator"], row["lag"]) == (estimator, lag)),
        key=lambda row: row["seed"],
    )


def column_table(rows: list[dict], names, lags, column: str) -> str:
    lines = [
        [f"`{name}`", *(spread(pick(rows, name, lag), column) for lag in lags)] for name in names
    ]
    return markdown(["estimator", *(f"lag {lag}" for lag in lags)], lines)


def lost_table(rows: list[dict], names, lags) -> str:
    """Return avg@8 at a lag minus that at lag 0 of the same estimator without correction."""
    lines = []
    for name in names:
        plain = pick(rows, name if pick(rows, name, 0) else name.partition("_")[0], 0)
        lines.append(
            [f"`{name}`", *(difference(plain, pick(rows, name, lag)) for lag in lags if lag)]
        )
    return markdown(["estimator", *(f"lag {lag} minus lag 0" for lag in lags if lag)], lines)


def difference(left: list[dict], right: list[dict]) -> str:
    """Return avg@8 of right minus left, paired by seed."""
    middle, half, count = paired(left, right, "avg@k")
    if not count:
        return ""
    return f"{middle:+.3f}" + ("" if math.isinf(half) else f" ± {half:.3f}")


def question_table(rows: list[dict], lags) -> str:
    lines = []
    for left, right, what in QUESTIONS:
        cells = [difference(pick(rows, right, lag), pick(rows, left, lag)) for lag in lags]
        lines.append([what, f"`{left}` minus `{right}`", *cells])
    return markdown(["difference", "avg@8", *(f"lag {lag}" for lag in lags)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "experiments" / "results" / "staleness"
    )
    args = parser.parse_args()
    sweep = load_sweep("staleness")
    rows, missing = read_all(args.runs)
    names, lags = (*sweep.PLAIN, *sweep.CORRECTED), sweep.LAGS
    attempts = [
        json.loads(line)
        for file in args.runs.glob("*/attempts.jsonl")
        for line in file.read_text().splitlines()
    ]
    text = TEXT.format(
        runs=len(rows),
        missing=len(missing),
        minutes=sum(row.get("seconds", 0.0) for row in attempts) / 60,
        commits=", ".join(sorted({row["commit"][:10] for row in rows})),
        machine=cpu_model(),
        start=rows[0]["start"],
        rate=sweep.RATE,
        scores=column_table(rows, names, lags, "avg@k"),
        lost=lost_table(rows, names, lags),
        questions=question_table(rows, lags),
        kl=column_table(rows, names, lags, "behavior_kl"),
        sizes=column_table(rows, names, lags, "sample_size"),
        greedy=column_table(rows, names, lags, "greedy"),
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(text)
    args.out.with_suffix(".json").write_text(
        json.dumps({"runs": rows, "missing": missing}, indent=1) + "\n"
    )
    print(text)


TEXT = """# Stale rollouts on the mini pair

    opdjax sweep experiments/sweeps/staleness.py --workdir runs/staleness --jobs 2
    python scripts/staleness_study.py runs/staleness

{runs} runs at commit {commits}, {minutes:.0f} minutes of runs in total (two at a time, one core
each, with other load); {missing} points of the sweep have not run yet. Machine: {machine}, two
cores.

Every run makes 100 updates of 64 answers with learning rate {rate:g}, constant after five steps. It
is evaluated on 256 test prompts with 8 samples each at T = 1 and the same random draws. The
untrained student has avg@8 {start:.3f}. At lag L, the weights of L updates earlier sampled every
answer (in the first L updates, the initial weights). `reverse`, `forward`: the exact divergence,
recomputed. `cached_…`: the same on the ten ids stored with the answer (reverse: renormalised on
both sides). `…_token_truncate`: min(rho, 2). `…_sequence_mask`: the ratio of the sequence, dropped
above 3. `…_prefix`: the ratio of the preceding tokens, at most 2.

"±" is half a 95 % interval over paired seeds (Student's t); a number without it is from one seed.
All estimators use one rate, so this does not compare them at their best. It compares the cost of a
lag.

## Final avg@8

{scores}

Greedy:

{greedy}

## The cost of a lag

Compared with lag 0 of the same estimator without correction.

{lost}

## Direction, sampling, storage and correction, one at a time

{questions}

## The age of the rollouts

KL(student ‖ behaviour) = mean(rho log rho - rho + 1), in nats a token, median of the last twenty
steps:

{kl}

Effective sample size of the sequence ratios, as a share of the sequences:

{sizes}
"""


if __name__ == "__main__":
    main()
