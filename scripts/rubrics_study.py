"""Write the results of the sweep of black-box distillation.

    python scripts/rubrics_study.py RUNS [--faulty RUN] [--out experiments/results/rubrics]

Reads the runs of experiments/sweeps/rubrics.py and writes OUT.md and OUT.json. --faulty: a run of
mini_ropd.py whose judge failed on purpose.
"""

import argparse
import json
import math
import pathlib
import statistics

from benchmark_vocab import cpu_model
from white_box_study import markdown, paired, spread

from opdjax.runs.results import Run, read_points, read_run
from opdjax.runs.workdir import read_lines

ROLES = ("rubricator", "verifier")


def mean_of(run: Run, name: str, rows: slice = slice(None)) -> float | None:
    found = [row[name] for row in run.metrics[rows] if row.get(name) is not None]
    return statistics.fmean(found) if found else None


def numbers(run: Run) -> dict:
    """Return the numbers of one run; `gain` and its interval are paired by prompt."""
    change, result = run.result["paired_difference"], run.result
    per_step = lambda name: sum(mean_of(run, f"api/{role}/{name}") or 0.0 for role in ROLES)
    halfway = (row["avg@k"] for row in run.evaluations if 0 < row["step"] < result["num_steps"])
    return {
        "avg@k": run.score("avg@k"),
        "greedy": run.score("greedy"),
        "pass@k": run.score("pass@k"),
        "gain": run.gain,
        "gain_interval": change["avg@k_interval"],
        "prompt_interval": result["eval_after"]["avg@k_interval"],
        "start": result["eval_before"]["avg@k"],
        "halfway": next(halfway, None),
        "auc": mean_of(run, "rubric/auc"),
        "no_signal": mean_of(run, "rubric/no_signal_share"),
        "tied": mean_of(run, "rubric/tied_groups"),
        "reward_first": mean_of(run, "rubric/reward_mean", slice(0, 10)),
        "reward_last": mean_of(run, "rubric/reward_mean", slice(-10, None)),
        "failed": sum(row.get("rubric/failed_groups") or 0 for row in run.metrics),
        "calls": per_step("calls"),
        "tokens": per_step("input_tokens"),
        "seconds": run.median("time/step"),
        "judge_wait": run.median("time/judge_wait"),
        "commit": run.environment["commit"],
        "prompt_scores": result["eval_after"]["per_prompt"],
    }


def read_all(directory: pathlib.Path) -> tuple[dict[str, list[dict]], list[str]]:
    """Return (runs by method, points without a result)."""
    by: dict[str, list[dict]] = {}
    missing = []
    for point in read_points(directory):
        if point.status == "done":
            row = {
                "id": point.id,
                "seed": point.config["seed"],
                "rate": point.config["optimizer"]["learning_rate"],
            }
            by.setdefault(point.overrides["estimator"], []).append(
                row | numbers(read_run(point.workdir))
            )
        else:
            missing.append(point.id)
    return {name: sorted(runs, key=lambda row: row["seed"]) for name, runs in by.items()}, missing


def minus(by, name: str, other: str) -> str:
    mean, half, count = paired(by.get(other, []), by.get(name, []), "avg@k")
    if name == other or not count:
        return ""
    return f"{mean:+.3f}" + ("" if math.isinf(half) else f" ± {half:.3f}")


def score_table(by) -> str:
    header = ["method", "rate", "n", "avg@8", "gain over the start", "least gain, by prompts"]
    header += ["minus `ropd`", "avg@8 halfway", "greedy", "pass@8"]
    lines = []
    for name, runs in by.items():
        least = min(row["gain"] - row["gain_interval"] for row in runs)
        scores = [spread(runs, column) for column in ("avg@k", "gain")]
        more = [spread(runs, column) for column in ("halfway", "greedy", "pass@k")]
        first = [f"`{name}`", f"{runs[0]['rate']:g}", str(len(runs)), *scores]
        lines.append([*first, f"{least:+.3f}", minus(by, name, "ropd"), *more])
    return markdown(header, lines)


def judge_table(by) -> str:
    header = ["method", "AUC", "criteria without signal, %", "tied groups, %"]
    header += ["reward, first ten steps", "last ten", "failed groups", "requests a step"]
    header += ["thousands of input tokens a step", "seconds a step", "of them waiting for judges"]
    lines = []
    for name, runs in by.items():
        if not runs[0]["calls"]:
            continue
        shares = [
            spread([{"x": 100 * row[column]} for row in runs if row[column] is not None], "x", 0)
            for column in ("no_signal", "tied")
        ]
        rewards = [spread(runs, column, 3) for column in ("reward_first", "reward_last")]
        mean = {
            column: statistics.fmean(row[column] for row in runs)
            for column in ("failed", "calls", "tokens", "seconds", "judge_wait")
        }
        cells = [f"{mean['failed']:.0f}", f"{mean['calls']:.0f}", f"{mean['tokens'] / 1000:.0f}"]
        cells += [f"{mean['seconds']:.2f}", f"{mean['judge_wait']:.2f}"]
        lines.append([f"`{name}`", spread(runs, "auc"), *shares, *rewards, *cells])
    return markdown(header, lines)


CLAIMS = {
    ("ropd", "tjudge"): "ROPD beats a scalar judge (table 1: by 2.5 points on AIME24)",
    ("ropd", "opd"): "ROPD beats distillation from logits (table 2: 45.9 against 32.8)",
    ("ropd", "one_reference"): "four references beat one (table 6: by 17.9)",
    ("ropd", "rubric_per_student"): "one rubric a group beats one a rollout (table 6: by 3.8)",
    ("ropd", "not_blind"): "a blind verifier beats one that is not (table 6: by 3.3)",
    (
        "ropd_stages",
        "ropd",
    ): "advantages by stage beat those of the whole answer (RubricEM, fig. 5)",
}


def claims(by) -> str:
    """Return a table of the papers' claims and the numbers here."""
    lines = []
    for (left, right), claim in CLAIMS.items():
        ours, theirs = by.get(left, []), by.get(right, [])
        mean, half, count = paired(theirs, ours, "avg@k")
        has_interval = count > 1 and not math.isinf(half)
        text = f"{mean:+.3f}" + (f" ± {half:.3f}" if has_interval else "") if count else ""
        lines.append([claim, text, str(count), verdict_on(ours, theirs, mean, half, count)])
    return markdown(["claim", "avg@8 here", "pairs", "verdict"], lines)


def verdict_on(ours: list[dict], theirs: list[dict], mean: float, half: float, count: int) -> str:
    """Return the verdict: the paired interval over seeds must be on the claim's side of 0."""
    if not count:
        return "not run"
    if all(a["prompt_scores"] == b["prompt_scores"] for a, b in zip(ours, theirs)):
        return "no difference at all"
    if count == 1 or abs(mean) <= half:
        return "inconclusive"
    return "reproduced" if mean > 0 else "contradicted"


def storm_text(directory: pathlib.Path | None, by) -> str:
    if directory is None:
        return ""
    run, rows = numbers(read_run(directory)), read_lines(directory / "rubrics.jsonl")
    metrics = read_run(directory).metrics
    problems = {
        name.rpartition("/")[2]: sum(row[name] or 0 for row in metrics)
        for name in metrics[0]
        if name.startswith("rubric/problems/")
    }
    repairs: dict[str, int] = {}
    for row in rows:
        for name, count in row["repairs"].items():
            repairs[name] = repairs.get(name, 0) + count
    clean = by["ropd"][0]
    counted = ", ".join(
        f"{name} {count:.0f}" for name, count in (*problems.items(), *repairs.items()) if count
    )
    retries = sum(row[f"api/{role}/retries"] for row in metrics for role in ROLES)
    scores = [f"{each['avg@k']:.3f} ± {each['prompt_interval']:.3f}" for each in (run, clean)]
    return (
        "\n## A judge that fails\n\n"
        f"Seed {clean['seed']} again, with faults of every kind in 30 % of the judge's replies "
        f"(`scripts/serve_rule_judge.py --faults 0.3`): avg@8 {scores[0]} over "
        f"prompts; without faults {scores[1]}. Of {len(rows)} groups, {run['failed']:.0f} had no "
        f"reward and were masked. The client repeated {retries:.0f} requests. Replies that could "
        f"not be used or were repaired: {counted}.\n"
    )


def short(point: str) -> str:
    """Return a short name of a point."""
    return f"{point.partition('estimator=')[2].partition(',')[0]} {point.partition(',')[0]}"


TEXT = """# Black-box distillation on the mini pair

Written by `scripts/rubrics_study.py` from {runs} runs of `experiments/sweeps/rubrics.py` (commits
{commits}; {machine}, two at a time, with other load). Every run makes 150 updates of 32 prompts x 8
rollouts. The untrained student has avg@8 {start}. "±" is half a 95 % interval over seeds unless
stated otherwise; `gain` is paired by prompt.
"""
NOTE = """
The judge applies rules. As a scalar judge it computes the right value itself, so `tjudge` is
rewarded for correct answers and form: an oracle, unlike the teachers of the paper. `grpo` is
rewarded for correct answers only. No rule depends on who wrote an answer, so `not_blind` can only
show that nothing else changes. Rates: 1e-4 is the best of 1e-4, 3e-4 and 1e-3 for `ropd` (one seed,
avg@8 0.532, 0.494, 0.043) and is used for all recipes with a judge; 3e-4 is the best of five of
`opd` and `vopd` at 64 rollouts.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--faulty", type=pathlib.Path)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("experiments/results/rubrics")
    )
    arguments = parser.parse_args()
    by, missing = read_all(arguments.runs)
    count = sum(map(len, by.values()))
    commits = sorted({row["commit"][:7] for runs in by.values() for row in runs if row["commit"]})
    start = next(iter(by.values()))[0]["start"]
    parts = [
        TEXT.format(
            runs=count, commits=", ".join(commits), machine=cpu_model(), start=f"{start:.3f}"
        ),
        f"Not run: {', '.join(map(short, missing))}.\n" if missing else "",
        score_table(by),
        NOTE,
        "## Judges: scores and cost\n",
        judge_table(by),
        "\nAUC: the probability that a correct answer scores above an incorrect one of the same "
        "step; ties count half.\n",
        "## Claims\n",
        claims(by),
        storm_text(arguments.faulty, by),
    ]
    arguments.out.with_suffix(".md").write_text("\n".join(part for part in parts if part))
    document = {
        name: [{k: v for k, v in row.items() if k != "prompt_scores"} for row in runs]
        for name, runs in by.items()
    }
    arguments.out.with_suffix(".json").write_text(
        json.dumps({"missing": missing, "runs": document}, indent=1) + "\n"
    )
    print(arguments.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
